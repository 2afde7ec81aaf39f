"""Whole runs: the loop in this process, and processes that are killed."""

import contextlib
import dataclasses
import gzip
import json
import pathlib
import re
import shutil
import signal
import subprocess
import time

import jax
import pytest
from etils import epath
from support.command import LONG, environment, long_run, losses, rows
from support.runs import mesh_of, small

from gptjax.checkpoints.manager import Checkpoints
from gptjax.errors import Preempted, Refused
from gptjax.models.config import ModelConfig
from gptjax.parallel import mesh
from gptjax.parallel.mesh import MeshConfig
from gptjax.training import loading, loop, validation, workdir
from gptjax.training import step as update
from gptjax.training.corpus import prepare, record_of
from gptjax.training.optim.config import OptimizerConfig

STEPS, EVERY = 6, 2
STEP_ROW = {
    "step",
    "loss",
    "learning_rate",
    "grad_norm",
    "skipped_updates",
    "tokens_seen",
    "tokens_per_second",
    "step_seconds",
    "mfu",
    "time",
}
EVAL_ROW = {"step", "eval_loss", "eval_bits_per_byte", "eval_accuracy", "time"}
SAVE_ROW = {"step", "save_blocked_seconds", "save_seconds", "time"}
START_ROW = {
    "step",
    "time",
    "parameters",
    "devices",
    "mesh",
    "versions",
    "compile_seconds",
    "compilation_cache",
    "compiled_bytes",
    "compiled_link_bytes",
    "first_step_seconds",
}


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """(workdir, what was printed) of a whole run."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    with open(folder.with_name("printed"), "w+", encoding="utf-8") as printed, contextlib.redirect_stdout(printed):
        loop.train(small(corpus), epath.Path(folder), profile=range(2, 4))
        printed.seek(0)
        return folder, printed.read()


def test_what_a_workdir_holds(finished):
    folder, _ = finished
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "tokenizer",
        "tensorboard",
        "samples.txt",
        "store",
        "profile",
    }
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_00000004", "step_00000006"]
    assert json.loads((folder / "config.json").read_text())["model"]["mlp_dim"] == 128
    assert list((folder / "tokenizer").iterdir()) and list((folder / "tensorboard").iterdir())


def test_rows_have_the_keys_of_the_contract(finished):
    folder, _ = finished
    steps = [row for row in rows(folder) if "loss" in row]
    evaluations = [row for row in rows(folder) if "eval_loss" in row]
    (started,) = [row for row in rows(folder) if "compile_seconds" in row]
    assert started["step"] == 0 and started.keys() == START_ROW and started["compilation_cache"] in ("hit", "miss")
    assert 0 < started["compile_seconds"] < started["first_step_seconds"] and started["compiled_bytes"] > 0
    saves = [row for row in rows(folder) if "save_seconds" in row]
    assert len(rows(folder)) == 1 + len(steps) + len(evaluations) + len(saves)
    assert [row["step"] for row in saves] == [2, 4, 6] and all(row.keys() == SAVE_ROW for row in saves)
    assert all(0 < row["save_blocked_seconds"] < row["save_seconds"] for row in saves)
    assert [row["step"] for row in steps] == [2, 4, 6] and all(row.keys() == STEP_ROW for row in steps)
    assert [row["step"] for row in evaluations] == [3, 6] and all(row.keys() == EVAL_ROW for row in evaluations)
    for row in steps:
        assert row["tokens_seen"] == row["step"] * 8 * 32 and row["mfu"] is None
        assert row["tokens_per_second"] == pytest.approx(8 * 32 / row["step_seconds"])
        assert row["learning_rate"] > 0 and row["grad_norm"] > 0
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_what_is_printed(finished):
    folder, printed = finished
    assert "M parameters on 8 × cpu, mesh slices 1, data 2, fsdp 2, tensor 2" in printed
    assert "training 6/6 · loss " in printed and "MFU" not in printed
    assert re.search(
        r"256 tokens a step, 1,536 in 6 steps: 0\.\d\d epochs of the corpus, \d\.\d\de\+\d\d FLOPs", printed
    )
    assert printed.index("compiling the train step") < printed.index("compiled the train step")
    assert "compiled the train step in " in printed and "(compilation cache: " in printed and "first step" in printed
    assert "memory of a device: " in printed and " MB as compiled · its peak unknown" in printed
    assert "held-out text, bits a byte: this model " in printed and "gzip -9" in printed and "xz -9" in printed
    assert printed.count(" sample\n") == 2
    assert (folder / "samples.txt").read_text().strip() and (
        folder / "samples.txt"
    ).read_text().strip() in printed.replace(f"{'—' * 30} sample\n", "\n")


def test_the_profile_has_its_steps_and_the_big_parts(finished):
    folder, _ = finished
    trace = gzip.decompress(next((folder / "profile").rglob("*.trace.json.gz")).read_bytes()).decode()
    assert sorted(set(re.findall(r'"name":"train","args":{"step_num":"(\d+)"', trace))) == ["3", "4"]
    planes = next((folder / "profile").rglob("*.xplane.pb")).read_bytes()
    assert b"forward_backward" in planes and b"optimizer" in planes


def test_again_it_is_complete_and_with_more_steps_it_goes_on(finished, corpus, capsys):
    folder, _ = finished
    before = (folder / "metrics.jsonl").read_text()
    loop.train(small(corpus), epath.Path(folder))
    assert "is complete at step 6 of num_steps=6" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_text() == before
    loop.train(small(corpus, num_steps=STEPS + 2), epath.Path(folder), profile=range(2, 4))
    assert len(list((folder / "profile").rglob("*.xplane.pb"))) == 1  # of steps that were done before
    assert "going on from the checkpoint of step 6" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_text().startswith(before)
    kept = [row["step"] for row in rows(folder) if "save_seconds" not in row]
    assert kept == [0, 2, 3, 4, 6, 6, 6, 8, 8]
    assert json.loads((folder / "config.json").read_text())["num_steps"] == STEPS + 2


@pytest.mark.slow
def test_a_run_of_before_goes_on_with_its_optimizer(corpus, tmp_path):
    """Its config.json names no version, and its state has the shapes of the first."""
    model = ModelConfig(num_layers=2, num_heads=4, embed_dim=128)
    now = OptimizerConfig(name="adafactor", warmup_steps=2)
    first = dataclasses.replace(now, version=1)
    loop.train(small(corpus, model=model, optimizer=first, num_steps=2), epath.Path(tmp_path))
    config = workdir.read_config(tmp_path)
    del config["optimizer"]["version"], config["packing"]["version"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loop.train(small(corpus, model=model, optimizer=now, num_steps=3), epath.Path(tmp_path))
    assert [workdir.read_config(tmp_path)[section]["version"] for section in ("optimizer", "packing")] == [1, 1]
    with Checkpoints(epath.Path(tmp_path) / "checkpoints") as checkpoints:
        assert checkpoints.record(3).config["optimizer"]["version"] == 1


def test_a_workdir_may_be_relative(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loop.train(small(corpus), epath.Path("runs/relative"))
    assert Checkpoints(epath.Path("runs/relative/checkpoints")).steps() == [4, 6]


def test_another_seed_is_refused(finished, corpus):
    folder, _ = finished
    with pytest.raises(Refused, match=r"seed \(0 there, 1 here\)"):
        loop.train(small(corpus, seed=1), epath.Path(folder))


def test_a_checkpoint_of_another_config_is_refused(finished, corpus, tmp_path):
    """config.json says what this run is, and the checkpoint what it is of: a copied one is noticed."""
    folder, _ = finished
    (tmp_path / "checkpoints").symlink_to(folder / "checkpoints")
    other = small(corpus, seed=1)
    workdir.write_config(other, epath.Path(tmp_path))
    with pytest.raises(Refused, match=r"checkpoints belongs to a run of another config: seed \(0 there, 1 here\)"):
        loop.train(other, epath.Path(tmp_path))


def test_average_of_the_weights_is_what_is_loaded(finished, corpus, tmp_path):
    config = small(corpus)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, ema_decay=0.99))
    folder = epath.Path(shutil.copytree(finished[0], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")))
    store = prepare(config, folder, mesh_of(2, 2, 2))
    with jax.set_mesh(mesh_of(2, 2, 2)), Checkpoints(folder / "checkpoints") as checkpoints:
        state = jax.jit(lambda: update.init_state(config, 257))()
        state.ema.norm.gain[...] += 1
        checkpoints.save(7, state, record_of(config, store))
    run = loading.load(folder, -1)
    assert (run.step, run.config) == (7, config)
    assert (run.model.norm.gain[...] == 2).all() and (state.model.norm.gain[...] == 1).all()


@pytest.mark.parametrize("changes, shape", [
    ({}, (1, 2, 2, 2)),
    (dict(mesh=MeshConfig(4, 4, 2)), (1, 1, 8, 1)),
    (dict(mesh=MeshConfig(3, 1, 1), model=ModelConfig(num_layers=1, num_heads=2, head_dim=8, embed_dim=36)),
     (1, 8, 1, 1)),
])  # fmt: skip
def test_a_run_from_other_devices_finds_a_mesh_here(corpus, changes, shape):
    """Its own on as many; else cut over all of these; else, as 36 does not divide by 8, whole on each."""
    assert tuple(mesh.sizes(loading.mesh_that_fits(small(corpus, **changes), 257)).values()) == shape


def test_a_checkpoint_brings_its_tokenizer(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    expected = loading.load(epath.Path(folder), -1).tokenizer.hash
    shutil.rmtree(folder / "tokenizer")
    assert loading.load(epath.Path(folder), -1).tokenizer.hash == expected


def test_another_text_behind_the_same_settings_is_refused(finished, corpus, tmp_path):
    """The store was lost, and what it was made from changed meanwhile by one letter."""
    files = shutil.copytree(corpus.parent, tmp_path / "corpus")
    config = small(files / "*.txt")
    loop.train(config, epath.Path(tmp_path / "run"))
    shutil.rmtree(tmp_path / "run" / "store")
    changed = files / "03.txt"
    changed.write_text(changed.read_text().replace("plus", "plug", 1))
    with pytest.raises(Refused, match=r"store has text_hash \w{12}, but .*checkpoints was trained on \w{12}"):
        loop.train(small(files / "*.txt", num_steps=STEPS + 2), epath.Path(tmp_path / "run"))


def test_samples_of_a_shorter_run_do_not_make_a_longer_one_complete(finished, corpus, tmp_path):
    """Killed after the last save of the longer run, before its samples."""
    folder = epath.Path(shutil.copytree(finished[0], tmp_path / "run"))
    workdir.write_config(small(corpus), folder)
    assert not (folder / "samples.txt").exists()
    loop.train(small(corpus), folder)
    assert (folder / "samples.txt").exists()


@pytest.mark.slow
def test_what_a_killed_save_left_is_cleared_away(finished, corpus, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    left = folder / "checkpoints" / "step_00000009"
    (left / "state").mkdir(parents=True)
    (left / "unfinished").touch()
    loop.train(small(corpus, num_steps=STEPS + 4), epath.Path(folder))
    assert not left.exists()


# Evaluation and logging never end a run


@pytest.mark.slow
def test_a_save_comes_before_the_evaluation_of_the_same_step(corpus, tmp_path, monkeypatch):
    """And an evaluation that dies of whatever takes nothing with it."""
    folder, seen = tmp_path / "run", []

    def evaluate(*_, **__):
        seen.append(sorted(int(path.name[5:13]) for path in (folder / "checkpoints").iterdir())[-1])
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(validation, "evaluate", evaluate)
    loop.train(small(corpus, eval_every=2), epath.Path(folder))
    assert seen == [2, 4, 6]
    assert [(row["step"], row["eval_error"]) for row in rows(folder) if "eval_error" in row] == [
        (step, "JaxRuntimeError: RESOURCE_EXHAUSTED: out of memory") for step in seen
    ]
    monkeypatch.undo()
    loop.train(small(corpus, eval_every=2, num_steps=8), epath.Path(folder))
    assert [row["step"] for row in rows(folder) if "eval_loss" in row] == [6, 8]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, Preempted])
def test_what_is_no_failure_of_an_evaluation_ends_the_run(corpus, tmp_path, monkeypatch, error):
    def evaluate(*_, **__):
        raise error("told to")

    monkeypatch.setattr(validation, "evaluate", evaluate)
    with pytest.raises(error, match="told to"):
        loop.train(small(corpus, eval_every=1), epath.Path(tmp_path / "run"))


def test_a_refusal_of_an_evaluation_is_a_warning(corpus, tmp_path, monkeypatch, capsys):
    def evaluate(*_, **__):
        raise Refused("a file that is damaged")

    monkeypatch.setattr(validation, "evaluate", evaluate)
    loop.train(small(corpus), epath.Path(tmp_path / "run"))
    assert "step 6 could not be evaluated (Refused: a file that is damaged)" in capsys.readouterr().out


def test_held_out_tokens_that_are_damaged(finished, corpus, tmp_path, capsys):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    damage(next((folder / "store" / "heldout" / "tokens").rglob("c/0")))
    loop.train(small(corpus, num_steps=12), epath.Path(folder))
    printed = capsys.readouterr().out
    assert "warning: step 9 could not be evaluated (Unreadable: the held-out rows of process 0 of 1: " in printed
    assert "the run goes on" in printed and "held-out text, bits a byte" not in printed
    assert Checkpoints(folder / "checkpoints").steps() == [10, 12] and (folder / "samples.txt").exists()
    assert [row["step"] for row in rows(folder) if "eval_error" in row] == [9, 12]


def damage(file):
    content = bytearray(file.read_bytes())
    content[100] ^= 0xFF
    file.write_bytes(content)


def test_folders_that_are_files(corpus, tmp_path, capsys):
    folder = tmp_path / "run"
    (folder / "metrics.jsonl").mkdir(parents=True)
    (folder / "tensorboard").write_text("a file where a folder should be")
    loop.train(small(corpus, log_every=1), epath.Path(folder))
    printed = capsys.readouterr().out
    assert printed.count("warning: ") == 2 and "training 6/6" in printed
    assert f"warning: {folder}/tensorboard can't be written (" in printed
    assert f"warning: {folder}/metrics.jsonl can't be written (IsADirectoryError" in printed
    assert Checkpoints(folder / "checkpoints").steps() == [4, 6]


# Processes


def killed(argv, folder, devices, past):
    """Starts a run and kills it, without warning, once it has logged a step beyond `past`."""
    log = folder.with_name(folder.name + ".log").open("w")
    process = subprocess.Popen(argv, env=environment(devices), stdout=log, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and f'{{"step": {past + 1}, ' in metrics.read_text():
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, pathlib.Path(log.name).read_text(encoding="utf-8")
    assert max(losses(folder)) < LONG
    return list((folder / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    """The losses of a run on one device that nothing happens to."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = subprocess.run(long_run(corpus, folder), env=environment(1), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(losses(folder)) == list(range(1, LONG + 1))
    return losses(folder)


def test_killed_and_started_again_bit_for_bit(uninterrupted, corpus, tmp_path):
    folder = tmp_path / "run"
    assert killed(long_run(corpus, folder), folder, 1, past=23)
    done = subprocess.run(long_run(corpus, folder), env=environment(1), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "going on from the checkpoint of step " in done.stdout
    assert losses(folder) == uninterrupted
    assert [row["step"] for row in rows(folder) if "eval_loss" in row] == [30, LONG]


@pytest.mark.slow
def test_killed_on_eight_devices_and_started_again_on_two(uninterrupted, corpus, tmp_path):
    folder = tmp_path / "run"
    assert killed(long_run(corpus, folder), folder, 8, past=23)
    done = subprocess.run(long_run(corpus, folder), env=environment(2), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "going on from the checkpoint of step " in done.stdout
    assert "on 2 × cpu" in done.stdout
    assert losses(folder) == pytest.approx(uninterrupted, rel=1e-5)
