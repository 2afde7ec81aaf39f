"""Archives of Common Crawl: WARC, whose pages' text has to be extracted, and WET, where that was done."""

from collections.abc import Iterator

from etils import epath

from gptjax.data.sources.documents import RECORD_BYTES, Damages, DataConfig, Document, Part
from gptjax.data.sources.formats.text import decoded
from gptjax.runtime import optional

PAGES = "text/html", "application/xhtml+xml"


def read_wet(part: Part, data: DataConfig, damages: Damages) -> Iterator[Document]:
    """The text of each conversion record; offset is the byte of the record in the file, compressed as it is."""
    for offset, _, content in _records(part, damages, "conversion"):
        for document in decoded(content, f"{part.path} record at byte {offset}", 0, damages):
            yield Document(part.path, offset, document.text)


def read_warc(part: Part, data: DataConfig, damages: Damages) -> Iterator[Document]:
    """The text of each page that was fetched, by trafilatura; offset is the byte of the record in the file."""
    trafilatura = optional.package("trafilatura", "data.source=warc")
    for offset, record, content in _records(part, damages, "response"):
        kind = record.http_headers.get_header("Content-Type", "") if record.http_headers else ""
        if kind.startswith(PAGES):
            text = trafilatura.extract(content, include_comments=False) if content else ""
            if text:
                yield Document(part.path, offset, text)
            else:
                damages.without_text += 1


def _records(part: Part, damages: Damages, kind: str) -> Iterator[tuple[int, object, bytes]]:
    """Whole records of a kind: the byte at which each begins, itself, and what it holds, as its HTTP headers say."""
    archives = optional.package("warcio.archiveiterator", f"data.source={part.source}")
    with epath.Path(part.path).open("rb") as stream:
        records, missing = archives.ArchiveIterator(stream), None
        records.close = lambda: None  # by which it would forget, at the end, what its reader knows
        for record in records:
            content = record.content_stream().read(RECORD_BYTES + 1) if record.rec_type == kind else b""
            while record.raw_stream.read(1 << 20):  # what the limit, or the content's own encoding, left of it
                pass
            told = record.rec_headers.get_header("Content-Length") or record.rec_headers.get_header("length")  # of ARC
            missing = getattr(record.raw_stream, "limit", "some") if told else "some"
            offset = records.get_record_offset()
            where = f"{part.path} record at byte {offset}"
            if missing:  # of whatever kind, since the records after it are missing too
                damages(where, f"was cut ({missing} bytes of it are missing)", "copy the file again")
            elif len(content) > RECORD_BYTES:
                damages(where, f"has more than {RECORD_BYTES:,} bytes", "remove it")
            elif record.rec_type == kind:
                yield offset, record, content
        # In the midst of a record's or a gzip member's header, the iterator takes a cut for the end.
        gzipped = records.reader.decompressor
        if not missing and (not stream.tell() or gzipped and not gzipped.eof):
            damages(part.path, f"was cut (it ends at byte {stream.tell()})", "copy the file again")
