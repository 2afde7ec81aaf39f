"""Command lines of small runs, and the state of a folder, for every test that starts `gptjax` or looks at its files."""

import hashlib
import json
import os
import pathlib
import sys

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


LONG = 60  # steps of `long_run`


def long_run(corpus, workdir, *more):
    """The program and arguments of a run of 60 steps in a process of its own."""
    return [
        sys.executable,
        "-m",
        "gptjax",
        "train",
        f"--config={DEBUG}",
        f"--workdir={workdir}",
        "--config.data.source=text",
        f"--config.data.path={corpus}",
        "--config.seq_len=32",
        f"--config.num_steps={LONG}",
        "--config.checkpoint_every=10",
        "--config.eval_every=30",
        "--config.eval_batches=1",
        "--config.num_samples=1",
        "--config.model.dropout=0.1",
        *more,
    ]


def environment(devices):
    """The environment of a process with so many CPU devices and the compilation cache of the tests."""
    return os.environ | {
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }


def rows(folder):
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    """The training loss at each logged step. Asserts that no step has two rows."""
    found = [(row["step"], row["loss"]) for row in rows(folder) if "loss" in row]
    assert len(dict(found)) == len(found), "a step has two rows"
    return dict(found)
