"""Draws the picture of `gptjax scale`."""

import io

import numpy as np
from etils import epath
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gptjax.experiments.scaling import laws
from gptjax.experiments.scaling.laws import Scaling

GREY, RED, INK = "#c9d3df", "#c8553d", "#24303c"


def draw(found: Scaling, compute: float, path: epath.Path) -> None:
    """Draws loss over size with the parabola of each budget, and the best size over compute, as a PNG."""
    figure = Figure(figsize=(12, 4.8), dpi=90, facecolor="white", layout="constrained")
    losses, sizes = figure.subplots(1, 2)
    colors = colormaps["viridis"](np.linspace(0.0, 0.85, len(found.parabolas)))
    for each, color in zip(found.parabolas, colors, strict=True):
        here = sorted((point.N, point.loss) for point in found.points if point.budget == each.budget)
        N, loss = np.array(here).T
        wide = np.geomspace(N[0] / 1.2, N[-1] * 1.2, 100)
        losses.plot(wide, np.polyval(each.coefficients, np.log(wide)), color=color, lw=1)
        losses.plot(N, loss, "o", color=color, ms=5, label=f"{each.budget:.3g} FLOPs")
        if not each.edge:
            losses.plot(each.N, np.polyval(each.coefficients, np.log(each.N)), "*", color=RED, ms=12)
            sizes.plot(each.budget, each.N, "*", color=RED, ms=12, zorder=3)
    losses.set(xscale="log", xlabel="parameters (FLOPs a token / 6)", ylabel="held-out loss, nats a token")
    losses.legend(frameon=False)
    budgets = [each.budget for each in found.parabolas]
    C = np.geomspace(min(budgets) / 2, max(compute, max(budgets)) * 2, 100)
    lines = np.array([np.ones_like(C), np.log(C)])
    by_parabolas = np.exp(found.powers @ lines), np.exp(found.power @ lines)
    by_law = np.array([law.best_size(C) for law in found.laws]), found.law.best_size(C)
    for (many, best), color, name in ((by_parabolas, RED, "parabolas"), (by_law, INK, "law")):
        sizes.fill_between(C, *np.percentile(many, laws.INTERVAL, axis=0), color=color, alpha=0.15, lw=0)
        sizes.plot(C, best, color=color, lw=1.5, label=f"by the {name}, with the middle 90 %")
    sizes.axvline(compute, color=GREY, lw=1)
    sizes.set(xscale="log", yscale="log", xlabel="compute, FLOPs", ylabel="best size, parameters")
    sizes.legend(frameon=False)
    for panel in (losses, sizes):
        panel.spines[["top", "right"]].set_visible(False)
    made = io.BytesIO()
    FigureCanvasAgg(figure).print_png(made)
    path.write_bytes(made.getvalue())
