"""Converts a tokenizer between Hugging Face's files and ours.

Our tokenizers reproduce every text exactly. If a tokenizer.json or SentencePiece model adds a leading space or
normalizes texts, this step is removed, and a note is printed. The ids of a text are then Hugging Face's ids of the text
with the space, or of the normalized text. A prompt gets the space (`tokenizer.encode_prompt`), and files for Hugging
Face get the removed steps back.
"""

import itertools
import json
import pathlib
import sysconfig
from typing import NamedTuple

import sentencepiece
from etils import epath

from gptjax.errors import Refused
from gptjax.runtime import optional, untrusted
from gptjax.tokenizers import exact, tokenizer
from gptjax.tokenizers.exact import SPACE_SIGN
from gptjax.tokenizers.huggingface import BYTE_OF, SPACE_TO_SIGN, opening
from gptjax.tokenizers.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer

REMEDY = "put the model's own tokenizer there"
OTHERS = "vocab.json", "merges.txt", "tekken.json", "vocab.txt", "spiece.model", "tokenizer.model.v3"
# These bytes are appended to a SentencePiece model, whose protobuf reader takes the last value of a field. They turn
# off the leading space, and the removal of spaces.
AS_IT_IS = bytes([3 << 3 | 2, 4, 3 << 3, 0, 4 << 3, 0])
MAX_TEMPLATE_BYTES = 1 << 20
MOST_DIFFERING = 0.01  # share of texts; rounding decides between equally good segmentations of a Unigram model
SAMPLE_BYTES = 1 << 18  # bytes of Python's standard library on which a converted tokenizer is compared with ours


class Carried(NamedTuple):
    """A tokenizer in our files. note: the changes to print; empty without changes."""

    files: dict[str, bytes]
    tokenizer: Tokenizer
    note: str


def read_tokenizer(folder: pathlib.Path, vocab_size: int, ends: list[int], begin: int | None = None) -> Carried:
    """Reads the tokenizer in a folder; the rest of the vocabulary gets reserved ids, which no text has.

    Args:
      folder: the folder of a Hugging Face model.
      vocab_size: rows of the embedding.
      ends: ids that end a text by the model's own files; all below vocab_size.
      begin: id that opens a text by the model's own files.

    Raises: Refused.
    """
    kind, content, note, changes = _found(folder, vocab_size)
    own = {tokenizer.FILE[kind]: content} if kind != "byte" else {}
    kept = {"ends": ends, "tokenizer_config": _config(folder)} | changes
    if kind == "huggingface":
        kept["own_ids"] = _own_ids(folder, content, ends, begin)
    kept = {key: value for key, value in kept.items() if value}
    ids = {key: kept[key] for key in ("own_ids",) if key in kept}
    files = {"tokenizer.json": tokenizer.description(kind, [], ids)} | own
    known = tokenizer.from_files(files, str(folder), {"huggingface": "tokenizer.json"}.get(kind, "tokenizer.model"))
    if known.vocab_size > vocab_size:
        raise Refused(
            f"{folder}: the tokenizer must have at most {vocab_size} ids, the rows of the embedding; found "
            f"{known.vocab_size}; {REMEDY}."
        )
    names = []
    if missing := vocab_size - known.vocab_size:
        # The tokenizer's own reserved tokens are named too, so no other token takes their names.
        names = [name for name in known.special if exact.RESERVED.fullmatch(name)]
        more = (name for name in exact.reserved(missing + len(names)) if name not in known.special)
        names += itertools.islice(more, missing)
    files = {"tokenizer.json": tokenizer.description(kind, names, kept)} | own
    return Carried(files, tokenizer.from_files(files, str(folder)), note)


def _config(folder: pathlib.Path) -> dict:
    """Returns the keys of tokenizer_config.json that are kept for Hugging Face, unused here. Raises: Refused."""
    path, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config = untrusted.read_json(epath.Path(path), tokenizer.MAX_BYTES, REMEDY) if path.exists() else {}
    if template.exists():
        content = untrusted.read(epath.Path(template), MAX_TEMPLATE_BYTES, REMEDY)
        config["chat_template"] = content.decode(errors="replace")
    return {key: config[key] for key in ("eos_token", "chat_template") if config.get(key)}


