"""From a source to a token store: hold out documents, train the tokenizer, tokenize, write.

What takes long is done task by task (pieces.py), by as many processes as there are (engine.py), in a folder beside the
store:

    STORE.partial/
        owner.json          who works here
        work.json           what for; of other settings or files it is begun anew
        tasks/              the parts of the source (sources.py) that make up each task
        texts/  text_tasks/ where extracting text takes long: what was extracted, and the tasks to read it
        clean/              where there is cleaning (clean.py): what is left of each task
        survey/  sample/  pieces/    the results of each step, task by task
        tokenizer/
        store/              put together from the pieces in their order, and renamed when it is whole

so a preparation that is killed goes on, and its store is the same to the byte, whoever did which task.
"""

import contextlib
import hashlib
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import NamedTuple

from etils import epath

from gptjax.data.cleaning import pipeline
from gptjax.data.cleaning.pipeline import CleanConfig
from gptjax.data.preparation import executor, merge
from gptjax.data.preparation import tasks as pieces
from gptjax.data.sources import sources
from gptjax.data.sources.documents import END, PLACES, Damages, DataConfig, Document, Part
from gptjax.data.store import store as stores
from gptjax.errors import Failed, Refused
from gptjax.runtime import heartbeat, lock, progress
from gptjax.tokenizers import tokenizer as tokenizers
from gptjax.tokenizers.tokenizer import TokenizerConfig

# SentencePiece keeps its training text in memory, and more of it than this changes few pieces.
TRAINING_BYTES = 64 << 20
# Tasks are of about this size, and smaller where a corpus would give few of them.
TASK_BYTES, LEAST_TASK_BYTES, TASKS = 64 << 20, 1 << 20, 256


def prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    folder: epath.PathLike,
    workers: int = 1,
    cleaning: CleanConfig = CleanConfig(),
) -> stores.Store:
    """The token store in `folder`: opened if it was made from the same settings, else made by so many processes.

    Raises: as `prepared`.
    """
    return prepared(data, tokenizer, folder, workers, cleaning)[0]


def prepared(
    data: DataConfig, tokenizer: TokenizerConfig, folder: epath.PathLike, workers: int, cleaning: CleanConfig
) -> tuple[stores.Store, bool]:
    """What `prepare` returns, and whether it was made by this call.

    Only one process of a run may call this before the store is there. Refuses a store made from other settings, a
    corpus that can't be read or split in two, and to work where another does; then nothing stays of what it did, unless
    it was going on with what an earlier call had done. Where it is killed, or a disk is full or fails (Failed), the same call goes on.
    """
    folder = epath.Path(folder)
    settings = _settings(data, tokenizer, cleaning)
    partial = folder.with_name(f"{folder.name}.partial")
    refusal = "is being prepared on", "wait until it is done, stop it, or give another folder in data.store"
    if stores.is_whole(folder):
        if partial.exists():  # of a process that was killed when all was done, unless it is just about to end
            with contextlib.suppress(Refused, OSError), lock.locked(partial, *refusal):
                partial.rmtree()
        return _reuse(folder, settings, tokenizer), False
    partly_moved = (partial / "moving").exists()  # as `_move` may leave it
    if not partly_moved and (folder.is_file() or folder.exists() and any(folder.iterdir())):
        raise Refused(f"{folder} exists and has no manifest.json, so it is no token store: give another in data.store.")
    tokenizers.check(tokenizer)
    pipeline.check_ready(cleaning)
    _check(data)
    with lock.locked(partial, *refusal):
        earlier = _work(partial)
        try:
            made = not stores.is_whole(folder)  # another run may have made it meanwhile
            if made:
                if partly_moved and folder.exists():
                    folder.rmtree()
                _build(data, tokenizer, cleaning, partial, settings, workers)
                _move(partial / "store", folder)
        except OSError as error:
            raise Failed(
                f"{partial} can't be written ({error.strerror or error}): make room or give another folder in "
                "data.store; the same command goes on."
            ) from error
        except Refused:
            # What an earlier call had done is kept as long as it is of use: a path may be mounted again.
            if not earlier or _work(partial) != earlier:
                partial.rmtree()
            raise
        with contextlib.suppress(OSError):  # the store is whole: what is left, or went already, is for the next call
            partial.rmtree()
    return stores.Store.open(folder) if made else _reuse(folder, settings, tokenizer), made


