"""README and the pages name only commands, flags, keys, files and headings that exist, and their example runs."""

import pathlib
import re
import shlex
import tempfile
from typing import Any

import pytest

from gptjax.cli.main import parse
from gptjax.config import default
from gptjax.errors import Refused
from gptjax.runtime.files import flatten
from gptjax.training.config import files

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [
    page
    for pattern in ("*.md", "docs/**/*.md", "launch/**/*.md", "benchmarks/*.md", "configs/*.py")
    for page in sorted(ROOT.glob(pattern))
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

each_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)

FENCE = re.compile(r"^```.*?\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:^|&& |-- |\$ |--command=\"|python -m )(gptjax [a-z-].*)")


def code(page: pathlib.Path) -> list[str]:
    """The lines of a page's code blocks with continuations joined, then the text of each code span."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".py":
        return [line.strip() for line in text.split('"""')[1].replace("\\\n", " ").splitlines()]
    lines = "\n".join(FENCE.findall(text)).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines] + re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def commands(line: str) -> list[list[str]]:
    """The arguments of the gptjax command in a line of code: without the parts in brackets, and with them."""
    found = COMMAND.search(line)
    if not found:
        return []
    text = re.split(r' && |; |"$| +# ', found[1])[0]
    text = re.sub(r"\$\{?\w+\}?", "1", text)  # a variable of the shell
    text = re.sub(r"=(N|K|I)\b", "=1", text)  # a number
    text = text.replace("…", "--config=FILE --workdir=DIR")
    short = re.sub(r" \[--[^\]]*\]", "", text)
    full = re.sub(r"\[(--[^\]|]*)(\|[^\]]*)?\]", r"\1", text)
    return [shlex.split(each)[1:] for each in dict.fromkeys((short, full))]


def check(argv: list[str]) -> None:
    """Parses a command; a bare mention such as `gptjax data show` only has to exist. Raises: Refused."""
    if argv[0].startswith("-") or all(not word.startswith("-") for word in argv):
        with pytest.raises(SystemExit) as ended:
            parse([*argv, "--help"])
        assert ended.value.code == 0
        return
    if "--help" in argv:
        return
    args = parse(argv)
    path = getattr(args, "config", "") or ""
    if path.startswith("configs/") and args.verb != "scale":
        files.load(str(ROOT / path), args.overrides)
    else:
        config = default()
        for key, value in args.overrides.items():
            files.override(config, key, value)


@each_page
def test_commands_parse(page, capsys):
    for line in code(page):
        for argv in commands(line):
            if "VERB" not in argv:
                try:
                    check(argv)
                except Refused as refusal:
                    pytest.fail(f"{line}\n{refusal}")


def test_the_search_finds_the_commands():
    """Guards the test above against a pattern that matches nothing, and shows that a wrong flag is seen."""
    assert commands("pip install -e . && gptjax train --config=FILE --workdir=$DIR") == [
        ["train", "--config=FILE", "--workdir=1"]
    ]
    assert commands("python -m gptjax eval --workdir=DIR [--step=N|best] [--json]") == [
        ["eval", "--workdir=DIR"],
        ["eval", "--workdir=DIR", "--step=1", "--json"],
    ]
    assert not commands("gptjax: error")
    found = [argv for page in PAGES for line in code(page) for argv in commands(line)]
    assert len(found) > 60
    assert {"train", "eval", "generate", "serve", "data", "tokenizer", "plan", "bench", "sweep"} <= {
        a[0] for a in found
    }
    for wrong in ("--wrong=1", "--config.num_stepz=1"):
        with pytest.raises(Refused):
            check(["train", "--config=FILE", "--workdir=DIR", wrong])
    with pytest.raises(Refused):
        check(["trian"])


@each_page
def test_config_keys_exist(page):
    """Every `--config.KEY=VALUE` is a key whose type takes the value, also outside a whole command."""
    config = default()
    for line in code(page):
        for key, value in re.findall(r"--config\.([a-z_.]+)=('[^']*'|\"[^\"]*\"|[^\s\]`]*)", line):
            value = value.strip("'\"")
            try:
                if value not in ("", "…"):
                    files.override(config, key, value)
                else:
                    assert key in flatten(config), key
            except Refused as refusal:
                pytest.fail(f"{line}\n{refusal}")


def headings(page: pathlib.Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@each_page
def test_links_lead_somewhere(page):
    if page.suffix == ".py":
        return
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", FENCE.sub("", page.read_text())):
        if target.startswith(("http:", "https:")):
            continue
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), f"{target} does not exist"
        assert not anchor or anchor in headings(there), f"{target}#{anchor} is not a heading"


@each_page
def test_named_files_exist(page):
    text = page.read_text()
    found = re.findall(
        r"(?<![\w/.~-])((?:gptjax|configs|docs|benchmarks|launch|notebooks|tests)/[\w./-]*)([*{…]?)", text
    )
    paths = [path.rstrip(".-") for path, pattern in found if not pattern and "/NAME" not in path]
    paths += [path.replace(".", "/") + ".py" for path in re.findall(r"python -m (benchmarks\.\w+)", text)]
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing


def test_the_files_of_the_architecture_exist():
    """Short names too, such as `loop.py` or `monitoring/sdc.py`; and each package has a row."""
    text = (ROOT / "docs/architecture.md").read_text()
    known = ["/" + str(path.relative_to(ROOT)) for path in (ROOT / "gptjax").rglob("*.py")]
    named = re.findall(r"`([\w/]+\.py)`", text)
    assert len(named) > 50
    assert not [name for name in named if not any(path.endswith("/" + name) for path in known)]
    packages = {path.split("/")[2] for path in known if path.count("/") > 2}
    assert not [name for name in packages if f"| `gptjax/{name}/` |" not in text]


@pytest.mark.slow
def test_the_example_of_the_python_api_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/python-api.md").read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert names["run"].step == 10
    assert all(text.startswith("def main(") for text in names["texts"])
    assert sorted(names["losses"])[-1] == 10
