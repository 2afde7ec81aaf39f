"""Real files of each source format, made by the format's own library."""

import csv
import gzip
import io
import json

import array_record.python.array_record_module as array_record
import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
import zstandard
from etils import epath
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from gptjax.data.sources.documents import DataConfig

TEXTS = [f'Text {i} é 中.\nIt has {"many " * (i % 9)}words,\tand "quotes".\r\n' for i in range(200)]


def jsonl(folder, texts, suffix=""):
    """Lines with other fields before and after, of other types."""
    lines = "".join(json.dumps({"id": i, "text": text, "meta": {"of": [i]}}) + "\n" for i, text in enumerate(texts))
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
    path = folder / f"a.jsonl{suffix}"
    path.write_bytes(compress[suffix](lines.encode()))
    return path


def csv_file(folder, texts):
    with (folder / "a.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "text"])
        rows.writerows(enumerate(texts))
    return folder / "a.csv"


def parquet(folder, texts):
    table = pa.table({"id": range(len(texts)), "text": texts})
    pq.write_table(table, folder / "a.parquet", row_group_size=30, write_page_checksum=True)
    return folder / "a.parquet"


def huggingface(folder, texts):
    datasets.Dataset.from_dict({"id": list(range(len(texts))), "text": texts}).save_to_disk(folder / "set")
    return folder / "set"


def arrayrecord(folder, texts):
    writer = array_record.ArrayRecordWriter(str(folder / "a.arrayrecord"), "group_size:10")
    for text in texts:
        writer.write(text.encode())
    writer.close()
    return folder / "a.arrayrecord"


class Tiny(tfds.core.GeneratorBasedBuilder):
    """A data set of TFDS."""

    pkg_dir_path = epath.Path(__file__).parent
    VERSION = tfds.core.Version("1.2.3")
    texts = TEXTS

    def _info(self):
        features = {"id": tfds.features.Scalar(np.int64), "text": tfds.features.Text()}
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features), disable_shuffling=True)

    def _split_generators(self, manager):
        return {"train": self._generate_examples(), "other": self._generate_examples()}

    def _generate_examples(self):
        for number, text in enumerate(self.texts):
            yield number, {"id": number, "text": text}


def tiny(folder, texts):
    Tiny.texts = texts
    Tiny(data_dir=folder, file_format="array_record").download_and_prepare()
    return "tiny:1.2.3"


def wet(folder, texts, name="a.wet.gz"):
    with (folder / name).open("wb") as file:
        writer = WARCWriter(file, gzip=name.endswith(".gz"))
        for i, text in enumerate(texts):
            head = {"Content-Type": "text/plain"}
            url, body = f"http://example.com/{i}", io.BytesIO(text.encode())
            writer.write_record(writer.create_warc_record(url, "conversion", payload=body, warc_headers_dict=head))
    return folder / name


def warc(folder, texts, name="a.warc.gz"):
    """A page for each text, each with its request and an image, which are no documents."""
    with (folder / name).open("wb") as file:
        writer = WARCWriter(file, gzip=name.endswith(".gz"))
        for i, text in enumerate(texts):
            page = f"<html><head><title>t</title></head><body><article><p>{text}</p></article></body></html>"
            for kind, body in (("text/html; charset=utf-8", page.encode()), ("image/png", b"\x89PNG")):
                head = StatusAndHeaders("200 OK", [("Content-Type", kind)], protocol="HTTP/1.1")
                url, body = f"http://example.com/{i}", io.BytesIO(body)
                writer.write_record(writer.create_warc_record(url, "response", payload=body, http_headers=head))
            writer.write_record(writer.create_warc_record("http://example.com", "request", payload=io.BytesIO(b"GET")))
    return folder / name


MAKERS = {
    "jsonl": jsonl,
    "csv": csv_file,
    "parquet": parquet,
    "huggingface": huggingface,
    "arrayrecord": arrayrecord,
    "tfds": tiny,
    "wet": wet,
    "warc": warc,
}


def made(source, folder, texts=TEXTS, monkeypatch=None, **more):
    """A source of some texts."""
    monkeypatch and monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    more = {"text_field": ""} | more if source == "arrayrecord" else more
    return DataConfig(source=source, path=str(MAKERS[source](folder, texts)), **more)
