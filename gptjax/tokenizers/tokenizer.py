"""Text to token ids and back, exactly: bytes, SentencePiece, or a tokenizer.json of Hugging Face.

Every kind reproduces every text exactly, or refuses. Every kind has:

    vocab_size: number of ids, the largest + 1.
    end_of_text: the id that opens every document in a store, and is predicted where a document ends.
    begin: the id that opens a document for the model; end_of_text, except in published tokenizers with an id of their
        own, such as Llama's.
    ends: the ids after which generation stops: end_of_text, and others that a published model names, such as Llama 3's
        end of a turn.
    prefix: whether the model was trained on texts with a leading space: "always", "unless there", or "" (never).
    opening: the ids that the tokenizer's own file puts before a text, for example by a template in tokenizer.json.
    special: ids by name that no text encodes to, including end-of-text and the config's `special_tokens`.
    token_bytes: int32 [vocab_size], the UTF-8 bytes of each id, 0 for special ids. The sum over a text's tokens is the
        length of the text in bytes, on which bits per byte rely.
    hash: sha256 of the files that the tokenizer was loaded from.
    encode(text): the ids, int32 [tokens]. Raises Refused, for half a surrogate pair, which UTF-8 lacks.
    encode_batch(texts, threads): `encode` of each text, by one thread or (-1) as many as there are cores.
    encode_sampled(text, seed, alpha): one of several encodings, a pure function of its arguments. Raises Refused, for
        a kind with one encoding only.
    decode(ids): the text. Special ids are silent, and bytes that are not UTF-8 come out as U+FFFD.
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
# The files of a tokenizer, in the order of hashing: the first names the kind, the others belong to one kind each.
FILES = "tokenizer.json", "sentencepiece.model", "huggingface.json"
FILE = {"sentencepiece": "sentencepiece.model", "huggingface": "huggingface.json"}
GIVE = {
    "sentencepiece": "give a .model file that SentencePiece wrote, or no path",
    "huggingface": "give a tokenizer.json that Hugging Face's tokenizers wrote",
}
# Kept of a published model: ids that end a text, unread parts of tokenizer_config.json, the effect on a text that is
# not applied here (`prefix`), and the parts taken out of its tokenizer.json.
CARRIED = {"ends": list, "tokenizer_config": dict, "prefix": str, "taken_out": dict, "own_ids": dict}
# A model of 256,000 pieces has some 5 MB, such a tokenizer.json some 30. A checkpoint's manifest holds the file as
# base64, 4/3 of its size, within manifest.MAX_BYTES.
MAX_BYTES = 40 << 20
REMEDY = "put back the tokenizer that the data was prepared with, or prepare the data again"

Tokenizer = ByteTokenizer | SentencePieceTokenizer | HuggingFaceTokenizer


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer that turns text into ids.

    kind: `byte` (256 bytes and end-of-text), `sentencepiece`, or `huggingface` (a tokenizer.json, given by `path`).
    path: an existing tokenizer, local or gs://, to use instead of training one: SentencePiece's .model, Hugging Face's
        tokenizer.json, or a folder with either, for example from `gptjax tokenizer train`.
    special_tokens: names, separated by commas, of ids that no text encodes to. A name that a given tokenizer lacks
        takes a reserved id, or a new id at the end.

    Settings for training SentencePiece; an existing tokenizer keeps its own:

    vocab_size: number of ids, including special and reserved ones.
    model: `bpe` or `unigram`.
    split_digits: whether each digit is a token of its own.
    num_reserved: ids reserved for special tokens that are named later.
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
    """Refuses a config that `train` can't follow with any corpus: an unknown kind, a file that is missing or lossy."""
    if config.kind not in KINDS:
        hint = nearest(config.kind, KINDS)
        raise Refused(f'tokenizer.kind="{config.kind}" must be one of {", ".join(KINDS)}.{hint}')
    if config.model not in sentencepiece.MODELS:
        hint = nearest(config.model, sentencepiece.MODELS)
        raise Refused(f'tokenizer.model="{config.model}" must be one of {", ".join(sentencepiece.MODELS)}.{hint}')
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
    """Writes a tokenizer into `folder`, which may be missing, and loads it.

    `texts` is read only for training. Refuses whatever `check` does, and a vocabulary larger than the texts can fill.
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
    for name in reversed(FILES):  # the file that names the kind is written last
        if name in files:
            (folder / name).write_bytes(files[name])
    return load(folder)


def given(config: TokenizerConfig) -> dict[str, bytes]:
    """The files of a tokenizer that a config gives without training. Raises: Refused."""
    if config.path:
        return _given(config)[0]
    return {"tokenizer.json": description(config.kind, special_names(config.special_tokens))}


def description(kind: str, names: list[str], carried: Mapping = MappingProxyType({})) -> bytes:
    """The content of tokenizer.json. carried: what is kept of a published model, by the keys of CARRIED."""
    return (json.dumps({"kind": kind} | ({"special_tokens": names} if names else {}) | dict(carried)) + "\n").encode()


def existing(path: str) -> Tokenizer:
    """The tokenizer at a path of any kind, as in `TokenizerConfig.path`; or `byte`. Raises: Refused."""
    if path == "byte":
        return ByteTokenizer("")
    kind, *_ = _found(epath.Path(path), "huggingface" if path.endswith(".json") else "sentencepiece")
    return load(path) if kind == "byte" else _existing(TokenizerConfig(kind=kind, path=path))


def _existing(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that `path` names. Raises: Refused."""
    files, path = _given(config)
    return from_files(files, str(path.parent), path.name)


