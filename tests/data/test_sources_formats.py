"""Real files of each format, made by the format's own library: what is read of them, whole, in parts, and damaged."""

import bz2
import gzip
import io
import json
import lzma

import datasets
import pytest
import zstandard
from support.source_files import MAKERS, TEXTS, jsonl, made
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from gptjax.data.sources import documents, files, sources
from gptjax.data.sources.documents import Damages, DataConfig
from gptjax.data.sources.formats import records, tables, web
from gptjax.errors import Refused


def read(data):
    return [list(sources.read(part, data, Damages(data.damaged))) for part in sources.parts(data)]


@pytest.mark.parametrize("source", [source for source in MAKERS if source != "warc"])
def test_every_text_is_read_as_it_was_written(source, tmp_path, monkeypatch):
    data = made(source, tmp_path, monkeypatch=monkeypatch)
    (found,) = read(data)
    assert [document.text for document in found] == TEXTS
    assert {document.name for document in found} == {data.path}
    assert [document.offset for document in found] == sorted({document.offset for document in found})
    if source not in ("jsonl", "csv", "wet"):
        assert [document.offset for document in found] == list(range(len(TEXTS)))


@pytest.mark.parametrize("source", ["jsonl", "csv"])
def test_the_offset_of_a_line_is_its_byte(source, tmp_path):
    data = made(source, tmp_path)
    content = (tmp_path / f"a.{source}").read_bytes()
    for number, document in enumerate(sources.documents(data)):
        assert content[document.offset :].startswith(b'{"id": %d,' % number if source == "jsonl" else b"%d," % number)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("source", ["jsonl", "text"])
def test_compressed_lines_are_the_same(source, suffix, tmp_path):
    plain, packed = ([*sources.documents(DataConfig(source, str(jsonl(tmp_path, TEXTS * 9, s))))] for s in ("", suffix))
    assert [document[1:] for document in packed] == [document[1:] for document in plain] and len(plain) > 2


@pytest.mark.parametrize("source", ["jsonl", "parquet", "huggingface", "arrayrecord", "tfds", "text"])
@pytest.mark.parametrize("size", [100, 777, 3000])
def test_parts_of_a_file_are_the_file(source, size, tmp_path, monkeypatch):
    if source == "text":
        (tmp_path / "a.txt").write_text("".join(TEXTS))
        data = DataConfig("text", str(tmp_path / "a.txt"))
    else:
        data = made(source, tmp_path, monkeypatch=monkeypatch)
    (whole,) = read(data)
    for module in (documents, files, tables, records):
        monkeypatch.setattr(module, "PART_BYTES", size)
    parts = read(data)
    assert len(parts) > 3
    if source == "text":  # cut otherwise, but nothing is lost
        assert "".join(document.text for part in parts for document in part) == "".join(TEXTS)
    else:
        assert [document for part in parts for document in part] == whole


@pytest.mark.parametrize("source, module", [("huggingface", tables), ("tfds", records)])
def test_a_data_set_is_opened_once_for_its_parts(source, module, tmp_path, monkeypatch):
    data = made(source, tmp_path, monkeypatch=monkeypatch)
    for name in (documents, files, tables, records):
        monkeypatch.setattr(name, "PART_BYTES", 777)
    for _ in range(2):  # anew where it is listed anew
        assert len(read(data)) > 3 and module._opened.cache_info().misses == 1


def test_of_a_warc_the_text_of_the_pages_is_read(tmp_path):
    texts = [f"This is page number {i}, and it has a sentence or two. Here is the second." for i in range(5)]
    data = made("warc", tmp_path, [*texts, ""])
    damages = Damages("stop")
    found = list(sources.documents(data, damages))
    assert [document.text for document in found] == texts
    assert (damages.count, damages.left_out) == (0, {web.NO_TEXT: 1, web.NO_PAGE: 6})
    with (tmp_path / "a.warc.gz").open("rb") as file:
        file.seek(found[3].offset)
        assert b"page number 3" in gzip.open(file).read(2000)


def test_code_is_what_is_written_by_hand(tmp_path):
    wanted = {"a.py": "1", "src/b.rs": "2", "src/deep/c.Cpp": "3"}
    others = {".git/d.py": "4", "node_modules/e.js": "5", "a.bin": "6", "src/empty.py": "", "src/.hidden/f.py": "7"}
    for name, content in (wanted | others).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "link.py").symlink_to(tmp_path / "a.py")
    found = {document.name: document.text for document in sources.documents(DataConfig("code", str(tmp_path)))}
    assert found == {str(tmp_path / name): content for name, content in wanted.items()}
    only = sources.documents(DataConfig("code", f"{tmp_path}/**/*.rs"))
    assert [document.text for document in only] == ["2"]
    (tmp_path / "none").mkdir()
    with pytest.raises(Refused, match="0 files of source code"):
        sources.parts(DataConfig("code", str(tmp_path / "none")))


