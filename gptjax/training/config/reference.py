"""Every key of a config with its default, type and meaning, read from the source of the dataclasses."""

import ast
import dataclasses
import inspect
import io
import re
import tokenize
from collections.abc import Iterable
from typing import NamedTuple, cast

from gptjax.training.config.schema import Config


class Key(NamedTuple):
    """A key of a config file."""

    name: str  # with its section, as in model.num_layers
    kind: str  # int, float, str or bool
    default: str  # as in Python
    meaning: str


def keys(section: type = Config, prefix: str = "") -> list[Key]:
    """All keys in the order of the dataclasses, a section's keys in its place."""
    known, found = meanings(section), []
    for field in dataclasses.fields(section):
        kind = cast(type, field.type)  # a class, never a text: no section quotes its annotations
        if dataclasses.is_dataclass(kind):
            found += keys(kind, f"{prefix}{field.name}.")
        else:
            text = known.get(field.name, "")
            found.append(Key(prefix + field.name, kind.__name__, repr(field.default), text))
    return found


def meanings(section: type) -> dict[str, str]:
    """The meaning of each field: the comment behind its default, or its entry `name: meaning` in the docstring."""
    found = _from_docstring(inspect.getdoc(section) or "") | _from_comments(inspect.getsource(section))
    return {name: meaning.removesuffix(".") for name, meaning in found.items()}


def _from_comments(source: str) -> dict[str, str]:
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    section = cast(ast.ClassDef, ast.parse(source).body[0])  # the source of a class
    for node in section.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            end = node.end_lineno or node.lineno
            lines = [comments[line] for line in range(node.lineno, end + 1) if line in comments]
            if lines:
                found[node.target.id] = " ".join(lines)
    return found


def _from_docstring(text: str) -> dict[str, str]:
    found, names = {}, []
    for line in text.splitlines():
        if entry := re.match(r"(\w+(?:, \w+)*): (.*)", line):
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        elif line.startswith("    ") and names:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
        else:
            names = []
    return found


def text(chosen: Iterable[Key]) -> str:
    """Keys for a terminal."""
    return "\n".join(f"{key.name}={key.default}  ({key.kind})\n    {key.meaning}" for key in chosen)


def page() -> str:
    """docs/config.md."""
    lines = [
        "# Configuration",
        "",
        "Every key of a config with its default, type and meaning. A config file sets `config.KEY = VALUE`; the",
        "command line sets `--config.KEY=VALUE`. `gptjax config WORD` prints the keys that match a word. This page is",
        "generated from the source by `python -m gptjax.training.config.reference > docs/config.md`.",
    ]
    section = None
    for key in sorted(keys(), key=lambda key: "." in key.name):  # stable: the keys without a section first
        name = key.name.rpartition(".")[0]
        if name != section:
            lines += ["", f"## {name or 'The run'}", "", "| key | default | type | meaning |", "|---|---|---|---|"]
            section = name
        default = key.default.replace("|", "\\|")
        lines.append(f"| `{key.name}` | `{default}` | {key.kind} | {_cell(key.meaning)} |")
    return "\n".join(lines) + "\n"


def _cell(meaning: str) -> str:
    """A meaning in a table: outside of code, characters that Markdown reads are escaped."""
    parts = meaning.split("`")
    parts[::2] = [re.sub(r"([*<_])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts).replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
