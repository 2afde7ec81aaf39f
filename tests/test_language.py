"""Counts what the rules of English in CONTRIBUTING.md forbid and a parser can find; each count must be 0.

Run as a script, this file prints the counts of a folder: `python tests/test_language.py [FOLDER]`.
"""

import ast
import pathlib
import re
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FUNCTIONS = {"told", "_told", "begun", "_begun"}
VARIABLES = {"its", "it"}
OPENINGS = re.compile(r"(What|Of|As|Also)\b")
IS_NO = re.compile(r"\b(is|are) no (?!longer|more)", re.IGNORECASE)
PUT_OFF = re.compile(r"\bput (it|them) off\b", re.IGNORECASE)
MAX_ARGUMENTS = 7
KINDS = (
    "function names",
    "variable names",
    "docstring openings",
    "put it off",
    "is no",
    "named lambdas",
    "long argument lists",
)


def in_source(source: str) -> Iterator[tuple[str, int, str]]:
    """Yields (kind, line, text) for each finding in the source of a Python file."""
    for number, line in enumerate(source.splitlines(), start=1):
        if PUT_OFF.search(line):
            yield "put it off", number, line.strip()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Module() | ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                yield from _in_definition(node)
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name) if name in VARIABLES:
                yield "variable names", node.lineno, name
            case ast.Assign(value=ast.Lambda()) | ast.AnnAssign(value=ast.Lambda()) | ast.NamedExpr(value=ast.Lambda()):
                yield "named lambdas", node.lineno, ast.unparse(node)
    for line, text in _strings(ast.parse(source)):
        if IS_NO.search(text):
            yield "is no", line, text


def _strings(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields the line and text of each string but docstrings, whether a constant, an f-string or a sum of them."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Expr(value=ast.Constant()):
                continue
            case ast.Constant(value=str()) | ast.JoinedStr() | ast.BinOp(op=ast.Add()):
                yield child.lineno, _text(child)
            case _:
                yield from _strings(child)


def _in_definition(node) -> Iterator[tuple[str, int, str]]:
    docstring = ast.get_docstring(node) or ""
    if OPENINGS.match(docstring):
        yield "docstring openings", node.body[0].lineno, docstring.splitlines()[0]
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    if node.name in FUNCTIONS:
        yield "function names", node.lineno, node.name
    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    count = len(given) - (bool(given) and given[0].arg in ("self", "cls"))
    if count > MAX_ARGUMENTS:
        yield "long argument lists", node.lineno, f"{node.name}: {count}"


def _text(node: ast.AST) -> str:
    """Joins the string constants below a node in order; a value inserted into an f-string becomes `…`."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    text = "".join(_text(child) for child in ast.iter_child_nodes(node))
    return text or "…" * isinstance(node, ast.FormattedValue)


def in_page(text: str) -> Iterator[tuple[str, int, str]]:
    """Yields (kind, line, text) for each finding in a page of documentation."""
    for number, line in enumerate(text.splitlines(), start=1):
        if PUT_OFF.search(line):
            yield "put it off", number, line.strip()


def findings(root: pathlib.Path) -> dict[str, list[str]]:
    """Lists `file:line: text` by kind, over gptjax/, docs/ and README.md in a folder."""
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for path in sorted([*root.glob("gptjax/**/*.py"), *root.glob("docs/*.md"), *root.glob("README.md")]):
        search = in_source if path.suffix == ".py" else in_page
        for kind, line, text in search(path.read_text(encoding="utf-8")):
            found[kind].append(f"{path.relative_to(root)}:{line}: {text}")
    return found


@pytest.fixture(scope="module")
def found():
    return findings(ROOT)


@pytest.mark.parametrize("kind", KINDS)
def test_the_package_has_none_of_what_the_rules_of_english_forbid(found, kind):
    assert not found[kind], "\n".join([f"{len(found[kind])} × {kind}:", *found[kind]])


@pytest.mark.parametrize(
    "kind, source",
    [
        ("function names", "def told(): ..."),
        ("variable names", "for its in []: ..."),
        ("variable names", "def name(it): ..."),
        ("docstring openings", '"""What there is."""'),
        ("docstring openings", 'class Name:\n    """Of a run."""'),
        ("put it off", 'raise Refused("turn=on: " + "put it off.")'),
        ("is no", 'raise Refused(f"{path} " + f"is {count}, " "which is no file.")'),
        ("is no", "raise files.Refused(f\"{path} is {'no file' if there else 'missing'}\")"),
        ("is no", 'raise Failed(f"{name} is n" f"o word.") from error'),
        ("named lambdas", "name = lambda: 0"),
        ("long argument lists", "def name(self, a, b, c, d, *, e, f, g, h): ..."),
    ],
)
def test_each_finding_is_found(kind, source):
    assert [found_kind for found_kind, _, _ in in_source(source)] == [kind]


def test_plain_sources_have_no_findings():
    source = '"""Reads a file."""\ndef name(self, a, b, c, d, e, f, g):\n    """Whatever."""\n'
    assert not list(in_source(source + '    raise Refused(f"{a} must be a file; found {b}; it is no longer read.")'))


if __name__ == "__main__":
    counted = findings(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
    for counted_kind, lines in counted.items():
        print(f"{len(lines):>6}  {counted_kind}")
    if "-v" in sys.argv:
        print(*(line for lines in counted.values() for line in lines), sep="\n")
