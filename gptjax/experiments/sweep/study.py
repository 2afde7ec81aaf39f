"""`gptjax sweep`: runs a config with other values of some keys in each trial, and finds the best values.

Optuna chooses the values and prunes hopeless trials; FOLDER/study.db holds Optuna's state. This process alone writes
the database and starts, watches and stops the trials' processes, so several workers need no lock between them.
"""

import dataclasses
import json
import math
import pathlib
import time
import warnings

import optuna
from etils import epath
from optuna.trial import FrozenTrial, TrialState

from gptjax.errors import TRY_AGAIN, Failed, Preempted, Refused, one_line
from gptjax.experiments.sweep import plot, space, table
from gptjax.experiments.sweep.trials import busy, evaluations
from gptjax.runtime import files, lock, optional, subprocesses, untrusted
from gptjax.runtime.subprocesses import GRACE_SECONDS, Process
from gptjax.training.config import files as config_file
from gptjax.training.config import schema

SECONDS = 0.5  # from one look at the trials to the next
STARTUP = 5  # random trials before a sampler models the loss; complete trials before a pruner prunes
TRIALS = 20
MAX_STARTS = 3  # starts of a trial whose process ends with "try again"
BEFORE = {"owner.json", "prepare.log", "store", "compiled"}  # files of a sweep killed before the first trial


@dataclasses.dataclass
class Running:
    """A started trial."""

    params: dict
    process: Process | None = None  # None: not started yet
    starts: int = 0
    seen: int = -1  # step of the last processed evaluation
    verdict: str = ""  # why the trial was asked to stop: "pruned", or the fault
    killed_at: float = math.inf  # time.monotonic() at which a trial that still runs is killed


