"""Text to token ids and back, exactly: bytes, SentencePiece, or a tokenizer.json of Hugging Face.

Every kind gives every text back unchanged, or refuses, and has

    vocab_size: number of ids, the largest + 1.
    end_of_text: the id that opens every document in a store, and so the one that is predicted where one ends.
    begin: the id that a model is given in its place, from which it predicts the first token of a document; end_of_text,
        but for published tokenizers that have one of its own, such as Llama's.
    ends: the ids after which a model that is asked for text has no more to say: end_of_text, and what the files of a
        published model name besides, as Llama 3's the end of a turn.
    prefix: whether its model has seen texts with a space before them: "always", "unless there" (is one), or "" (no).
    opening: the ids that its own file puts before a text for others to read, as a tokenizer.json with a template does.
    special: ids by name that no text encodes to, end-of-text and the `special_tokens` of the config among them.
    token_bytes: int32 [vocab_size], how many UTF-8 bytes an id stands for, 0 for special ones. The sum over a text's
        tokens is its length in bytes; bits per byte rests on that.
    hash: sha256 of the files it was loaded from.
    encode(text): the ids, int32 [tokens]. Raises Refused, for half a surrogate pair, which has no UTF-8.
    encode_batch(texts, threads): `encode` of each, by one thread or (-1) as many as there are cores.
    encode_sampled(text, seed, alpha): one of several encodings, a pure function of its arguments. Raises Refused, for
        a kind that has only one.
    decode(ids): the text. Special ones are silent, and bytes that are not UTF-8 come out as U+FFFD.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from etils import epath

from gptjax.errors import Refused, nearest, shown
from gptjax.runtime import untrusted
from gptjax.tokenizers import exact, huggingface, sentencepiece
from gptjax.tokenizers.byte import ByteTokenizer
from gptjax.tokenizers.huggingface import HuggingFaceTokenizer
from gptjax.tokenizers.sentencepiece import SentencePieceTokenizer

KINDS = "byte", "sentencepiece", "huggingface"
# What a tokenizer consists of, in the order in which it is hashed: which kind, and the file that the kind reads.
FILES = "tokenizer.json", "sentencepiece.model", "huggingface.json"
FILE = {"sentencepiece": "sentencepiece.model", "huggingface": "huggingface.json"}
GIVE = {
    "sentencepiece": "give a .model file that SentencePiece wrote, or no path",
    "huggingface": "give a tokenizer.json that Hugging Face's tokenizers wrote",
}
# What is kept of a published model besides: ids that end a text, and what of tokenizer_config.json goes out unread.
# And what it does to a text, which is not done here: `prefix`, and the parts of its tokenizer.json that were taken out.
CARRIED = {"ends": list, "tokenizer_config": dict, "prefix": str, "taken_out": dict}
# A model of 256,000 pieces has some 5 MB, a tokenizer.json of as many some 30. A checkpoint's manifest holds it as
# base64, 4/3 of it, and may have manifest.MAX_BYTES.
MAX_BYTES = 40 << 20
REMEDY = "put back the tokenizer that the data was prepared with, or prepare the data again"

Tokenizer = ByteTokenizer | SentencePieceTokenizer | HuggingFaceTokenizer


@dataclass(frozen=True)
class TokenizerConfig:
    """What turns text into tokens.

    kind: `byte` (256 bytes and end-of-text), `sentencepiece`, or `huggingface` (a tokenizer.json, given by `path`).
    path: a tokenizer that exists, local or gs://, to use in place of training one: SentencePiece's .model or Hugging
        Face's tokenizer.json, or a folder with it, such as `gptjax tokenizer train` writes.
    special_tokens: names, separated by commas, of ids that no text encodes to. One that a given tokenizer doesn't know
        takes an id that it has reserved, or a new one at the end.

    What SentencePiece is trained with; a tokenizer that is not trained keeps what it has:

    vocab_size: number of ids, all of those above and below included.
    model: `bpe` or `unigram`.
    split_digits: each digit is a token of its own.
    num_reserved: ids kept for special tokens that are named later.
    """

    kind: str = "sentencepiece"
    vocab_size: int = 4096
    path: str = ""
    model: str = "bpe"
    split_digits: bool = True
    num_reserved: int = 0
    special_tokens: str = ""

    @property
    def trained(self) -> bool:
        return self.kind == "sentencepiece" and not self.path


def check(config: TokenizerConfig):
    """Refuses what `train` can't follow, whatever the corpus: an unknown kind, a file that is missing or lossy."""
    if config.kind not in KINDS:
        raise Refused(
            f'tokenizer.kind is "{config.kind}", which is none of {", ".join(KINDS)}.{nearest(config.kind, KINDS)}'
        )
    if config.model not in sentencepiece.MODELS:
        hint = nearest(config.model, sentencepiece.MODELS)
        raise Refused(f'tokenizer.model is "{config.model}", which is none of {", ".join(sentencepiece.MODELS)}.{hint}')
    if config.num_reserved < 0:
        raise Refused(f"tokenizer.num_reserved={config.num_reserved} must not be negative.")
    if config.path and config.kind == "byte":
        raise Refused(f'tokenizer.path is "{config.path}", but tokenizer.kind=byte takes no path: use sentencepiece.')
    if config.kind == "huggingface" and not config.path:
        raise Refused('tokenizer.kind=huggingface needs tokenizer.path, which is "": give a tokenizer.json.')
    special_names(config.special_tokens)
    if config.path:
        _existing(config)


