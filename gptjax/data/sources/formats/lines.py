"""A record a line: JSON Lines and CSV, plain or compressed, and the documents that a step before `prepare` left."""

import csv
import json
import re
from collections.abc import Iterator

from gptjax.data.sources import files
from gptjax.data.sources.documents import RECORD_BYTES, Damages, DataConfig, Document, Part

NAME_IT = "name the one that holds the text in data.text_field"
NAME_PROMPT = "name the one that holds the prompt in data.prompt_field"


def read_jsonl(part: Part, data: DataConfig, damages: Damages) -> Iterator[Document]:
    """Objects, of each the field data.text_field; offset is the byte at which the line begins. Blank lines are none.

    With data.prompt_field each has a prompt and a response, which are put together as they are.
    """
    remedies = {data.prompt_field: NAME_PROMPT} if data.prompt_field else {}
    remedies |= {data.text_field: NAME_IT}
    for lines, record in _objects(part, damages):
        bad = [field for field in remedies if not isinstance(record.get(field), str)]
        if bad:
            (field, *_) = bad
            state = f'text in the field "{field}" ({record[field]!r:.40})' if field in record else ""
            state = state or f'field "{field}" (it has {listed(record)})'
            damages(lines.where, f"has no {state}", remedies[field])
        elif data.prompt_field and not record[data.text_field]:
            damages(lines.where, f'has an empty response in the field "{data.text_field}"', "give it one")
        else:
            *prompt, response = (record[field] for field in remedies)
            yield Document(part.path, lines.offset, "".join([*prompt, response]), sum(map(len, prompt)))


def read_documents(part: Part, data: DataConfig, damages: Damages) -> Iterator[Document]:
    """Lines that `line_of` wrote: each document keeps its name and offset."""
    kinds = {"name": str, "offset": int, "text": str, "prompt": int}
    for lines, record in _objects(part, damages):
        if {name: type(value) for name, value in record.items()} == kinds:
            yield Document(**record)
        else:
            damages(lines.where, f"has {listed(record)} and no name, offset, text and prompt", "prepare the data again")


def line_of(document: Document) -> bytes:
    return json.dumps(document._asdict(), ensure_ascii=False).encode() + b"\n"


def _objects(part: Part, damages: Damages) -> Iterator[tuple[files.Lines, dict]]:
    """The JSON object of each line."""
    lines = files.Lines(part, damages)
    for line in lines:
        if not line.strip():
            continue
        try:
            record = json.loads(_decoded(lines, line))
            if type(record) is not dict:
                raise ValueError("it is no object")
        except (ValueError, RecursionError) as error:  # of ValueErrors also too long a number, and no UTF-8
            damages(lines.where, f"is no JSON object ({error})", "mend the line")
        else:
            yield lines, record


def read_csv(part: Part, data: DataConfig, damages: Damages) -> Iterator[Document]:
    """The column data.text_field, by the names in the first line; offset is the byte at which the record begins."""
    csv.field_size_limit(RECORD_BYTES)
    lines = files.Lines(part, damages)
    texts = (_decoded(lines, line, "surrogateescape") for line in lines)  # of other columns any bytes will do
    tabs = part.path.endswith((".tsv", *(f".tsv{end}" for end in files.COMPRESSED)))
    rows = csv.reader(texts, delimiter="\t" if tabs else ",", strict=True)
    header = next(rows, [])
    if data.text_field not in header:
        damages(part.path, f'has no column "{data.text_field}" (it has {listed(header)})', NAME_IT)
        return
    column = header.index(data.text_field)
    while True:
        offset = lines.next
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            damages(lines.where, f"is no CSV ({error})", f"mend the record, which begins at byte {offset}")
            continue
        if not row:  # a blank line is no record
            continue
        if len(row) != len(header):
            damages(lines.where, f"has {len(row)} fields where the first line has {len(header)}", "mend the record")
        elif not row[column].isascii() and re.search("[\ud800-\udfff]", row[column]):
            damages(lines.where, "is not UTF-8", "convert it")
        else:
            yield Document(part.path, offset, row[column])


def _decoded(lines: files.Lines, line: bytes, errors: str = "strict") -> str:
    return line.decode("utf-8" if lines.offset else "utf-8-sig", errors)


def listed(names) -> str:
    """A few names for a sentence."""
    names = [str(name)[:40] for name in names]
    return ", ".join(names[:8]) + ", …" * (len(names) > 8) if names else "none"
