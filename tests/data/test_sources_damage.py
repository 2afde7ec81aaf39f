"""Damaged files of each format: one sentence that names the place, or counted and left out."""

import errno
import gzip
import io
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.source_files import TEXTS, jsonl, made, wet
from warcio import warcwriter

from gptjax.data.preparation.prepare import prepare
from gptjax.data.sources import files, sources
from gptjax.data.sources.documents import Damages, DataConfig
from gptjax.data.sources.formats import web
from gptjax.errors import Failed, Refused, one_line
from gptjax.tokenizers.tokenizer import TokenizerConfig


def spoil(path, change):
    path.write_bytes(change(path.read_bytes()))


def cut(content):
    return content[: len(content) * 2 // 3]


def flipped(content):
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


def lines(*records):
    return lambda content: content + b"".join(record + b"\n" for record in records) + content


def refusal_and_rest(data):
    """The sentence that stops it, and what skipping leaves: the texts, how much is lost, and the first places."""
    with pytest.raises(Refused) as refused:
        list(sources.documents(data))
    sentence = str(refused.value)
    assert sentence == one_line(sentence) and sentence.endswith("or leave out what is damaged with data.damaged=skip.")
    damages = Damages("skip")
    texts = [document.text for document in sources.documents(data, damages)]
    assert damages.places[0] in sentence
    return sentence, texts, damages


COUNT = len(TEXTS)


@pytest.mark.parametrize("record, words", [
    (b"{", "is not a JSON object"),
    (b"[1]", "is not a JSON object (the line holds another value)"),
    (b'{"a":' * 5000, "is not a JSON object"),
    (b'{"text": 1' + b"0" * 5000 + b"}", "is not a JSON object"),
    (b'{"text": "caf\xe9"}', "is not a JSON object ('utf-8' codec can't decode byte 0xe9"),
    (b'{"body": "x", "n": 1}', 'must have a field "text" (it has body, n): name the one'),
    (b'{"text": null}', 'must have a field "text" that is text (None)'),
    (b'{"text": ["x"]}', 'must have a field "text" that is text'),
])  # fmt: skip
def test_a_bad_line_is_named_by_its_number(tmp_path, monkeypatch, record, words):
    spoil(jsonl(tmp_path, TEXTS), lines(record, b"", record))
    data = DataConfig("jsonl", str(tmp_path / "a.jsonl"))
    sentence, texts, damages = refusal_and_rest(data)
    assert f"a.jsonl line {COUNT + 1} {words}" in sentence
    assert (texts, damages.count) == (TEXTS * 2, 2)
    monkeypatch.setattr(files, "PART_BYTES", 1000)  # of a part of a file too
    assert f"a.jsonl line {COUNT + 1} {words}" in refusal_and_rest(data)[0]


@pytest.mark.parametrize("text, words", [("", "has an empty document"), ("a\ud800", "half a surrogate pair")])
def test_a_document_that_is_none(tmp_path, text, words):
    jsonl(tmp_path, [*TEXTS, text])
    sentence, texts, damages = refusal_and_rest(DataConfig("jsonl", str(tmp_path / "a.jsonl")))
    offset = len((tmp_path / "a.jsonl").read_bytes().rstrip().rpartition(b"\n")[0]) + 1
    assert f"a.jsonl at {offset} has" in sentence and words in sentence
    assert (texts, damages.count) == (TEXTS, 1)


@pytest.mark.parametrize("source, head", [("jsonl", b""), ("csv", b"text\n")])
@pytest.mark.parametrize("part", [1 << 25, 1 << 40])
def test_a_line_of_a_gigabyte_is_not_held(tmp_path, monkeypatch, source, head, part):
    """64 MiB are the most of a gigabyte; here 128 KiB of 128 MiB, which are a hole in the file."""
    monkeypatch.setattr(files, "RECORD_BYTES", 1 << 17)
    monkeypatch.setattr(files, "PART_BYTES", part)
    line = json.dumps({"text": "x"}).encode() + b"\n" if source == "jsonl" else b"x\n"
    with (tmp_path / "a").open("wb") as file:
        file.write(head + line)
        file.truncate(1 << 27)
        file.seek(1 << 27)
        file.write(b"\n" + line)
    sentence, texts, damages = refusal_and_rest(DataConfig(source, str(tmp_path / "a")))
    assert f"line {2 + bool(head)} has more than 131,072 bytes" in sentence
    assert (texts, damages.count) == (["x", "x"], 1)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("change", [cut, flipped, lambda content: content[:5]])
def test_what_can_not_be_decompressed(tmp_path, suffix, change):
    path = jsonl(tmp_path, [f"{text}{i * i * 7919}" for i, text in enumerate(TEXTS * 20)], suffix)
    spoil(path, change)
    sentence, texts, damages = refusal_and_rest(DataConfig("jsonl", str(path)))
    if change is flipped:  # of which lines are wrong before the decompressor can tell, if it does at all
        assert f"a.jsonl{suffix} " in sentence and damages.count >= 1
    else:
        assert f"a.jsonl{suffix} can't be read" in sentence and damages.count == 1
        assert len(texts) < COUNT * 20


@pytest.mark.parametrize("row, words", [
    (b"1,2,3", "has 3 fields where the first line has 2"),
    (b"x", "has 1 fields where the first line has 2"),
    (b'1,"a"b', "is not CSV (',' expected after '\"')"),
    (b"1,caf\xe9", "is not UTF-8"),
])  # fmt: skip
def test_a_bad_row_of_csv(tmp_path, row, words):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfid,text\n1,a\n\n" + row + b'\n2,"b\nc"\n')
    sentence, texts, damages = refusal_and_rest(DataConfig("csv", str(tmp_path / "a.csv")))
    assert "a.csv line 4" in sentence and words in sentence
    assert (texts, damages.count) == (["a", "b\nc"], 1)


def test_a_csv_file_without_the_column(tmp_path):
    (tmp_path / "a.csv").write_text("id,body\n1,a\n")
    (tmp_path / "b.csv").write_text("id,text\n1,a\n")
    sentence, texts, _ = refusal_and_rest(DataConfig("csv", str(tmp_path / "*.csv")))
    assert 'a.csv has no column "text" (it has id, body)' in sentence and texts == ["a"]
    assert [document.text for document in sources.documents(DataConfig("csv", str(tmp_path / "b.csv"), "id"))] == ["1"]


@pytest.mark.parametrize("change", [cut, flipped, lambda content: b"", lambda content: content[:-20]])
@pytest.mark.parametrize("source", ["parquet", "arrayrecord"])
def test_damaged_tables_and_records(tmp_path, source, change):
    texts = [f"{text}{i * i * 7919}" for i, text in enumerate(TEXTS * 20)]
    data = made(source, tmp_path, texts)
    spoil(tmp_path / f"a.{source}", change)
    sentence, left, damages = refusal_and_rest(data)
    assert f"a.{source} can't be read" in sentence and damages.count == 1
    assert left == texts[: len(left)] and len(left) < len(texts)


def test_rows_without_a_text(tmp_path):
    column = pa.array([b"a", None, b"caf\xe9", b"b"], pa.binary())
    pq.write_table(pa.table({"text": column, "n": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    sentence, texts, damages = refusal_and_rest(DataConfig("parquet", str(tmp_path / "a.parquet")))
    assert "a.parquet row 1 has no text (None)" in sentence and texts == ["a", "b"]
    assert damages.places[1].endswith("a.parquet row 2 is not UTF-8 at its byte 3 (0xE9)")
    sentence, texts, damages = refusal_and_rest(DataConfig("parquet", str(tmp_path / "a.parquet"), "n"))
    assert "row 0 has no text (1)" in sentence and (texts, damages.count) == ([], 4)
    sentence, *_ = refusal_and_rest(DataConfig("parquet", str(tmp_path / "a.parquet"), "body"))
    assert 'a.parquet has no column "body" (it has text, n)' in sentence


def test_records_without_a_text(tmp_path, monkeypatch):
    data = made("arrayrecord", tmp_path, text_field="text")
    assert "record 0 is not a tf.train.Example" in refusal_and_rest(data)[0]
    made("tfds", tmp_path, monkeypatch=monkeypatch)
    (file,) = tmp_path.glob("tiny/1.2.3/*-train.array_record*")
    data = DataConfig("arrayrecord", str(file))
    assert [document.text for document in sources.documents(data)] == TEXTS
    sentence, *_ = refusal_and_rest(DataConfig("arrayrecord", str(file), "id"))
    assert 'record 0 has no text in "id" (it has text)' in sentence
    with pytest.raises(Refused, match='example 0 has no text in "id" '):
        list(sources.documents(DataConfig("tfds", "tiny:1.2.3", "id")))


@pytest.mark.parametrize("name", ["a.wet", "a.wet.gz"])
def test_a_cut_archive(tmp_path, name):
    texts = [f"{text}{i * i * 7919}" * 20 for i, text in enumerate(TEXTS)]
    path = wet(tmp_path, texts, name)
    spoil(path, cut)
    sentence, left, damages = refusal_and_rest(DataConfig("wet", str(path)))
    assert left == texts[: len(left)] and 100 < len(left) < 150 and damages.count == 1
    assert f"{name} record at byte " in sentence and " was cut (" in sentence


@pytest.mark.parametrize("name", ["a.wet", "a.wet.gz"])
def test_an_archive_cut_anywhere(tmp_path, name):
    """In a record of any kind, and in the midst of a header: only a cut between two records leaves a whole archive."""
    whole, ends, path = io.BytesIO(), [], tmp_path / name
    writer = warcwriter.WARCWriter(whole, gzip=name.endswith("gz"))
    for kind in ("warcinfo", "conversion", "metadata"):
        writer.write_record(writer.create_warc_record("http://a", kind, payload=io.BytesIO(b"some text")))
        ends.append(whole.tell())
    content = whole.getvalue()
    unseen = []
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        damages = Damages("skip")
        list(sources.documents(DataConfig("wet", str(path)), damages))
        unseen += [size] * (not damages.count)
    blank = 0 if name.endswith("gz") else 4  # the empty lines after a record say nothing
    assert unseen == [size for end in ends for size in range(end - blank, end + 1)]


def test_an_archive_of_before_warc(tmp_path):
    """ARC, whose records tell their length by another name."""
    page = b"HTTP/1.0 200 OK\r\nContent-Type: text/html\r\n\r\n<html><body><p>%s</p></body></html>" % (b"A page. " * 20)
    about = b"1 0 test\nURL IP-address Archive-date Content-type Archive-length\n"
    head = b"http://a 127.0.0.1 20080101000000 text/html %d\n" % len(page)
    path = tmp_path / "a.arc"
    path.write_bytes(
        b"filedesc://a.arc 127.0.0.1 20080101000000 text/plain %d\n%s\n%s%s\n" % (len(about), about, head, page)
    )
    (document,) = sources.documents(DataConfig("warc", str(path)))
    assert document.text.startswith("A page. A page.")
    spoil(path, lambda content: content[:-40])
    sentence, left, damages = refusal_and_rest(DataConfig("warc", str(path)))
    assert " was cut (39 bytes of it are missing)" in sentence and left == [] and damages.count == 1


def test_a_row_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "RECORD_BYTES", 1000)
    pq.write_table(pa.table({"text": ["a", "x" * 1001, "b"]}), tmp_path / "a.parquet")
    sentence, left, damages = refusal_and_rest(DataConfig("parquet", str(tmp_path / "a.parquet")))
    assert "a.parquet at 1 has 1,001 characters, and at most 1,000 are read" in sentence
    assert left == ["a", "b"] and damages.count == 1


@pytest.mark.parametrize("source, name", [("jsonl", "a.jsonl.gz"), ("jsonl", "a.jsonl.zst"), ("wet", "a.wet.gz")])
def test_an_archive_without_a_byte(tmp_path, source, name):
    (tmp_path / name).touch()
    sentence, left, damages = refusal_and_rest(DataConfig(source, str(tmp_path / name)))
    assert name in sentence and left == [] and damages.count == 1


def test_a_tab_separates_where_the_file_says_so_and_not_its_folder(tmp_path):
    (tmp_path / "x.tsv.d").mkdir()
    (tmp_path / "x.tsv.d/a.csv").write_text("id,text\n1,first\n")
    (tmp_path / "x.tsv.d/b.tsv.gz").write_bytes(gzip.compress(b"id\ttext\n1\tsecond\n"))
    found = sources.documents(DataConfig("csv", str(tmp_path / "x.tsv.d/*")))
    assert [document.text for document in found] == ["first", "second"]


def test_a_file_name_that_is_no_utf8(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    with open(path, "w", encoding="utf-8") as file:
        file.write("text")
    (document,) = sources.documents(DataConfig("text", str(tmp_path / "*.txt")))
    assert document.name == f"{tmp_path}/caf\\xe9.txt" and document.text == "text"


def test_a_page_that_is_too_large_and_one_in_another_encoding(tmp_path, monkeypatch):
    monkeypatch.setattr(web, "RECORD_BYTES", 1000)
    path = wet(tmp_path, ["a", "x" * 1001, "b"], "a.wet")
    spoil(path, lambda content: content.replace(b"\n\nb", b"\n\n\xff").replace(b"\r\nb\r", b"\r\n\xff\r"))
    sentence, left, damages = refusal_and_rest(DataConfig("wet", str(path)))
    assert "has more than 1,000 bytes" in sentence and left == ["a"]
    assert "is not UTF-8 at byte 0 (0xFF)" in damages.places[1]


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    made("huggingface", tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for source, path, message in [
        ("huggingface", "", "needs data.path"),
        ("huggingface", str(tmp_path / "none"), "none can't be loaded"),
        ("tfds", "tiny", "must be NAME:VERSION"),
        ("tfds", "tiny:9.9.9", "The split train of tiny:9.9.9 can't be read from"),
        ("jsonl", "", "data.source=jsonl needs data.path"),
        ("warc", str(tmp_path / "*.gz"), "matches 0 files"),
    ]:
        with pytest.raises(Refused, match=message):
            sources.parts(DataConfig(source, path))
    with pytest.raises(Refused, match='no column "body"'):
        sources.parts(DataConfig("huggingface", str(tmp_path / "set"), "body"))
    with pytest.raises(Refused, match='data.source="documents" must be one of stdlib, .*, wet[.]$'):
        sources.parts(DataConfig("documents", str(tmp_path)))
    with pytest.raises(Refused, match='data.damaged="skp".*Did you mean "skip"'):
        sources.parts(DataConfig(damaged="skp"))


def test_a_cut_text_of_gzip(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(
        cut(gzip.compress("".join(f"{i * i * 7919}\n" for i in range(50_000)).encode()))
    )
    sentence, texts, _ = refusal_and_rest(DataConfig("text", str(tmp_path / "a.txt.gz")))
    assert "a.txt.gz can't be read after the document at" in sentence and texts


@pytest.mark.parametrize("error", [
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.EMFILE, "Too many open files"),
    TimeoutError("no answer"),
    MemoryError(),
])  # fmt: skip
@pytest.mark.parametrize("damaged", ["stop", "skip"])
def test_what_the_system_fails_at_is_no_damage(tmp_path, monkeypatch, error, damaged):
    def fails(*_):
        raise error

    data = DataConfig("jsonl", str(jsonl(tmp_path, TEXTS)), damaged=damaged)
    monkeypatch.setattr(files, "opened", fails)
    with pytest.raises(Failed, match="a.jsonl can't be read .*run the same command to resume"):
        list(sources.documents(data))


def test_a_list_that_fails_names_the_path(tmp_path, monkeypatch):
    """And not the folder that the store is made in."""

    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files, "with_bytes", fails)
    data = DataConfig("jsonl", str(jsonl(tmp_path, TEXTS)))
    with pytest.raises(Failed, match=r"data.path=.*a.jsonl of .* can't be listed \(Input/output error\): fix this"):
        prepare(data, TokenizerConfig(kind="byte"), tmp_path / "store")


def test_a_file_that_is_gone_is_damage(tmp_path):
    path = jsonl(tmp_path, TEXTS)
    data = DataConfig("jsonl", str(path))
    (part,) = sources.parts(data)
    path.unlink()
    with pytest.raises(Refused, match="can't be read .*No such file"):
        list(sources.read(part, data, Damages("stop")))