def special_names(text: str) -> list[str]:
    """The special tokens that a config names. Raises: Refused."""
    names = [name.strip() for name in text.split(",")] if text else []
    for name in names:
        if not name or names.count(name) > 1:
            state = f'has "{name}" {names.count(name)} times' if name else "has an empty name"
            raise Refused(f'tokenizer.special_tokens="{text}" {state}: give different names, separated by commas.')
    return names


def train(config: TokenizerConfig, texts: Iterable[str], folder: epath.PathLike) -> Tokenizer:
    """Writes a tokenizer into `folder` (made if it is missing) and loads it.

    `texts` is read only if there is something to train. Refuses what `check` does, and a vocabulary that the texts
    can't fill.
    """
    check(config)
    names = special_names(config.special_tokens)
    files = given(config)
    if config.trained:
        files["sentencepiece.model"] = sentencepiece.train(
            texts,
            vocab_size=config.vocab_size,
            model=config.model,
            split_digits=config.split_digits,
            control_symbols=[n for n in names if n != exact.END_OF_TEXT] + exact.reserved(config.num_reserved),
        )
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in reversed(FILES):  # the one that names the others at last
        if name in files:
            (folder / name).write_bytes(files[name])
    return load(folder)


def given(config: TokenizerConfig) -> dict[str, bytes]:
    """The files of a tokenizer as far as a config gives them, and none has to be trained. Raises: Refused."""
    if config.path:
        return _given(config)[0]
    return {"tokenizer.json": description(config.kind, special_names(config.special_tokens))}


def description(kind: str, names: list[str], carried: Mapping = MappingProxyType({})) -> bytes:
    """carried: what hf/tokenizer.py keeps of a published model, by the keys of CARRIED."""
    return (json.dumps({"kind": kind} | ({"special_tokens": names} if names else {}) | dict(carried)) + "\n").encode()


def existing(path: str) -> Tokenizer:
    """The tokenizer at a path, as `TokenizerConfig.path` takes it, of whatever kind; or `byte`. Raises: Refused."""
    if path == "byte":
        return ByteTokenizer("")
    kind, *_ = _found(epath.Path(path), "huggingface" if path.endswith(".json") else "sentencepiece")
    return load(path) if kind == "byte" else _existing(TokenizerConfig(kind=kind, path=path))


