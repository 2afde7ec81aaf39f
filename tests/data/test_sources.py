import codecs
import itertools
import threading

import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from gptjax.data.sources import files, sources
from gptjax.data.sources.documents import DataConfig, Document
from gptjax.data.sources.formats import text
from gptjax.errors import Refused


def documents(source, path):
    return sources.documents(DataConfig(source=source, path=path))


def test_stdlib_has_the_library_and_not_its_tests():
    names = [document.name for document in documents("stdlib", "")]
    assert names == sorted(set(names), key=lambda name: name.split("/"))
    assert {"os.py", "json/decoder.py"} <= set(names)
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    assert folders.isdisjoint({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
    assert len(names) > 400


def test_stdlib_honours_declared_encodings_and_has_no_empty_documents(tmp_path, monkeypatch):
    (tmp_path / "latin.py").write_bytes("# -*- coding: latin-1 -*-\n# é\n".encode("latin-1"))
    (tmp_path / "empty.py").touch()
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "skipped.py").write_text("1")
    monkeypatch.setattr(text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert list(documents("stdlib", "")) == [Document("latin.py", 0, "# -*- coding: latin-1 -*-\n# é\n")]


def test_text_gives_small_files_whole_and_sorted(tmp_path):
    names = [f"{letter}.txt" for letter in "hcafbdge"]
    for name in [*names, "c.md"]:
        (tmp_path / name).write_bytes(f"{name}\r\nline é\n".encode())
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "i.txt").write_text("i")
    found = list(documents("text", str(tmp_path / "*.txt")))
    assert found == [Document(str(tmp_path / name), 0, f"{name}\r\nline é\n") for name in sorted(names)]
    assert len(list(documents("text", str(tmp_path / "**" / "*.txt")))) == 9


@pytest.mark.parametrize("size", [64 * 1024 - 1, 64 * 1024, 64 * 1024 + 1, 200_000])
@pytest.mark.parametrize(
    "unit",
    ["line é of text.\n", "\U0001f600", "é", "x", "short\n" + "中" * 50_000],
    ids=["lines", "4 bytes", "2 bytes", "1 byte", "long lines"],
)
def test_a_large_file_is_cut_and_nothing_is_lost(tmp_path, unit, size):
    content = unit * (size // len(unit.encode()) + 1)
    (tmp_path / "large.txt").write_bytes(content.encode())
    parts = list(documents("text", str(tmp_path / "large.txt")))
    assert "".join(part.text for part in parts) == content
    lengths = [len(part.text.encode()) for part in parts]
    assert max(lengths) <= 64 * 1024
    assert [part.offset for part in parts] == [0, *itertools.accumulate(lengths[:-1])]
    assert len(parts) == 1 if len(content.encode()) <= 64 * 1024 else len(parts) > 1
    if unit.startswith("line"):
        assert all(part.text.endswith("\n") for part in parts)


def test_one_long_line_is_read_a_part_at_a_time(tmp_path):
    with (tmp_path / "long.txt").open("wb") as file:
        file.truncate(1 << 40)  # sparse: a terabyte of NUL
    first = next(documents("text", str(tmp_path / "long.txt")))
    assert first.text == "\0" * (64 * 1024)


@pytest.mark.parametrize("before", [0, 10, 64 * 1024 - 1, 100_000])
@pytest.mark.parametrize("after", [b"", b"ok" * 50_000])
def test_not_utf8_names_file_and_byte(tmp_path, before, after):
    (tmp_path / "bad.txt").write_bytes(b"\n" * before + codecs.BOM_UTF16_LE + after)
    with pytest.raises(Refused, match=rf"bad.txt is not UTF-8 at byte {before} \(0xFF\)"):
        list(documents("text", str(tmp_path / "bad.txt")))


def test_many_continuation_bytes_are_refused_and_not_looped_over(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\x80" * 200_000)
    with pytest.raises(Refused, match="bad.txt is not UTF-8 at byte 0"):
        list(documents("text", str(tmp_path / "bad.txt")))


def test_refusals(tmp_path):
    (tmp_path / "empty.txt").touch()
    for source, path, message in [
        ("text", "", "data.source=text needs data.path"),
        ("text", str(tmp_path / "*.md"), "matches 0 files, and at least 1"),
        ("text", str(tmp_path / "missing.txt"), "matches 0 files"),
        ("text", str(tmp_path), r"This is a folder: try \".*/\*\""),
        ("text", str(tmp_path / "empty.txt"), r"empty.txt is empty \(0 bytes\)"),
        ("text", "gs://bucket/**/x.txt", "one \\* for each level"),
        ("stdlib", "x", "must be empty with data.source=stdlib"),
        ("stdlb", "", 'Did you mean "stdlib"'),
    ]:
        with pytest.raises(Refused, match=message):
            list(documents(source, path))


class Bucket(MemoryFileSystem):
    """A stand-in for one: what it says of a file it says when it is asked of two at a time."""

    protocol = "gs"
    two = threading.Barrier(2)

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("gs://").strip("/")

    def info(self, path, **options):
        if "corpus/" in path:  # a file, and not the bucket
            self.two.wait(timeout=30)
        return super().info(path, **options)


def test_files_in_a_bucket_are_asked_of_together(monkeypatch):
    bucket = Bucket()
    for name in ("b", "a", "c", "d", "folder/e", "other/f"):
        bucket.pipe_file(f"gs://corpus/{name}", name.encode())
    monkeypatch.setattr(backend.fsspec_backend, "fs", lambda path: bucket)
    found = files.matching("gs://corpus/*")
    assert [str(file) for file in found] == [f"gs://corpus/{name}" for name in "abcd"]
    assert files.with_bytes(found) == [(file, 1) for file in found]
