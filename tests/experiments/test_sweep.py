"""Sweeps: spaces that are refused, and trials that are real runs: complete, refused, pruned, killed and taken up."""

import contextlib
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import optuna
import pytest
from etils import epath
from support.command import CACHE, DEBUG

from gptjax.experiments.sweep import plot, space, study, table
from gptjax.runtime import files, lock
from gptjax.training.config import files as config_file

RATE = "optimizer.peak_learning_rate"


def file_of(folder, text) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "space.py"
    path.write_text(f"def get_space():\n    return {text}\n")
    return path


@pytest.fixture(scope="module")
def tiny(corpus, tmp_path_factory):
    """A config file of three steps with an evaluation after each, on a small corpus."""
    path = tmp_path_factory.mktemp("configs") / "tiny.py"
    path.write_text(
        f"import runpy\n\n\ndef get_config():\n    config = runpy.run_path({DEBUG!r})['get_config']()\n"
        f"    config.data.source = 'text'\n    config.data.path = {str(corpus)!r}\n    config.num_steps = 3\n"
        "    config.eval_every = 1\n    config.eval_batches = 1\n    config.checkpoint_every = 1\n"
        "    config.optimizer.warmup_steps = 1\n    config.num_samples = 0\n    config.seq_len = 32\n"
        "    return config\n"
    )
    return path