def _own_ids(folder: pathlib.Path, content: bytes, ends: list[int], begin: int | None) -> dict:
    """Returns `OwnIds` where a model's files and the names of special tokens differ. The files decide.

    A name is right if the files have the same id among their ends. tokenizer_config.json names the opening token where
    config.json has no id for it, and says whether texts open with this token although no template does it.
    """
    file, path = untrusted.json_object(content, folder / "tokenizer.json", REMEDY), folder / "tokenizer_config.json"
    config = untrusted.read_json(epath.Path(path), tokenizer.MAX_BYTES, REMEDY) if path.exists() else {}
    added = [token for token in file.get("added_tokens") or [] if type(token) is dict and token.get("special")]
    known = {token["content"]: token["id"] for token in added}
    found: dict[str, object] = {}
    end = next((known[name] for name in exact.ENDS if name in known), None)
    if ends and end not in ends and (special := [i for i in ends if i in known.values()]):
        end = found["end"] = special[0]
    if opening(file, str(folder / "tokenizer.json")):
        return found
    if begin is None:
        named = config.get("bos_token")
        begin = known.get(named.get("content") if type(named) is dict else named)
    by_name = next((known[name] for name in exact.BEGINS if name in known), end)
    if begin in known.values():
        opens = {"opens": True} if config.get("add_bos_token") is True else {}
        found |= ({"begin": begin} if begin != by_name or opens else {}) | opens
    return found


def _found(folder: pathlib.Path, vocab_size: int) -> tuple[str, bytes, str, dict]:
    """Returns (kind, content of the kind's file, note, `prefix` and `taken_out` of tokenizer.CARRIED)."""
    if (folder / "tokenizer.json").exists():
        content = untrusted.read(epath.Path(folder / "tokenizer.json"), tokenizer.MAX_BYTES, REMEDY)
        return "huggingface", *_without_changes(content, folder / "tokenizer.json")
    if (folder / "tokenizer.model").exists():
        content = untrusted.read(epath.Path(folder / "tokenizer.model"), tokenizer.MAX_BYTES, REMEDY)
        try:
            both = content, content + AS_IT_IS
            theirs, plain = (sentencepiece.SentencePieceProcessor(model_proto=each) for each in both)
        except RuntimeError as error:
            raise Refused(f"{folder / 'tokenizer.model'} must be a SentencePiece model; {REMEDY}.") from error
        lossy = theirs.encode(" a  b ") != plain.encode(" a  b ")
        prefix = "" if theirs.encode("a") == plain.encode("a") else "always"
        if theirs.encode(" a") == theirs.encode("a"):
            prefix = prefix and "unless there"
        note = "tokenizer.model adds or removes spaces; this step is left out."
        return "sentencepiece", content + AS_IT_IS * lossy, note * lossy, {"prefix": prefix}
    others = [name for name in OTHERS if (folder / name).exists()]
    if others or vocab_size < 257:
        raise Refused(
            f"{folder} has no tokenizer.json and no tokenizer.model"
            f"{f', only {others[0]}, which is not read' if others else ''}; {REMEDY}; transformers' "
            "AutoTokenizer.from_pretrained(…).save_pretrained(…) writes a tokenizer.json."
        )
    note = "the folder has no tokenizer: the ids 0 to 255 are taken for bytes, which may be wrong for this model."
    return "byte", b"", note, {}


