"""Command lines of small runs, and the state of a folder, for every test that starts `gptjax` or looks at its files."""

import hashlib
import pathlib

import gptjax

CACHE = pathlib.Path(__file__).parents[2] / ".jax_cache"
DEBUG = str(pathlib.Path(gptjax.__file__).parents[1] / "configs" / "debug.py")


def corpus_text() -> str:
    """Lines that a small model can learn something of: arithmetic spelled out."""
    return "".join(f"{a} plus {b} is {a + b}.\n" for a in range(120) for b in range(40))


def tree(folder):
    """Every path in a folder, and the bytes of the files; None where it is missing."""
    if not folder.exists():
        return None
    return {path: hashlib.sha256(path.read_bytes()).digest() if path.is_file() else None for path in folder.rglob("*")}


def training(corpus, workdir, *more):
    """The command line of a run of four steps."""
    return [
        "train",
        f"--config={DEBUG}",
        f"--workdir={workdir}",
        "--config.data.source=text",
        f"--config.data.path={corpus}",
        "--config.num_steps=4",
        "--config.checkpoint_every=2",
        "--config.optimizer.warmup_steps=2",
        "--config.num_samples=1",
        "--config.seq_len=32",
        *more,
    ]
