"""The stages of cleaning; `executor.run` does each over tasks of its own.

    filter     sends each document through the steps that look at one; writes those that stay, and their signatures
    exact      compares hashes; the first of equal documents stays (the stages of datatrove's ExactDedup)
    near       compares MinHash's buckets, clusters similar documents, keeps one of a cluster (its MinhashDedup)

Duplicates are found across all tasks, so a stage begins when the previous one is complete. The output of a stage is
removed when the next stage is complete.
"""

import contextlib
import io
import resource
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import fsspec
import loguru
import orjson
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.writers import JsonlWriter
from datatrove.pipeline.writers.disk_base import DiskWriter
from datatrove.utils.text import TextNormConfig
from etils import epath

from gptjax.data.cleaning.filters import steps
from gptjax.data.cleaning.pipeline import CleanConfig
from gptjax.data.cleaning.report import Account, merged
from gptjax.data.preparation.executor import Report
from gptjax.data.preparation.tasks import Corpus, done, finish, lost, result
from gptjax.data.sources import documents
from gptjax.data.sources.documents import Damages, DataConfig
from gptjax.errors import Refused

# Most tasks for comparing hashes; depends on the corpus, since nothing may depend on the workers.
FINDERS = 16
loguru.logger.disable("datatrove")


@dataclass(frozen=True)
class Kept:
    """A cleaned corpus, read like any other. first: the folder with the accounts of the first stage."""

    data: DataConfig
    folder: epath.Path
    first: epath.Path

    def documents(self, task: int, damages: Damages) -> Iterator[documents.Document]:
        """The remaining documents of a task; `damages` is set to what the first stage counted."""
        account = result(self.first, task)
        damages.count, damages.places = account["damaged"], account["places"]
        damages.left_out = account["left_out"]
        for row in _rows(self.folder, task):
            yield documents.Document(row["name"], row["offset"], row["text"])


