"""The sources of text, by name: each lists parts, and reads the documents of a part.

    parts(data)                  → the parts of a source, in an order that is the same every time
    read(part, data, damages)    → the documents of one part, with a bounded amount in memory

`formats/` has a module for each family of formats, with these two functions for each format. Cleaning stands between a
source and `prepare`: it reads parts, and writes what it keeps as parts of the source `documents`.
"""

import errno
import os
from collections.abc import Iterator

from gptjax.data.sources import files
from gptjax.data.sources.documents import QUOTING, RECORD_BYTES, Damages, DataConfig, Document, Part
from gptjax.data.sources.formats import lines, records, tables, text, web
from gptjax.errors import Failed, Refused, nearest

# For each source, the function that lists its parts and the function that reads a part.
READERS = {
    "stdlib": (text.stdlib_parts, text.read_stdlib),
    "text": (files.ranges, text.read_text),
    "code": (text.code_parts, text.read_text),
    "jsonl": (files.ranges, lines.read_jsonl),
    "csv": (files.parts, lines.read_csv),  # only from a file's start is it known which line ends are inside quotes
    "parquet": (tables.parquet_parts, tables.read_parquet),
    "huggingface": (tables.huggingface_parts, tables.read_huggingface),
    "arrayrecord": (records.arrayrecord_parts, records.read_arrayrecord),
    "tfds": (records.tfds_parts, records.read_tfds),
    "warc": (files.parts, web.read_warc),
    "wet": (files.parts, web.read_wet),
    "documents": (files.ranges, lines.read_documents),  # written by a step of `prepare`
}
GIVEN = [name for name in READERS if name != "documents"]  # the names that a config may use

# Sources whose files are known from data.path alone.
LISTED = ("text", "code", "jsonl", "csv", "parquet", "arrayrecord", "warc", "wet")

# Sources whose text is extracted once, instead of each time that `prepare` reads.
SLOW = ("warc",)


def parts(data: DataConfig) -> list[Part]:
    """The parts of a source.

    Raises: Refused, for an unknown source, or a source with nothing to read; Failed, for an error of the system.
    """
    if data.source not in GIVEN:
        hint = nearest(data.source, GIVEN)
        raise Refused(f'data.source="{data.source}" must be one of {", ".join(GIVEN)}.{hint}')
    Damages(data.damaged)
    if data.quoting not in QUOTING:
        raise Refused(f'data.quoting="{data.quoting}" must be quotes, none or empty.')
    if data.prompt_field and (data.source != "jsonl" or data.prompt_field == data.text_field):
        raise Refused(
            f"data.prompt_field={data.prompt_field} must be a field of data.source=jsonl other than data.text_field; "
            f"found data.source={data.source} and data.text_field={data.text_field}: change one of them."
        )
    try:
        return READERS[data.source][0](data)
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())[:200]
        where = f"data.path={data.path} of data.source={data.source}"
        raise Failed(f"{where} can't be listed ({reason}): fix this, then run the same command to resume.") from error


def listing(data: DataConfig) -> dict[str, int] | None:
    """The local files of a source with their bytes, none if the path matches none any more.

    Returns None where a look costs more than that: on a bucket, and for sources that a library lists.
    """
    if "://" in data.path or data.source not in LISTED:
        return None
    found: dict[str, int] = {}
    try:
        for part in READERS["code"][0](data) if data.source == "code" else files.parts(data):
            found[part.path] = found.get(part.path, 0) + part.size
    except (Refused, OSError):
        return {}
    return found


def read(part: Part, data: DataConfig, damages: Damages) -> Iterator[Document]:
    """Yields the documents of a part in order; none is empty, and each can be written as UTF-8.

    Raises: Refused, as `damages` does; Failed, for an error of the system rather than the file.
    """
    offset = None
    odd = _half_pair(part.path)  # the file's name is not UTF-8, so no document could be written with it
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
    except Exception as error:  # libraries raise anything for a damaged file; the rest of the file is lost
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if _of_system(error):
            raise Failed(
                f"{part.path} can't be read ({reason}): fix this, then run the same command to resume."
            ) from error
        after = "" if offset is None else f" after the document at {offset}"
        damages(part.path, f"can't be read{after} ({reason})", "copy the file again")


def _of_system(error: Exception) -> bool:
    """Whether the file may be intact, and the cause is memory, a disk, a network or a permission.

    An error from a damaged file has no number, or comes from seeking past the end (EINVAL).
    """
    number = error.errno if isinstance(error, OSError) else None
    system = MemoryError, ConnectionError, TimeoutError
    return isinstance(error, system) or number not in (None, errno.ENOENT, errno.EINVAL)


def _half_pair(text: str) -> int:
    """The first character that UTF-8 can't hold, half a surrogate pair; 0 if there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return ord(text[error.start])
    return 0


def documents(data: DataConfig, damages: Damages | None = None) -> Iterator[Document]:
    """Yields all documents of a source, part after part."""
    damages = damages or Damages(data.damaged)
    for part in parts(data):
        yield from read(part, data, damages)
