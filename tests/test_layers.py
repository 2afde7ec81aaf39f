"""DESIGN.md's order of imports, held over the syntax tree."""

import ast
import pathlib
import sys

import pytest

import gptjax

ROOT = pathlib.Path(gptjax.__file__).parent
ROWS = (
    {"cli"},
    {"verbs"},
    {
        "train",
        "inspection",
        "tokenizing",
        "audit",
        "status",
        "summary",
        "plan",
        "search",
        "bench",
        "plan_text",
        "report",
        "sweep",
        "aot",
        "theory",
        "convert",
        "scale",
        "isoflops",
    },
    {"serve"},
    {"measuring", "harness", "batching", "protocol", "child"},
    {"transfer", "workdir", "generate", "update", "inside", "config_file"},
    {"decoding"},
    {"config"},
    {"piecewise", "evaluate", "checkpoint", "saving", "recovery", "recompute", "hf"},
    {"lora"},
    {"models", "loss"},
    {
        "sampling",
        "continuation",
        "laws",
        "optimizer",
        "classification",
        "pairs",
        "data",
        "metrics",
        "writers",
        "tracking",
        "wandb_run",
        "owner",
        "topology",
        "compiled",
        "compiler",
        "collectives",
        "flops",
        "hlo",
    },
    {"sharding", "tokenizer", "tokenizers", "terminal", "hosts", "manifest", "rotation", "stopping"},
    {"lifeline", "watchdog", "preemption", "heartbeat"},
    {"untrusted", "extra"},
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
    found = set(edges())
    below = {name: {target for source, target in found if source == name} for name in MODULES}
    while free := [name for name, targets in below.items() if not targets]:
        for name in free:
            del below[name]
        for targets in below.values():
            targets.difference_update(free)
    assert not below


@pytest.mark.parametrize("name", FILES)
def test_imports_are_at_the_top(name):
    """But in verbs.py, where a verb imports what it needs when it is called."""
    tree = ast.parse(FILES[name].read_text())
    late = [node.lineno for _, node in imported(tree) if node not in tree.body]
    assert name == "verbs" or not late


def test_orbax_is_imported_by_checkpoint_only():
    users = {
        name
        for name, file in FILES.items()
        for target, _ in imported(ast.parse(file.read_text()))
        if target.startswith("orbax")
    }
    assert users == {"checkpoint"}


@pytest.mark.parametrize("name", ["lifeline", "watchdog", "preemption", "heartbeat", "errors"])
def test_what_answers_signals_is_there_before_jax(name):
    """And before anything else that takes long to import."""
    tops = {target.partition(".")[0] for target, _ in imported(ast.parse(FILES[name].read_text()))}
    assert tops <= sys.stdlib_module_names | {"gptjax"}


def test_the_command_line_imports_nothing_heavy():
    tops = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for name in ("cli", "verbs")
        for node in ast.parse(FILES[name].read_text()).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert tops <= {"argparse", "json", "os", "sys", "gptjax", "gptjax.errors"}