def _without_changes(content: bytes, path: pathlib.Path) -> tuple[bytes, str, dict]:
    """Removes the steps of a tokenizer.json that change texts. Returns the content, a note, and the removed steps."""
    file, changed = untrusted.json_object(content, path, REMEDY), []

    def kept(part):
        """Returns the part without a prepended space and without NFC."""
        if type(part) is list:
            return [inner for inner in map(kept, part) if inner is not None]
        if type(part) is not dict:
            return part
        if part.get("type") in ("Prepend", "NFC"):
            changed.append(part["type"])
            return None
        if part.get("type") == "Metaspace" and part.get("prepend_scheme") != "never":
            changed.append("Metaspace")
            part = {key: value for key, value in part.items() if key != "add_prefix_space"}
            return part | {"prepend_scheme": "never"}
        if part.get("type") == "ByteLevel" and part.get("add_prefix_space"):
            changed.append("ByteLevel")
            return part | {"add_prefix_space": False}
        return {key: kept(value) if type(value) is list else value for key, value in part.items()}

    parts = {key: kept(file.get(key)) for key in ("normalizer", "pre_tokenizer")}
    if not changed:
        return content, "", {}
    taken_out = {"taken_out": {key: file.get(key) for key in parts}}
    if {*changed} != {"NFC"}:
        taken_out["prefix"] = "always" if "Prepend" in changed else "unless there"
    steps = ("normalizes text by NFC" if name == "NFC" else "puts a space before every text" for name in changed)
    note = f"tokenizer.json {' and '.join(dict.fromkeys(steps))}; this is left out."
    return json.dumps(file | parts, ensure_ascii=False).encode(), note, taken_out


def tokenizer_files(files: dict[str, bytes], known: Tokenizer, seq_len: int) -> tuple[dict[str, bytes], dict, str]:
    """Converts a checkpoint's tokenizer for Hugging Face.

    Args:
      files: the tokenizer's files in the checkpoint.
      known: the tokenizer.
      seq_len: tokens of the model's context.

    Returns:
      (files that `AutoTokenizer` loads, bos_token_id and eos_token_id, a note to print).
    """
    names = {i: name for name, i in known.special.items()}
    _, _, kept = tokenizer.described_by(json.loads(files["tokenizer.json"]), "the checkpoint")
    ends = dict.fromkeys([*kept.get("ends", []), *known.ends])  # training here also teaches end_of_text
    ends = list(ends)
    ends = {"bos_token_id": known.begin, "eos_token_id": ends[0] if len(ends) == 1 else ends}
    best, note = 0.0, ""
    if isinstance(known, HuggingFaceTokenizer):
        file = json.loads(files["huggingface.json"]) | kept.get("taken_out", {})
        content = _with_names(file | {"truncation": None, "padding": None}, known)
        if known.opening and not opening(file, "tokenizer.json"):
            content["post_processor"] = _template(known)
    else:
        made = [_bytes(known)] if isinstance(known, ByteTokenizer) else _pieces(files["sentencepiece.model"], known)
        differing = [_differing(content, known) for content in made]
        best = min(differing)
        if best > MOST_DIFFERING:
            return {}, ends, f"wrote no tokenizer: a tokenizer.json would give other ids for {best:.1%} of texts."
        content = _opened(made[differing.index(best)], known)
        note = f"tokenizer.json gives other ids for {best:.2%} of texts, where two segmentations are equally good."
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {"bos_token": names[known.begin], "eos_token": names[known.end_of_text], "model_max_length": seq_len}
    config |= kept.get("tokenizer_config", {})
    encoded = {"tokenizer.json": content, "tokenizer_config.json": config}
    return {name: (json.dumps(text) + "\n").encode() for name, text in encoded.items()}, ends, note if best else ""


def _added(i: int, name: str) -> dict:
    rest = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": name} | rest | {"special": True}


def _with_names(file: dict, known: HuggingFaceTokenizer) -> dict:
    """Adds the special tokens that a config named to a tokenizer.json, without tokens that only fill the vocabulary."""
    named = {i: name for name, i in known.special.items()}
    added = file.get("added_tokens") or []
    here = {token["id"] for token in added}
    added = [token | {"content": named.get(token["id"], token["content"])} for token in added]
    more = [i for i in named if i not in here and not exact.RESERVED.fullmatch(named[i])]
    return file | {"added_tokens": added + [_added(i, named[i]) for i in more]}


def _file(model: dict, known: Tokenizer, normalizer, pre_tokenizer, decoder) -> dict:
    named = sorted((i, name) for name, i in known.special.items())
    parts = {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": None, "decoder": decoder}
    added = [_added(i, name) for i, name in named]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added} | parts | {"model": model}


