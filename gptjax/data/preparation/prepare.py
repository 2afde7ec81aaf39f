"""Prepares a source as a token store: holds out documents, trains the tokenizer, tokenizes, writes.

Long work is done task by task (`tasks.py`), in several processes (`executor.py`), in a folder beside the store,
or inside a folder that exists already:

    STORE.partial/
        owner.json          the process that works here
        work.json           the settings and files being prepared; others start over
        tasks/              the parts of the source (`sources.py`) in each task
        texts/  text_tasks/ only where extracting text is slow: the extracted text, and the tasks that read it
        clean/              only with cleaning (`cleaning/pipeline.py`): the remaining documents of each task
        survey/  sample/  pieces/    the results of each step, task by task
        tokenizer/
        store/              merged from the pieces in their order; renamed when complete

A killed preparation therefore resumes, and the store is identical to the byte, whichever process did which task.
"""

import contextlib
import itertools
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict

from etils import epath

from gptjax.data.cleaning import pipeline
from gptjax.data.cleaning.pipeline import CleanConfig
from gptjax.data.preparation import corpus_files, merge
from gptjax.data.preparation.survey import Surveyed, run_step, surveyed, work
from gptjax.data.preparation.tasks import Corpus, Sample, Tokenize, hash_of, result
from gptjax.data.sources.documents import Damages, DataConfig, Document
from gptjax.data.store.store import Store, is_whole, token_dtype, write_manifest
from gptjax.errors import Failed, Refused
from gptjax.runtime import files, heartbeat, lock
from gptjax.tokenizers import tokenizer as tokenizers
from gptjax.tokenizers.tokenizer import Tokenizer, TokenizerConfig

# SentencePiece holds its training text in memory, and more text than this changes few pieces.
TRAINING_BYTES = 64 << 20


def prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    folder: epath.PathLike,
    workers: int = 1,
    cleaning: CleanConfig = CleanConfig(),
) -> Store:
    """Opens the token store in `folder` if it was made from the same settings; otherwise makes it.

    workers: number of processes.

    Raises: like `prepared`.
    """
    return prepared(data, tokenizer, folder, workers, cleaning)[0]


def prepared(
    data: DataConfig, tokenizer: TokenizerConfig, folder: epath.PathLike, workers: int, cleaning: CleanConfig
) -> tuple[Store, bool]:
    """Returns the store of `prepare`, and whether this call made it.

    Only one process of a run may call this before the store exists. A refused call leaves nothing behind, unless it was
    resuming the work of an earlier call. After a kill or a Failed, the same call resumes.

    Raises:
      Refused: the store was made from other settings, the corpus can't be read or split in two, or another process is
        preparing it.
      Failed: the disk is full or fails.
    """
    folder = epath.Path(folder)
    settings = _settings(data, tokenizer, cleaning)
    partial = partial_of(folder)
    refusal = "is being prepared on", "wait until it is done, stop it, or give another folder in data.store"
    if is_whole(folder):
        for left in (path for path in (partial, folder / "partial") if path.exists()):
            # A process was killed after the last step, or is just about to end.
            with contextlib.suppress(Refused, OSError), lock.locked(left, *refusal):
                left.rmtree()
        return _reuse(folder, settings, data, tokenizer), False
    partly_moved = (partial / "moving").exists()  # as `_move` may leave it
    others = [path for path in files.contents(folder) if path != partial]
    if not partly_moved and (folder.is_file() or others):
        raise Refused(
            f"{folder} exists and has no manifest.json, so it can't be a token store: give another in data.store."
        )
    tokenizers.check(tokenizer)
    pipeline.check_ready(cleaning)
    _check(data)
    with lock.locked(partial, *refusal):
        earlier = work(partial)
        try:
            made = not is_whole(folder)  # another run may have made the store meanwhile
            if made:
                for path in others:  # only left by `_move`
                    path.rmtree() if path.is_dir() else path.unlink()
                _build(data, tokenizer, cleaning, partial, settings, workers)
                _move(partial / "store", folder)
        except OSError as error:
            raise Failed(
                f"{partial} can't be written ({error.strerror or error}): make room or give another folder in "
                "data.store; run the same command to resume."
            ) from error
        except Refused:
            # The work of an earlier call is kept while it can still be used: a path may be mounted again.
            if not earlier or work(partial) != earlier:
                partial.rmtree()
            raise
        with contextlib.suppress(OSError):  # the store is complete: the next call removes what is left
            partial.rmtree()
    return Store.open(folder) if made else _reuse(folder, settings, data, tokenizer), made


def partial_of(folder: epath.Path) -> epath.Path:
    """Where the store of a folder is prepared: beside the folder, or inside one that exists.

    A folder that exists may be a mount, which no other folder can be renamed over.
    """
    beside = folder.with_name(f"{folder.name}.partial")
    inside = "://" not in str(folder) and folder.is_dir() and not is_whole(folder) and not beside.exists()
    return folder / "partial" if inside else beside


def _move(made: epath.Path, folder: epath.Path) -> None:
    """Moves a complete store to its place, which must be free, or into its place, which must be empty.

    A bucket moves object by object, and a folder that exists is filled entry by entry. There the manifest is written
    last, and the file `moving` lets `prepared` remove what a killed move left.
    """
    if "://" not in str(folder) and not folder.exists():
        made.rename(folder)
        return
    (made.parent / "moving").write_text("")  # from here on, whatever is in the target is ours
    if "://" not in str(folder):
        files.fill(folder, made, last="manifest.json")
        return
    manifest = (made / "manifest.json").read_bytes()
    (made / "manifest.json").unlink()
    made.rename(folder)
    (folder / "manifest.json").write_bytes(manifest)


