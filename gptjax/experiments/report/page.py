"""`gptjax report`: makes one self-contained HTML page about one or several runs.

A template escapes all text, since samples, paths and values may hold anything. The page's policy lets a browser run
only the page's script, and load nothing.
"""

import base64
import hashlib
import os
import pathlib
import tempfile
import time

import jinja2
from etils import epath
from markupsafe import Markup

from gptjax import __version__
from gptjax.errors import Refused, nearest
from gptjax.experiments.report import charts
from gptjax.experiments.report.charts import rounded
from gptjax.experiments.report.runs import Run, differences, median, read
from gptjax.runtime import files

HERE = pathlib.Path(__file__).parent
SAMPLE_CHARS = 4000  # characters of a run's samples on the page
CELL_CHARS = 200
MAX_ROWS = 300  # rows of a table


def write(folders: list[epath.Path], target: epath.Path) -> None:
    """Writes the page, and replaces an existing file. Raises: Refused."""
    check_target(target)
    files.write_whole(target, page(read(folders)).encode())


def check_target(target: epath.Path) -> None:
    """Raises: Refused, if no file of this name can be written."""
    if target.is_dir():
        raise Refused(f"--target={target} is a folder: give the name of a file, such as {target / 'report.html'}.")
    if "://" in str(target):
        return
    if not target.parent.is_dir():
        near = target.parent.parent
        beside = [path.name for path in near.iterdir() if path.is_dir()] if near.is_dir() else []
        raise Refused(f"--target={target} is in no folder that exists.{nearest(target.parent.name, beside)}")
    try:
        with tempfile.TemporaryFile(dir=os.fspath(target.parent)):
            pass
    except OSError as error:
        raise Refused(f"--target={target} can't be written ({error.strerror}): give another.") from error


def page(runs: list[Run]) -> str:
    """Renders the page of some runs."""
    script = (HERE / "hover.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    drawn = charts.charts(runs)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((HERE / "page.html").read_text("utf-8"))
    legend = [
        {"name": run.name, "colour": charts.colour(number), "state": run.state} for number, run in enumerate(runs)
    ]
    return template.render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        made=f"{time.strftime('%Y-%m-%d %H:%M')}, gptjax {__version__}",
        style=Markup((HERE / "style.css").read_text("utf-8")),
        script=Markup(script),
        digest=digest,
        legend=legend,
        charts=[chart | {"svg": Markup(chart["svg"])} for chart in drawn],
        data={"runs": legend, "charts": [chart["data"] for chart in drawn]},
        overview=overview(runs),
        evaluation=evaluation(runs),
        time_bars=[times(run) for run in runs],
        config=config(runs),
        samples=[
            {"name": run.name, "text": run.samples[:SAMPLE_CHARS], "cut": len(run.samples) > SAMPLE_CHARS}
            for run in runs
            if run.samples
        ],
        starts=starts(runs),
        events=events(runs),
    )


def table(head: list, rows: list[list], best: list[int] | None = None) -> dict:
    """Makes a table of texts. best: the best column of each row, counted from 1; 0 is none."""
    cut = [[_text(cell) for cell in row] for row in rows[:MAX_ROWS]]
    return {
        "head": head,
        "rows": list(zip(cut, (best or [0] * len(rows))[:MAX_ROWS], strict=True)),
        "left_out": len(rows) - len(cut),
    }