def _given(config: TokenizerConfig) -> tuple[dict[str, bytes], epath.Path]:
    """The files of the tokenizer at `path`, as `train` writes them, and the path of its own file. Raises: Refused."""
    kind, names, carried, path = _found(epath.Path(config.path), config.kind)
    if kind != config.kind:
        raise Refused(
            f"tokenizer.path {config.path} is of kind {kind}, and tokenizer.kind is {config.kind}: set it to {kind}."
        )
    names += [name for name in special_names(config.special_tokens) if name not in names]
    content = untrusted.read(path, MAX_BYTES, GIVE[kind])
    return {"tokenizer.json": description(kind, names, carried), FILE[kind]: content}, path


def _found(path: epath.Path, kind: str) -> tuple[str, list[str], dict, epath.Path]:
    """Kind, special tokens, carried keys and own file of the tokenizer at a path; a file is taken to be of `kind`."""
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
    """The vocabulary size of a config's tokenizer.

    If the file at `path` is missing, the config's own number: a resumed run no longer needs the file, and reads the
    tokenizer of its store. Callers without a store call `check` first.
    """
    if config.kind == "byte":
        return 257 + len(special_names(config.special_tokens))
    if config.path and epath.Path(config.path).exists():
        return _existing(config).vocab_size
    return config.vocab_size


def settings(config: TokenizerConfig) -> dict[str, object]:
    """The config keys that the tokens depend on, with values."""
    used = ["kind", "special_tokens"]
    if config.kind != "byte":
        used += ["path"]
    if config.trained:
        used += ["vocab_size", "model", "split_digits", "num_reserved"]
    return {key: getattr(config, key) for key in used}


def check_same(config: TokenizerConfig, hash: str, where) -> None:
    """Refuses a `path` with a tokenizer other than that of the store in `where`."""
    if config.path and epath.Path(config.path).exists() and (here := hash_of(_given(config)[0])) != hash:
        raise Refused(
            f"tokenizer.path {config.path} has hash {here[:12]}, but the tokens of {where} were made by {hash[:12]}: "
            "put that tokenizer back, or prepare the data again in another folder."
        )


