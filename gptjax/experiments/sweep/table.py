"""Formats the trials of a sweep as a table for a terminal."""

import math

from optuna.trial import FrozenTrial, TrialState


def text(trials: list[FrozenTrial], keys: list[str]) -> str:
    """Formats one row per trial: complete trials by loss, then pruned trials by last loss, then failed trials.

    keys: the columns, keys of the config.
    """
    rows = [("trial", "state", "held-out loss", "step", *keys, "")]
    for trial in sorted(trials, key=_order):
        loss = "" if trial.value is None else f"{trial.value:.4f}"
        step = "" if trial.last_step is None else str(trial.last_step)
        values = (short(trial.params[key]) if key in trial.params else "" for key in keys)
        why = trial.user_attrs.get("reason", "") if trial.state == TrialState.FAIL else ""
        rows.append((str(trial.number), trial.state.name.lower(), loss, step, *values, why))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _order(trial: FrozenTrial) -> tuple[int, float, int]:
    ranks = {TrialState.COMPLETE: 0, TrialState.PRUNED: 1}
    return ranks.get(trial.state, 2), math.inf if trial.value is None else trial.value, trial.number


def short(value) -> str:
    return f"{value:.4g}" if type(value) is float else str(value)
