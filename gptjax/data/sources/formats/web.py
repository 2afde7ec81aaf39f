"""Archives of Common Crawl: WARC with pages, whose text is extracted here, and WET with extracted text."""

from collections.abc import Iterator
from typing import Any

from etils import epath

from gptjax.data.sources.documents import RECORD_BYTES, Damages, DataConfig, Document, Part
from gptjax.data.sources.formats.text import decoded
from gptjax.runtime import optional

PAGES = "text/html", "application/xhtml+xml"


def read_wet(part: Part, data: DataConfig, damages: Damages) -> Iterator[Document]:
    """Reads the text of each conversion record; offset is the record's byte in the (compressed) file."""
    for offset, _, content in _records(part, damages, "conversion"):
        for document in decoded(content, f"{part.path} record at byte {offset}", 0, damages):
            yield Document(part.path, offset, document.text)


def read_warc(part: Part, data: DataConfig, damages: Damages) -> Iterator[Document]:
    """Extracts the text of each fetched page by trafilatura; offset is the record's byte in the file."""
    trafilatura = optional.package("trafilatura", "data.source=warc")
    for offset, record, content in _records(part, damages, "response"):
        kind = record.http_headers.get_header("Content-Type", "") if record.http_headers else ""
        if kind.startswith(PAGES):
            text = trafilatura.extract(content, include_comments=False) if content else ""
            if text:
                yield Document(part.path, offset, text)
            else:
                damages.without_text += 1


def _records(part: Part, damages: Damages, kind: str) -> Iterator[tuple[int, Any, bytes]]:
    """Yields the complete records of a kind: the byte where each begins, the record, and its decoded content."""
    archives = optional.package("warcio.archiveiterator", f"data.source={part.source}")
    with epath.Path(part.path).open("rb") as stream:
        records, missing = archives.ArchiveIterator(stream), None
        records.close = _keep_open  # at the end, `close` would discard the state of the reader, used below
        for record in records:
            content = record.content_stream().read(RECORD_BYTES + 1) if record.rec_type == kind else b""
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
            elif record.rec_type == kind:
                yield offset, record, content
        # If the file is cut inside a header of a record or gzip member, the iterator takes that for the end.
        gzipped = records.reader.decompressor
        if not missing and (not stream.tell() or (gzipped and not gzipped.eof)):
            damages(part.path, f"was cut (it ends at byte {stream.tell()})", "copy the file again")


def _keep_open() -> None:
    pass
