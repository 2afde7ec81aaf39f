"""Hostile inputs for hypothesis: what a bad disk, a cut transfer or malice makes of real files and words."""

import copy
import json
import os
import pathlib

from hypothesis import strategies as st

NASTY = (
    "", " ", "\0", "a\0b", "\n", "\ud800", "\u2028", "\ufeff", "\x1b[2J", "nan", "-inf", "1e999", "0x10", "1_0", "²",
    "٣", "-0", "--", "=", "%s", "{}", "None", "__class__", "9" * 5000, "9" * 400, "(" * 5000, "-" * 5000 + "1",
    "a" * 5000, "~", "..", "../../etc/passwd", "/etc/passwd", "/dev/zero", "a/../../b", "gs://bucket/x", "x" * 300,
)  # fmt: skip
NUMBERS = (0, -1, 1, 3, 2**15, 2**31, 2**32, 2**53, 2**63, 10**15, 10**40, -(2**63), 0.5, -0.0, 1e-320, 1e300)
# Not to be had from Python's own values: put in as these words, and replaced in the text.
RAW = {
    "@deep": "[" * 3000 + "]" * 3000,
    "@deeper": '{"a":' * 100_000,
    "@digits": "9" * 5000,
    "@infinite": "1e999",
    "@nan": "NaN",
    "@lone": '"\\ud800"',
    "@cut": "",
}
BYTES = tuple(word.encode("utf-8", "surrogatepass") for word in (*NASTY, *RAW.values())) + (
    b"\xff" * 8, b"\x80", b"\0" * 4096, b"\x7fELF", b"\x80\x04\x95", b"\xff\xfe", b"PK\x03\x04",
)  # fmt: skip

words = st.one_of(st.sampled_from(NASTY), st.text(max_size=20), st.text(st.characters(), max_size=5))
numbers = st.one_of(st.sampled_from(NUMBERS), st.integers(), st.floats())
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, words, st.sampled_from(list(RAW))),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)),
    max_leaves=5,
)


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """Bytes of a real file with a few bits flipped, parts cut, doubled, overwritten or exchanged; or none of it."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.one_of(st.binary(max_size=200), st.sampled_from(BYTES)))
    for _ in range(draw(st.integers(1, 3))):
        at, other = (draw(st.integers(0, len(content))) for _ in range(2))
        start, stop = sorted((at, other))
        word = draw(st.one_of(st.sampled_from(BYTES), st.binary(min_size=1, max_size=8)))
        kind = draw(st.sampled_from(("flip", "cut", "drop", "double", "insert", "overwrite", "fill")))
        if kind == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ 1 << draw(st.integers(0, 7))]) + content[at + 1 :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "drop":
            content = content[:start] + content[stop:]
        elif kind == "double":
            content = content[:stop] + content[start:]
        elif kind == "insert":
            content = content[:at] + word + content[at:]
        elif kind == "overwrite":
            content = content[:at] + word + content[at + len(word) :]
        elif kind == "fill":
            content = content[:start] + word[:1] * (stop - start) + content[stop:]
    return content


@st.composite
def changed(draw, value):
    """A tree of a real file with a few keys or items exchanged, dropped, renamed or added."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        holder = value
        while inner := [child for child in (holder.values() if type(holder) is dict else holder)
                        if type(child) in (dict, list) and child]:  # fmt: skip
            if draw(st.booleans()):
                break
            holder = draw(st.sampled_from(inner))
        keys = list(holder) if type(holder) is dict else list(range(len(holder)))
        key = draw(st.sampled_from(keys)) if keys else "a"
        kind = draw(st.sampled_from(("set", "set", "drop", "rename", "add"))) if keys else "add"
        if kind == "set":
            holder[key] = draw(values)
        elif kind == "drop" or kind == "rename":
            old = holder.pop(key)
            if kind == "rename" and type(holder) is dict:
                holder[draw(words)] = old
        elif type(holder) is dict:
            holder[draw(words)] = draw(values)
        else:
            holder.append(draw(values))
    return value


