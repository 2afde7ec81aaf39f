"""Trackers: one's own function, and wandb without a network."""

import json

import pytest
from support.command import training

BLOCK = 1 << 15
MINE = """
import json


def mine(config, workdir):
    file = open(f"{workdir}/mine.jsonl", "a")
    file.write(json.dumps({"began": config["optimizer"]["name"]}) + "\\n")
    return lambda step, row: print(json.dumps({"at": step} | row), file=file, flush=True)


def broken(config, workdir):
    def log(step, row):
        raise ConnectionError("no line")

    return log
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "my_tracker.py").write_text(MINE)
    (tmp_path / "modules" / "my_broken_module.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path / "modules")


def test_a_function_of_ones_own_gets_every_row(module, gptjax_main, corpus, tmp_path):
    argv = training(corpus, tmp_path / "run", "--config.tracker=my_tracker:mine", "--config.num_samples=0")
    assert gptjax_main(*argv)[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    seen = [json.loads(line) for line in (tmp_path / "run/mine.jsonl").read_text().splitlines()]
    assert seen[0] == {"began": "adamw"} and len(rows) > 4
    expected = [{"at": row.pop("step")} | row for row in rows if row.pop("time")]
    assert seen[1:] == expected


@pytest.mark.slow
def test_a_tracker_that_fails_is_one_warning(module, gptjax_main, corpus, copied):
    """In a run that goes on, with a tracker that it did not have before."""
    argv = training(corpus, copied, "--config.tracker=my_tracker:broken", "--config.num_steps=6")
    code, out, _ = gptjax_main(*argv)
    warning = "warning: the tracker can't be written (ConnectionError: no line); the run goes on without it"
    assert code == 0 and out.count(warning) == 1


@pytest.mark.parametrize("name, words", [
    ("wandbb", "tracker=wandbb is unknown: write wandb, or package.module:function"),
    ("my_tracker:", "tracker=my_tracker: is unknown"),
    ("my_tracker:yours", "tracker=my_tracker:yours: my_tracker has no function yours"),
    ("my_missing_module:mine", "can't be imported (ModuleNotFoundError: No module named 'my_missing_module')"),
    ("my_broken_module:mine", "can't be imported (ZeroDivisionError: division by zero)"),
])  # fmt: skip
def test_a_tracker_that_is_none(module, refused, corpus, tmp_path, name, words):
    assert words in refused(tmp_path / "run", *training(corpus, tmp_path / "run", f"--config.tracker={name}"))
    assert not (tmp_path / "run").exists()
