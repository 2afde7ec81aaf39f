"""Runs in several real processes on this machine, joined over loopback, with collectives between CPU devices."""

import json
import pathlib
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
from support.command import environment
from support.ports import SLURM, free_port

import gptjax

STEPS, EVERY = 6, 3
DEVICES = 4  # of all processes together
RECORDED = str(pathlib.Path(__file__).parents[1] / "support" / "recorded_run.py")


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def processes(
    number: int, *argv: str, slurm: bool = False, full: bool = False, inside: Sequence[pathlib.Path] = ()
) -> list[Ended]:
    """The command in so many processes at once, which divide the devices.

    Args:
      full: the last of them can write no file of more than 64 KiB, as on a full disk. inside: a folder for each.
    """
    config = pathlib.Path(gptjax.__file__).parent.parent / "configs" / "debug.py"
    port, started = str(free_port()), []
    for process in range(number):
        # Only process 0 finds in the cache what process 0 compiled.
        variables = environment(DEVICES // number) | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        started_by = [RECORDED] if argv[0] == "train" else ["-m", "gptjax"]
        command = [sys.executable, *started_by, *argv]
        if slurm:
            variables |= SLURM | {"SLURM_NTASKS": str(number), "SLURM_PROCID": str(process)}
            variables |= {"JAX_COORDINATOR_PORT": port}
        elif number > 1:
            command += [f"--coordinator=127.0.0.1:{port}", f"--num_processes={number}", f"--process_id={process}"]
        if argv[0] == "train":
            command.append(f"--config={config}")
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        # Their files' permissions tell who wrote them: nobody else may read those of the processes after the first.
        where = inside[process] if inside else None
        umask = 0o077 if process else 0o022
        started.append(subprocess.Popen(command, env=variables, umask=umask, cwd=where, **pipes))
    if full:
        resource.prlimit(started[-1].pid, resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    try:
        outputs = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    return [Ended(process.returncode, *output) for process, output in zip(started, outputs, strict=True)]


def train(number: int, folder, store, *more: str, **how) -> list[Ended]:
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
        **how,
    )


def rows(folder, key: str) -> dict[int, float]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in found if key in row}


def batches(folder) -> dict[str, dict[str, str]]:
    """Of each step of the runs in a workdir, the hash of each row of the batch that lay on the devices of all."""
    found = {}
    for file in sorted(folder.with_name(folder.name + ".rows").iterdir()):
        for step, rows in map(json.loads, file.read_text().splitlines()):
            there = found.setdefault(step, {})
            assert all(there.setdefault(row, row_hash) == row_hash for row, row_hash in rows.items()), step
    return found


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


def test_the_batches_are_those_of_one_process(alone, two):
    assert {step: len(rows) for step, rows in batches(alone).items()} == dict.fromkeys(range(STEPS), 8)
    assert len({row for rows in batches(alone).values() for row in rows.values()}) > 8
    assert batches(two[0]) == batches(alone)


@pytest.mark.slow
def test_one_goes_on_as_two_and_then_as_one(alone, store, tmp_path):
    folder = half_way(alone, tmp_path / "run")
    ended = train(2, folder, store, "--config.checkpoint_every=1")
    assert [process.code for process in ended] == [0, 0], ended
    shutil.rmtree(folder / "checkpoints" / f"step_{STEPS:08}")
    (only,) = train(1, folder, store)
    assert (only.code, only.err) == (0, "") and "going on from the checkpoint of step 5" in only.out
    assert rows(folder, "loss") == pytest.approx(rows(alone, "loss"), rel=1e-5)
    assert batches(folder) == {step: batches(alone)[step] for step in range(EVERY, STEPS)}