@st.composite
def changed_json(draw, value) -> bytes:
    """`changed` as the bytes of a file, with what only a text can have: deep nesting, doubled keys, NaN."""
    text = json.dumps(draw(changed(value)), ensure_ascii=draw(st.booleans()))
    for word, raw in RAW.items():
        text = text.replace(f'"{word}"', raw)
    if draw(st.integers(0, 9)) == 0:
        text = text.replace("{", "{" + draw(st.sampled_from(('"format": 7,', '"files": {}, ', '"a": 1, "a": 2, '))), 1)
    return text.encode("utf-8", "surrogatepass")


def json_files(value):
    """Changes a JSON file as a tree, or damages the bytes."""
    return st.one_of(changed_json(value), damaged(json.dumps(value, indent=1).encode()))


def of_text(text: str):
    """A word of the command line, damaged."""

    def as_text(content: bytes) -> str:
        return content.decode("utf-8", "surrogateescape").replace("\0", "")

    return st.one_of(words, damaged(text.encode("utf-8", "surrogatepass")).map(as_text))


def put(path: pathlib.Path, content: bytes | str) -> None:
    """Makes a file of these bytes, whatever was there; or, for `link:TARGET`, `folder` and `pipe`, what is none."""
    if path.is_symlink() or path.exists():
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.mkdir()
    elif content == "pipe":
        os.mkfifo(path)
    elif content != "nothing":
        path.symlink_to(content.removeprefix("link:"))


def one_at_a_time(folder: pathlib.Path, files: dict[str, bytes]):
    """Returns: put(name, content) for these files of a folder, which first mends the one that it damaged before."""
    damaged = ""

    def put_one(name: str, content: bytes | str) -> None:
        nonlocal damaged
        if damaged:
            put(folder / damaged, files[damaged])
        damaged = name
        put(folder / name, content)

    return put_one


# In place of a file.
NO_FILES = st.sampled_from(("folder", "pipe", "nothing", "link:/dev/zero", "link:/etc/passwd", "link:.", "link:itself"))


@st.composite
def messages(draw, message: bytes) -> bytes:
    """A protobuf message whose fields are damaged one by one, and put together to one that is whole."""
    fields = fields_of(message)
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(("drop", "double", "damage", "number", "swap")))
        at, other = (draw(st.integers(0, len(fields) - 1)) for _ in range(2))
        number, content = fields[at]
        if kind == "drop" and len(fields) > 1:
            del fields[at]
        elif kind == "double":
            fields.insert(other, fields[at])
        elif kind == "damage":
            fields[at] = number, draw(damaged(content))
        elif kind == "number":
            fields[at] = draw(st.integers(1, 6)), content
        elif kind == "swap":
            fields[at], fields[other] = fields[other], fields[at]
    return b"".join(varint(number << 3 | 2) + varint(len(content)) + content for number, content in fields)


def fields_of(message: bytes) -> list[tuple[int, bytes]]:
    """(number, content) of the fields of a protobuf message that has only fields with a length."""
    found, at = [], 0
    while at < len(message):
        size, at, number = 0, at + 1, message[at] >> 3
        for shift in range(0, 64, 7):
            byte, at = message[at], at + 1
            size |= (byte & 127) << shift
            if byte < 128:
                break
        found.append((number, message[at : at + size]))
        at += size
    return found


def varint(number: int) -> bytes:
    content = b""
    while number >= 128:
        content, number = content + bytes([number & 127 | 128]), number >> 7
    return content + bytes([number])


def sealed(shard: bytes, parts: int) -> bytes:
    """A zarr3 shard whose checksums hold: of its index, which is at its end, and of each part that this points at."""
    content = bytearray(shard)
    index = len(content) - 4 - 16 * parts

    def seal(start: int, stop: int):
        content[stop : stop + 4] = crc32c(content[start:stop]).to_bytes(4, "little")

    if index < 0:
        return shard
    for entry in range(index, len(content) - 4, 16):
        start, size = (int.from_bytes(content[entry + at : entry + at + 8], "little") for at in (0, 8))
        if 4 <= size and start + size <= index:
            seal(start, start + size - 4)
    seal(index, len(content) - 4)
    return bytes(content)


def crc32c(content: bytes) -> int:
    remainder = 0xFFFFFFFF
    for byte in content:
        remainder ^= byte
        for _ in range(8):
            remainder = remainder >> 1 ^ (0x82F63B78 if remainder & 1 else 0)
    return remainder ^ 0xFFFFFFFF
