"""Draws the picture of a sweep: the best loss from trial to trial, and each parameter against the loss."""

import io
import math
import pathlib

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from gptjax.runtime.files import write_whole

BLUE, GREY, RED, INK = "#3b6fb6", "#c9d3df", "#c8553d", "#24303c"
PANELS = 12  # at most; in a space of more keys the last ones are left out
COLUMNS = 4


def draw(trials: list[FrozenTrial], space: dict[str, BaseDistribution], path: pathlib.Path) -> None:
    """Draws the trials that have ended as a PNG; losses far above the complete ones are put at the upper edge."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    pruned = [trial for trial in trials if trial.state == TrialState.PRUNED and trial.value is not None]
    if not complete:
        return
    best = min(complete, key=lambda trial: trial.value)
    losses = sorted(trial.value for trial in complete)
    low, high = losses[0], losses[math.ceil(0.9 * len(losses)) - 1]
    room = max(high - low, 0.01 * abs(low), 1e-6)
    low, high = low - 0.1 * room, high + 0.25 * room
    keys = list(space)[: PANELS - 1]
    columns = min(len(keys) + 1, COLUMNS)
    rows = math.ceil((len(keys) + 1) / columns)
    figure = Figure(figsize=(4 * columns, 3.4 * rows), dpi=110, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    _dots(panels[0], [(t.number, t.value) for t in complete], [(t.number, t.value) for t in pruned], high)
    in_order = sorted(complete, key=lambda trial: trial.number)
    so_far = [min(trial.value for trial in in_order[: i + 1]) for i in range(len(in_order))]
    numbers = [trial.number for trial in in_order]
    panels[0].step([*numbers, len(trials) - 1], [*so_far, so_far[-1]], where="post", color=RED, linewidth=1.6)
    panels[0].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _plain(panels[0], "trial (line: the best so far)")
    for panel, key in zip(panels[1:], keys, strict=False):  # the last panels may stay empty
        values = space[key]
        if isinstance(values, CategoricalDistribution):
            place = values.choices.index
            panel.set_xticks(range(len(values.choices)), [str(choice)[:20] for choice in values.choices])
            panel.set_xlim(-0.6, len(values.choices) - 0.4)
        else:
            place = float
            if values.log:
                panel.set_xscale("log")
                panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                panel.xaxis.set_major_formatter("{x:g}")
                panel.xaxis.set_minor_formatter(NullFormatter())
            panel.set_xlim(values.low, values.high)
        shown = [[(place(t.params[key]), t.value) for t in group] for group in (complete, pruned)]
        _dots(panel, *shown, high)
        panel.plot(place(best.params[key]), best.value, "o", color=RED, markersize=9, zorder=4, clip_on=False)
        _plain(panel, key)
    for panel in panels[len(keys) + 1 :]:
        panel.set_visible(False)
    panels[0].set_ylim(low, high + 0.04 * (high - low))
    for first in panels[::columns]:
        first.set_ylabel("held-out loss, nats a token", color=INK)
    title = f"{len(complete)} complete, {len(pruned)} pruned (hollow); best {best.value:.4f}, trial {best.number}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK)
    FigureCanvasAgg(figure)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_whole(path, picture.getvalue())


def _dots(panel, complete: list[tuple], pruned: list[tuple], high: float) -> None:
    """Draws full dots, and hollow dots for pruned trials at their last loss; losses above `high` lie on `high`."""
    for points, face in ((pruned, "white"), (complete, BLUE)):
        if points:
            x, y = zip(*points, strict=True)
            panel.scatter(
                x, [min(loss, high) for loss in y], s=36, facecolors=face, edgecolors=BLUE, zorder=3, clip_on=False
            )


def _plain(panel, title: str) -> None:
    panel.set_title(title, loc="left", color=INK, fontsize=10, parse_math=False)
    panel.grid(color=GREY, linewidth=0.5)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(GREY)
    panel.tick_params(which="both", length=0, colors=INK)
