"""Runs in several real processes on this machine, joined over loopback, with collectives between CPU devices."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import NamedTuple

import pytest
from conftest import CACHE
from test_hosts import SLURM, free_port

import gptjax

STEPS, EVERY = 6, 3
DEVICES = 4  # of all processes together


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def processes(number: int, *argv: str, slurm: bool = False) -> list[Ended]:
    """The command in so many processes at once, which divide the devices."""
    config = pathlib.Path(gptjax.__file__).parent.parent / "configs" / "debug.py"
    port, started = str(free_port()), []
    for process in range(number):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(DEVICES // number),
            "JAX_COMPILATION_CACHE_DIR": str(CACHE),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # only process 0 finds in the cache what process 0 compiled
        }
        command = [sys.executable, "-m", "gptjax", *argv]
        if slurm:
            environment |= SLURM | {"SLURM_NTASKS": str(number), "SLURM_PROCID": str(process)}
            environment |= {"JAX_COORDINATOR_PORT": port}
        elif number > 1:
            command += [f"--coordinator=127.0.0.1:{port}", f"--num_processes={number}", f"--process_id={process}"]
        if argv[0] == "train":
            command.append(f"--config={config}")
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        # Their files' permissions tell who wrote them: nobody else may read those of the processes after the first.
        started.append(subprocess.Popen(command, env=environment, umask=0o077 if process else 0o022, **pipes))
    try:
        outputs = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    return [Ended(process.returncode, *output) for process, output in zip(started, outputs)]


def train(number: int, folder, store, *more: str, slurm: bool = False) -> list[Ended]:
    return processes(
        number,
        "train",
        f"--workdir={folder}",
        f"--config.data.source={store.manifest['settings']['data.source']}",
        f"--config.data.path={store.manifest['settings']['data.path']}",
        "--config.data.heldout_fraction=0.1",
        f"--config.num_steps={STEPS}",
        "--config.seq_len=32",
        "--config.optimizer.warmup_steps=2",
        f"--config.checkpoint_every={EVERY}",
        f"--config.eval_every={EVERY}",
        "--config.eval_batches=2",
        "--config.num_samples=0",
        "--config.mesh.tensor=2",
        *more,
        slurm=slurm,
    )


def rows(folder, key: str) -> dict[int, float]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in found if key in row}


def half_way(folder: pathlib.Path, to: pathlib.Path) -> pathlib.Path:
    """A copy of a finished run without its last checkpoint."""
    shutil.copytree(folder, to)
    shutil.rmtree(to / "checkpoints" / f"step_{STEPS:08}")
    return to


@pytest.fixture(scope="module")
def alone(store, tmp_path_factory):
    """The workdir of a run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    (only,) = train(1, folder, store)
    assert (only.code, only.err) == (0, "")
    return folder


@pytest.fixture(scope="module")
def two(store, tmp_path_factory):
    """The workdir of the same run in two processes, and how they ended."""
    folder = tmp_path_factory.mktemp("two") / "run"
    return folder, train(2, folder, store, "--config.num_samples=1")


def test_the_losses_are_those_of_one_process(alone, two):
    folder, ended = two
    assert [process.code for process in ended] == [0, 0], ended
    assert rows(folder, "loss") == pytest.approx(rows(alone, "loss"), rel=1e-5) and len(rows(alone, "loss")) == STEPS
    assert rows(folder, "eval_loss") == pytest.approx(rows(alone, "eval_loss"), rel=1e-5)
    assert list(rows(alone, "eval_loss")) == [EVERY, STEPS]


def test_only_process_0_writes_and_prints(alone, two):
    folder, (first, other) = two
    assert other.out == "" and "Gloo" not in first.out
    assert "on 4 × cpu in 2 processes, mesh" in first.out and first.out.count(" sample\n") == 1
    names = lambda run: sorted(path.name for path in run.iterdir())
    assert names(folder) == names(alone)
    others = {path.relative_to(folder).parts[0] for path in folder.rglob("*") if not path.stat().st_mode & 0o077}
    assert others <= {"checkpoints"}


def test_both_processes_wrote_the_checkpoint(two):
    folder, _ = two
    saved = sorted((folder / "checkpoints").iterdir())
    assert [path.name for path in saved] == [f"step_{step:08}" for step in (EVERY, STEPS)]
    for path in saved:
        parts = {part.name: part for part in (path / "state").iterdir()}
        assert not list(parts["ocdbt.process_1"].rglob("*"))[0].stat().st_mode & 0o077


def test_two_go_on_as_one(two, store, tmp_path):
    folder = half_way(two[0], tmp_path / "run")
    (only,) = train(1, folder, store)
    assert (only.code, only.err) == (0, "") and "going on from the checkpoint of step 3" in only.out
    assert rows(folder, "loss") == pytest.approx(rows(two[0], "loss"), rel=1e-5)


def test_one_goes_on_as_four_which_find_each_other_by_slurm(alone, store, tmp_path):
    folder = half_way(alone, tmp_path / "run")
    ended = train(4, folder, store, slurm=True)
    assert [process.code for process in ended] == [0] * 4, ended
    assert "going on from the checkpoint of step 3" in ended[0].out and "in 4 processes" in ended[0].out
    assert rows(folder, "loss") == pytest.approx(rows(alone, "loss"), rel=1e-5)


def test_evaluation(two):
    folder, _ = two
    first, other = processes(2, "eval", f"--workdir={folder}")
    assert (first.code, other.code, other.out) == (0, 0, ""), (first, other)
    found = json.loads(first.out)
    assert (found["step"], found["loss"]) == (STEPS, pytest.approx(rows(folder, "eval_loss")[STEPS], rel=1e-5))


def test_generation(two):
    greedy = "generate", f"--workdir={two[0]}", "--prompt=1 plus", "--max_tokens=8", "--temperature=0"
    first, other = processes(2, *greedy)
    (only,) = processes(1, *greedy)
    assert (first.code, first.out) == (0, only.out) and only.out.startswith("1 plus"), first
    assert (other.code, other.out) == (0, "")


def test_a_refusal_of_process_0_reaches_the_other(store, tmp_path):
    ended = train(2, tmp_path / "run", store, "--config.data.path=/nowhere/*.txt")
    assert {(process.code, process.out) for process in ended} == {(2, "")}
    assert {process.err for process in ended} == {
        'gptjax: data.path "/nowhere/*.txt" matches 0 files, and at least 1 is needed.\n'
    }
    assert not (tmp_path / "run").exists()


def test_a_failure_of_one_ends_the_other(two, store, tmp_path):
    """Soon, and not when JAX stops waiting for it (minutes)."""
    folder = half_way(two[0], tmp_path / "run")
    shutil.rmtree(folder / "tensorboard")
    (folder / "tensorboard").write_text("a file where process 0 makes a folder")
    ended = train(2, folder, store)
    assert ended[0].code == 1 and "NotADirectoryError" in ended[0].err
    assert ended[1].code not in (0, 2)
