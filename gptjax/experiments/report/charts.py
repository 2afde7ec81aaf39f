"""Draws curves as inline SVG by matplotlib, in the style's colours, with their numbers for the page's script."""

import io
import itertools
import math
import re
from array import array

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from gptjax.experiments.report.runs import Curve, Run

WIDTH, HEIGHT = 560, 300  # of a chart, in its own units
POINTS = 6000  # of a chart, over all its curves; a long curve is thinned
COLOURS = 8  # that the style has for runs
# Stand-ins for the variables of the style: matplotlib takes no others.
INK, MUTED, GRID, RUN = "#fd0000", "#fd0001", "#fd0002", "#fe00{:02x}"
STYLE = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "font.family": "sans-serif",
    "font.size": 9,
    "path.simplify": True,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
}


def colour(number: int) -> str:
    """Returns the style's variable for the colour of a run."""
    return f"var(--run{number % COLOURS})"


def charts(runs: list[Run]) -> list[dict]:
    """Returns title, svg and data of each chart with numbers; the script shows the data under the pointer."""
    wanted = [
        ("Training loss, nats a token", "loss", False),
        ("Held-out loss, nats a token", "eval_loss", False),
        ("Held-out text, bits a byte", "eval_bits_per_byte", False),
        ("Learning rate", "learning_rate", False),
        ("Throughput, tokens a second", "tokens_per_second", False),
        ("Model FLOPs utilization (MFU)", "mfu", False),
        ("Norm of the gradient", "grad_norm", True),
    ]
    return [_chart(title, key, log, runs) for title, key, log in wanted if any(run.curves[key].steps for run in runs)]


def _chart(title: str, key: str, log: bool, runs: list[Run]) -> dict:
    most = max(POINTS // len(runs), 50)
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": key}):  # ids of one page have to differ
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), facecolor="none")
        axes = figure.add_axes((0.1, 0.08, 0.88, 0.89), facecolor="none")
        series, drawn, lowest = [], [], []
        for number, run in enumerate(runs):
            curve = run.curves[key]
            if not curve.steps:
                continue
            steps, values = thinned(curve, most)
            line = dict(color=RUN.format(number % COLOURS), solid_joinstyle="round")
            if key == "loss" and len(curve.steps) > 20:
                axes.plot(steps, values, **line, linewidth=0.8, alpha=0.4)
                lowest.append(values)
                steps, values = thinned(Curve(curve.steps, smoothed(curve.values)), most)
            drawn.append(values)
            seldom = (key.startswith("eval") and len(steps) <= 40) or len(steps) == 1
            marker = dict(marker="o", markersize=3) if seldom else {}
            axes.plot(steps, values, **line, **marker, linewidth=1.6)
            series.append({"run": number, "x": steps.tolist(), "y": [float(f"{value:.5g}") for value in values]})
        _scale(axes, key, log and min(map(np.min, drawn)) > 0, lowest + drawn, drawn)
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(color=GRID, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(which="both", length=0)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        left, right = axes.get_xlim()
    return {"title": title, "svg": _inline(file.getvalue()), "data": {"left": left, "right": right, "series": series}}


def _scale(axes, key: str, log: bool, lowest: list, drawn: list) -> None:
    """Sets the range of the values. The range of a loss leaves out the first fall, which would flatten the rest."""
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif key in ("learning_rate", "tokens_per_second", "mfu"):
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(EngFormatter(sep="") if key == "tokens_per_second" else "{x:g}")
    else:
        low = min(float(np.min(values)) for values in lowest)
        high = max(float(np.max(values[len(values) // 20 :])) for values in drawn)
        room = max(0.06 * (high - low), 1e-9 + 1e-4 * abs(high))
        axes.set_ylim(low - room, high + room)


def thinned(curve: Curve, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Thins a curve to at most `most` points: the lowest and highest of each stretch, and both ends, in order."""
    steps, values = np.asarray(curve.steps), np.asarray(curve.values)
    if len(steps) <= most:
        return steps, values
    edges = np.linspace(0, len(values), (most - 2) // 2 + 1).astype(int)
    kept = {0, len(values) - 1}
    for first, stop in itertools.pairwise(edges):
        kept |= {first + int(np.argmin(values[first:stop])), first + int(np.argmax(values[first:stop]))}
    kept = sorted(kept)
    return steps[kept], values[kept]


def smoothed(values: array) -> np.ndarray:
    """Returns the mean over a window of a fiftieth of the values, shorter at the ends."""
    values, half = np.asarray(values), max(len(values) // 100, 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    reach = np.minimum(half, np.minimum(at, len(values) - 1 - at))  # the same on both sides, so that a slope stays
    return (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)


def _inline(svg: str) -> str:
    """Returns the svg element alone, in full width, with the style's variables in place of the stand-ins."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg)
    for stand_in, name in ((INK, "ink"), (MUTED, "muted"), (GRID, "grid")):
        svg = svg.replace(stand_in, f"var(--{name})")
    return re.sub(r"#fe00([0-9a-f]{2})", lambda found: colour(int(found[1], 16)), svg)


def rounded(value: float) -> str:
    """Formats a number for a reader: four digits, and 12.3k or 4.56M for large numbers."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    return EngFormatter(places=2, sep="")(value) if 1e4 <= abs(value) < 1e15 else f"{value:.3g}"
