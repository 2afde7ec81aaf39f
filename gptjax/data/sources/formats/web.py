"""Archives of Common Crawl: WARC with pages, whose text is extracted here, and WET with extracted text."""

from collections.abc import Iterator
from typing import Any

from etils import epath

from gptjax.data.sources.documents import RECORD_BYTES, Damages, DataConfig, Document, Part
from gptjax.data.sources.formats.text import decoded
from gptjax.runtime import optional

PAGES = "text/html", "application/xhtml+xml"
NO_TEXT = "pages in which no text was found"
NO_PAGE = "records that are not pages of HTML"
UNREADABLE = "pages whose body can't be decoded"
SNIFFED = 2048  # bytes of a body that are looked at
ZSTD = b"\x28\xb5\x2f\xfd"  # begins a frame (RFC 8878, section 3.1.1)


def read_wet(part: Part, data: DataConfig, damages: Damages) -> Iterator[Document]:
    """Reads the text of each conversion record; offset is the record's byte in the (compressed) file."""
    for offset, _, content in _records(part, damages, "conversion"):
        for document in decoded(content, f"{part.path} record at byte {offset}", 0, damages):
            yield Document(part.path, offset, document.text)


def read_warc(part: Part, data: DataConfig, damages: Damages) -> Iterator[Document]:
    """Extracts the text of each fetched page by trafilatura; offset is the record's byte in the file."""
    trafilatura = optional.package("trafilatura", "data.source=warc")
    for offset, record, content in _records(part, damages, "response", "resource"):
        headers = record.http_headers or record.rec_headers
        kind = (headers.get_header("Content-Type") or "").strip().lower()
        if not kind and b"<html" in content[:SNIFFED].lower():
            kind = PAGES[0]
        try:
            content = _unpacked(headers, content) if kind.startswith(PAGES) else content
        except Exception as error:  # decoders raise errors of their own; one page must not cost the file
            damages.leave_out(f"pages in the encoding {error.args[0]}" if isinstance(error, KeyError) else UNREADABLE)
            continue
        text = trafilatura.extract(content, include_comments=False) if content and kind.startswith(PAGES) else ""
        if text:
            yield Document(part.path, offset, text)
        else:
            damages.leave_out(NO_TEXT if kind.startswith(PAGES) else NO_PAGE)


def _unpacked(headers, content: bytes) -> bytes:
    """The content without the encodings that warcio leaves: zstd. Raises: KeyError, with the name of another."""
    encoding = (headers.get_header("Content-Encoding") or "").strip().lower()
    if encoding == "zstd" and content[:4] == ZSTD:
        library = optional.package("zstandard", "A page in the encoding zstd")
        return library.ZstdDecompressor().decompressobj().decompress(content)[: RECORD_BYTES + 1]
    if encoding in ("br", "zstd", "compress") and b"<" not in content[:SNIFFED]:
        raise KeyError(encoding)
    return content


def _records(part: Part, damages: Damages, *kinds: str) -> Iterator[tuple[int, Any, bytes]]:
    """Yields the complete records of some kinds: the byte where each begins, the record, and its decoded content."""
    archives = optional.package("warcio.archiveiterator", f"data.source={part.source}")
    with epath.Path(part.path).open("rb") as stream:
        records, missing = archives.ArchiveIterator(stream), None
        records.close = _keep_open  # at the end, `close` would discard the state of the reader, used below
        for record in records:
            wanted, content, decoded_ = record.rec_type in kinds, b"", True
            try:
                content = record.content_stream().read(RECORD_BYTES + 1) if wanted else b""
            except Exception:  # a body that is not in the encoding that its header names
                decoded_ = False
            while record.raw_stream.read(1 << 20):  # skips what the limit or the content's encoding left unread
                pass
            headers = record.rec_headers
            length = headers.get_header("Content-Length") or headers.get_header("length")  # the latter in ARC
            missing = getattr(record.raw_stream, "limit", "some") if length else "some"
            offset = records.get_record_offset()
            where = f"{part.path} record at byte {offset}"
            if missing:  # for records of any kind, since the later records are missing too
                damages(where, f"was cut ({missing} bytes of it are missing)", "copy the file again")
            elif len(content) > RECORD_BYTES:
                damages(where, f"has more than {RECORD_BYTES:,} bytes", "remove it")
            elif not decoded_:
                damages.leave_out(UNREADABLE)
            elif wanted:
                yield offset, record, content
        # If the file is cut inside a header of a record or gzip member, the iterator takes that for the end.
        gzipped = records.reader.decompressor
        if not missing and (not stream.tell() or (gzipped and not gzipped.eof)):
            damages(part.path, f"was cut (it ends at byte {stream.tell()})", "copy the file again")


def _keep_open() -> None:
    pass