def test_only_process_0_writes_and_prints(alone, two):
    folder, (first, other) = two
    assert other.out == "" and "Gloo" not in first.out
    assert "on 4 × cpu in 2 processes, mesh" in first.out and first.out.count(" sample\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in alone.iterdir())
    others = {path.relative_to(folder).parts[0] for path in folder.rglob("*") if not path.stat().st_mode & 0o077}
    assert others <= {"checkpoints"}


def test_both_processes_wrote_the_checkpoint(two):
    folder, _ = two
    saved = sorted((folder / "checkpoints").iterdir())
    assert [path.name for path in saved] == [f"step_{step:08}" for step in (EVERY, STEPS)]
    for path in saved:
        parts = {part.name: part for part in (path / "state").iterdir()}
        assert not next(iter(parts["ocdbt.process_1"].rglob("*"))).stat().st_mode & 0o077


def test_two_go_on_as_one(two, store, tmp_path):
    folder = half_way(two[0], tmp_path / "run")
    (only,) = train(1, folder, store)
    assert (only.code, only.err) == (0, "") and "going on from the checkpoint of step 3" in only.out
    assert rows(folder, "loss") == pytest.approx(rows(two[0], "loss"), rel=1e-5)


@pytest.mark.slow
def test_one_goes_on_as_four_which_find_each_other_by_slurm(alone, store, tmp_path):
    folder = half_way(alone, tmp_path / "run")
    ended = train(4, folder, store, slurm=True)
    assert [process.code for process in ended] == [0] * 4, ended
    assert "going on from the checkpoint of step 3" in ended[0].out and "in 4 processes" in ended[0].out
    assert rows(folder, "loss") == pytest.approx(rows(alone, "loss"), rel=1e-5)
    assert batches(folder) == {step: batches(alone)[step] for step in range(EVERY, STEPS)}


def test_evaluation(two):
    folder, _ = two
    first, other = processes(2, "eval", f"--workdir={folder}")
    assert (first.code, other.code, other.out) == (0, 0, ""), (first, other)
    found = json.loads(first.out)
    assert (found["step"], found["loss"]) == (STEPS, pytest.approx(rows(folder, "eval_loss")[STEPS], rel=1e-5))


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_full_disk_of_one_is_known_to_both(two, store, tmp_path):
    folder = half_way(two[0], tmp_path / "run")
    first, other = train(2, folder, store, "--config.checkpoint.write_seconds=3", full=True)
    assert (first.code, other.code) == (1, 1), (first, other)
    assert first.err.count("the checkpoint of step 6 was not saved") == 4 and "on process 1" in first.err
    assert other.err.count("\n") == 1 and first.err.endswith(other.err) and "could not be saved" in other.err
    assert {path.parent.name for path in (folder / "checkpoints").glob("*/manifest.json")} == {f"step_{EVERY:08}"}
    assert [path.name for path in (folder / "checkpoints" / f"step_{STEPS:08}").iterdir()] == ["unfinished"]


@pytest.mark.slow
def test_damage_that_one_process_finds_is_passed_over_by_both(two, store, tmp_path):
    folder = shutil.copytree(two[0], tmp_path / "run")
    newest = folder / "checkpoints" / f"step_{STEPS:08}"
    share = sorted(json.loads((newest / "manifest.json").read_text())["files"])[1::2]  # that process 1 reads
    content = bytearray((newest / share[0]).read_bytes())
    content[-1] ^= 1
    (newest / share[0]).write_bytes(content)
    (folder / "samples.txt").unlink()  # as after a kill: there is something left to do
    ended = train(2, folder, store)
    assert [process.code for process in ended] == [0, 0], ended
    assert f"passed over the checkpoint of step {STEPS} in " in ended[0].err and ended[1].err == ""
    assert f"{share[0]} is not what was written" in ended[0].err
    assert rows(folder, "loss") == pytest.approx(rows(two[0], "loss"), rel=1e-5)


def damaged_for_one(two, where, split: str) -> dict:
    """Settings of a run of two processes, each with a copy of the store, of which process 0 can't read a split."""
    for name in ("first", "other"):
        shutil.copytree(two[0] / "store", where / name / "store")
    shard = next((where / "first" / "store" / split / "tokens").rglob("c/0"))
    content = np.frombuffer(shard.read_bytes(), np.uint8).copy()
    content[: len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    return dict(inside=[where / "first", where / "other"])


@pytest.mark.slow
def test_a_failure_of_one_ends_the_other(two, store, tmp_path):
    """Soon, and not when JAX stops waiting for it (minutes)."""
    folder = half_way(two[0], tmp_path / "run")
    ended = train(2, folder, store, "--config.data.store=store", **damaged_for_one(two, tmp_path, "train"))
    assert ended[0].code == 1 and "DATA_LOSS" in ended[0].err, ended[0].err
    assert ended[1].code not in (0, 2)


@pytest.mark.slow
def test_held_out_rows_that_one_can_not_read_end_neither(two, store, tmp_path):
    folder = half_way(two[0], tmp_path / "run")
    ended = train(2, folder, store, "--config.data.store=store", **damaged_for_one(two, tmp_path, "heldout"))
    assert [process.code for process in ended] == [0, 0], ended
    assert "could not be evaluated (Unreadable: the held-out rows of process 0 of 2: " in ended[0].out
    assert rows(folder, "loss") == rows(two[0], "loss") and list(rows(folder, "eval_error")) == [STEPS]