def _check(data: DataConfig) -> None:
    if not 0 < data.heldout_fraction < 1:
        raise Refused(
            f"data.heldout_fraction={data.heldout_fraction} must be above 0 and below 1: use for example 0.02."
        )


def training_texts(data: DataConfig, cleaning: CleanConfig, workers: int) -> Iterator[str]:
    """The texts that `prepare` trains a tokenizer on, read by `workers` processes. Raises: Refused, Failed."""
    _check(data)
    with _temporary() as folder:
        corpus, survey, _, _ = surveyed(data, cleaning, folder, {}, workers)
        yield from _training_texts(corpus, survey, folder, workers)


def heldout_documents(data: DataConfig, cleaning: CleanConfig, workers: int) -> Iterator[Document]:
    """The documents that `prepare` holds out, after `workers` processes read the corpus. Raises: Refused, Failed."""
    _check(data)
    with _temporary() as folder:
        corpus, survey, _, _ = surveyed(data, cleaning, folder, {}, workers)
        for task in range(len(survey.tasks)):
            for document in corpus.documents(task, Damages("skip")):
                if hash_of(document.text.encode()) < survey.cut:
                    yield document


@contextlib.contextmanager
def _temporary() -> Iterator[epath.Path]:
    """Makes a temporary folder for the block. Raises: Failed, if the folder can't be written."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield epath.Path(folder)
    except OSError as error:
        raise Failed(
            f"The folder for temporary files can't be written ({error.strerror or error}): make room there, or name "
            "another in TMPDIR."
        ) from error


def _settings(data: DataConfig, tokenizer: TokenizerConfig, cleaning: CleanConfig) -> dict:
    """The config keys, with values, that the tokens depend on."""
    settings = {"data": asdict(data), "tokenizer": tokenizers.settings(tokenizer)}
    del settings["data"]["store"]
    flat = {f"{section}.{key}": value for section, keys in settings.items() for key, value in keys.items()}
    return flat | pipeline.settings(cleaning)


def _reuse(folder: epath.Path, settings: dict, data: DataConfig, tokenizer: TokenizerConfig) -> Store:
    store = Store.open(folder)
    # A key that an earlier version did not record had no effect on its stores, which is what a default means.
    made = _settings(DataConfig(), TokenizerConfig(), CleanConfig()) | store.manifest["settings"]
    made.setdefault("clean.minhash_numbers", settings.get("clean.minhash_numbers"))  # the store is used as it was made
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
    if changes := corpus_files.changes(folder, data):
        print(
            f"gptjax: warning: {changes} since the token store in {folder} was made, which is used as it is; to "
            "prepare the data anew, give another folder in data.store, or delete this one.",
            file=sys.stderr,
            flush=True,
        )
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
    manifest |= merge.merge(results, folder, token_dtype(tokenizer.vocab_size), bool(data.prompt_field))
    (folder / "store" / "tokenizer").mkdir()
    for name, content in tokenizers.read_files(folder / "tokenizer").items():
        (folder / "store" / "tokenizer" / name).write_bytes(content)
    manifest["lost"] = lost
    corpus_files.write(folder / "store", data)
    if cleaned:
        report, samples = cleaned
        pipeline.write(report, samples, folder / "store" / "cleaning")
        manifest["cleaning"] = report
    write_manifest(folder / "store", manifest)


def _train(config: TokenizerConfig, corpus: Corpus, survey: Surveyed, folder: epath.Path, workers: int) -> Tokenizer:
    """The tokenizer in `folder`, trained if needed."""
    done, partial = folder / "tokenizer", folder / "tokenizer.partial"
    if not done.exists():
        # The sample is on disk before SentencePiece starts, so that a full disk does not fail inside SentencePiece.
        texts = _training_texts(corpus, survey, folder, workers) if config.trained else ()
        tokenizers.train(config, texts, partial)
        partial.rename(done)
    return tokenizers.load(done)


def _training_texts(corpus: Corpus, survey: Surveyed, folder: epath.Path, workers: int) -> Iterator[str]:
    """Training documents for a tokenizer: each k-th of the corpus if the corpus is larger than TRAINING_BYTES."""
    every = -(-survey.bytes // TRAINING_BYTES)
    firsts = [0, *itertools.accumulate(task["documents"] for task in survey.tasks)][:-1]
    step = Sample(corpus, folder / "sample", every, survey.cut, tuple(firsts))
    run_step(step, len(firsts), workers, folder, "training the tokenizer: reading documents", survey.documents)
    return _with_heartbeats(step.texts())


def _with_heartbeats(texts: Iterator[str]) -> Iterator[str]:
    for text in texts:
        heartbeat.moved()
        yield text


def _tokenize(data: DataConfig, corpus: Corpus, survey: Surveyed, folder: epath.Path, workers: int) -> list[dict]:
    """Tokenizes all tasks, and returns their results. Raises: Refused, if the text changed since the survey."""
    step = Tokenize(corpus, folder / "pieces", folder / "tokenizer", survey.cut, threads=workers == 1)
    run_step(step, len(survey.tasks), workers, folder, "tokenizing documents", survey.documents)
    results = [result(step.folder, task) for task in range(len(survey.tasks))]
    for before, now in zip(survey.tasks, results, strict=True):
        if before["digest"] != now["digest"]:
            (folder / "work.json").unlink()  # the counts are of no use to another call
            raise Refused(
                f"The files of data.source={data.source} changed while they were read: {before['documents']} documents "
                f"of {before['bytes']} bytes at first, then {now['documents']} of {now['bytes']}: prepare again when "
                "they no longer change."
            )
    return results
