"""Logs that go away, and terminals that lack letters: real processes before real pipes."""

import os
import signal
import subprocess
import sys
import time

import pytest
from support.command import environment, long_run, losses, training

GPTJAX = [sys.executable, "-m", "gptjax"]
OLD_TERMINALS = [
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
]


def shell(line: str, **variables: str) -> subprocess.CompletedProcess:
    """Runs a line of bash in which $G is gptjax; the exit code is that of gptjax."""
    line = line.replace("$G", " ".join(GPTJAX))
    return subprocess.run(
        ["bash", "-c", f"{line}\nexit ${{PIPESTATUS[0]}}"], env=environment(1) | variables, capture_output=True
    )


@pytest.mark.parametrize("line", [
    "$G config | head -1",
    "$G config | true",
    "$G config > /dev/full",
    "$G config >&-",
    "$G config >&- 2>&- <&-",
])  # fmt: skip
def test_a_lost_log_changes_no_exit_code(line):
    done = shell(line)
    assert (done.returncode, done.stderr) == (0, b""), done


def test_a_refusal_without_a_reader_is_a_refusal():
    for line in (
        "$G train --config=nowhere.py --workdir=x 2>&-",
        "$G train --config=nowhere.py --workdir=x 2>/dev/full",
    ):
        assert shell(line).returncode == 2


@pytest.mark.parametrize("variables", OLD_TERMINALS, ids=["encoding", "locale"])
def test_letters_that_a_terminal_lacks_are_replaced(variables):
    done = shell("$G scale --help", **variables)
    assert done.returncode == 0 and b"?" in done.stdout and done.stderr == b"", done
    done.stdout.decode("ascii")


def test_a_run_outlives_its_log(corpus, tmp_path):
    """The reader of the first line is gone, the terminal knows ASCII alone, and the number of stdout is free."""
    words = [sys.executable, "-m", "gptjax", *training(corpus, tmp_path / "run")]
    line = " ".join(f"'{word}'" for word in words)
    done = shell(f"{line} | head -1", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"") and len(losses(tmp_path / "run")) == 4, done
    assert (tmp_path / "run/checkpoints/step_00000004/manifest.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("log", ["> /dev/full", ">&-", "2>&1 | true"])
def test_a_run_outlives_every_kind_of_log(corpus, tmp_path, log):
    line = " ".join(f"'{word}'" for word in [*GPTJAX, *training(corpus, tmp_path / "run")])
    assert shell(f"{line} {log}").returncode == 0 and len(losses(tmp_path / "run")) == 4
    done = shell(f"$G checkpoint verify --workdir={tmp_path}/run")
    assert done.returncode == 0, done


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [False, True], ids=["terminal", "nohup"])
def test_sighup_saves_unless_it_is_ignored(corpus, tmp_path, ignored):
    """Also the exit code is that of a stopped run, though nobody reads the log."""
    prepare = (lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) if ignored else None
    read, write = os.pipe()
    os.close(read)
    run = subprocess.Popen(
        long_run(corpus, tmp_path / "run"), env=environment(1), stdout=write, stderr=write, preexec_fn=prepare
    )
    os.close(write)
    metrics = tmp_path / "run/metrics.jsonl"
    while run.poll() is None and not (metrics.exists() and "grad_norm" in metrics.read_text(encoding="utf-8")):
        time.sleep(0.02)
    run.send_signal(signal.SIGHUP)
    assert run.wait(60) == (0 if ignored else 75)
    assert any((tmp_path / "run/checkpoints").glob("step_*/manifest.json"))