def clean(config: CleanConfig, corpus: Corpus, tasks: int, folder: epath.Path, run: Callable):
    """Cleans a corpus; skips what is complete already.

    Args:
      corpus: the corpus that is cleaned.
      tasks: number of its tasks.
      folder: for the output of the stages.
      run: does a step with a number of tasks, and a text for the progress bar.

    Returns:
      The cleaned corpus, which has as many tasks, and the result of `report.merged`.
    """
    folder.mkdir(exist_ok=True)
    stages = [Exact(folder, min(FINDERS, 1 + tasks // FINDERS))] * config.exact_duplicates + [
        Near(folder, config)
    ] * config.near_duplicates
    if stages:
        _allow_files(tasks)
    kept = folder / "filtered"
    run(Filter(config, corpus, kept, stages[0] if stages else None), tasks, "cleaning")
    accounts = [kept]
    for stage, following in zip(stages, [*stages[1:], None], strict=False):
        stage.compare(run)
        left = folder / f"without_{stage.name}"
        run(Remove(stage, kept, left, following), tasks, f"removing {stage.name.replace('_', ' ')}")
        for task in range(tasks):
            _file(kept, task).unlink(missing_ok=True)
        kept = left
        accounts.append(left)
    results = (result(account, task) for account in accounts for task in range(tasks))
    return Kept(corpus.data, kept, accounts[0]), *merged(results, config.steps())


def _allow_files(tasks: int) -> None:
    """Lets this process and its workers open a file of each task at the same time, to compare documents."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = tasks + 256
    if soft < needed:
        if hard < needed and hard != resource.RLIM_INFINITY:
            raise Refused(
                f"Finding duplicates in {tasks} tasks opens {needed} files, and ulimit -Hn is {hard}: raise it."
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


@dataclass(frozen=True)
class Filter:
    """Sends each document of a task through the steps that look at one document, and writes those that stay.

    following: the deduplication that comes next, which gets a signature of each document that stays.
    Result: that of an `Account`, and the damages found while reading.
    """

    config: CleanConfig
    corpus: Corpus
    folder: epath.Path
    following: "Exact | Near | None"

    def __call__(self, task: int, report: Report):
        if done(self.folder, task):
            return
        account, damages = Account(), Damages(self.corpus.data.damaged)
        found = self.corpus.documents(task, damages)
        _write(self._kept(_documents(found, report, task), account), task, self.folder, self.following)
        finish(self.folder, task, account.result() | lost(damages))

    def _kept(self, documents: Iterable[Document], account: Account) -> Iterator[Document]:
        judges = steps(self.config)
        for document in documents:
            account.add(document.text)
            for step, judge in judges.items():
                before = document.text
                if reason := judge(document):
                    account.remove(step, reason, document)
                    break
                account.change(step, before, document, private=step == "personal_data")
            else:
                yield document


@dataclass(frozen=True)
class Compare:
    """Finds equal or similar documents across all tasks: one stage of datatrove's, with tasks of its own."""

    step: PipelineStep
    tasks: int
    folder: epath.Path

    def __call__(self, task: int, report: Report):
        if not done(self.folder, task):
            with _quiet():
                self.step.run(None, task, self.tasks)
            finish(self.folder, task, {})
        report(0, 0, 0)  # shows that the step is alive, though there are no more documents


@dataclass(frozen=True)
class Remove:
    """Writes the documents of a task that are not duplicates. Result: that of an `Account`.

    kept: the output folder of the previous stage. The other fields are as in `Filter`.
    """

    stage: "Exact | Near"
    kept: epath.Path
    folder: epath.Path
    following: "Exact | Near | None"

    def __call__(self, task: int, report: Report):
        if done(self.folder, task):
            return
        account = Account()
        documents = _documents((row.values() for row in _rows(self.kept, task)), report, task)
        with _quiet():
            removed: Any = _Removed(self.stage.name, account)  # has all that deduplication uses of a DiskWriter
            left = self.stage.filter(removed).run(documents, task)
            _write(left, task, self.folder, self.following)
        finish(self.folder, task, account.result())


class _Removed:
    """Counts what deduplication removes; used in place of a writer of datatrove's."""

    def __init__(self, step: str, account: Account):
        self._step, self._account = step, account

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def write(self, document: Document, rank: int) -> None:
        self._account.remove(self._step, "duplicate", document)


@dataclass(frozen=True)
class Exact:
    """Equal documents, by a 64-bit hash of their text. The first in the corpus stays."""

    folder: epath.Path
    tasks: int  # of comparing
    name = "exact_duplicates"

    def signature(self) -> PipelineStep:
        return ExactDedupSignature(str(self.folder / "hashes"), self._config(), self.tasks)

    def compare(self, run: Callable) -> None:
        find = ExactFindDedups(str(self.folder / "hashes"), str(self.folder / "equal"), self._config())
        run(Compare(find, self.tasks, self.folder / "hashes_compared"), self.tasks, "comparing hashes")

    def filter(self, removed: DiskWriter) -> PipelineStep:
        return ExactDedupFilter(str(self.folder / "equal"), self._config(), removed)

    def _config(self) -> ExactDedupConfig:
        return ExactDedupConfig(_text, _priority)


def _text(document: Document) -> str:
    return document.text


def _priority(document: Document) -> int:
    """A priority of 16 bits; the largest stays. Earlier tasks have more; within a task datatrove keeps the first."""
    return max(1, (1 << 16) - 1 - document.metadata["task"])


@dataclass(frozen=True)
class Near:
    """Similar documents, found by MinHash."""

    folder: epath.Path
    config: CleanConfig
    name = "near_duplicates"

    def signature(self) -> PipelineStep:
        language = self.config.word_language
        return MinhashDedupSignature(str(self.folder / "signatures"), self._config(), language)

    def compare(self, run: Callable) -> None:
        signatures, pairs, alike = (str(self.folder / name) for name in ("signatures", "pairs", "alike"))
        buckets = MinhashDedupBuckets(signatures, pairs, config=self._config())
        tasks = self.config.minhash_buckets
        run(Compare(buckets, tasks, self.folder / "signatures_compared"), tasks, "comparing MinHash signatures")
        cluster = MinhashDedupCluster(pairs, alike, self._config())
        run(Compare(cluster, 1, self.folder / "signatures_clustered"), 1, "clustering them")

    def filter(self, removed: DiskWriter) -> PipelineStep:
        return MinhashDedupFilter(str(self.folder / "alike"), removed)

    def _config(self) -> MinhashConfig:
        c = self.config
        words = TextNormConfig(norm_numbers=not c.minhash_numbers)
        return MinhashConfig(c.minhash_words, c.minhash_buckets, c.minhash_hashes, norm_config=words)


def _documents(found: Iterable, report: Report, task: int) -> Iterator[Document]:
    """Makes datatrove's documents from tuples (name, offset, text, …). Documents with a prompt are never cleaned."""
    for number, (name, offset, text, *_) in enumerate(found):
        yield Document(text, str(number), metadata={"name": name, "offset": offset, "task": task})
        report(1, len(text.encode()), 0)


def _write(documents: Iterable[Document], task: int, folder: epath.Path, following: "Exact | Near | None") -> None:
    """Writes the documents of a task, and their signatures for the next deduplication."""
    writer = JsonlWriter(str(folder), "${rank}.jsonl", compression="zstd", adapter=_row)
    documents = writer.run(documents, task)
    if following:
        following.signature().run(documents, task)
    else:
        for _ in documents:
            pass


def _row(writer: JsonlWriter, document: Document) -> dict:
    where = {name: document.metadata[name] for name in ("name", "offset")}
    return where | {"text": document.text, "prompt": 0}


def _rows(folder: epath.Path, task: int) -> Iterator[dict]:
    """The rows written for a task; a task without documents has no file."""
    if not _file(folder, task).exists():
        return
    with fsspec.open(str(_file(folder, task)), "rb", compression="zstd") as stream:
        raw: Any = stream
        yield from map(orjson.loads, io.BufferedReader(raw))


def _file(folder: epath.Path, task: int) -> epath.Path:
    return folder / f"{task:05}.jsonl.zst"


@contextlib.contextmanager
def _quiet():
    """Silences the bars that datatrove draws on stderr, which would tear ours."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
