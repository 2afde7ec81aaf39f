"""The files that a token store was made of, and what has changed since."""

import json
import os

from etils import epath

from gptjax.data.sources import sources
from gptjax.data.sources.documents import DataConfig
from gptjax.errors import Refused
from gptjax.runtime import untrusted

NAME = "corpus.json"
MAX_BYTES = 1 << 30
SHOWN = 3  # names in a sentence


def write(store: epath.Path, data: DataConfig) -> None:
    """Writes the names and sizes of a source's files into a new store, where they can be listed cheaply."""
    found = sources.listing(data)
    if found is not None:
        (store / NAME).write_text(json.dumps(found))


def changes(store: epath.Path, data: DataConfig) -> str:
    """Compares a source with the files of a store. Returns the beginning of a sentence; empty if nothing changed.

    A file has changed if it has another size, or was written after the store was made. Stores of before know no files.
    """
    found = sources.listing(data) if (store / NAME).exists() else None
    if found is None:
        return ""
    try:
        then = untrusted.read_json(store / NAME, MAX_BYTES, "")
    except Refused:  # it serves a warning alone
        return ""
    if not found and then:
        return f"data.path={data.path} had {len(then):,} files, and matches 0 files now"
    kinds = {
        "new": [path for path in found if path not in then],
        "changed": [
            path for path in found if path in then and (found[path] != then[path] or _later(path, store / NAME))
        ],
        "missing": [path for path in then if path not in found],
    }
    if not any(kinds.values()):
        return ""
    counts = ", ".join(f"{len(paths):,} {kind}" for kind, paths in kinds.items() if paths)
    names = sorted(path for paths in kinds.values() for path in paths)
    more = ", …" * (len(names) > SHOWN)
    return f"data.path={data.path} has {counts} files ({', '.join(names[:SHOWN])}{more})"


def _later(path: str, than: epath.Path) -> bool:
    """Whether a file was written after another, which may lie on a bucket."""
    return "://" not in str(than) and os.stat(path).st_mtime > os.stat(than).st_mtime
