"""Real files of each format, made by the format's own library: what is read of them, whole, in parts, and damaged."""

import gzip

import pytest
from support.source_files import MAKERS, TEXTS, jsonl, made

from gptjax.data.sources import documents, files, sources
from gptjax.data.sources.documents import Damages, DataConfig
from gptjax.data.sources.formats import records, tables
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
    assert (damages.count, damages.without_text) == (0, 1)
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
