"""The first reading of a corpus: shares the source out into tasks, extracts and cleans its text, counts documents."""

import hashlib
import itertools
import json
import time
from typing import NamedTuple

from etils import epath

from gptjax.data.cleaning import pipeline
from gptjax.data.cleaning.pipeline import CleanConfig
from gptjax.data.preparation import executor
from gptjax.data.preparation.tasks import LOWEST, Corpus, Extract, Survey, done, finish, path, result
from gptjax.data.sources import sources
from gptjax.data.sources.documents import END, PLACES, DataConfig, Part
from gptjax.errors import Refused
from gptjax.runtime import heartbeat, progress
from gptjax.runtime.files import size_of

# The size of a task; smaller where a corpus would give few tasks of this size.
TASK_BYTES, LEAST_TASK_BYTES, TASKS = 64 << 20, 1 << 20, 256
# How far the held-out bytes may be from the asked fraction, in parts of the fraction: until the cut moves, and until a
# warning.
NEAR, WARN = 0.25, 0.5


class Surveyed(NamedTuple):
    """Counts of a corpus, and the line between training and held-out documents.

    cut: documents with a smaller hash are held out.
    tasks: the result of each task.
    """

    documents: int
    bytes: int
    cut: int
    tasks: list[dict]


def surveyed(data: DataConfig, cleaning: CleanConfig, folder: epath.Path, settings: dict, workers: int):
    """Reads a source up to the point where its text can be tokenized.

    Returns: the corpus that is tokenized; its `Surveyed`; the counts of `_lost`; and the report and samples of
    cleaning, or None.
    """
    corpus, tasks = _corpus(data, sources.parts(data), folder, settings)
    lost, cleaned = None, None
    if data.source in sources.SLOW:
        corpus, lost = _extract(data, corpus, tasks, folder, workers)
    if cleaning.steps():

        def run(step, tasks: int, words: str):
            run_step(step, tasks, workers, folder, words, None)

        corpus, *cleaned = pipeline.clean(cleaning, corpus, tasks, folder / "clean", run)
    survey = _survey(data, corpus, tasks, folder, workers)
    return corpus, survey, _lost(survey.tasks) if lost is None else lost, cleaned


def work(folder: epath.Path) -> str:
    """A description of what is prepared in a folder, as `_corpus` wrote it; "" if nothing is."""
    file = folder / "work.json"
    return file.read_text() if file.exists() else ""


def _corpus(data: DataConfig, parts: list[Part], folder: epath.Path, settings: dict) -> tuple[Corpus, int]:
    """The corpus prepared in `folder`, and its number of tasks; removes the work of other settings or files."""
    tasks = _tasks(parts)
    listed = hashlib.sha256(json.dumps(tasks).encode()).hexdigest()
    described = json.dumps({"settings": settings, "parts": listed}, sort_keys=True)
    corpus = Corpus(data, folder / "tasks")
    earlier = work(folder)
    if earlier == described:
        print(f"resuming the preparation in {folder}", flush=True)
        return corpus, len(tasks)
    if earlier:
        print(f"starting over in {folder}, where other files or settings were being prepared", flush=True)
    (folder / "work.json").unlink(missing_ok=True)  # first, since a call must not resume what is half removed
    for item in folder.iterdir():
        if item.is_dir():
            item.rmtree()
        elif item.name != "owner.json":
            item.unlink()
    corpus.tasks.mkdir()
    for number, task in enumerate(tasks):
        finish(corpus.tasks, number, task)
    (folder / "work.json").write_text(described)
    return corpus, len(tasks)


