"""Formats with columns: Parquet, and data sets that Hugging Face's `datasets` saved on disk."""

import functools
from collections.abc import Iterator

from etils import epath

from gptjax.data.sources import files
from gptjax.data.sources.documents import END, PART_BYTES, Damages, DataConfig, Document, Part
from gptjax.data.sources.formats.lines import NAME_IT, listed
from gptjax.errors import Refused
from gptjax.runtime import optional

ROWS = 64  # in memory at a time


def parquet_parts(data: DataConfig) -> list[Part]:
    """Files as parts, and row groups for large files."""
    return [part for file, size in files.sized(data) for part in _row_groups(file, size, data)]


def _row_groups(file: epath.Path, size: int, data: DataConfig) -> list[Part]:
    whole = [Part(data.source, str(file), 0, END, size)]
    if size <= PART_BYTES:
        return whole
    try:
        with file.open("rb") as stream:
            count = _parquet(data).ParquetFile(stream).num_row_groups
    except (OSError, ValueError):  # damaged: `read_parquet` reports it
        return whole
    step = max(1, count * PART_BYTES // size)
    ranges = [range(count)[start : start + step] for start in range(0, count, step)]
    return [Part(data.source, str(file), r.start, r.stop, size * len(r) // count) for r in ranges]


def _parquet(data: DataConfig):
    return optional.package("pyarrow.parquet", f"data.source={data.source}")


def read_parquet(part: Part, data: DataConfig, damages: Damages) -> Iterator[Document]:
    """Reads the column data.text_field; offset is the number of the row in the file, from 0."""
    with epath.Path(part.path).open("rb") as stream:
        table = _parquet(data).ParquetFile(stream, page_checksum_verification=True)
        names = table.schema_arrow.names
        if data.text_field not in names:
            damages(part.path, f'has no column "{data.text_field}" (it has {listed(names)})', NAME_IT)
            return
        groups = range(table.num_row_groups)[part.start : part.stop]
        row = sum(table.metadata.row_group(group).num_rows for group in range(groups.start))
        for batch in table.iter_batches(ROWS, list(groups), [data.text_field]):
            yield from _documents(part.path, row, batch.column(0), damages)
            row += batch.num_rows


def _documents(path: str, first: int, column, damages: Damages) -> Iterator[Document]:
    """Yields the documents of an Arrow column of text, or bytes of UTF-8, whose first value is in row `first`."""
    for row, value in enumerate(column, first):
        try:
            text = value.as_py()
            text = text.decode() if isinstance(text, bytes) else text
        except UnicodeDecodeError as error:
            why = f"is not UTF-8 at its byte {error.start} (0x{error.object[error.start]:02X})"
            damages(f"{path} row {row}", why, "convert it")
            continue
        if isinstance(text, str):
            yield Document(path, row, text)
        else:
            damages(f"{path} row {row}", f"has no text ({text!r:.40})", NAME_IT)


def huggingface_parts(data: DataConfig) -> list[Part]:
    """Ranges of rows as parts."""
    _opened.cache_clear()  # a new listing opens the data set anew
    try:
        table = _load(data)
    except Refused:
        raise
    except IndexError as error:  # the library's own, for the folder of a data set without rows
        raise Refused(f"{data.path} has 0 rows, and at least 1 is needed: give another data set.") from error
    except Exception as error:  # the library raises anything for a folder that it can't read
        raise Refused(f"{data.path} can't be loaded ({error}): give the folder that save_to_disk wrote.") from error
    if data.text_field not in table.column_names:
        names = listed(table.column_names)
        raise Refused(f'{data.path} has no column "{data.text_field}" (it has {names}): {NAME_IT}.')
    if not len(table):
        raise Refused(f"{data.path} has 0 rows, and at least 1 is needed: give another data set.")
    step = max(1, len(table) * PART_BYTES // max(table.data.nbytes, 1))
    starts = range(0, len(table), step)
    size = table.data.nbytes * step // max(len(table), 1)
    return [Part(data.source, data.path, start, min(start + step, len(table)), size) for start in starts]


def _load(data: DataConfig):
    datasets = optional.package("datasets", "data.source=huggingface")
    if not data.path:
        raise Refused('data.source=huggingface needs data.path; found "": give the folder that save_to_disk wrote.')
    datasets.disable_progress_bars()
    table = datasets.load_from_disk(data.path)
    if isinstance(table, datasets.DatasetDict):
        raise Refused(f"{data.path} has the splits {listed(table)}: give the folder of one, {data.path}/{min(table)}.")
    return table.with_format("arrow")


# Opening a data set of many files is slow, and there is a part for every 8 MiB.
_opened = functools.lru_cache(maxsize=1)(_load)


def read_huggingface(part: Part, data: DataConfig, damages: Damages) -> Iterator[Document]:
    """Reads the column data.text_field; offset is the number of the row, from 0."""
    row = part.start
    for batch in _opened(data).select_columns([data.text_field]).select(range(part.start, part.stop)).iter(ROWS):
        yield from _documents(part.path, row, batch.column(0), damages)
        row += batch.num_rows