def _move(made: epath.Path, folder: epath.Path) -> None:
    """Puts a whole store in its place, where nothing is. A bucket moves object by object: there the manifest goes last,
    and what a kill left of it `prepared` removes, by the file `moving`."""
    if folder.exists():
        folder.rmdir()  # empty, as `prepared` has seen; a rename has to make it
    if "://" not in str(folder):
        made.rename(folder)
        return
    (made.parent / "moving").write_text("")  # from now on what is there is ours
    manifest = (made / "manifest.json").read_bytes()
    (made / "manifest.json").unlink()
    made.rename(folder)
    (folder / "manifest.json").write_bytes(manifest)


def _check(data: DataConfig) -> None:
    if not 0 < data.heldout_fraction < 1:
        raise Refused(
            f"data.heldout_fraction is {data.heldout_fraction}, which is not between 0 and 1: use for example 0.02."
        )


def training_texts(data: DataConfig, cleaning: CleanConfig, workers: int) -> Iterator[str]:
    """The texts that `prepare` trains a tokenizer on, read by so many processes. Raises: Refused, Failed."""
    _check(data)
    with _temporary() as folder:
        corpus, survey, _, _ = surveyed(data, cleaning, folder, {}, workers)
        yield from _training_texts(corpus, survey, folder, workers)


def heldout_documents(data: DataConfig, cleaning: CleanConfig, workers: int) -> Iterator[Document]:
    """The documents that `prepare` holds out, after so many processes have read all. Raises: Refused, Failed."""
    _check(data)
    with _temporary() as folder:
        corpus, survey, _, _ = surveyed(data, cleaning, folder, {}, workers)
        for task in range(len(survey.tasks)):
            for document in corpus.documents(task, Damages("skip")):
                if pieces.hash_of(document.text.encode()) < survey.cut:
                    yield document


