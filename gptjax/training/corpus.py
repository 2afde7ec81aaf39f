"""The token stores that a run reads, and the tokenizer in its workdir."""

import dataclasses

import jax
from etils import epath

from gptjax.checkpoints.record import RunRecord
from gptjax.data.preparation import prepare as preparation
from gptjax.data.store.store import Store, is_whole
from gptjax.data.stream import augment, mixture
from gptjax.data.stream.mixture import Corpus
from gptjax.errors import Refused
from gptjax.models.build import check_divides
from gptjax.runtime import distributed, heartbeat
from gptjax.runtime.files import write_whole
from gptjax.tokenizers import tokenizer
from gptjax.training.config.schema import Config


def store_folder(setting: str, folder: epath.Path) -> epath.Path:
    """The folder of a run's token store: `setting`, its data.store, or a folder in the workdir."""
    return epath.Path(setting) if setting else folder / "store"


def open_corpus(config: Config, folder: epath.Path) -> Corpus:
    """Opens the prepared stores of a run in `folder`. Raises: Refused."""
    if config.mixture.stores:
        return Corpus.open(config.mixture.stores)
    return Corpus({"": Store.open(store_folder(config.data.store, folder))})


def record_of(config: Config, corpus: Corpus) -> RunRecord:
    """The record of a run for its checkpoints, still without progress."""
    return RunRecord(
        config=dataclasses.asdict(config),
        tokenizer_hash=corpus.tokenizer.hash,
        text_hashes={name: store.manifest["text_hash"] for name, store in corpus.stores.items()},
        tokenizer=tokenizer_files(corpus),
    )


def tokenizer_files(corpus: Corpus) -> dict[str, bytes]:
    """The content of each of the tokenizer's files, by name."""
    return tokenizer.read_files(next(iter(corpus.stores.values())).folder / "tokenizer")


def prepare(config: Config, folder: epath.Path, mesh: jax.sharding.Mesh) -> Corpus:
    """Opens the token stores of a run; process 0 first makes a missing store and copies the tokenizer.

    The vocabulary size is known from here on. The model must divide over the mesh with it, which is checked before a
    store is made.

    Raises: Refused, for an unusable corpus or mesh; nothing made for it stays.
    """
    with distributed.together():
        if distributed.first():
            is_made = bool(config.mixture.stores) or is_whole(store_folder(config.data.store, folder))
            corpus = make_corpus(config, folder) if is_made else None
            vocab_size = corpus.tokenizer.vocab_size if corpus else tokenizer.expected_vocab_size(config.tokenizer)
            check_divides(config.model, vocab_size, config.seq_len, mesh)
            corpus = corpus or make_corpus(config, folder)
            augment.check_tokenizer(config.augment, corpus.tokenizer)
            write_tokenizer(corpus, folder)
    with distributed.together():
        if not distributed.first():
            where = [store_folder(config.data.store, folder)]
            where = list(mixture.folders(config.mixture.stores).values()) if config.mixture.stores else where
            for path in (*(each / "manifest.json" for each in where), folder / "tokenizer"):
                if not path.exists():
                    raise Refused(
                        f"{path}, which process 0 made, is invisible to process {jax.process_index()}: give a "
                        "--workdir (and data.store) that all hosts share, for example on gs://."
                    )
            corpus = open_corpus(config, folder)
    return corpus


def make_corpus(config: Config, folder: epath.Path) -> Corpus:
    """Opens the stores of a run's mixture, or makes the store of its source. Raises: Refused."""
    where, beats = store_folder(config.data.store, folder), folder / heartbeat.FOLDER
    # A bucket keeps no empty folders, and the last of its parents is the list of all buckets.
    around = [path for each in (where, folder) if "://" not in str(each) for path in (each, *each.parents)]
    new = [path for path in (where, beats, *around) if not path.exists()]
    made = False
    try:
        if config.mixture.stores:
            corpus = open_corpus(config, folder)
            check_vocabulary(config, corpus)
        else:
            store, made = preparation.prepared(config.data, config.tokenizer, where, 1, config.clean)
            corpus = Corpus({"": store})
        corpus.check_windows(config.seq_len)
        return corpus
    except Refused:
        # The fault is known only now. Older folders, folders with other content, and a store that another run made
        # meanwhile all stay.
        for path in new:
            if (path == beats or (path == where and made)) and path.exists():
                path.rmtree()
            elif path.exists() and not any(path.iterdir()):
                path.rmdir()
        raise


def check_vocabulary(config: Config, corpus: Corpus) -> None:
    """The stores must have the config's vocabulary size, with which plan and bench count. Raises: Refused."""
    expected, found = tokenizer.expected_vocab_size(config.tokenizer), corpus.tokenizer.vocab_size
    if expected != found:
        path = next(iter(corpus.stores.values())).folder / "tokenizer"
        if isinstance(corpus.tokenizer, tokenizer.ByteTokenizer):
            remedy = f"tokenizer.kind=byte, with the special_tokens of {path / 'tokenizer.json'}"
        else:
            remedy = f"tokenizer.path={path}, or tokenizer.vocab_size={found}"
        raise Refused(
            f"mixture.stores has a vocabulary of {found}, and the section tokenizer {expected}: set {remedy}."
        )


def write_tokenizer(corpus: Corpus, folder: epath.Path) -> None:
    """Copies the stores' tokenizer into the workdir."""
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer_files(corpus).items():
        write_whole(folder / "tokenizer" / name, content)