class Sweep:
    """A sweep in its folder."""

    def __init__(self, config_path: str, overrides: dict[str, str], space_path: str, folder: str):
        """Raises: Refused, for a config, space or folder that can't be used."""
        self.config_path, self.overrides, self.space_path = config_path, overrides, space_path
        self.config = config_file.load(config_path, overrides)
        self.values = files.flatten(dataclasses.asdict(self.config))
        self.space = space.load(space_path)
        if both := sorted(overrides.keys() & self.space.keys()):
            raise Refused(f"--config.{both[0]}={overrides[both[0]]} and {space_path} both set {both[0]}: take one out.")
        if "://" in folder:
            raise Refused(f"--workdir={folder} must be a local folder, for the SQLite file of the sweep.")
        self.folder = folder = pathlib.Path(folder)
        files.check_writable(epath.Path(folder))
        others = sorted({path.name for path in folder.iterdir()} - BEFORE) if folder.is_dir() else []
        if others and not (folder / "sweep.json").exists():
            raise Refused(
                f"--workdir={folder} must be empty or the folder of a sweep; found {others[0]}, and no sweep.json."
            )
        self.store = self.config.data.store or str(folder / "store")

    def run(self, trials: int, workers: int, sampler: str, pruner: str) -> None:
        """Runs a sweep up to a number of trials, `workers` at once, and resumes an interrupted sweep.

        Args:
          trials: number in all; 0 is all points of a grid, or TRIALS.
          workers: trials at once.
          sampler: name of the sampler, as in the flag.
          pruner: name of the pruner, as in the flag.

        Raises: Refused, Failed, Preempted.
        """
        if workers < 1 or trials < 0:
            raise Refused(f"--workers={workers} must be at least 1, and --trials={trials} must not be negative.")
        self.grid = space.grid(self.space_path, self.space) if sampler == "grid" else []
        if sampler == "gp":
            optional.package("torch", "--sampler=gp", "gp")
        most = len(self.grid) or trials or TRIALS
        self.trials, self.workers, self.running = min(trials or most, most), workers, {}
        with lock.locked(epath.Path(self.folder), "belongs to a sweep on", "wait until it ends, or stop it"):
            self._check_same()
            with subprocesses.asked_to_stop() as self._asked:
                self._prepare()
                files.write_whole(epath.Path(self.folder) / "sweep.json", self._described())
                self._open(sampler, pruner)
                self._loop()
        print(table.text(self.study.get_trials(), list(self.space)))
        if (self.folder / "best.py").exists():
            print(f"the best as a config: {self.folder}/best.py · picture: {self.folder}/sweep.png")
        if not self.grid:
            print(f"{self.trials} trials; the same command with --trials={2 * self.trials} goes on")

    def _described(self) -> bytes:
        """Returns the content of sweep.json, which must not change when the sweep resumes."""
        return json.dumps({"config": self.values, "space": space.described(self.space)}, indent=1).encode() + b"\n"

    def _check_same(self) -> None:
        """Raises: Refused, if the folder belongs to a sweep of another config or space."""
        path, here = epath.Path(self.folder) / "sweep.json", json.loads(self._described())
        if not path.exists():
            return
        there = untrusted.read_json(path, schema.MAX_JSON_BYTES, "put back the file that the sweep wrote")
        untrusted.check_types(there, {"config": dict, "space": dict}, path, "put back the file that the sweep wrote")
        there["config"] = (
            files.flatten(schema.default().to_dict()) | there["config"]
        )  # keys that are newer than the sweep
        for part in here:
            for key in sorted(here[part].keys() | there[part].keys()):
                old, new = there[part].get(key, "not set"), here[part].get(key, "not set")
                if old != new:
                    raise Refused(
                        f"{self.folder} belongs to a sweep of another {part}: {key} ({old} there, {new} here). Use the "
                        "old values, or another --workdir."
                    )

    def _prepare(self) -> None:
        """Makes the store that the trials share, unless the store exists; each trial checks the store."""
        if self.config.mixture.stores or (epath.Path(self.store) / "manifest.json").exists():
            return
        print("preparing the data that the trials share", flush=True)
        words = ["data", "prepare", "--workers=1", *self._words({})]
        process = Process(words, self.folder / "prepare.log", self.folder / "compiled")
        if subprocesses.finish(process, self._asked, "preparing data"):
            reason = process.last_words()
            if process.code() == 2:
                (self.folder / "prepare.log").unlink()
            raise {2: Refused}.get(process.code(), Failed)(reason)

    def _words(self, params: dict) -> list[str]:
        """Returns the flags for the config of a trial."""
        given = self.overrides | ({} if self.config.mixture.stores else {"data.store": self.store}) | params
        texts = {key: str(value).lower() if type(value) is bool else str(value) for key, value in given.items()}
        return [f"--config={self.config_path}", *(f"--config.{key}={text}" for key, text in texts.items())]

    def _open(self, sampler: str, pruner: str) -> None:
        """Opens Optuna's study, and takes up the trials that ran when the sweep was last stopped or killed."""
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        storage = optuna.storages.RDBStorage(f"sqlite:///{(self.folder / 'study.db').resolve()}")
        self.study = optuna.create_study(storage=storage, study_name="sweep", load_if_exists=True)
        seed = self.config.seed + len(
            self.study.get_trials(deepcopy=False)
        )  # a resumed sweep must not draw the same values
        samplers = {
            "grid": lambda: optuna.samplers.RandomSampler(seed),  # never asked: every point is enqueued
            "random": lambda: optuna.samplers.RandomSampler(seed),
            "tpe": lambda: optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP),
            "gp": lambda: optuna.samplers.GPSampler(seed=seed, n_startup_trials=STARTUP),
        }
        first = min(self.config.eval_every, self.config.num_steps)
        pruners = {
            "median": lambda: optuna.pruners.MedianPruner(STARTUP),
            "hyperband": lambda: optuna.pruners.HyperbandPruner(first, self.config.num_steps),
            "none": optuna.pruners.NopPruner,
        }
        self.study.sampler, self.study.pruner = samplers[sampler](), pruners[pruner]()
        self._storage, self._study_id = storage, storage.get_study_id_from_name("sweep")
        for trial in self.study.get_trials(states=(TrialState.RUNNING,)):
            if trial.params.keys() == self.space.keys():
                self.running[trial.number] = Running(trial.params)
            else:  # killed while its values were drawn
                self._tell(trial.number, "killed before it began")

    def _loop(self) -> None:
        try:
            while True:
                while len(self.running) < self.workers and (trial := self._next()):
                    self.running[trial.number] = Running(trial.params)
                if not self.running:
                    return
                for number in list(self.running):
                    self._look(number, self.running[number])
                if self._asked:
                    raise Preempted(f"{self._asked[0]}: the trials are stopped, and the same command goes on")
                time.sleep(SECONDS)
        finally:
            self._stop_all()

    def _next(self) -> FrozenTrial | None:
        """Returns a new trial; None if all trials exist. Trial 0 has the config's own values if the space has them."""
        known = self.study.get_trials(deepcopy=False)
        waiting = sum(trial.state == TrialState.WAITING for trial in known)
        if len(known) - waiting >= self.trials:
            return None
        if not waiting and self.grid:
            self.study.enqueue_trial(self.grid[len(known)])
        elif not known and space.contains(self.space, self.values):
            self.study.enqueue_trial({key: self.values[key] for key in self.space})
        number = self.study.ask(self.space).number
        return self.study.get_trials()[number]

    def _look(self, number: int, trial: Running) -> None:
        """Starts, watches, stops or ends a trial."""
        folder, output = self.folder / "trials" / f"{number:03}", self.folder / "logs" / f"{number:03}.log"
        if trial.process is None:
            if folder.exists() and busy(folder):
                return
            output.parent.mkdir(exist_ok=True)
            words = ["train", f"--workdir={folder}", *self._words(trial.params)]
            trial.process, trial.starts = Process(words, output, self.folder / "compiled"), trial.starts + 1
        code = trial.process.code()
        found = evaluations(folder)
        for step, loss in found:
            if step > trial.seen and not trial.verdict:
                self._evaluated(number, trial, step, loss)
        if code is None:
            if trial.verdict and time.monotonic() > trial.killed_at:
                trial.process.kill()
        elif code == 0 and not (trial.verdict and trial.verdict != "pruned"):
            step, loss = found[-1] if found else (0, None)
            self._tell(number, f"the evaluation of step {step} failed" if loss is None else "", loss)
        elif trial.verdict:
            self._tell(number, trial.verdict)
        elif code == TRY_AGAIN and trial.starts < MAX_STARTS:
            trial.process = None
        elif code == 2 and folder.exists() and busy(folder):  # a trial of a killed sweep took the folder first
            trial.process = None
        else:
            self._tell(number, one_line(trial.process.last_words())[:500] if code > 0 else f"killed by signal {-code}")

    def _evaluated(self, number: int, trial: Running, step: int, loss: float | None) -> None:
        """Records an evaluation of a trial, and asks the trial to stop if pruned or not finite."""
        trial.seen = step
        if loss is None:
            return
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        self._storage.set_trial_intermediate_value(trial_id, step, loss)
        frozen = self.study.get_trials(deepcopy=False)[number]
        if not math.isfinite(loss):
            trial.verdict = f"the held-out loss of step {step} is {loss}"
        elif step < (self.values | trial.params)["num_steps"] and self.study.pruner.prune(self.study, frozen):
            trial.verdict = "pruned"
        if trial.verdict:
            trial.process.stop()
            trial.killed_at = time.monotonic() + GRACE_SECONDS

    def _tell(self, number: int, reason: str, loss: float | None = None) -> None:
        """Ends a trial: complete with a loss, `pruned`, or failed for a reason. Writes the best config so far."""
        self.running.pop(number, None)
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        if reason:
            self._storage.set_trial_user_attr(trial_id, "reason", reason)
        if reason and reason != "pruned":
            self.study.tell(number, state=TrialState.FAIL)
        elif reason:
            self.study.tell(number, state=TrialState.PRUNED)
        else:
            self.study.tell(number, loss)
        trials = self.study.get_trials()
        values = ", ".join(f"{key}={table.short(value)}" for key, value in trials[number].params.items())
        outcome = reason if loss is None else f"held-out loss {loss:.4f}"
        print(f"trial {number}: {outcome} · {values}", flush=True)
        if complete := [trial for trial in trials if trial.state == TrialState.COMPLETE]:
            best = min(complete, key=lambda trial: trial.value)
            docstring = (
                f"{pathlib.Path(self.config_path).name} with the best of {len(trials)} trials of gptjax sweep.\n\n"
                f"Held-out loss {best.value:.4f} nats a token, in trial {best.number}.\n"
            )
            given = {key: self.values[key] for key in self.overrides} | best.params
            config_file.write(self.folder / "best.py", self.config_path, docstring, given)
        plot.draw(trials, self.space, self.folder / "sweep.png")

    def _stop_all(self) -> None:
        """Asks all trials to stop, and waits; a second signal kills them. The next sweep resumes these trials."""
        subprocesses.stop([trial.process for trial in self.running.values() if trial.process], self._asked)
