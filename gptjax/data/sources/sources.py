"""Where text comes from: a list of parts, and the documents of each.

    parts(data)                  → the parts of a source, in an order that is the same every time
    read(part, data, damages)    → the documents of one of them, at most a bounded amount of it in memory

`formats/` has a module for each family of formats, with the same two functions for each. Cleaning goes between the two
and `prepare`: it reads parts, and what it leaves is written as parts again, of the source `documents`.
"""

import errno
import os
from collections.abc import Iterator

from gptjax.data.sources import files
from gptjax.data.sources.documents import RECORD_BYTES, Damages, DataConfig, Document, Part
from gptjax.data.sources.formats import lines, records, tables, text, web
from gptjax.errors import Failed, Refused, nearest

# What lists the parts of a source, and what reads one.
READERS = {
    "stdlib": (text.stdlib_parts, text.read_stdlib),
    "text": (files.ranges, text.read_text),
    "code": (text.code_parts, text.read_text),
    "jsonl": (files.ranges, lines.read_jsonl),
    "csv": (files.parts, lines.read_csv),  # whether a line end is inside of quotes only a file's start can tell
    "parquet": (tables.parquet_parts, tables.read_parquet),
    "huggingface": (tables.huggingface_parts, tables.read_huggingface),
    "arrayrecord": (records.arrayrecord_parts, records.read_arrayrecord),
    "tfds": (records.tfds_parts, records.read_tfds),
    "warc": (files.parts, web.read_warc),
    "wet": (files.parts, web.read_wet),
    "documents": (files.ranges, lines.read_documents),  # as a step of `prepare` leaves them
}
GIVEN = [name for name in READERS if name != "documents"]  # for a config to name

# What is extracted once, rather than at each of the times that `prepare` reads.
SLOW = ("warc",)


def parts(data: DataConfig) -> list[Part]:
    """The parts of a source.

    Raises: Refused, for an unknown source, and one that has nothing to read; Failed, where the system is at fault.
    """
    if data.source not in GIVEN:
        hint = nearest(data.source, GIVEN)
        raise Refused(f'data.source is "{data.source}", which is none of {", ".join(GIVEN)}.{hint}')
    Damages(data.damaged)
    if data.prompt_field and (data.source != "jsonl" or data.prompt_field == data.text_field):
        raise Refused(
            f"data.prompt_field={data.prompt_field} is for another field of data.source=jsonl than data.text_field, and "
            f"these are data.source={data.source} and data.text_field={data.text_field}: change one of them."
        )
    try:
        return READERS[data.source][0](data)
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())[:200]
        where = f"data.path={data.path} of data.source={data.source}"
        raise Failed(f"{where} can't be listed ({reason}): see to it; the same command goes on.") from error


def read(part: Part, data: DataConfig, damages: Damages) -> Iterator[Document]:
    """The documents of a part, in their order; none is empty, all have UTF-8.

    Raises: Refused, as `damages` does; Failed, where not the file but the system is at fault.
    """
    offset = None
    odd = _half_pair(part.path)  # a file name that is no UTF-8, which a document could not be written with
    try:
        for document in READERS[part.source][1](part, data, damages):
            offset = document.offset
            if odd:
                document = document._replace(name=os.fsencode(part.path).decode(errors="backslashreplace"))
            if len(document.text) > RECORD_BYTES:
                why = f"has {len(document.text):,} characters, and at most {RECORD_BYTES:,} are read"
                damages(f"{document.name} at {offset}", why, "split it")
            elif not document.text:
                damages(f"{document.name} at {offset}", "has an empty document", "remove it")
            elif half := _half_pair(document.text):
                why = f"has U+{half:04X}, half a surrogate pair, which UTF-8 can't hold"
                damages(f"{document.name} at {offset}", why, "mend it")
            else:
                yield document
    except Refused:
        raise
    except Exception as error:  # whatever a library raises for a damaged file: the rest of it is lost
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if _of_system(error):
            raise Failed(f"{part.path} can't be read ({reason}): see to it; the same command goes on.") from error
        after = "" if offset is None else f" after the document at {offset}"
        damages(part.path, f"can't be read{after} ({reason})", "copy the file again")


def _of_system(error: Exception) -> bool:
    """Whether a file may be whole though it can't be read now: for want of memory, a disk, a network or a right.

    A damaged file is told without a number, or has somebody seek where nothing is (EINVAL).
    """
    number = error.errno if isinstance(error, OSError) else None
    system = MemoryError, ConnectionError, TimeoutError
    return isinstance(error, system) or number not in (None, errno.ENOENT, errno.EINVAL)


def _half_pair(text: str) -> int:
    """The first character that UTF-8 has no bytes for; 0 where there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return ord(text[error.start])
    return 0


def documents(data: DataConfig, damages: Damages | None = None) -> Iterator[Document]:
    """All documents of a source, part after part."""
    damages = damages or Damages(data.damaged)
    for part in parts(data):
        yield from read(part, data, damages)
