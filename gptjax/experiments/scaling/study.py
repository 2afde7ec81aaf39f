"""`gptjax scale`: trains a grid of runs of equal compute, and finds the best model size and tokens for any compute."""

import json
import math
import sys
from typing import NamedTuple

from etils import epath

from gptjax.errors import TRY_AGAIN, Failed, Preempted, Refused
from gptjax.experiments.scaling import laws
from gptjax.experiments.scaling.laws import Point, Scaling
from gptjax.runtime import files, subprocesses
from gptjax.tokenizers import tokenizer
from gptjax.training import workdir
from gptjax.training.config import files as config_file
from gptjax.training.config import schema
from gptjax.training.config.schema import Config
from gptjax.training.monitoring import records

MIN_STEPS = 10


class Trial(NamedTuple):
    """A run of the grid."""

    budget: float
    size: str
    config_path: str  # path and arguments, as in `config.files.split`
    config: Config
    flops_per_token: int

    @property
    def tokens(self) -> int:
        return self.config.num_steps * self.config.batch_size * self.config.seq_len

    @property
    def name(self) -> str:
        return f"{self.budget:.3g}_{self.size}"


def numbers(flag: str, text: str) -> list[float]:
    """Parses numbers such as `1e13,3e13`. Raises: Refused."""
    found = []
    for word in text.split(","):
        try:
            found.append(float(word))
        except ValueError:
            found.append(math.nan)
        if not 0 < found[-1] < math.inf:
            raise Refused(
                f"{flag}={text} must be numbers above 0; found {word or 'an empty text'}; write 1e13,3e13,1e14."
            )
    return found


def grid(config_path: str, overrides: dict[str, str], sizes: list[str], budgets: list[float]) -> list[Trial]:
    """Makes a run for each size and budget, smallest budgets first.

    Args:
      config_path: a file whose get_config(size, tokens) returns a model of that size, trained on that many tokens.
      overrides: values of `--config.KEY=VALUE`.
      sizes: names of sizes, passed to get_config.
      budgets: FLOPs of a run.

    Raises: Refused.
    """
    laws.check(sizes, budgets)
    file, arguments = config_file.split(config_path)
    if arguments:
        raise Refused(
            f"--config={config_path} must be without arguments, since --sizes gives them; write --config={file}."
        )
    costs = {}
    for size in sizes:
        any_length = config_file.load(_path_of(file, size, 1e9), overrides)
        vocab_size = tokenizer.expected_vocab_size(any_length.tokenizer)
        costs[size] = any_length.model.flops_per_token(vocab_size, any_length.seq_len)
    trials = []
    for budget in sorted(set(budgets)):
        for size, cost in costs.items():
            path = _path_of(file, size, budget / cost)
            trial = Trial(budget, size, path, config_file.load(path, overrides), cost)
            if len(trial.config.phases) > 1:
                raise Refused(f"--config={file} must have equal batches in all steps; take the curriculum out.")
            if trial.config.num_steps < MIN_STEPS:
                raise Refused(
                    f"--budgets={budget:.3g} must pay for at least {MIN_STEPS} steps of size {size}; found "
                    f"{trial.config.num_steps}; give a larger budget, or leave the size out."
                )
            trials.append(trial)
    return trials


def _path_of(file: str, size: str, tokens: float) -> str:
    """Returns the config path of a size trained on this many tokens."""
    return f"{file}:{size}:{tokens:.6g}"


def run_in(folder: epath.Path, config_path: str, overrides: dict[str, str]) -> list[dict]:
    """Trains by `gptjax train` in a separate process, and returns the rows of metrics.jsonl.

    Raises:
      Refused, Failed or Preempted: by the exit code of that process, which has printed the reason. If this process is
        asked to stop, that process is asked too, and saves.
    """
    words = ["train", f"--config={config_path}", f"--workdir={folder}"]
    words += [f"--config.{key}={value}" for key, value in overrides.items()]
    with subprocesses.asked_to_stop() as asked:
        code = subprocesses.finish(subprocesses.Process(words), asked, f"training in {folder}")
    if code:
        kind = {2: Refused, TRY_AGAIN: Preempted}.get(code, Failed)
        raise kind(f"The run in {folder} ended with exit code {code}" + "." * (kind is not Preempted))
    return records.rows_until(folder / "metrics.jsonl", sys.maxsize)


def result(rows: list[dict], step: int) -> float:
    """Returns the last held-out loss after `step`; nan without an evaluation."""
    found = [row["eval_loss"] for row in rows if row["step"] == step and row.get("eval_loss") is not None]
    return found[-1] if found else math.nan


def measured(trial: Trial, folder: epath.Path, overrides: dict[str, str]) -> Point:
    """Returns the result of a run of the grid, and trains unless the folder has a complete run.

    Raises: Refused, Failed or Preempted, as in `run_in`.
    """
    there = folder / "config.json"
    loss = math.nan
    if there.exists() and trial.config == schema.parse(workdir.read_config(folder)):
        loss = result(records.rows_until(folder / "metrics.jsonl", sys.maxsize), trial.config.num_steps)
    if math.isnan(loss):
        loss = result(run_in(folder, trial.config_path, overrides), trial.config.num_steps)
    if math.isnan(loss):
        raise Failed(f"The run in {folder} has no held-out loss; see metrics.jsonl in this folder.")
    return Point(trial.budget, trial.size, trial.flops_per_token / 6, float(trial.tokens), loss)


