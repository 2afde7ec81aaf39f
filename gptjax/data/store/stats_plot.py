"""The plot of `gptjax data stats`."""

import warnings

import numpy as np
from etils import epath
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, MaxNLocator
from PIL import Image

from gptjax.errors import one_line

BLUE, GREY, RED, INK = "#3b6fb6", "#c9d3df", "#c8553d", "#24303c"
ROWS = 12  # bars in a panel


def draw(found: dict, path: epath.Path) -> None:
    """Draws the result of `stats.stats` as a PNG of 1500 x 800 pixels."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(15, 8), dpi=100, facecolor="white", layout=layout)
    panels = figure.subplots(2, 4)
    figure.suptitle(one_line(_title(found)), parse_math=False, x=0.01, ha="left", fontsize=13, color=INK)
    _numbers(panels[0, 0], found)
    _histogram(panels[0, 1], found["tokens_per_document"], "Tokens a document")
    _histogram(panels[0, 2], found["bytes_per_document"], "Bytes a document")
    languages = {name: count["bytes"] / found["sample"]["bytes"] for name, count in found["languages"].items()}
    _bars(panels[0, 3], languages, "Languages (share of bytes)", lambda value: f"{value:.1%}")
    if found["cleaning"]:
        read = max(found["cleaning"]["read"]["documents"], 1)
        shares = {step: count["documents"] / read for step, count in found["cleaning"].items() if step != "read"}
        _bars(panels[1, 0], shares, "Cleaning (share of documents)", lambda value: f"{value:.2%}")
    else:
        shares = {
            kind: count["documents"] / found["sample"]["documents"] for kind, count in found["duplicates"].items()
        }
        shares = {"unique": 1.0 - sum(shares.values())} | shares
        _bars(panels[1, 0], shares, "Duplicates (share of documents)", lambda value: f"{value:.2%}")
    for panel, (n, ngrams) in zip(panels[1, 1:], found["ngrams"].items(), strict=True):
        title = {"1": "Words", "2": "Pairs of words", "3": "Three words"}[n]
        shares = {words: count / ngrams["total"] for words, count in ngrams["most_frequent"]}
        _bars(panel, shares, f"{title} (share of all)", lambda value: f"{value:.2%}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # for scripts that the font lacks
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[:, :, :3]
    with path.open("wb") as file:
        Image.fromarray(pixels).quantize(64).save(file, "PNG", optimize=True)  # a third of the size, same look


def _title(found: dict) -> str:
    source, where = (found["settings"].get(f"data.{key}", "") for key in ("source", "path"))
    whole = "every document" if found["sample"]["whole"] else "a sample by hash"
    looked = f"{found['sample']['documents']:,} of {found['total']['documents']:,} documents looked at ({whole})"
    return f"{source} {where}".strip()[:70] + f"  ·  {looked}"


def _numbers(panel, found: dict) -> None:
    """Draws a table of counts."""
    panel.axis("off")
    short = EngFormatter(places=3, sep=" ")
    rows = [("", "train", "held out")]
    for key in ("documents", "tokens", "bytes"):
        train, heldout = (
            f"{count:,}" if count < 10_000 else short(count)
            for count in (found["splits"][name][key] for name in ("train", "heldout"))
        )
        rows.append((key, train, heldout))
    rows += [("bytes a token", f"{found['bytes_per_token']:.2f}", ""), ("vocabulary", f"{found['vocab_size']:,}", "")]
    table = panel.table(rows, loc="upper left", edges="horizontal", cellLoc="right", bbox=(0, 0.3, 1, 0.68))
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    for (_, column), cell in table.get_celld().items():
        cell.set_edgecolor(GREY)
        cell.get_text().set_color(INK)
        if column == 0:
            cell.get_text().set_horizontalalignment("left")
    panel.set_title("Counts", loc="left", color=INK, fontsize=11)


def _histogram(panel, lengths: dict, title: str) -> None:
    """Draws bins that double as columns of equal width, and the median."""
    counts, edges = np.array(lengths["counts"]), lengths["edges"]
    panel.bar(np.arange(len(counts)) + 0.5, 100 * counts / counts.sum(), width=0.92, color=BLUE)
    median = np.log2(max(lengths["median"], 1))
    panel.axvline(median, color=RED, linewidth=1.5)
    panel.text(
        median, 1.0, f" median {lengths['median']:,}", color=RED, va="top", transform=panel.get_xaxis_transform()
    )
    first = int(np.flatnonzero(counts)[0])
    panel.set_xlim(first, len(counts))
    ticks = range(first, len(edges), max(1, (len(edges) - first) // 5))
    panel.set_xticks(ticks, [_power(edges[tick]) for tick in ticks])
    panel.margins(y=0.12)
    _plain(panel, f"{title} (share of documents)")
    panel.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")


def _power(number: int) -> str:
    """A power of two in units of 1024."""
    unit = (number.bit_length() - 1) // 10
    return f"{number >> 10 * unit}{' kMGT'[unit].strip()}"


def _bars(panel, shares: dict[str, float], title: str, shown) -> None:
    """Draws horizontal bars with their numbers, the largest at the top; shows the first ROWS only."""
    names, values = list(shares)[:ROWS], list(shares.values())[:ROWS]
    rows = panel.barh(range(len(names)), values, color=[GREY if name in ("kept", "unique") else BLUE for name in names])
    panel.bar_label(rows, [f" {shown(value)}" for value in values], color=INK, fontsize=8)
    panel.set_yticks(range(len(names)), [name if len(name) <= 28 else name[:27] + "…" for name in names])
    panel.set_ylim(max(len(names), 6) - 0.4, -0.6)
    panel.set_xlim(0, 1.25 * max(values, default=1))
    panel.set_xticks([])
    _plain(panel, title)


def _plain(panel, title: str) -> None:
    panel.set_title(title, loc="left", color=INK, fontsize=11)
    panel.spines[["top", "right", "bottom"]].set_visible(False)
    panel.spines["left"].set_color(GREY)
    panel.tick_params(length=0, colors=INK)
