"""Reports: of real and of made-up runs, whole, broken, empty and very long; nothing of a run is taken for HTML."""

import base64
import dataclasses
import hashlib
import html.parser
import json
import os
import re
import shutil
import socket
import time

import numpy as np
import pytest
from etils import epath

from gptjax.experiments.report import charts, page, runs
from gptjax.runtime import heartbeat
from gptjax.training.config import schema

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7 * 7 }}$x^2$"
STEP = {"learning_rate": 0.1, "tokens_per_second": 100.0, "step_seconds": 0.5, "grad_norm": 1.0, "skipped_updates": 0}


def made(folder, rows, **changes):
    """A workdir with these rows, and a config with these values."""
    folder.mkdir(parents=True)
    loaded = schema.default()
    with loaded.unlocked():
        loaded.update(changes)
    (folder / "config.json").write_text(schema.to_json(schema.parse(loaded)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return epath.Path(folder)


def losses(count, start=0):
    return [{"step": start + i + 1, "loss": 5.0 / (i + 1), "time": 1000.0 + i} | STEP for i in range(count)]


class Tags(html.parser.HTMLParser):
    """Every element of a page with its attributes, and the text of tables and samples."""

    def __init__(self, text):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, text):
        self.text += text


def test_a_real_run(gptjax_main, finished, tmp_path):
    target = tmp_path / "report.html"
    code, out, _ = gptjax_main("report", finished, f"--target={target}")
    text = target.read_text()
    seen = Tags(text)
    assert (code, out) == (0, f"wrote {target}\n") and len(text) < 400_000
    assert [tag for tag, _ in seen.found].count("svg") == 6  # MFU is not known here
    assert "4 of 4" in seen.text and "8 × cpu" in seen.text and "data 1, fsdp 8" in seen.text and "jax 0." in seen.text
    assert "complete" in seen.text and (finished / "samples.txt").read_text().strip()[:20] in seen.text
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    loss = next(row["eval_loss"] for row in rows if "eval_loss" in row)
    assert charts.rounded(loss) in seen.text
    assert (
        "optimizer.warmup_steps" in seen.text and "model.activation" not in seen.text
    )  # of which the one is default's
    assert re.search(r"training steps \d+\.\d %", seen.text)


def test_it_needs_nothing_beside_itself(finished):
    """No address is loaded, and the policy lets no script run but the page's own."""
    text = page.page(runs.read([epath.Path(finished)]))
    seen = Tags(text)
    for tag, attributes in seen.found:
        assert tag not in ("link", "iframe", "object", "img", "base")
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#")
    assert not re.search(r"url\((?!#)|@import", text)
    policy = next(a["content"] for t, a in seen.found if a.get("http-equiv") == "Content-Security-Policy")
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert policy.startswith("default-src 'none'")
    assert len(re.findall(r"\bid=\"([^\"]+)\"", text)) > len(seen.found) // 20
    ids = [attributes["id"] for tag, attributes in seen.found if tag in ("clippath", "path") and "id" in attributes]
    assert len(ids) == len(set(ids)), "two charts would share a shape"


def test_what_a_run_says_is_text(tmp_path):
    rows = losses(30) + [{"step": 30, "eval_error": EVIL, EVIL: 1.0, "task/" + EVIL: 0.5, "eval_loss": 1.0}]
    rows.insert(0, {"step": 0, "devices": EVIL, "mesh": EVIL, "versions": EVIL, "first_step_seconds": 1.0})
    folder = made(tmp_path / EVIL.replace("/", "_"), rows, sample_prompt=EVIL)
    (folder / "samples.txt").write_text(EVIL)
    (folder / "skipped.jsonl").write_text(json.dumps({"step": 3, "reason": EVIL, "batch": 3}) + "\n")
    text = page.page(runs.read([folder, made(tmp_path / "b", losses(3))]))
    seen = Tags(text)
    assert [tag for tag, _ in seen.found].count("script") == 2
    assert not any(tag == "img" or "onerror" in attributes for tag, attributes in seen.found)
    assert seen.text.count("alert(1)") >= 8 and "{{ 7 * 7 }}" in seen.text


def test_two_runs_beside_each_other(tmp_path):
    one = made(tmp_path / "a/run", losses(50) + [{"step": 50, "eval_loss": 2.0, "task/x": 0.5}])
    two = made(tmp_path / "b/run", losses(50) + [{"step": 50, "eval_loss": 1.5}], batch_size=64)
    read = runs.read([one, two])
    assert [run.name for run in read] == ["a/run", "b/run"]
    assert runs.differences(read) == [("batch_size", [32, 64])]
    text = page.page(read)
    assert '<td class="best">1.5 (step 50)</td>' in text and '<th scope="row">task/x</th><td>0.5</td><td>–</td>' in text
    assert "stroke: var(--run1)" in text and "#fe00" not in text and "#fd00" not in text


def test_of_one_run_the_config_is_held_against_the_defaults(tmp_path):
    (run,) = runs.read([made(tmp_path / "run", [], num_steps=700)])
    assert ("num_steps", [1000, 700]) in runs.differences([run]) and run.state == "not begun"
    assert not any(key == "batch_size" for key, _ in runs.differences([run]))


@pytest.mark.parametrize("spoil", [
    lambda folder: (folder / "metrics.jsonl").unlink(),
    lambda folder: (folder / "metrics.jsonl").write_bytes(b"\xff\0" * 1000),
    lambda folder: (folder / "metrics.jsonl").write_text(
        '{"step": 1, "loss": "high", "time": [], "first_step_seconds": "x"}\n'),
    lambda folder: (folder / "metrics.jsonl").write_text(
        '{"step": 1, "loss": NaN}\n{"step": 2, "loss": 1e999, "eval_loss": NaN}\n'),
    lambda folder: (folder / "metrics.jsonl").write_text(
        '{"step": %s, "loss": 1.0}\n{"step": -1, "loss": 2}\n' % ("9" * 30)),
    lambda folder: (folder / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 1e308}\n{"step": 2, "loss": -1e308}\n' * 20),
    lambda folder: (folder / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 1.0, "eval_loss": 1, "eval_error": 3}\n{"step": 2, "lo'),
    lambda folder: (folder / "config.json").write_text("{"),
    lambda folder: (folder / "samples.txt").mkdir(),
    lambda folder: (folder / "samples.txt").write_bytes(b"\xff" * (2 << 20)),
    lambda folder: (folder / "skipped.jsonl").write_text('{"step": 1}\nx\n'),
    lambda folder: (folder / "hosts").mkdir(),
], ids=range(12))  # fmt: skip
def test_what_is_broken_or_missing_is_left_out(tmp_path, spoil):
    folder = made(tmp_path / "run", [])
    spoil(folder)
    text = page.page(runs.read([folder, made(tmp_path / "whole", losses(3))]))
    assert "Throughput" in text and "nan" not in Tags(text).text.lower().replace("alert", "")


def test_a_run_that_is_not_complete(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    values = json.loads((folder / "config.json").read_text()) | {"num_steps": 100}
    (folder / "config.json").write_text(json.dumps(values))
    (run,) = runs.read([epath.Path(folder)])
    assert run.state == "stopped" and "4 of 100" in Tags(page.page([run])).text
    beat = heartbeat.Beat(0, socket.gethostname(), os.getpid(), "training", "", 4, 9, False, 0.0, 1.0, 0.1, time.time())
    (folder / "hosts").mkdir(exist_ok=True)
    (folder / "hosts" / "0.json").write_text(json.dumps(dataclasses.asdict(beat)))
    (run,) = runs.read([epath.Path(folder)])
    assert run.state == "in progress" and "in progress" in Tags(page.page([run])).text


def test_many_rows_are_thinned(tmp_path):
    rows = losses(1)[0]
    path = made(tmp_path / "run", []) / "metrics.jsonl"
    del rows["step"], rows["loss"]
    rest = json.dumps(rows)[1:]
    with path.open("w") as file:
        file.writelines(f'{{"step": {i}, "loss": {3 + (i == 77_777) * 5}, {rest}\n' for i in range(1, 100_001))
    (run,) = runs.read([epath.Path(tmp_path / "run")])
    steps, values = charts.thinned(run.curves["loss"], 500)
    assert len(steps) <= 500 and values.max() == 8 and 77_777 in steps, "a spike of one step is seen"
    assert (steps[0], steps[-1]) == (1, 100_000) and all(np.diff(steps) > 0)
    assert len(page.page([run])) < 1_000_000


def test_where_the_time_went(tmp_path):
    """Ten steps of two seconds before a stop and ten after it, 40 of 100 seconds; the rest is told too."""
    rows = [{"step": 0, "first_step_seconds": 10.0, "time": 1010.0}]
    rows += [{"step": 10, "loss": 1.0, "time": 1030.0} | STEP | {"step_seconds": 2.0}]
    rows += [{"step": 10, "save_blocked_seconds": 3.0, "save_seconds": 5.0, "time": 1034.0}]
    rows += [{"step": 10, "first_step_seconds": 7.0, "time": 1075.0}]
    rows += [{"step": 20, "loss": 1.0, "time": 1100.0} | STEP | {"step_seconds": 2.0}]
    (run,) = runs.read([made(tmp_path / "run", rows)])
    assert run.seconds == {"steps": 40.0, "starting": 17.0, "saving": 3.0, "whole": 100.0} and run.goodput == 0.4
    assert [part["percent"] for part in page.times(run)["parts"]] == ["40.0", "17.0", "3.0", "40.0"]
    for row in rows:
        del row["time"]
    (run,) = runs.read([made(tmp_path / "old", rows)])
    assert run.goodput is None and page.times(run)["parts"] == []


def test_smoothing_keeps_a_slope_and_a_level():
    line = np.arange(1000.0)
    assert charts.smoothed(line) == pytest.approx(line) and charts.smoothed(np.ones(3)) == pytest.approx(np.ones(3))


@pytest.mark.parametrize("words, sentence", [
    (["nowhere"], "nowhere has no config.json and no metrics.jsonl: give the workdirs of runs."),
    (["finishd"], 'Did you mean "finished"?'),
    (["finished", "finished"], "is given twice: name each run once."),
    (["finished", "--target=."], "--target=. is a folder: give the name of a file"),
    (["finished", "--target=nowhere/report.html"], "--target=nowhere/report.html is in no folder that exists."),
    ([], "the following arguments are required: WORKDIR"),
])  # fmt: skip
def test_refusals(refused, finished, monkeypatch, words, sentence):
    monkeypatch.chdir(finished.parent)
    assert sentence in refused(finished, "report", *words)
    assert not (finished.parent / "report.html").exists()