def _text(value) -> str:
    if value is None or value == "":
        return "–"
    text = rounded(value) if type(value) is float else f"{value:,}" if type(value) is int else str(value)
    return text if len(text) <= CELL_CHARS else text[:CELL_CHARS] + " …"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def overview(runs: list[Run]) -> dict:
    """Makes the table of main numbers: one row per number, one column per run."""
    rows = [
        ["step", *(f"{run.step:,} of {_text(run.config.get('num_steps'))}" for run in runs)],
        ["parameters", *(run.last.get("parameters") for run in runs)],
        ["tokens seen", *(run.last.get("tokens_seen") for run in runs)],
        ["training loss, last", *(run.last.get("loss") for run in runs)],
        ["held-out loss, last", *(run.last.get("eval_loss") for run in runs)],
        [
            "held-out loss, least",
            *(f"{rounded(run.best[1])} (step {run.best[0]:,})" if run.best else "–" for run in runs),
        ],
        ["bits a byte, last", *(run.last.get("eval_bits_per_byte") for run in runs)],
        ["tokens a second, median", *(median(run.curves["tokens_per_second"]) for run in runs)],
        ["MFU, median", *(_percent(median(run.curves["mfu"])) for run in runs)],
        ["goodput", *(_percent(run.goodput) for run in runs)],
        ["starts", *(len(run.starts) for run in runs)],
        ["updates left out", *(run.last.get("skipped_updates") for run in runs)],
        ["saves", *(run.saves for run in runs)],
    ]
    least = min((run.best[1] for run in runs if run.best), default=None)
    best = [0] * len(rows)
    if len(runs) > 1 and least is not None:
        best[5] = 1 + next(number for number, run in enumerate(runs) if run.best and run.best[1] == least)
    return table(["", *(run.name for run in runs)], rows, best)


def evaluation(runs: list[Run]) -> dict:
    """Makes the table of the last value of every evaluation, tasks included."""
    keys = dict.fromkeys(key for run in runs for key in run.last if key.startswith(("eval_", "task/")))
    numbers = [key for key in keys if any(type(run.last.get(key)) in (int, float) for run in runs)]
    rows = [[key.removeprefix("eval_"), *(run.last.get(key) for run in runs)] for key in numbers]
    return table(["last value of", *(run.name for run in runs)], rows)


def times(run: Run) -> dict:
    """Returns shares of a run's time by activity."""
    whole = run.seconds["whole"]
    if not whole:
        return {"name": run.name, "parts": [], "hours": ""}
    seconds = {
        "training steps": run.seconds["steps"],
        "starting": run.seconds["starting"],
        "saving": run.seconds["saving"],
    }
    seconds["evaluating, done twice, or not running"] = max(0.0, whole - sum(seconds.values()))
    total = sum(seconds.values())
    parts = [
        {"name": name, "percent": f"{100 * each / total:.1f}", "number": number, "seconds": f"{each:,.0f} s"}
        for number, (name, each) in enumerate(seconds.items())
    ]
    return {"name": run.name, "parts": parts, "hours": f"{whole / 3600:.2f} h"}


def config(runs: list[Run]) -> dict:
    heads = ["key", "default", runs[0].name] if len(runs) == 1 else ["key", *(run.name for run in runs)]
    return table(heads, [[key, *map(repr_of, values)] for key, values in differences(runs)])


def repr_of(value) -> str:
    """Formats a value of a config as on the command line."""
    return "" if value is None else '""' if value == "" else str(value).lower() if type(value) is bool else str(value)


def starts(runs: list[Run]) -> dict:
    """Makes the table of starts and their devices."""
    keys = "step", "devices", "mesh", "versions", "compile_seconds", "compilation_cache", "first_step_seconds"
    rows = [[run.name, *(start.get(key) for key in keys)] for run in runs for start in run.starts]
    heads = "after step", "devices", "mesh", "versions", "compiled in, s", "cache", "first step after, s"
    return table(["run", *heads], rows)


def events(runs: list[Run]) -> dict:
    """Makes the table of skipped updates and failed evaluations."""
    rows = []
    for run in runs:
        more = f" ({run.num_skipped} steps in all)" if run.num_skipped > len(run.skipped) else ""
        rows += [[run.name, row["step"], f"left out: {row.get('reason', '')}{more}"] for row in run.skipped]
        rows += [[run.name, row["step"], f"not evaluated: {row['eval_error']}"] for row in run.failed_evaluations]
    return table(["run", "step", "what"], rows)