def _existing(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that `path` names. Raises: Refused."""
    files, path = _given(config)
    return from_files(files, str(path.parent), path.name)


def _given(config: TokenizerConfig) -> tuple[dict[str, bytes], epath.Path]:
    """(the files of the tokenizer that `path` names, as `train` writes them; where its own is). Raises: Refused."""
    kind, names, carried, path = _found(epath.Path(config.path), config.kind)
    if kind != config.kind:
        raise Refused(
            f"tokenizer.path {config.path} is of kind {kind}, and tokenizer.kind is {config.kind}: set it to {kind}."
        )
    names += [name for name in special_names(config.special_tokens) if name not in names]
    content = untrusted.read(path, MAX_BYTES, GIVE[kind])
    return {"tokenizer.json": description(kind, names, carried), FILE[kind]: content}, path


def _found(path: epath.Path, kind: str) -> tuple[str, list[str], dict, epath.Path]:
    """(kind, names of special tokens, what is carried, its own file) of what is at a path; a file is taken to be of `kind`."""
    if not path.exists():
        raise Refused(f"tokenizer.path {path} does not exist: {GIVE[kind]}.")
    if not path.is_dir():
        return kind, [], {}, path
    described = path / "tokenizer.json"
    if not described.exists():
        return "sentencepiece", [], {}, path / FILE["sentencepiece"]
    made = untrusted.read_json(described, MAX_BYTES, GIVE[kind])
    if "kind" not in made:  # not ours, but Hugging Face's
        return "huggingface", [], {}, described
    kind, names, carried = described_by(made, path)
    return kind, names, carried, path / FILE.get(kind, described.name)


def expected_vocab_size(config: TokenizerConfig) -> int:
    """The size of the vocabulary that the tokenizer of a config is to have.

    Of one that is given by `path`, and is not to be found here, what the config says: a run that goes on needs it no
    more, and looks at its store's. Whoever has no store calls `check` before.
    """
    if config.kind == "byte":
        return 257 + len(special_names(config.special_tokens))
    if config.path and epath.Path(config.path).exists():
        return _existing(config).vocab_size
    return config.vocab_size


def settings(config: TokenizerConfig) -> dict[str, object]:
    """The keys that the tokens depend on."""
    used = ["kind", "special_tokens"]
    if config.kind != "byte":
        used += ["path"]
    if config.trained:
        used += ["vocab_size", "model", "split_digits", "num_reserved"]
    return {key: getattr(config, key) for key in used}


def check_same(config: TokenizerConfig, hash: str, where) -> None:
    """Refuses a `path` that holds another tokenizer than that of the store in `where`."""
    if config.path and epath.Path(config.path).exists() and (here := hash_of(_given(config)[0])) != hash:
        raise Refused(
            f"tokenizer.path {config.path} has hash {here[:12]}, but the tokens of {where} were made by {hash[:12]}: "
            "put that tokenizer back, or prepare the data again in another folder."
        )


def load(folder: epath.PathLike) -> Tokenizer:
    """The tokenizer that `train` wrote into `folder`; refused if it isn't there, or can't be what was written."""
    return from_files(read_files(folder), str(folder))


def read_files(folder: epath.PathLike) -> dict[str, bytes]:
    """The files of a tokenizer's folder, which `from_files` takes; those that are missing are left out."""
    there = [path for path in (epath.Path(folder) / name for name in FILES) if path.exists()]
    return {path.name: untrusted.read(path, MAX_BYTES, REMEDY) for path in there}


def hash_of(files: dict[str, bytes]) -> str:
    """The `hash` of the tokenizer of these files: compare it first, where one is known, and parse them then."""
    return hashlib.sha256(b"".join(files[name] for name in FILES if name in files)).hexdigest()


def from_files(files: dict[str, bytes], where: str, name: str = "") -> Tokenizer:
    """The tokenizer of some files, found at `where`; refused if one is missing or damaged.

    name: what the kind's own file is called there, if not as `train` calls it.
    """
    return _parsed(tuple(files.items()), where, name)


# Where one tokenizer is asked for again and again, as by `plan --search`: a large tokenizer.json takes 2 s to parse.
@functools.lru_cache(maxsize=1)
def _parsed(pairs: tuple[tuple[str, bytes], ...], where: str, name: str) -> Tokenizer:
    files = dict(pairs)
    if "tokenizer.json" not in files:
        raise Refused(f"{where}/tokenizer.json does not exist: there is no tokenizer, so prepare the data there first.")
    made = untrusted.json_object(files["tokenizer.json"], f"{where}/tokenizer.json", REMEDY)
    kind, names, carried = described_by(made, where)
    if kind != "byte" and FILE[kind] not in files:
        raise Refused(
            f"{where}/{FILE[kind]} does not exist though tokenizer.json asks for it: prepare the data there again."
        )
    if kind == "byte":
        known = ByteTokenizer(hash_of(files), names)
    else:
        lossless = {"sentencepiece": sentencepiece.lossless, "huggingface": huggingface.lossless}[kind]
        known = lossless(files[FILE[kind]], hash_of(files), names, f"{where}/{name or FILE[kind]}")
    ends = carried.get("ends", [])
    if not all(type(i) is int and 0 <= i < known.vocab_size for i in ends):
        raise Refused(f"{where}/tokenizer.json is damaged (its ends are {shown(ends)}): {REMEDY}.")
    known.ends += tuple(i for i in ends if i not in known.ends)
    known.prefix = carried.get("prefix", "")
    return known


def prompted(known: Tokenizer, text: str) -> str:
    """A text as the tokenizer's model has seen texts: with its `prefix`."""
    space = known.prefix == "always" or known.prefix == "unless there" and not text.startswith(" ")
    return " " + text if text and space else text


def encode_prompt(known: Tokenizer, text: str) -> np.ndarray:
    """The ids of a text as the tokenizer's model has seen texts."""
    return known.encode(prompted(known, text))


def described_by(made: dict, where) -> tuple[str, list[str], dict]:
    """(kind, names of special tokens, what is carried) by a tokenizer.json of ours. Raises: Refused."""
    kind, names = made.get("kind"), made.get("special_tokens", [])
    if kind not in KINDS:
        raise Refused(f"{where}/tokenizer.json is damaged (its kind is {shown(kind)}): {REMEDY}.")
    if type(names) is not list or any(type(name) is not str for name in names) or len(set(names)) < len(names):
        raise Refused(f"{where}/tokenizer.json is damaged (its special_tokens are {shown(names)}): {REMEDY}.")
    carried = {key: made[key] for key in CARRIED if key in made}
    untrusted.check_types(carried, {key: CARRIED[key] for key in carried}, f"{where}/tokenizer.json", REMEDY)
    return kind, names, carried
