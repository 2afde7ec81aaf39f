import json
import os
import pathlib
import signal
import threading
import time

import numpy as np
import pytest
from etils import epath

from gptjax.errors import Preempted, Refused
from gptjax.experiments.scaling import study
from gptjax.experiments.scaling.laws import Law, Point
from gptjax.runtime import subprocesses
from gptjax.training.config.files import load

FAMILY = str(pathlib.Path(study.__file__).parents[3] / "benchmarks" / "family.py")
SIZES = ["16", "32", "48", "64"]
LAW = Law(1.0, 50.0, 60.0, 0.3, 0.3)


def lawful(config_file, overrides, folder, sizes, budgets):
    """What a grid would give if losses followed LAW and a little noise."""
    random = np.random.default_rng(0)
    points = []
    for trial in study.grid(config_file, overrides, sizes, budgets):
        N, D = trial.flops_per_token / 6, float(trial.tokens)
        points.append(Point(trial.budget, trial.size, N, D, LAW.loss(N, D) * np.exp(1e-4 * random.standard_normal())))
    return points


def test_grid():
    trials = study.grid(FAMILY, {"model.num_layers": "1"}, SIZES, [3e10, 1e10])
    assert [(trial.budget, trial.size) for trial in trials] == [(c, s) for c in (1e10, 3e10) for s in SIZES]
    for trial in trials:
        assert trial.config == load(trial.config_path, {"model.num_layers": "1"})
        assert trial.config.model.num_layers == 1
        assert trial.flops_per_token == trial.config.model.flops_per_token(257, trial.config.seq_len)
        assert trial.tokens * trial.flops_per_token == pytest.approx(trial.budget, rel=0.02)


@pytest.mark.parametrize("change, words", [
    ({"sizes": "16,32,48"}, "--sizes must have at least 4 different sizes to fit a parabola; found 3"),
    ({"budgets": "1e10"}, "--budgets must have at least 2 different budgets; found 1"),
    ({"budgets": "1e10,many"}, "--budgets=1e10,many must be numbers above 0; found many"),
    ({"budgets": "1e10,-1"}, "--budgets=1e10,-1 must be numbers above 0; found -1"),
    ({"budgets": "1e10,,1e11"}, "must be numbers above 0; found an empty text"),
    ({"budgets": "1e5,1e10"}, "--budgets=1e+05 must pay for at least 10 steps of size 16; found 1"),
    ({"compute": "nan"}, "--compute=nan must be numbers above 0; found nan"),
    ({"sizes": "16,32,48,huge"}, "family.py: ValueError: invalid literal for int"),
    ({"config": FAMILY + ":16:1e9"}, "must be without arguments, since --sizes gives them; write --config="),
    ({"config": "configs/debug.py"}, "has 2 arguments: write --config=configs/debug.py."),
])  # fmt: skip
def test_refused(refused, tmp_path, change, words):
    flags = {"config": FAMILY, "sizes": ",".join(SIZES), "budgets": "1e10,3e10"} | change
    folder = tmp_path / "grid"
    assert words in refused(
        tmp_path, "scale", f"--workdir={folder}", *(f"--{key}={text}" for key, text in flags.items())
    )


def test_what_is_printed_and_drawn(gptjax_main, tmp_path, monkeypatch):
    """Of losses that follow a law, by the verb: the law's own best size is within the intervals."""
    monkeypatch.setattr(study, "scale", lawful)
    budgets = [float(6 * c) for c in (1e11, 3e11, 1e12)]
    flags = [f"--config={FAMILY}", f"--workdir={tmp_path}", "--sizes=48,64,80,96,128,160,192,256"]
    flags += [f"--budgets={','.join(map(str, budgets))}", "--compute=1e15"]
    code, out, error = gptjax_main("scale", *flags, "--json")
    assert code == 0, error
    found = json.loads(out)
    assert found == json.loads((tmp_path / "scale.json").read_text()) and found["compute"] == 1e15
    best = LAW.best_size(1e15)
    low, high = found["law"]["parameters_interval"]
    assert low / 1.05 < best < high * 1.05 and high / low < 3
    assert found["law"]["parameters"] * found["law"]["tokens"] * 6 == pytest.approx(1e15)
    assert found["parabolas"]["exponent"] == pytest.approx(0.5, abs=0.1)
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = gptjax_main("scale", *flags)
    assert code == 0 and "best for 1e+15 FLOPs" in out and "by the parabolas: " in out and "nan" not in out


def signal_once_it_trains(path: pathlib.Path, over: threading.Event):
    """SIGTERM to this process, whose run in `path` has done a step, or has not for two minutes; unless it is `over`."""
    deadline = time.monotonic() + 120
    while (
        not (path.exists() and "first_step_seconds" in path.read_text(encoding="utf-8")) and time.monotonic() < deadline
    ):
        if over.wait(0.05):
            return
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_a_run_is_done_once(tmp_path, monkeypatch, corpus, capfd):
    """A real run by `gptjax train`, taken up again without a process; one that is asked to stop saves
    before; and one that can't be is refused in its words."""
    overrides = {"data.source": "text", "data.path": str(corpus), "data.store": str(tmp_path / "store")}
    overrides |= {"num_samples": "0", "eval_batches": "1"}
    trial = study.grid(FAMILY, overrides, SIZES, [2e9, 1e10])[0]
    point = study.measured(trial, epath.Path(tmp_path / "run"), overrides)
    assert point.size == "16" and 1 < point.loss < 6 and point.D == trial.tokens
    with monkeypatch.context() as patch:
        patch.setattr(subprocesses, "Process", None)
        assert study.measured(trial, epath.Path(tmp_path / "run"), overrides) == point
    longer = overrides | {"num_steps": "20000", "checkpoint_every": "20000"}
    folder = tmp_path / "longer"
    over = threading.Event()
    timer = threading.Thread(target=signal_once_it_trains, args=(folder / "metrics.jsonl", over))
    timer.start()
    try:
        with pytest.raises(Preempted, match=f"SIGTERM while training in {folder}: the same command goes on"):
            study.run_in(epath.Path(folder), trial.config_path, longer)
    finally:
        over.set()
        timer.join()
    assert list((folder / "checkpoints").glob("step_*/manifest.json")) and not (folder / "owner.json").exists()
    with pytest.raises(Refused, match="ended with exit code 2"):
        study.run_in(epath.Path(tmp_path / "other"), FAMILY + ":16:1e6", overrides | {"model.num_heads": "0"})
    assert "model.num_heads=0 must be at least 1" in capfd.readouterr().err