def load(folder: epath.PathLike) -> Tokenizer:
    """Loads the tokenizer that `train` wrote into `folder`. Raises: Refused, if files are missing or damaged."""
    return from_files(read_files(folder), str(folder))


def read_files(folder: epath.PathLike) -> dict[str, bytes]:
    """The files of a tokenizer's folder, for `from_files`; missing files are left out."""
    there = [path for path in (epath.Path(folder) / name for name in FILES) if path.exists()]
    return {path.name: untrusted.read(path, MAX_BYTES, REMEDY) for path in there}


def hash_of(files: dict[str, bytes]) -> str:
    """The `hash` of a tokenizer with these files; compare a known hash first, then parse."""
    return hashlib.sha256(b"".join(files[name] for name in FILES if name in files)).hexdigest()


def from_files(files: dict[str, bytes], where: str, name: str = "") -> Tokenizer:
    """Parses a tokenizer from its files, found at `where`. Raises: Refused, if files are missing or damaged.

    name: file name of the kind's own file, if different from the one that `train` uses.
    """
    return _parsed(tuple(files.items()), where, name)


# Cached for repeated requests, for example by `plan --search`: parsing a large tokenizer.json takes 2 s.
@functools.lru_cache(maxsize=1)
def _parsed(pairs: tuple[tuple[str, bytes], ...], where: str, name: str) -> Tokenizer:
    files = dict(pairs)
    if "tokenizer.json" not in files:
        raise Refused(f"{where}/tokenizer.json does not exist: prepare the data there first.")
    made = untrusted.json_object(files["tokenizer.json"], f"{where}/tokenizer.json", REMEDY)
    kind, names, carried = described_by(made, where)
    if kind != "byte" and FILE[kind] not in files:
        raise Refused(
            f"{where}/{FILE[kind]} does not exist though tokenizer.json asks for it: prepare the data there again."
        )
    if kind == "byte":
        known = ByteTokenizer(hash_of(files), names)
    else:
        own = files[FILE[kind]], hash_of(files), names, f"{where}/{name or FILE[kind]}"
        if kind == "sentencepiece":
            known = sentencepiece.lossless(*own)
        else:
            ids = huggingface.own_ids(carried.get("own_ids", {}), f"{where}/tokenizer.json")
            known = huggingface.lossless(*own, ids)
    ends = carried.get("ends", [])
    if not all(type(i) is int and 0 <= i < known.vocab_size for i in ends):
        raise Refused(f"{where}/tokenizer.json is damaged (its ends are {shown(ends)}): {REMEDY}.")
    known.ends += tuple(i for i in ends if i not in known.ends)
    known.prefix = carried.get("prefix", "")
    return known


def prompted(known: Tokenizer, text: str) -> str:
    """Adds the tokenizer's `prefix`, so that a text looks like the texts that its model was trained on."""
    space = known.prefix == "always" or (known.prefix == "unless there" and not text.startswith(" "))
    return " " + text if text and space else text


def encode_prompt(known: Tokenizer, text: str) -> np.ndarray:
    """The ids of a text with the tokenizer's `prefix`."""
    return known.encode(prompted(known, text))


def described_by(made: dict, where) -> tuple[str, list[str], dict]:
    """Kind, special tokens and carried keys of one of our tokenizer.json files. Raises: Refused."""
    kind, names = made.get("kind"), made.get("special_tokens", [])
    if kind not in KINDS:
        raise Refused(f"{where}/tokenizer.json is damaged (its kind is {shown(kind)}): {REMEDY}.")
    if type(names) is not list or any(type(name) is not str for name in names) or len(set(names)) < len(names):
        raise Refused(f"{where}/tokenizer.json is damaged (its special_tokens are {shown(names)}): {REMEDY}.")
    carried = {key: made[key] for key in CARRIED if key in made}
    untrusted.check_types(carried, {key: CARRIED[key] for key in carried}, f"{where}/tokenizer.json", REMEDY)
    return kind, names, carried