def _tasks(parts: list[Part]) -> list[list[Part]]:
    """Groups neighbouring parts into tasks that are large enough to be shared out."""
    size = min(max(sum(part.size for part in parts) // TASKS, LEAST_TASK_BYTES), TASK_BYTES)
    tasks, held = [[]], 0
    for part in parts:
        if held >= size:
            tasks.append([])
            held = 0
        tasks[-1].append(part)
        held += part.size
    return tasks


def run_step(step, tasks: int, workers: int, folder: epath.Path, words: str, total: int | None) -> None:
    """Does all tasks of a step of `tasks.py`, with a bar that counts documents."""
    step.folder.mkdir(exist_ok=True)
    finished = [result(step.folder, task) for task in range(tasks) if done(step.folder, task)]
    count, num_bytes, num_tokens = (sum(each.get(key, 0) for each in finished) for key in executor.Counts._fields)
    started, before = time.monotonic(), num_bytes
    with progress.progress(words, total, count) as bar:

        def report(more_documents: int, more_bytes: int, more_tokens: int):
            nonlocal count, num_bytes, num_tokens
            count, num_bytes, num_tokens = count + more_documents, num_bytes + more_bytes, num_tokens + more_tokens
            heartbeat.moved()
            speed = (num_bytes - before) / 1e6 / max(time.monotonic() - started, 1e-3)
            words = [f"{num_bytes / 1e6:.1f} MB · {speed:.1f} MB/s"] * bool(num_bytes)
            bar.update(count, " · ".join(words + [f"{num_tokens / 1e6:.1f}M tokens"] * bool(num_tokens)))

        executor.run(step, tasks, workers, folder / "engine" / step.folder.name, report)


def _extract(data: DataConfig, corpus: Corpus, tasks: int, folder: epath.Path, workers: int) -> tuple[Corpus, dict]:
    """The corpus of the texts extracted from another corpus, and the counts of `_lost` for that other corpus."""
    step, made = Extract(corpus, folder / "texts"), Corpus(data, folder / "text_tasks")
    run_step(step, tasks, workers, folder, "extracting text", None)
    made.tasks.mkdir(exist_ok=True)
    for task in range(tasks):
        file = path(step.folder, task, "documents")
        finish(made.tasks, task, [Part("documents", str(file), 0, END, size_of(file))])
    lost = _lost([result(step.folder, task) for task in range(tasks)])
    _print_lost(lost)
    return made, lost


def _lost(results: list[dict]) -> dict:
    """Counts of a source's damaged records and files, some `places` of them, and of pages `left_out` by reason."""
    lost = {"damaged": sum(result["damaged"] for result in results), "left_out": {}}
    for reason, count in itertools.chain.from_iterable(task.get("left_out", {}).items() for task in results):
        lost["left_out"][reason] = lost["left_out"].get(reason, 0) + count
    return lost | {"places": [place for result in results for place in result["places"]][:PLACES]}


def _print_lost(lost: dict):
    if lost["damaged"]:
        more = "; …" * (lost["damaged"] > len(lost["places"]))
        print(f"left out {lost['damaged']:,} damaged: {'; '.join(lost['places'])}{more}", flush=True)
    for reason, count in sorted(lost["left_out"].items()):
        print(f"left out {count:,} {reason}", flush=True)


def _survey(data: DataConfig, corpus: Corpus, tasks: int, folder: epath.Path, workers: int) -> Surveyed:
    """Reads the corpus once, to count documents and to choose the held-out ones.

    A hash of the content decides, so that equal documents are on the same side. The fraction gives the cut, which moves
    if needed to hold out the smallest hash and to train on the largest. In a small corpus the cut also moves where the
    documents below have another share of the bytes than the fraction.
    """
    step = Survey(corpus, folder / "survey")
    run_step(step, tasks, workers, folder, "reading documents", None)
    results = [result(step.folder, task) for task in range(tasks)]
    count, num_bytes = (sum(result[key] for result in results) for key in ("documents", "bytes"))
    smallest, largest = min(result["smallest"] for result in results), max(result["largest"] for result in results)
    _print_lost(_lost(results))
    if smallest >= largest:
        raise Refused(
            f"data.source={data.source} has {count} documents and {min(count, 1)} different ones, and at least 2 are "
            "needed to hold one out: add text (a file of more than 64 KiB is several documents)."
        )
    cut = min(max(int(data.heldout_fraction * (1 << 64)), smallest + 1), largest)
    cut = _by_bytes(cut, data.heldout_fraction, num_bytes, results)
    return Surveyed(count, num_bytes, cut, results)


def _by_bytes(cut: int, fraction: float, num_bytes: int, results: list[dict]) -> int:
    """The cut that holds out nearest to a fraction of the bytes.

    The given cut stays where it is near enough, and where not all documents around the cut are known: among so many the
    share of the bytes is near the fraction by itself.
    """
    if not all("lowest" in result for result in results):  # surveyed by an earlier version
        return cut
    largest = max(result["largest"] for result in results)
    known = min((result["lowest"][-1][0] for result in results if len(result["lowest"]) == LOWEST), default=largest)
    if cut > known:
        return cut
    sizes: dict[int, int] = {}
    for hash, size in itertools.chain.from_iterable(task["lowest"] for task in results):
        sizes[hash] = sizes.get(hash, 0) + size
    hashes = sorted(hash for hash in sizes if hash <= known)
    below = list(itertools.accumulate(sizes[hash] for hash in hashes))
    wanted, held = fraction * num_bytes, sum(sizes[hash] for hash in hashes if hash < cut)
    if abs(held - wanted) > NEAR * wanted:
        choices = range(len(hashes) - (hashes[-1] == largest))  # documents with the largest hash are trained on
        best = min(choices, key=lambda index: abs(below[index] - wanted))
        cut, held = hashes[best] + 1, below[best]
    if abs(held - wanted) > WARN * wanted:
        print(
            f"warning: {held:,} of {num_bytes:,} bytes are held out, {held / num_bytes:.2%}, where "
            f"data.heldout_fraction asks for {fraction:.2%}: no cut between whole documents comes nearer",
            flush=True,
        )
    return cut