def scale(
    config_path: str, overrides: dict[str, str], folder: epath.Path, sizes: list[str], budgets: list[float]
) -> list[Point]:
    """Runs the grid in a folder, or the rest of the grid. Raises: Refused, Failed or Preempted."""
    first = config_file.load(f"{config_file.split(config_path)[0]}:{sizes[0]}:1e9", overrides)
    if not (first.data.store or first.mixture.stores):
        overrides = overrides | {"data.store": str(folder / "store")}  # one for all
    overrides = overrides | {"num_samples": "0"}
    trials = grid(config_path, overrides, sizes, budgets)
    total = sum(trial.tokens * trial.flops_per_token for trial in trials)
    print(f"{len(trials)} runs, {total:.3g} FLOPs", file=sys.stderr, flush=True)
    points = []
    for number, trial in enumerate(trials, 1):
        cost = f"{trial.flops_per_token / 6:.3g} parameters, {trial.tokens:.3g} tokens"
        print(f"run {number} of {len(trials)}: {trial.name}: {cost}", file=sys.stderr, flush=True)
        points.append(measured(trial, folder / "runs" / trial.name, overrides))
    files.write_whole(folder / "points.json", (json.dumps([p._asdict() for p in points], indent=1) + "\n").encode())
    return points


def summary(found: Scaling, compute: float) -> dict:
    """Returns the fits as plain numbers; each interval holds 90 % of the resamples."""
    log_k, a = found.power
    by_power = [math.exp(log_k + a * math.log(compute)) for log_k, a in found.powers]
    by_law = [law.best_size(compute) for law in found.laws]
    best = found.law.best_size(compute)

    def optimal(N: float, resampled: list[float]) -> dict:
        low, high = laws.interval(resampled)
        tokens = {"tokens": compute / 6 / N, "tokens_interval": [compute / 6 / high, compute / 6 / low]}
        return {"parameters": N, "parameters_interval": [low, high]} | tokens

    losses = [law.loss(N, compute / 6 / N) for law, N in zip(found.laws, by_law, strict=True)]
    return {
        "points": [point._asdict() for point in found.points],
        "budgets": [
            {"budget": each.budget, "edge": each.edge} | ({} if each.edge else {"parameters": each.N})
            for each in found.parabolas
        ],
        "parabolas": {"exponent": a, "exponent_interval": list(laws.interval(found.powers[:, 1]))}
        | optimal(math.exp(log_k + a * math.log(compute)), by_power),
        "law": {
            name: {"value": value, "interval": list(laws.interval([getattr(law, name) for law in found.laws]))}
            for name, value in found.law._asdict().items()
        }
        | {"exponent": exponent(found.law), "exponent_interval": list(laws.interval([exponent(x) for x in found.laws]))}
        | optimal(best, by_law)
        | {"loss": found.law.loss(best, compute / 6 / best), "loss_interval": list(laws.interval(losses))},
        "compute": compute,
    }


def exponent(law: laws.Law) -> float:
    """Returns the exponent of the best size's growth with compute (Hoffmann et al. 2022, equation 4)."""
    return law.beta / (law.alpha + law.beta)


def text(found: dict) -> str:
    lines = ["budget       size  parameters     tokens    loss"]
    for point in found["points"]:
        lines.append(
            f"{point['budget']:<9.3g}{point['size']:>8}{point['N']:>12.3g}{point['D']:>11.3g}{point['loss']:>8.4f}"
        )
    lines.append("")
    for each in found["budgets"]:
        best = f"not known: {each['edge']}" if each["edge"] else f"{each['parameters']:.3g} parameters"
        lines.append(f"best at {each['budget']:.3g} FLOPs: {best}")
    law, parabolas, compute = found["law"], found["parabolas"], found["compute"]
    shown = {
        name: f"{law[name]['value']:.3g} [{' to '.join(f'{x:.3g}' for x in law[name]['interval'])}]"
        for name in laws.Law._fields
    }
    lines += [
        "",
        f"L = E + A / N^alpha + B / D^beta: {', '.join(f'{name} {value}' for name, value in shown.items())}",
        "",
        f"best for {compute:.3g} FLOPs, with the middle 90 % of {laws.RESAMPLES} resamples:",
    ]
    for name, each in (("parabolas", parabolas), ("law", law)):
        low, high = each["exponent_interval"]
        ranges = [
            f"{each[key]:.3g} {key} [{each[key + '_interval'][0]:.3g} to {each[key + '_interval'][1]:.3g}]"
            for key in ("parameters", "tokens")
        ]
        lines.append(f"  by the {name}: {', '.join(ranges)}, size ~ C^{each['exponent']:.2f} [{low:.2f} to {high:.2f}]")
    lines.append(
        f"  loss by the law: {law['loss']:.3f} [{law['loss_interval'][0]:.3f} to {law['loss_interval'][1]:.3f}]"
    )
    return "\n".join(lines)