def test_every_record_of_a_warc_is_a_document_or_counted(tmp_path):
    """Capitals, a page without a type, resources, encodings with and without a decoder, and what is no page."""
    text = "This is a page, and it has a sentence or two. Here is the second of them."
    page = f"<html><head><title>t</title></head><body><article><p>{text}</p></article></body></html>".encode()
    html = ("Content-Type", "Text/HTML")
    records_of = [
        ("response", [html], page),
        ("response", [], page),
        ("resource", [html], page),
        ("response", [html, ("Content-Encoding", "gzip")], gzip.compress(page)),
        ("response", [html, ("Content-Encoding", "zstd")], zstandard.compress(page)),
        ("response", [html, ("Content-Encoding", "br")], b"\x8b\x02\x80abc\x03"),
        ("response", [html, ("Content-Encoding", "gzip")], b"no gzip at all"),
        ("response", [("Content-Type", "image/png")], b"\x89PNG"),
        ("response", [html], b"<html></html>"),
        ("request", [], b"GET"),
    ]
    with (tmp_path / "a.warc.gz").open("wb") as file:
        writer = WARCWriter(file, gzip=True)
        for kind, headers, body in records_of:
            url, body, http = "http://example.com", io.BytesIO(body), kind == "response"
            head = StatusAndHeaders("200 OK", headers, protocol="HTTP/1.1") if http else None
            own = {} if http else dict(headers)
            record = writer.create_warc_record(url, kind, body, http_headers=head, warc_headers_dict=own)
            writer.write_record(record)
    damages = Damages("stop")
    found = list(sources.documents(DataConfig("warc", str(tmp_path / "a.warc.gz")), damages))
    assert [document.text for document in found] == [text] * 5
    assert damages.left_out == {web.NO_PAGE: 1, web.NO_TEXT: 2, "pages in the encoding br": 1}


ROWS = 'id\ttext\n1\tan inch is 1" long\n2\tsecond\n3\t"quoted" words\n4\tfour\n'


@pytest.mark.parametrize("quoting, texts", [
    ("", ['an inch is 1" long', "second", '"quoted" words', "four"]),
    ("none", ['an inch is 1" long', "second", '"quoted" words', "four"]),
])  # fmt: skip
def test_a_row_of_a_tsv_is_a_line(tmp_path, quoting, texts):
    (tmp_path / "a.TSV").write_text(ROWS)
    found = sources.documents(DataConfig("csv", str(tmp_path / "a.TSV"), quoting=quoting))
    assert [document.text for document in found] == texts


def test_quotes_of_a_tsv_by_a_setting(tmp_path):
    (tmp_path / "a.tsv").write_text('id\ttext\n1\t"two\nlines"\n2\t"a ""word"""\n')
    found = sources.documents(DataConfig("csv", str(tmp_path / "a.tsv"), quoting="quotes"))
    assert [document.text for document in found] == ["two\nlines", 'a "word"']
    with pytest.raises(Refused, match='data.quoting="single" must be quotes, none or empty'):
        sources.parts(DataConfig("csv", str(tmp_path / "a.tsv"), quoting="single"))


LINES = "".join(json.dumps({"text": f"line {number}"}) + "\n" for number in range(1000)).encode()


def long_window(content: bytes, bits: int) -> bytes:
    parameters = zstandard.ZstdCompressionParameters(window_log=bits, enable_ldm=True, format=zstandard.FORMAT_ZSTD1)
    made = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # without the size in the header
    return made.compress(content) + made.flush()


@pytest.mark.parametrize("name, content", [
    ("a.jsonl.GZ", gzip.compress(LINES)),
    ("a.jsonl.gzip", gzip.compress(LINES)),
    ("a.jsonl.zstd", zstandard.compress(LINES)),
    ("a.jsonl.bz2", bz2.compress(LINES[:9000]) + bz2.compress(LINES[9000:])),
    ("a.jsonl.xz", lzma.compress(LINES[:9000]) + b"\0" * 4 + lzma.compress(LINES[9000:])),
    ("a.jsonl.zst", long_window(LINES, 28)),
    ("a.jsonl.Zst", long_window(LINES[:9000], 30) + long_window(LINES[9000:], 28)),
])  # fmt: skip
def test_every_common_compression(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    found = sources.documents(DataConfig("jsonl", str(tmp_path / name)))
    assert [document.text for document in found] == [f"line {number}" for number in range(1000)]
    if name.endswith((".xz", "a.jsonl.zst")):
        (tmp_path / name).write_bytes(content[:-9])
        with pytest.raises(Refused, match="cut before the end of a frame"):
            list(sources.documents(DataConfig("jsonl", str(tmp_path / name))))


def test_a_window_that_takes_too_much_memory_has_a_remedy_that_fits(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(long_window(LINES, 31))
    with pytest.raises(Refused, match="its window of 2,147,483,648 bytes .* recompress the file with zstd --long=30"):
        list(sources.documents(DataConfig("jsonl", str(tmp_path / "a.jsonl.zst"))))


def test_a_data_set_without_rows(tmp_path):
    datasets.Dataset.from_dict({"text": []}).save_to_disk(tmp_path / "empty")
    with pytest.raises(Refused, match="has 0 rows, and at least 1 is needed"):
        sources.parts(DataConfig("huggingface", str(tmp_path / "empty")))