@pytest.fixture(scope="module", autouse=True)
def kept_programs():
    """The trials' compiled programs are kept between runs of the tests, as those of this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(CACHE))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
        yield


def sweep(*words) -> list[str]:
    return [sys.executable, "-m", "gptjax", "sweep", *map(str, words)]


# Spaces


@pytest.mark.parametrize("text, more, words", [
    ("{'model.num_layer': [2]}", [],
     """space.py: 'model.num_layer' must be a key of the config. Did you mean "model.num_layers"?"""),
    ("{'model': [2]}", [], "'model' must be a key of the config. It is a section: name model."),
    ("{3: [2]}", [], "3 must be a key of the config."),
    ("{'seed': []}", [], "seed must be a list of at least one value; found an empty list."),
    ("{'seed': [1, 1]}", [], "seed has a value twice"),
    ("{'seed': [1, 2.5]}", [], "seed must have values of type int; found 2.5"),
    ("{'seed': [True]}", [], "seed must have values of type int; found True"),
    ("{'seed': (1, 2, 3)}", [], 'seed is (1, 2, 3): write ("log", LOW, HIGH)'),
    (f"{{'{RATE}': ('log', 1e-2, 1e-3)}}", [], "must have LOW below HIGH; found 0.01 and 0.001"),
    (f"{{'{RATE}': ('log', 0, 1)}}", [], 'must have LOW above 0 for "log"; found 0.0'),
    (f"{{'{RATE}': ('linear', 0, float('inf'))}}", [], "must have values of type float; found inf"),
    ("{'model.norm': ('linear', 'a', 'b')}", [], "model.norm is of type str, which has no ranges"),
    ("{'tokenizer.kind': ['byte']}", [], "tokenizer.kind makes the tokens that all trials share"),
    ("{}", [], "get_space() of"),
    ("1 / 0", [], "space.py: ZeroDivisionError: division by zero."),
    (f"{{'{RATE}': ('log', 1e-3, 1e-2)}}", ["--sampler=grid"], "is a range, and a grid takes lists of values"),
    ("{'seed': list(range(200)), 'batch_size': list(range(1, 200))}", ["--sampler=grid"], "has 39,800 combinations"),
    ("{'seed': [1, 2]}", ["--config.seed=3"], "both set seed: take one out."),
    ("{'seed': [1, 2]}", ["--workers=0"], "--workers=0 must be at least 1"),
    ("{'seed': [1, 2]}", ["--config.num_step=3"], "--config.num_step is unknown."),
    ("{'seed': [1, 2]}", ["--sampler=bayes"], "argument --sampler: invalid choice: 'bayes'"),
    ("{'seed': [1, 2]}", ["--workdir=gs://bucket/sweep"], "must be a local folder"),
])  # fmt: skip
def test_a_space_that_is_refused(refused, tmp_path, text, more, words):
    file = file_of(tmp_path / "space", text)
    argv = ["sweep", f"--config={DEBUG}", f"--space={file}", f"--workdir={tmp_path / 'sweep'}", *more]
    assert words in refused(tmp_path / "sweep", *argv)
    assert not (tmp_path / "sweep").exists()


def test_a_space_or_a_folder_that_is_none(refused, tmp_path):
    file = file_of(tmp_path / "a", "{'seed': [1]}")
    argv = ["sweep", f"--config={DEBUG}", f"--workdir={tmp_path / 'a'}"]
    assert "spaec.py does not exist." in refused(tmp_path, *argv, f"--space={tmp_path}/a/spaec.py")
    assert "found space.py, and no sweep.json" in refused(tmp_path, *argv, f"--space={file}")
    file.write_text("def space():\n    return {}\n")
    assert "has no get_space()" in refused(tmp_path, *argv, f"--space={file}")


def test_ranges_and_choices_as_the_key_has_them(tmp_path):
    text = f"{{'{RATE}': ('log', 1e-3, 1), 'model.num_layers': ('linear', 2, 8), 'loss.z_loss': [0, 1e-4]}}"
    made = space.load(str(file_of(tmp_path, text)))
    assert made == {
        RATE: optuna.distributions.FloatDistribution(1e-3, 1.0, log=True),
        "model.num_layers": optuna.distributions.IntDistribution(2, 8),
        "loss.z_loss": optuna.distributions.CategoricalDistribution([0.0, 1e-4]),
    }
    assert space.contains(made, {RATE: 1e-2, "model.num_layers": 8, "loss.z_loss": 0.0})
    assert not space.contains(made, {RATE: 1e-2, "model.num_layers": 9, "loss.z_loss": 0.0})


def test_a_grid_has_every_combination(tmp_path):
    path = str(file_of(tmp_path, "{'seed': [1, 2], 'model.norm': ['rmsnorm', 'layernorm']}"))
    points = space.grid(path, space.load(path))
    assert [tuple(point.values()) for point in points] == [
        (1, "rmsnorm"), (1, "layernorm"), (2, "rmsnorm"), (2, "layernorm")
    ]  # fmt: skip


def test_a_corpus_that_is_refused_leaves_nothing(refused, tmp_path):
    file = file_of(tmp_path / "space", "{'seed': [1, 2]}")
    argv = ["sweep", f"--config={DEBUG}", f"--space={file}", f"--workdir={tmp_path / 'runs/sweep'}"]
    argv += ["--config.data.source=text", f"--config.data.path={tmp_path}/*.txt"]
    assert "matches 0 files" in refused(tmp_path, *argv)


# Trials


@pytest.fixture(scope="module")
def swept(tiny, tmp_path_factory):
    """(folder, space, what was printed) of a grid whose sweep was killed in its midst, and run again."""
    folder = tmp_path_factory.mktemp("sweeps") / "killed"
    file = file_of(folder.parent / "space", f"{{'{RATE}': [1e-2, -1.0, 1e-5]}}")
    command = sweep(f"--config={tiny}", f"--space={file}", f"--workdir={folder}", "--sampler=grid", "--workers=2")
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    rows = folder / "trials/000/metrics.jsonl"
    until = time.monotonic() + 300
    while not rows.exists() and first.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    first.kill()
    first.wait()
    assert rows.exists() and "COMPLETE" not in states(folder)
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    return folder, file, again.stdout


def test_a_trial_of_a_killed_sweep_that_was_only_starting_is_waited_for(tiny, tmp_path, monkeypatch):
    """It takes its folder after this sweep has looked, whose own process is then refused."""
    made = study.Sweep(str(tiny), {}, str(file_of(tmp_path, "{'seed': [1, 2]}")), str(tmp_path / "sweep"))
    made.folder.mkdir()
    folder, trial, orphan = made.folder / "trials/000", study.Running({}), contextlib.ExitStack()

    class Second:
        """A process that finds the folder taken."""

        def __init__(self, *_):
            folder.mkdir(parents=True, exist_ok=True)
            orphan.enter_context(lock.locked(epath.Path(folder), "", ""))

        def code(self):
            return 2

    monkeypatch.setattr(study, "Process", Second)
    made.running = {0: trial}
    with orphan:
        made._look(0, trial)
        made._look(0, trial)
        assert (trial.process, trial.starts, made.running) == (None, 1, {0: trial})


def trials(folder) -> list:
    storage = optuna.storages.RDBStorage(f"sqlite:///{folder / 'study.db'}")
    return optuna.load_study(study_name="sweep", storage=storage).get_trials()


def states(folder) -> list[str]:
    return [trial.state.name for trial in trials(folder)]


@pytest.mark.slow
def test_every_point_is_a_trial_and_a_failed_one_ends_nothing(swept):
    folder, _, printed = swept
    found = trials(folder)
    assert [trial.state.name for trial in found] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert [trial.params for trial in found] == [{RATE: 1e-2}, {RATE: -1.0}, {RATE: 1e-5}]
    assert found[0].value < found[2].value and list(found[0].intermediate_values) == [1, 2, 3]
    assert found[1].user_attrs["reason"] == "optimizer.peak_learning_rate=-1.0 must not be negative."
    rows = [json.loads(line) for line in (folder / "trials/000/metrics.jsonl").read_text().splitlines()]
    assert [row["eval_loss"] for row in rows if "eval_loss" in row] == list(found[0].intermediate_values.values())
    assert not (folder / "trials/001").exists() and (folder / "store/manifest.json").exists()
    lines = printed.splitlines()
    assert [line.split()[:2] for line in lines if line[:1].isdigit()][:2] == [["0", "complete"], ["2", "complete"]]


@pytest.mark.slow
def test_the_best_is_a_config_and_there_is_a_picture(swept, tiny):
    folder, _, _ = swept
    best, own = config_file.load(str(folder / "best.py"), {}), config_file.load(str(tiny), {})
    assert best.optimizer.peak_learning_rate == 1e-2 and best.num_steps == own.num_steps == 3
    assert (folder / "sweep.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_a_complete_sweep_does_nothing_and_another_is_refused(swept, tiny, gptjax_main, refused):
    folder, file, _ = swept
    argv = ["sweep", f"--config={tiny}", f"--space={file}", f"--workdir={folder}", "--sampler=grid"]
    code, printed, _ = gptjax_main(*argv)
    assert code == 0 and "trial 0:" not in printed and states(folder).count("COMPLETE") == 2
    message = refused(folder, *argv, "--config.seed=7")
    assert "belongs to a sweep of another config: seed (0 there, 7 here)" in message
    file.write_text(f"def get_space():\n    return {{'{RATE}': [1e-2, 1e-4]}}\n")
    assert "belongs to a sweep of another space: " in refused(folder, *argv)


@pytest.mark.slow
def test_a_report_of_the_trials(swept, gptjax_main, tmp_path):
    folder, _, _ = swept
    code, _, _ = gptjax_main("report", *sorted((folder / "trials").iterdir()), f"--target={tmp_path / 'report.html'}")
    page = (tmp_path / "report.html").read_text()
    assert code == 0 and RATE in page and ">000</th>" in page and ">002</th>" in page


@pytest.mark.slow
def test_a_hopeless_trial_is_pruned_and_a_signal_stops_all_in_order(swept, tiny):
    """Of a sweep that already knows five good trials, and runs on."""
    folder = swept[0].parent / "pruned"
    folder.mkdir()
    file = file_of(folder.parent / "another", f"{{'{RATE}': ('log', 1e-8, 1e-7)}}")
    values = files.flatten(json.loads((swept[0] / "sweep.json").read_text())["config"])
    values["data.store"] = str(swept[0] / "store")
    del values["model.layers"]  # as in a sweep that is older than the key
    known = {"config": values, "space": {RATE: ["log", 1e-8, 1e-7]}}
    (folder / "sweep.json").write_text(json.dumps(known))
    made = optuna.create_study(storage=f"sqlite:///{folder / 'study.db'}", study_name="sweep")
    for _ in range(5):
        made.add_trial(
            optuna.trial.create_trial(
                params={RATE: 3e-8},
                distributions=space.load(str(file)),
                value=1.0,
                intermediate_values={1: 1.0, 2: 1.0, 3: 1.0},
            )
        )
    command = sweep(f"--config={tiny}", f"--space={file}", f"--workdir={folder}", "--sampler=random")
    command += [f"--config.data.store={swept[0] / 'store'}", "--trials=7", "--config.num_steps=3"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 300
    while states(folder)[-1] != "RUNNING" or len(states(folder)) < 7:
        assert running.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    while not (folder / "trials/006/hosts/0.json").exists():
        assert running.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    (beat,) = (folder / "trials/006/hosts").glob("0.json")
    worker = json.loads(beat.read_text())["pid"]
    running.send_signal(signal.SIGTERM)
    printed, error = running.communicate(timeout=300)
    assert running.returncode == 75 and "the trials are stopped, and the same command goes on" in error, error
    assert "trial 5: pruned" in printed and states(folder)[5:] == ["PRUNED", "RUNNING"]
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


# What is shown


def test_a_table_and_a_picture_of_trials(tmp_path):
    values = {
        "seed": optuna.distributions.CategoricalDistribution([1, 2]),
        RATE: optuna.distributions.FloatDistribution(1e-3, 1, log=True),
    }
    made = optuna.create_study()
    for number, (loss, state) in enumerate(
        [(2.0, "COMPLETE"), (1.5, "COMPLETE"), (float("nan"), "FAIL"), (9e9, "PRUNED")]
    ):
        steps = {1: loss} if state == "PRUNED" else {}
        params = {"seed": 1 + number % 2, RATE: 10 ** -(number % 3 + 0.5)}
        state = optuna.trial.TrialState[state]
        value = loss if state.name == "COMPLETE" else None
        attributes = {"reason": "it broke"} if state.name == "FAIL" else {}
        trial = optuna.trial.create_trial(
            params=params,
            distributions=values,
            state=state,
            value=value,
            intermediate_values=steps,
            user_attrs=attributes,
        )
        made.add_trial(trial)
    lines = table.text(made.get_trials(), list(values)).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["1", "0", "3", "2"] and lines[-1].endswith("it broke")
    plot.draw(made.get_trials(), values, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "sampler, pruner",
    [("random", "none"), ("tpe", "hyperband"), pytest.param("gp", "median", marks=pytest.mark.parity)],
)
def test_a_sampler_goes_on_with_other_values(tmp_path, sampler, pruner):
    """Its seed depends on how many trials there are, or each start would draw the same again."""
    file = str(file_of(tmp_path / "space", f"{{'{RATE}': ('log', 1e-5, 1e-3)}}"))
    drawn = []
    for _ in range(2):
        made = study.Sweep(DEBUG, {}, file, str(tmp_path / "sweep"))
        (tmp_path / "sweep").mkdir(exist_ok=True)
        (tmp_path / "sweep/sweep.json").touch()
        made.running, made.grid, made.trials = {}, [], 99
        made._open(sampler, pruner)
        for _ in range(study.STARTUP + 2):
            trial = made._next()
            drawn.append(trial.params[RATE])
            made.study.tell(trial.number, (math.log10(drawn[-1]) + 4) ** 2)
    first, again = drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :]
    assert first[1:3] != again[:2] and first[:2] != again[:2] and all(1e-5 <= value <= 1e-3 for value in drawn)
    if sampler != "random":
        assert sum(3e-5 < value < 3e-4 for value in again) > len(again) / 2, "by then it knows where the least is"
