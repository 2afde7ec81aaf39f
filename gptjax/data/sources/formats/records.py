"""Formats with numbered records: ArrayRecord, and data sets of TFDS in ArrayRecord files."""

import functools
import os
from collections.abc import Iterator

from gptjax.data.sources import files
from gptjax.data.sources.documents import END, PART_BYTES, Damages, DataConfig, Document, Part
from gptjax.data.sources.formats.lines import NAME_IT, listed
from gptjax.data.sources.formats.text import decoded
from gptjax.errors import Refused
from gptjax.runtime import optional, untrusted


def arrayrecord_parts(data: DataConfig) -> list[Part]:
    """Files as parts, and ranges of records for large files."""
    found = []
    for file, size in files.sized(data):
        count = 1
        if size > PART_BYTES and "://" not in str(file):
            try:
                count = _reader(str(file)).num_records()
            except ValueError:  # damaged: `read_arrayrecord` reports it
                pass
        found += _ranges(Part(data.source, str(file), 0, END, size), count)
    return found


def _ranges(part: Part, count: int) -> list[Part]:
    """Splits a part of `count` records into parts of PART_BYTES; the last part is open-ended."""
    step = max(1, count * PART_BYTES // max(part.size, 1))
    starts = range(0, max(count, 1), step)
    size = part.size // len(starts)
    stops = [*starts[1:], END]
    return [part._replace(start=start, stop=stop, size=size) for start, stop in zip(starts, stops, strict=True)]


def _reader(path: str):
    # One thread reads ahead, so that a worker's memory does not grow with the number of cores.
    return optional.package("array_record.python.array_record_module", path).ArrayRecordReader(
        path, "max_parallelism:1"
    )


def read_arrayrecord(part: Part, data: DataConfig, damages: Damages) -> Iterator[Document]:
    """Reads each record as text, or with data.text_field as a tf.train.Example; offset is its number, from 0."""
    with files.local(part.path) as path:
        reader = _reader(path)
        if not reader.ok():  # such a reader also reports no records
            raise ValueError("this must be an uncut ArrayRecord file")
        reader.seek(part.start)
        for number in range(part.start, min(part.stop, reader.num_records())):
            record, where = reader.read(), f"{part.path} record {number}"
            if data.text_field:
                try:
                    features = _features(record)
                except ValueError as error:
                    plain = 'if records are plain texts, set data.text_field=""'
                    damages(where, f"is not a tf.train.Example ({error})", plain)
                    continue
                if data.text_field not in features:
                    damages(where, f'has no text in "{data.text_field}" (it has {listed(features)})', NAME_IT)
                    continue
                record = features[data.text_field]
            for document in decoded(record, where, 0, damages):
                yield Document(part.path, number, document.text)
        reader.close()


def _features(record: bytes) -> dict[str, bytes]:
    """The first value of each bytes feature of a tf.train.Example. Raises: ValueError, for another message.

    Numbers of its .proto: Example.features 1, Features.feature 1 (a map: key 1, value 2), Feature.bytes_list 1,
    BytesList.value 1.
    """
    found, fields = {}, untrusted.protobuf_fields
    for entry in (entry for _, features in fields(record) for number, entry in fields(features) if number == 1):
        pair = dict(fields(entry))
        for kind, values in fields(pair.get(2, b"")):
            if kind == 1:
                found |= {pair.get(1, b"").decode(): value for _, value in [*fields(values)][:1]}
    return found


def tfds_parts(data: DataConfig) -> list[Part]:
    """Ranges of the examples of a data set that is already prepared; see `_tfds`."""
    _opened.cache_clear()  # a new listing opens the data set anew
    examples = _tfds(data)
    whole = Part("tfds", data.path, 0, END, max(examples.dataset_info.splits[_named(data)[1]].num_bytes, 1))
    return _ranges(whole, len(examples))


def _named(data: DataConfig) -> tuple[str, str]:
    """The data set and the split of data.path, which is NAME:VERSION or NAME:VERSION:SPLIT; the default is train."""
    name, _, rest = data.path.removeprefix("tfds:").partition(":")
    version, _, split = rest.partition(":")
    if not (name and version):
        raise Refused(f'data.path="{data.path}" must be NAME:VERSION, or NAME:VERSION:SPLIT, with data.source=tfds.')
    return f"{name}:{version}", split or "train"


def _tfds(data: DataConfig):
    """The examples by number; imports no TensorFlow. Raises: Refused."""
    tfds = optional.package("tensorflow_datasets", "data.source=tfds")
    folder, (name, split) = os.environ.get("TFDS_DATA_DIR"), _named(data)
    where = folder or tfds.core.constants.DATA_DIR
    try:
        return tfds.data_source(name, split=split, data_dir=folder, try_gcs=False)
    except Exception as error:  # the library raises anything for a data set that is missing or damaged
        raise Refused(
            f"The split {split} of {name} can't be read from {where} ({' '.join(str(error).split())[:200]}): prepare "
            "it there with file_format=array_record, or set TFDS_DATA_DIR to its folder."
        ) from error


# Opening a data set of many files is slow, and there is a part for every 8 MiB.
_opened = functools.lru_cache(maxsize=1)(_tfds)


def read_tfds(part: Part, data: DataConfig, damages: Damages) -> Iterator[Document]:
    """Reads the feature data.text_field; offset is the number of the example, from 0."""
    examples = _opened(data)
    for number in range(part.start, min(part.stop, len(examples))):
        example, where = examples[number], f"{part.path} example {number}"
        text = example.get(data.text_field)
        if isinstance(text, bytes):
            for document in decoded(text, where, 0, damages):
                yield Document(part.path, number, document.text)
        else:
            damages(where, f'has no text in "{data.text_field}" (it has {listed(example)})', NAME_IT)
