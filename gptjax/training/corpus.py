"""The token stores that a run reads, and the tokenizer in its workdir."""

import base64
import dataclasses

import jax
from etils import epath

from gptjax.data.preparation import prepare as preparation
from gptjax.data.store.store import Store
from gptjax.data.stream import augment, mixture
from gptjax.data.stream.mixture import Corpus
from gptjax.errors import Refused, shown
from gptjax.models.build import check_divides
from gptjax.runtime import distributed, heartbeat, untrusted
from gptjax.runtime.files import write_whole
from gptjax.tokenizers import tokenizer
from gptjax.training.config.schema import Config


def store_folder(setting: str, folder: epath.Path) -> epath.Path:
    """Where the token store of a run in `folder` is, by its data.store."""
    return epath.Path(setting) if setting else folder / "store"


def open_corpus(config: Config, folder: epath.Path) -> Corpus:
    """What a run in `folder` reads, where it is prepared. Raises: Refused."""
    if config.mixture.stores:
        return Corpus.open(config.mixture.stores)
    return Corpus({"": Store.open(store_folder(config.data.store, folder))})


def identity(config: Config, corpus: Corpus) -> dict:
    """What a checkpoint keeps beside the state: which run it is of, and what to read its tokens with."""
    files = tokenizer.read_files(next(iter(corpus.stores.values())).folder / "tokenizer")
    return {
        "config": dataclasses.asdict(config),
        "tokenizer_hash": corpus.tokenizer.hash,
        "text_hashes": {name: store.manifest["text_hash"] for name, store in corpus.stores.items()},
        "tokenizer": {name: base64.b64encode(content).decode() for name, content in files.items()},
    }


def check_same_data(corpus: Corpus, saved: dict, where: epath.Path) -> None:
    """Raises: Refused, when stores do not hold the tokens that a checkpoint was trained on; there may be more of them."""
    untrusted.check_types(saved, {"text_hashes": dict}, where, "begin anew in another --workdir")
    known = saved["text_hashes"]
    for name, store in corpus.stores.items():
        text = store.manifest["text_hash"]
        pairs = [("tokenizer_hash", store.tokenizer.hash, saved.get("tokenizer_hash"))]
        for what, here, there in pairs + [("text_hash", text, known.get(name, text))]:
            if here != there:
                raise Refused(
                    f"{store.folder} has {what} {here[:12]}, but {where} was trained on {str(there)[:12]}: put back the "
                    "store of that run, or begin anew in another --workdir."
                )
        others = [other for other in known if known[other] == text and name not in known]
        if others == [""]:  # the order of a store's rows is one by its name, which this one did not have
            raise Refused(
                f"mixture.stores calls {store.folder} {name}, and {where} is of a run that began with it alone, and "
                f"without a name: go on with data.store={store.folder} and no mixture, or begin anew in another "
                f"--workdir, with mixture.weights={name} 1 at first."
            )
        if others and not name:
            raise Refused(
                f"{store.folder} is {shown(others[0])} of the mixture that {where} is of: go on with "
                f"mixture.stores='{others[0]}={store.folder}' and mixture.weights='{others[0]} 1'."
            )
        if others:
            raise Refused(
                f"mixture.stores calls {store.folder} {name}, and {where} knows its text as {shown(others[0])}: keep the "
                "name, by which a run finds how far it was in a store, or begin anew in another --workdir."
            )


def prepare(config: Config, folder: epath.Path, mesh: jax.sharding.Mesh) -> Corpus:
    """The token stores of a run and, in its workdir, the tokenizer; made if need be, by process 0 while others wait.

    Raises: Refused, for a corpus that can't be used; nothing that was made for it stays.
    """
    with distributed.together():
        if distributed.first():
            corpus = make_corpus(config, folder)
            check_divides(config.model, corpus.tokenizer.vocab_size, config.seq_len, mesh)
            augment.check_tokenizer(config.augment, corpus.tokenizer)
            write_tokenizer(corpus, folder)
    with distributed.together():
        if not distributed.first():
            where = [store_folder(config.data.store, folder)]
            where = list(mixture.folders(config.mixture.stores).values()) if config.mixture.stores else where
            for path in (*(each / "manifest.json" for each in where), folder / "tokenizer"):
                if not path.exists():
                    raise Refused(
                        f"{path}, which process 0 made, is not seen by process {jax.process_index()}: give a --workdir "
                        "(and data.store) that all hosts share, such as one on gs://."
                    )
            corpus = open_corpus(config, folder)
    return corpus


def make_corpus(config: Config, folder: epath.Path) -> Corpus:
    """The stores of a run in `folder`: those of its mixture, or the one that is made of its source. Raises: Refused."""
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
        # Only the corpus itself could tell; a folder that was there, or has something else in it by now, stays, and so
        # does a store that another run made meanwhile.
        for path in new:
            if (path == beats or path == where and made) and path.exists():
                path.rmtree()
            elif path.exists() and not any(path.iterdir()):
                path.rmdir()
        raise


def check_vocabulary(config: Config, corpus: Corpus) -> None:
    """The vocabulary by the config, which check, plan and bench count, is that of the stores. Raises: Refused."""
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
    """A copy of the stores' tokenizer into the workdir."""
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer.read_files(next(iter(corpus.stores.values())).folder / "tokenizer").items():
        write_whole(folder / "tokenizer" / name, content)
