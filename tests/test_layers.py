"""DESIGN.md's order of imports, held over the syntax tree."""

import ast
import pathlib

import pytest

import gptjax

ROOT = pathlib.Path(gptjax.__file__).parent
ROWS = (
    {"cli"},
    {"train", "plan", "search", "bench", "report", "aot", "theory"},
    {"workdir", "generate"},
    {"config"},
    {"evaluate", "checkpoint"},
    {"models", "loss"},
    {"optimizer", "data", "metrics", "topology", "compiled", "collectives", "flops", "hlo"},
    {"sharding", "tokenizer", "terminal", "hosts"},
    {"errors"},
)
FILES = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in sorted(ROOT.rglob("*.py"))}
MODULES = {name: file for name, file in FILES.items() if not name.endswith(("__init__", "__main__"))}


def row(name):
    """Counted from the top; a folder is one room."""
    found = [number for number, rooms in enumerate(ROWS) if name.partition(".")[0] in rooms]
    assert found, f"gptjax/{name} is in no row"
    return found[0]


def imported(tree):
    """Absolute names of everything that is imported, `from a import b` as both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield node.module, node
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


def edges():
    for name, file in MODULES.items():
        for target, _ in imported(ast.parse(file.read_text())):
            target = target.removeprefix("gptjax.")
            if target in MODULES and target != name:
                yield name, target


def test_imports_point_down():
    assert {name for name, _ in edges()} > {"cli", "train", "config", "models.transformer"}
    up = [f"{name} imports {target}" for name, target in edges() if row(target) < row(name)]
    assert not up


def test_no_cycles_within_a_row():
    below = {name: {target for source, target in edges() if source == name} for name in MODULES}
    while free := [name for name, targets in below.items() if not targets]:
        for name in free:
            del below[name]
        for targets in below.values():
            targets.difference_update(free)
    assert not below


@pytest.mark.parametrize("name", FILES)
def test_imports_are_at_the_top(name):
    """But in cli.py, whose verbs import what they need when they are called."""
    tree = ast.parse(FILES[name].read_text())
    late = [node.lineno for _, node in imported(tree) if node not in tree.body]
    assert name == "cli" or not late


def test_orbax_is_imported_by_checkpoint_only():
    users = {
        name
        for name, file in FILES.items()
        for target, _ in imported(ast.parse(file.read_text()))
        if target.startswith("orbax")
    }
    assert users == {"checkpoint"}


def test_the_command_line_imports_nothing_heavy():
    tops = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.parse(FILES["cli"].read_text()).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert tops <= {"argparse", "json", "sys", "gptjax", "gptjax.errors"}
