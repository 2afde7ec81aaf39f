"""The stages of cleaning, each of which `engine.run` does over tasks of its own.

    filter     every document through the steps that look at one alone; those that stay are written, and signed
    exact      hashes are compared; of equal documents the first stays (datatrove's stages of ExactDedup)
    near       MinHash's buckets are compared, what is alike is clustered, one of a cluster stays (its MinhashDedup)

Equal and alike documents are found in all tasks together, so a stage begins when the one before is complete. What a
stage wrote is removed when the next one is.
"""

import contextlib
import io
import resource
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

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
from etils import epath

from gptjax.data.cleaning.filters import steps
from gptjax.data.cleaning.pipeline import CleanConfig
from gptjax.data.cleaning.report import Account, merged
from gptjax.data.preparation.tasks import Corpus, done, finish, lost, result
from gptjax.data.sources import documents as origin
from gptjax.data.sources.documents import Damages, DataConfig
from gptjax.errors import Refused

# By how many tasks hashes are compared, at most: a matter of the corpus, since nothing may depend on the workers.
FINDERS = 16
loguru.logger.disable("datatrove")


@dataclass(frozen=True)
class Kept:
    """A cleaned corpus, read as any other. first: where the accounts of the first stage are."""

    data: DataConfig
    folder: epath.Path
    first: epath.Path

    def documents(self, task: int, damages: Damages) -> Iterator[origin.Document]:
        """What is left of a task; `damages` becomes what was met when it was first read."""
        account = result(self.first, task)
        damages.count, damages.places = account["damaged"], account["places"]
        damages.without_text = account["without_text"]
        for row in _rows(self.folder, task):
            yield origin.Document(row["name"], row["offset"], row["text"])


def clean(config: CleanConfig, corpus: Corpus, tasks: int, folder: epath.Path, run: Callable):
    """Cleans a corpus; what is complete already is not done again.

    Args:
      tasks: of the corpus. folder: for what is kept meanwhile. run: does a step, of so many tasks,
        and says so in some words.

    Returns:
      The cleaned corpus, of as many tasks, and what `accounts.merged` gives.
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
    for stage, following in zip(stages, [*stages[1:], None]):
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
    """Lets this process and its workers open a file of each task together, by which they are compared."""
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
    """Sends each document of a task through the steps that look at it alone, and writes those that stay.

    following: the deduplication that comes next, to which each kept document goes too.
    Result: that of an `Account`, and the damages met in reading.
    """

    config: CleanConfig
    corpus: Corpus
    folder: epath.Path
    following: "Exact | Near | None"

    def __call__(self, task: int, told: Callable[[int, int, int], None]):
        if done(self.folder, task):
            return
        account, damages = Account(), Damages(self.corpus.data.damaged)
        found = self.corpus.documents(task, damages)
        _write(self._kept(_documents(found, told, task), account), task, self.folder, self.following)
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
    """Finds what is equal or alike in all tasks: one of datatrove's stages, which has tasks of its own."""

    step: PipelineStep
    tasks: int
    folder: epath.Path

    def __call__(self, task: int, told: Callable[[int, int, int], None]):
        if not done(self.folder, task):
            with _quiet():
                self.step.run(None, task, self.tasks)
            finish(self.folder, task, {})
        told(0, 0, 0)  # it went on, though with no more documents


@dataclass(frozen=True)
class Remove:
    """Writes what is left of a task without the duplicates that were found. Result: that of an `Account`.

    kept: where the stage before has written. The rest as in `Filter`.
    """

    stage: "Exact | Near"
    kept: epath.Path
    folder: epath.Path
    following: "Exact | Near | None"

    def __call__(self, task: int, told: Callable[[int, int, int], None]):
        if done(self.folder, task):
            return
        account = Account()
        documents = _documents((row.values() for row in _rows(self.kept, task)), told, task)
        with _quiet():
            left = self.stage.filter(_Removed(self.stage.name, account)).run(documents, task)
            _write(left, task, self.folder, self.following)
        finish(self.folder, task, account.result())


class _Removed:
    """Takes, in the place of a writer of datatrove's, what deduplication removes."""

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
    """Equal documents: those of the same 64-bit hash of their text. The first of the corpus stays."""

    folder: epath.Path
    tasks: int  # of comparing
    name = "exact_duplicates"

    def signature(self) -> PipelineStep:
        return ExactDedupSignature(str(self.folder / "hashes"), self._config(), self.tasks)

    def compare(self, run: Callable) -> None:
        find = ExactFindDedups(str(self.folder / "hashes"), str(self.folder / "equal"), self._config())
        run(Compare(find, self.tasks, self.folder / "hashes_compared"), self.tasks, "comparing hashes")

    def filter(self, removed: _Removed) -> PipelineStep:
        return ExactDedupFilter(str(self.folder / "equal"), self._config(), removed)

    def _config(self) -> ExactDedupConfig:
        return ExactDedupConfig(_text, _priority)


def _text(document: Document) -> str:
    return document.text


def _priority(document: Document) -> int:
    """16 bits, of which the largest stays: an earlier task has more, and within a task datatrove takes the first."""
    return max(1, (1 << 16) - 1 - document.metadata["task"])


@dataclass(frozen=True)
class Near:
    """Documents alike by MinHash."""

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

    def filter(self, removed: _Removed) -> PipelineStep:
        return MinhashDedupFilter(str(self.folder / "alike"), removed)

    def _config(self) -> MinhashConfig:
        return MinhashConfig(self.config.minhash_words, self.config.minhash_buckets, self.config.minhash_hashes)


def _documents(found: Iterable, told: Callable[[int, int, int], None], task: int) -> Iterator[Document]:
    """datatrove's documents, of tuples that begin with name, offset and text: what has a prompt is not cleaned."""
    for number, (name, offset, text, *_) in enumerate(found):
        yield Document(text, str(number), metadata={"name": name, "offset": offset, "task": task})
        told(1, len(text.encode()), 0)


def _write(documents: Iterable[Document], task: int, folder: epath.Path, following: "Exact | Near | None") -> None:
    """Writes the documents of a task, and signs them for the deduplication that comes next."""
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
    """What was written of a task; of one without documents there is no file."""
    if not _file(folder, task).exists():
        return
    with fsspec.open(str(_file(folder, task)), "rb", compression="zstd") as stream:
        yield from map(orjson.loads, io.BufferedReader(stream))


def _file(folder: epath.Path, task: int) -> epath.Path:
    return folder / f"{task:05}.jsonl.zst"


@contextlib.contextmanager
def _quiet():
    """Without the bars that datatrove draws on stderr, beside which ours could not be read."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