@contextlib.contextmanager
def _temporary() -> Iterator[epath.Path]:
    """A folder for the block. Raises: Failed, where it can't be written."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield epath.Path(folder)
    except OSError as error:
        raise Failed(
            f"The folder for temporary files can't be written ({error.strerror or error}): make room there, or name "
            "another in TMPDIR."
        ) from error


def _settings(data: DataConfig, tokenizer: TokenizerConfig, cleaning: CleanConfig) -> dict:
    """Whatever the tokens depend on, as config keys."""
    settings = {"data": asdict(data), "tokenizer": tokenizers.settings(tokenizer)}
    del settings["data"]["store"]
    flat = {f"{section}.{key}": value for section, keys in settings.items() for key, value in keys.items()}
    return flat | pipeline.settings(cleaning)


def _reuse(folder: epath.Path, settings: dict, tokenizer: TokenizerConfig) -> stores.Store:
    store = stores.Store.open(folder)
    # What a store of an earlier version does not name had no effect on it, and that is what a default is.
    made = _settings(DataConfig(), TokenizerConfig(), CleanConfig()) | store.manifest["settings"]
    differing = [
        f"{key} ({made.get(key, 'not set')} there, {settings[key]} now)"
        for key in sorted(settings)
        if made.get(key) != settings[key]
    ]
    if differing:
        raise Refused(
            f"{folder} holds a token store made from other settings, {', '.join(differing)}: give another folder in "
            "data.store, or the old settings."
        )
    tokenizers.check_same(tokenizer, store.tokenizer.hash, folder)
    print(f"using the token store in {folder}: {store.split('train').tokens:,} tokens to train on", flush=True)
    return store


def _build(
    data: DataConfig,
    config: TokenizerConfig,
    cleaning: CleanConfig,
    folder: epath.Path,
    settings: dict,
    workers: int,
):
    """Makes FOLDER/store."""
    corpus, survey, lost, cleaned = surveyed(data, cleaning, folder, settings, workers)
    tokenizer = _train(config, corpus, survey, folder, workers)
    results = _tokenize(data, corpus, survey, folder, workers)
    manifest = {"settings": settings, "tokenizer_hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size}
    manifest |= merge.merge(results, folder, stores.token_dtype(tokenizer.vocab_size), bool(data.prompt_field))
    (folder / "store" / "tokenizer").mkdir()
    for name, content in tokenizers.read_files(folder / "tokenizer").items():
        (folder / "store" / "tokenizer" / name).write_bytes(content)
    manifest["lost"] = lost
    if cleaned:
        report, samples = cleaned
        pipeline.write(report, samples, folder / "store" / "cleaning")
        manifest["cleaning"] = report
    stores.write_manifest(folder / "store", manifest)


def surveyed(data: DataConfig, cleaning: CleanConfig, folder: epath.Path, settings: dict, workers: int):
    """The corpus as it is tokenized, its survey, what of the source it lacks, and what cleaning says of itself."""
    corpus, tasks = _corpus(data, sources.parts(data), folder, settings)
    extracted, cleaned = data.source in sources.SLOW, None
    if extracted:
        corpus, lost = _extract(data, corpus, tasks, folder, workers)
    if cleaning.steps():

        def run(step, tasks: int, words: str):
            _run(step, tasks, workers, folder, words, None)

        corpus, *cleaned = pipeline.clean(cleaning, corpus, tasks, folder / "clean", run)
    survey = _survey(data, corpus, tasks, folder, workers)
    return corpus, survey, lost if extracted else _lost(survey.tasks), cleaned


def _work(folder: epath.Path) -> str:
    """What is prepared in a folder, as `_corpus` wrote it; "" where nothing is."""
    path = folder / "work.json"
    return path.read_text() if path.exists() else ""


def _corpus(data: DataConfig, parts: list[Part], folder: epath.Path, settings: dict) -> tuple[pieces.Corpus, int]:
    """The corpus that is prepared in `folder`, and its number of tasks; whatever else is there is removed."""
    tasks = _tasks(parts)
    listed = hashlib.sha256(json.dumps(tasks).encode()).hexdigest()
    work = json.dumps({"settings": settings, "parts": listed}, sort_keys=True)
    corpus = pieces.Corpus(data, folder / "tasks")
    earlier = _work(folder)
    if earlier == work:
        print(f"going on with what was prepared in {folder}", flush=True)
        return corpus, len(tasks)
    if earlier:
        print(f"beginning anew in {folder}, where other files or settings were being prepared", flush=True)
    (folder / "work.json").unlink(missing_ok=True)  # first: without all that it speaks of nothing can go on
    for path in folder.iterdir():
        if path.is_dir():
            path.rmtree()
        elif path.name != "owner.json":
            path.unlink()
    corpus.tasks.mkdir()
    for number, task in enumerate(tasks):
        pieces.finish(corpus.tasks, number, task)
    (folder / "work.json").write_text(work)
    return corpus, len(tasks)


def _tasks(parts: list[Part]) -> list[list[Part]]:
    """Neighbouring parts together, until they are large enough to be shared out."""
    size = min(max(sum(part.size for part in parts) // TASKS, LEAST_TASK_BYTES), TASK_BYTES)
    tasks, held = [[]], 0
    for part in parts:
        if held >= size:
            tasks.append([])
            held = 0
        tasks[-1].append(part)
        held += part.size
    return tasks


class _Survey(NamedTuple):
    """What a first reading finds.

    cut: documents with a smaller hash are held out. tasks: the result of each.
    """

    documents: int
    bytes: int
    cut: int
    tasks: list[dict]


def _run(step, tasks: int, workers: int, folder: epath.Path, words: str, total: int | None) -> None:
    """Does all tasks of a step of pieces.py, with a bar that counts documents."""
    step.folder.mkdir(exist_ok=True)
    finished = [pieces.result(step.folder, task) for task in range(tasks) if pieces.done(step.folder, task)]
    count, num_bytes, num_tokens = (sum(result.get(key, 0) for result in finished) for key in executor.Told._fields)
    began, before = time.monotonic(), num_bytes
    with progress.progress(words, total, count) as bar:

        def told(more_documents: int, more_bytes: int, more_tokens: int):
            nonlocal count, num_bytes, num_tokens
            count, num_bytes, num_tokens = count + more_documents, num_bytes + more_bytes, num_tokens + more_tokens
            heartbeat.moved()
            speed = (num_bytes - before) / 1e6 / max(time.monotonic() - began, 1e-3)
            words = [f"{num_bytes / 1e6:.1f} MB · {speed:.1f} MB/s"] * bool(num_bytes)
            bar.update(count, " · ".join(words + [f"{num_tokens / 1e6:.1f}M tokens"] * bool(num_tokens)))

        executor.run(step, tasks, workers, folder / "engine" / step.folder.name, told)


def _extract(data: DataConfig, corpus: pieces.Corpus, tasks: int, folder: epath.Path, workers: int):
    """The corpus of the texts of another one, and what was lost of that."""
    step, made = pieces.Extract(corpus, folder / "texts"), pieces.Corpus(data, folder / "text_tasks")
    _run(step, tasks, workers, folder, "extracting text", None)
    made.tasks.mkdir(exist_ok=True)
    for task in range(tasks):
        file = pieces.path(step.folder, task, "documents")
        pieces.finish(made.tasks, task, [Part("documents", str(file), 0, END, file.stat().length)])
    lost = _lost([pieces.result(step.folder, task) for task in range(tasks)])
    _tell_lost(lost)
    return made, lost


def _lost(results: list[dict]) -> dict:
    """What of a source is not among its documents: `damaged` records and files, some `places`, pages `without_text`."""
    lost = {key: sum(result[key] for result in results) for key in ("damaged", "without_text")}
    return lost | {"places": [place for result in results for place in result["places"]][:PLACES]}


def _tell_lost(lost: dict):
    if lost["damaged"]:
        more = "; …" * (lost["damaged"] > len(lost["places"]))
        print(f"left out {lost['damaged']:,} damaged: {'; '.join(lost['places'])}{more}", flush=True)
    if lost["without_text"]:
        print(f"left out {lost['without_text']:,} pages in which no text was found", flush=True)


def _survey(data: DataConfig, corpus: pieces.Corpus, tasks: int, folder: epath.Path, workers: int) -> _Survey:
    """Reads the corpus once, to count it and to draw the line between training and held-out documents.

    A document is held out by a hash of its content, so that equal ones are on the same side. The fraction draws the
    line, moved if need be to hold out the smallest hash and to train on the largest.
    """
    step = pieces.Survey(corpus, folder / "survey")
    _run(step, tasks, workers, folder, "reading documents", None)
    results = [pieces.result(step.folder, task) for task in range(tasks)]
    count, num_bytes = (sum(result[key] for result in results) for key in ("documents", "bytes"))
    smallest, largest = min(result["smallest"] for result in results), max(result["largest"] for result in results)
    _tell_lost(_lost(results))
    if smallest >= largest:
        raise Refused(
            f"data.source={data.source} has {count} documents and {min(count, 1)} different ones, and at least 2 are "
            "needed to hold one out: add text (a file of more than 64 KiB is several documents)."
        )
    cut = min(max(int(data.heldout_fraction * (1 << 64)), smallest + 1), largest)
    return _Survey(count, num_bytes, cut, results)


def _train(
    config: TokenizerConfig, corpus: pieces.Corpus, survey: _Survey, folder: epath.Path, workers: int
) -> tokenizers.Tokenizer:
    """The tokenizer in `folder`, trained if need be."""
    done, partial = folder / "tokenizer", folder / "tokenizer.partial"
    if not done.exists():
        # Read and written before SentencePiece is called, so that it is not what fails where a disk is full.
        texts = _training_texts(corpus, survey, folder, workers) if config.trained else ()
        tokenizers.train(config, texts, partial)
        partial.rename(done)
    return tokenizers.load(done)


def _training_texts(corpus: pieces.Corpus, survey: _Survey, folder: epath.Path, workers: int) -> Iterator[str]:
    """What a tokenizer learns from: training documents, each k-th of the corpus if it is larger than the sample."""
    every = -(-survey.bytes // TRAINING_BYTES)
    firsts = [0, *itertools.accumulate(task["documents"] for task in survey.tasks)][:-1]
    step = pieces.Sample(corpus, folder / "sample", every, survey.cut, tuple(firsts))
    _run(step, len(firsts), workers, folder, "training the tokenizer: reading documents", survey.documents)
    return _told(step.texts())


def _told(texts: Iterator[str]) -> Iterator[str]:
    for text in texts:
        heartbeat.moved()
        yield text


def _tokenize(data: DataConfig, corpus: pieces.Corpus, survey: _Survey, folder: epath.Path, workers: int) -> list[dict]:
    """Has each task tokenized; their results. Raises: Refused, where the text is not what it was."""
    step = pieces.Tokenize(corpus, folder / "pieces", folder / "tokenizer", survey.cut, threads=workers == 1)
    _run(step, len(survey.tasks), workers, folder, "tokenizing documents", survey.documents)
    results = [pieces.result(step.folder, task) for task in range(len(survey.tasks))]
    for before, now in zip(survey.tasks, results):
        if before["digest"] != now["digest"]:
            (folder / "work.json").unlink()  # what was counted is of no use to another call
            raise Refused(
                f"The files of data.source={data.source} changed while they were read: {before['documents']} documents "
                f"of {before['bytes']} bytes at first, then {now['documents']} of {now['bytes']}: prepare again when "
                "they are still."
            )
    return results
