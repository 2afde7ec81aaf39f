"""Real runs that get SIGTERM or SIGINT, in each phase."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import pytest
from support.command import environment, long_run, losses, rows

SIGNALLED = pathlib.Path(__file__).parents[1] / "support" / "signalled.py"
# Cheap to compile, and compiled anew: a signal is to come in the midst of it.
ENVIRONMENT = environment(1) | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
MORE = "--config.eval_every=15", "--config.eval_batches=3", "--config.num_samples=2"


class Stopped(NamedTuple):
    code: int
    seconds: float  # from the last signal to the end of the process
    phase: str  # in which the last signal came
    out: str
    err: str


def stopped(argv: list[str], phase: str, step: int, seconds: float, signals: str, **variables: str) -> Stopped:
    """Runs a long run that gets signals, as tests/support/signalled.py says."""
    flags = argv[argv.index("train") + 1 :]
    program = [sys.executable, str(SIGNALLED), phase, str(step), str(seconds), signals, *flags]
    done = subprocess.run(program, env=ENVIRONMENT | variables, capture_output=True, text=True, timeout=120)
    ended = time.time()
    when, where = re.findall(r"^signalled ([\d.]+) while (.*)$", done.stdout, re.MULTILINE)[-1]
    return Stopped(done.returncode, ended - float(when), where, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = subprocess.run(long_run(corpus, folder, *MORE), env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return folder


def test_a_signal_in_training_is_a_save_and_the_run_goes_on(uninterrupted, corpus, tmp_path):
    folder = tmp_path / "run"
    ended = stopped(long_run(corpus, folder, *MORE), "training", 0, 0.1, "SIGTERM")
    assert ended.code == 75 and re.search(r"SIGTERM on \S+: step \d+ is saved", ended.err), ended
    done = subprocess.run(long_run(corpus, folder, *MORE), env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert losses(folder) == losses(uninterrupted)


@pytest.mark.slow
def test_stopped_in_each_phase_it_ends_as_if_nothing_had_happened(uninterrupted, corpus, tmp_path, record_property):
    """One run, started again after each stop."""
    folder = tmp_path / "run"

    def saved():
        return sorted(int(path.name[-8:]) for path in (folder / "checkpoints").glob("step_????????"))

    for phase, step, seconds, signals, words in [
        ("starting", 0, 0.2, "SIGTERM", "while starting: nothing is unsaved"),
        ("preparing data", 0, 0, "SIGTERM", "while preparing data: nothing is unsaved"),
        ("compiling", 0, 0.3, "SIGINT", "SIGINT on .* while compiling: nothing is unsaved"),
        ("training", 0, 0.1, "SIGINT", r"SIGINT on \S+: step \d+ is saved"),
        ("training", 0, 0.1, "SIGHUP", r"SIGHUP on \S+: step \d+ is saved"),
        ("evaluating", 15, 0, "SIGTERM", r"SIGTERM on \S+: step 15 is saved"),
        ("restoring", 15, 0, "SIGTERM", "while restoring: nothing is unsaved"),
        ("saving", 29, 0, "SIGTERM,SIGTERM", "a second SIGTERM: ending at once"),  # in the midst of the save of 30
        ("saving", 39, 0, "SIGTERM", "step 40 is saved"),
        ("sampling", 0, 0.2, "SIGTERM", "while sampling: nothing is unsaved"),
    ]:
        print(phase)
        # So that a compilation takes a while, and so does a save.
        slow = {"JAX_ENABLE_COMPILATION_CACHE": "false"} if phase == "compiling" else {"SAVE_SECONDS": "0.2"}
        slow |= {"SAVE_SECONDS": "60"} if "," in signals else {}
        ended = stopped(long_run(corpus, folder, *MORE), phase, step, seconds, signals, **slow)
        record_property(f"seconds from a signal in {phase} to the end", round(ended.seconds, 2))
        print(ended.err, ended.seconds)
        assert ended.code == 75, ended
        assert re.search(words, ended.err), ended.err
        assert ended.seconds < 10
        if phase == "evaluating":  # it does not finish the evaluation first
            assert not any("eval_loss" in row for row in rows(folder))
    done = subprocess.run(long_run(corpus, folder, *MORE), env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert losses(folder) == losses(uninterrupted) and len(losses(folder)) == 60
    found, expected = (
        [(row["step"], row["eval_loss"]) for row in rows(run) if "eval_loss" in row] for run in (folder, uninterrupted)
    )
    assert found == expected
    assert (folder / "samples.txt").read_text() == (uninterrupted / "samples.txt").read_text()
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in uninterrupted.iterdir())
    assert saved() == [50, 60]


def test_a_signal_deep_in_the_training_of_the_tokenizer(tmp_path):
    """SentencePiece computes for seconds, in which no Python of the main thread runs."""
    argv = long_run(f"{pathlib.Path(os.__file__).parent}/*.py", tmp_path / "run")
    argv += ["--config.tokenizer.kind=sentencepiece", "--config.tokenizer.vocab_size=8000"]
    run = subprocess.Popen(argv, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in run.stdout:
        if read := re.match(r"training the tokenizer: reading documents ([\d,]+)/\1$", line):
            break
    assert read
    time.sleep(0.3)
    run.send_signal(signal.SIGTERM)
    began = time.monotonic()
    _, err = run.communicate(timeout=60)
    assert run.returncode == 75 and "SIGTERM on " in err and "while preparing data: nothing is unsaved" in err
    assert time.monotonic() - began < 5
    left = sorted(path.name.partition("-")[0] for path in (tmp_path / "run").iterdir())
    assert left == ["owner.json", "store.partial"]  # the lock itself went with the process