def _opened(file: dict, known: Tokenizer) -> dict:
    """Adds the opening token and the leading space of a SentencePiece model to a tokenizer.json."""
    if known.prefix:
        sign = {"type": "Prepend", "prepend": SPACE_SIGN}
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        file["normalizer"] = {"type": "Sequence", "normalizers": [sign, file["normalizer"]]}
        file["decoder"]["decoders"].append(strip)
    if known.opening:
        file["post_processor"] = _template(known)
    return file


def _template(known: Tokenizer) -> dict:
    """The part of a tokenizer.json that puts the opening token before a text."""
    name = next(name for name, i in known.special.items() if i == known.begin)
    first, second = ({"SpecialToken": {"id": name, "type_id": number}} for number in (0, 1))
    a, b = ({"Sequence": {"id": part, "type_id": number}} for number, part in enumerate("AB"))
    token = {name: {"id": name, "ids": [known.begin], "tokens": [name]}}
    template = {"single": [first, a], "pair": [first, a, second, b], "special_tokens": token}
    return {"type": "TemplateProcessing"} | template


BPE = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}


def _bytes(known: ByteTokenizer) -> dict:
    """Makes a tokenizer.json with one character for each byte, and no merges."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model = BPE | {"fuse_unk": False, "byte_fallback": False, "merges": []}
    return _file(model | {"vocab": {chr(char): i for char, i in BYTE_OF.items()}}, known, None, level, level)


def _pieces(content: bytes, known: Tokenizer) -> list[dict]:
    """Converts a SentencePiece model to BPE and to Unigram; comparing ids shows which of both is right.

    SentencePiece merges the pair that makes the piece with the highest score. The merges are therefore all pairs that
    make a piece, in the order of the pieces' scores.
    """
    pieces = sentencepiece.SentencePieceProcessor(model_proto=content)
    names = [pieces.id_to_piece(i) for i in range(pieces.vocab_size())]
    scores = [pieces.get_score(i) for i in range(pieces.vocab_size())]
    silent = pieces.is_control, pieces.is_unknown, pieces.is_unused, pieces.is_byte
    plain = {name: i for i, name in enumerate(names) if not any(kind(i) for kind in silent)}
    merges = []
    for name in sorted((name for name in plain if len(name) > 1), key=lambda name: -scores[plain[name]]):
        cuts = [(name[:cut], name[cut:]) for cut in range(1, len(name))]
        pairs = [pair for pair in cuts if pair[0] in plain and pair[1] in plain]
        merges += sorted(pairs, key=lambda pair: (plain[pair[0]], plain[pair[1]]))
    bpe = BPE | {"unk_token": names[pieces.unk_id()], "fuse_unk": False, "byte_fallback": True}
    bpe |= {"vocab": {name: i for i, name in enumerate(names)}, "merges": [list(pair) for pair in merges]}
    unigram = {"type": "Unigram", "unk_id": pieces.unk_id(), "vocab": [*map(list, zip(names, scores, strict=True))]}
    back = {"type": "Replace", "pattern": {"String": SPACE_SIGN}, "content": " "}
    decoder = {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]}
    models = bpe, unigram | {"byte_fallback": True}
    return [_file(model, known, SPACE_TO_SIGN, None, decoder) for model in models]


def _differing(file: dict, known: Tokenizer) -> float:
    """Returns the share of texts with other ids by a tokenizer.json: paragraphs of Python's library, and odd texts."""
    library = optional.package("tokenizers", "gptjax convert to-hf")
    theirs = library.Tokenizer.from_str(json.dumps(file))
    texts, size = ["naïve Größe, Ωμέγα, 東京 😀 \x00 \t\r\n", "  two  spaces  ", "x"], 0
    for path in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py")):
        texts += path.read_text("utf-8", "replace").replace(SPACE_SIGN, " ").split("\n\n")
        if (size := size + path.stat().st_size) > SAMPLE_BYTES:
            break
    return sum(
        theirs.encode(text, add_special_tokens=False).ids != known.encode(text).tolist() for text in texts
    ) / len(texts)
