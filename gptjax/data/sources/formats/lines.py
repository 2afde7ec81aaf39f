"""Formats with a record a line: JSON Lines, CSV, and documents that a step of `prepare` wrote."""

import csv
import json
import re
from collections.abc import Iterator

from gptjax.data.sources import files
from gptjax.data.sources.documents import RECORD_BYTES, Damages, DataConfig, Document, Part

NAME_IT = "name the one that holds the text in data.text_field"
NAME_PROMPT = "name the one that holds the prompt in data.prompt_field"


def read_jsonl(part: Part, data: DataConfig, damages: Damages) -> Iterator[Document]:
    """Reads the field data.text_field of each JSON object; offset is the byte where the line begins. Skips blank lines.

    With data.prompt_field each object has a prompt and a response, which are joined unchanged.
    """
    remedies = {data.prompt_field: NAME_PROMPT} if data.prompt_field else {}
    remedies |= {data.text_field: NAME_IT}
    for lines, record in _objects(part, damages):
        bad = [field for field in remedies if not isinstance(record.get(field), str)]
        if bad:
            (field, *_) = bad
            state = f'field "{field}" that is text ({record[field]!r:.40})' if field in record else ""
            state = state or f'field "{field}" (it has {listed(record)})'
            damages(lines.where, f"must have a {state}", remedies[field])
        elif data.prompt_field and not record[data.text_field]:
            damages(lines.where, f'has an empty response in the field "{data.text_field}"', "add the response")
        else:
            *prompt, response = (record[field] for field in remedies)
            yield Document(part.path, lines.offset, "".join([*prompt, response]), sum(map(len, prompt)))


def read_documents(part: Part, data: DataConfig, damages: Damages) -> Iterator[Document]:
    """Reads lines that `line_of` wrote; each document keeps its name and offset."""
    kinds = {"name": str, "offset": int, "text": str, "prompt": int}
    for lines, record in _objects(part, damages):
        if {name: type(value) for name, value in record.items()} == kinds:
            yield Document(**record)
        else:
            problem = f"has {listed(record)} instead of name, offset, text and prompt"
            damages(lines.where, problem, "prepare the data again")


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
                raise ValueError("the line holds another value")
        except (ValueError, RecursionError) as error:  # ValueError covers too long numbers, and bytes outside UTF-8
            damages(lines.where, f"is not a JSON object ({error})", "mend the line")
        else:
            yield lines, record


def read_csv(part: Part, data: DataConfig, damages: Damages) -> Iterator[Document]:
    """Reads the column data.text_field, named in the first line; offset is the byte where the record begins."""
    csv.field_size_limit(RECORD_BYTES)
    lines = files.Lines(part, damages)
    texts = (_decoded(lines, line, "surrogateescape") for line in lines)  # other columns may hold any bytes
    tabs = part.path.lower().endswith((".tsv", *(f".tsv{end}" for end in files.COMPRESSED)))
    quoted = data.quoting == "quotes" or (not data.quoting and not tabs)
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    rows = csv.reader(texts, delimiter="\t" if tabs else ",", strict=True, quoting=quoting)
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
            damages(lines.where, f"is not CSV ({error})", f"mend the record, which begins at byte {offset}")
            continue
        if not row:  # a blank line
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
    """A few names for a message."""
    names = [str(name)[:40] for name in names]
    return ", ".join(names[:8]) + ", …" * (len(names) > 8) if names else "none"
