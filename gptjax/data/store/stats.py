"""Statistics of a token store: counts, lengths, duplicates, languages, the most frequent n-grams.

Everything is read from the store itself. Every token is read once; documents whose tokens have a small hash are also
decoded to text. The hash depends on content alone, so a sample has all copies of a document or none, and its share of
duplicates is that of the corpus. The sizes below bound the memory, whatever the size of the store.
"""

import hashlib
import heapq
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from datatrove.pipeline.dedup import MinhashConfig, MinhashDedupSignature
from datatrove.utils.text import TextNormConfig
from datatrove.utils.word_tokenizers import WhitespaceTokenizer

from gptjax.data.cleaning import filters
from gptjax.data.store.store import REMEDY, Split, Store
from gptjax.errors import Refused
from gptjax.runtime import heartbeat, progress, untrusted

# Approximate size of the sample that is decoded; a smaller store is decoded completely.
SAMPLE_DOCUMENTS, SAMPLE_BYTES = 50_000, 64 << 20
# Tokens, and document starts, that are read at a time.
READ_TOKENS, READ_DOCUMENTS = 4 << 20, 1 << 16
NGRAMS = 1, 2, 3
TOP = 20
# Different n-grams counted at a time; beyond that, the rarer half is forgotten.
MAX_NGRAMS = 1 << 20
WORD = re.compile(r"\w+")
QUANTILES = {"min": 0, "p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1}
# Least probability at which a document counts as being in a language.
SURE = 0.5


def stats(store: Store) -> dict:
    """The content of stats.json. Counts cover the whole store; everything else covers `sample`."""
    splits = {
        name: {"documents": split.documents, "tokens": split.tokens, "bytes": split.bytes}
        for name, split in store.splits.items()
    }
    total = {key: sum(split[key] for split in splits.values()) for key in ("documents", "tokens", "bytes")}
    share = min(1, SAMPLE_DOCUMENTS / total["documents"], SAMPLE_BYTES / total["bytes"])
    sample = _Sample()
    with progress.progress("reading documents", total["documents"]) as bar:
        for number, (hash, tokens) in enumerate(_documents(store), 1):
            if hash < share * (1 << 64):
                sample.add(hash, len(tokens), store.tokenizer.decode(tokens))
            bar.update(number, f"{sample.documents:,} looked at")
            heartbeat.moved()
    return {
        "store": str(store.folder),
        "settings": store.manifest["settings"],
        "vocab_size": store.tokenizer.vocab_size,
        "total": total,
        "splits": splits,
        "bytes_per_token": total["bytes"] / total["tokens"],
        "sample": {"documents": sample.documents, "bytes": sample.bytes, "whole": share == 1},
        **sample.result(),
        "cleaning": _cleaning(store),
    }


def _documents(store: Store) -> Iterator[tuple[int, np.ndarray]]:
    """A 64-bit hash of each document's tokens, and those tokens, end_of_text first. Raises: Refused."""
    for name, split in store.splits.items():
        try:
            for tokens in _split(split, store.tokenizer.vocab_size):
                yield int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=8).digest()), tokens
        except ValueError as error:
            reason = " ".join(str(error).split())[:200]
            raise Refused(f"{store.folder / name} is not as it was written ({reason}): {REMEDY}.") from error


def _split(split: Split, vocab_size: int) -> Iterator[np.ndarray]:
    """The tokens of each document. Raises: ValueError, if a token is outside the vocabulary."""
    for first in range(0, split.documents, READ_DOCUMENTS):
        last = min(first + READ_DOCUMENTS, split.documents)
        starts = split.document_starts(first, min(last + 1, split.documents))
        if last == split.documents:
            starts = np.append(starts, split.tokens)
        begin = 0
        while begin < len(starts) - 1:
            # As many whole documents as fit into one read; a larger document is read alone.
            end = max(begin + 1, int(np.searchsorted(starts, starts[begin] + READ_TOKENS, "right")) - 1)
            (window,) = split.read(starts[begin : begin + 1], int(starts[end] - starts[begin]))
            if window.max() >= vocab_size:
                raise ValueError(f"token {window.max()} of {vocab_size}")
            yield from np.split(window, starts[begin + 1 : end] - starts[begin])
            begin = end


def _cleaning(store: Store) -> dict:
    """Counts of the cleaning report in the manifest, by step; {} if the corpus was not cleaned. Raises: Refused."""
    report, where = store.manifest.get("cleaning", {}), store.folder / "manifest.json"
    if report == {}:
        return {}
    untrusted.check_types({"cleaning": report}, {"cleaning": dict}, where, REMEDY)
    untrusted.check_types(report, {"read": dict, "kept": dict, "steps": list}, where, REMEDY)
    rows = [{"step": "kept", "removed": report["kept"]}, {"step": "read", "removed": report["read"]}, *report["steps"]]
    for row in rows:
        untrusted.check_types({"a step": row}, {"a step": dict}, where, REMEDY)
        untrusted.check_types(row, {"step": str, "removed": dict}, where, REMEDY)
        untrusted.check_types(row["removed"], {"documents": int, "bytes": int}, where, REMEDY)
    return {row["step"]: row["removed"] for row in rows}


class _Words(WhitespaceTokenizer):
    """Splits words for MinHash the way they are counted here; many times faster than the rules of a language."""

    def word_tokenize(self, text: str) -> list[str]:
        return WORD.findall(text)


class _Sample:
    """Counts over the documents of the sample."""

    def __init__(self):
        self.documents = self.bytes = 0
        self._tokens: list[int] = []  # of each document
        self._bytes: list[int] = []  # of each document
        self._seen: set[int] = set()  # hashes of documents
        self._buckets: set[tuple] = set()  # of MinHash
        self._duplicates: dict[str, tuple[int, int]] = {"exact": (0, 0), "near": (0, 0)}  # documents and bytes
        self._languages = Counter(), Counter()  # documents and bytes
        self._ngrams: dict[int, Counter] = {n: Counter() for n in NGRAMS}
        self._words: dict[int, int] = {n: 0 for n in NGRAMS}
        self._forgot: dict[int, int] = {n: 0 for n in NGRAMS}
        words: Any = _Words()  # datatrove accepts a tokenizer here, though its annotation says str
        config = MinhashConfig(norm_config=TextNormConfig(norm_numbers=False))  # as clean.minhash_numbers
        self._minhash = MinhashDedupSignature("memory://", config, words)

    def add(self, hash: int, tokens: int, text: str) -> None:
        size = len(text.encode())
        self.documents, self.bytes = self.documents + 1, self.bytes + size
        self._tokens.append(tokens)
        self._bytes.append(size)
        self._compare(hash, text, size)
        (found,) = filters.languages(text, 1)
        language = found["lang"] if found["score"] >= SURE else "not sure"
        for counter, more in zip(self._languages, (1, size), strict=True):
            counter[language] += more
        words = WORD.findall(text)
        for n, counter in self._ngrams.items():
            counter.update(zip(*(words[i:] for i in range(n)), strict=False))  # the shifted lists end one by one
            self._words[n] += max(0, len(words) - n + 1)
            if len(counter) > MAX_NGRAMS:
                kept = counter.most_common(MAX_NGRAMS // 2)
                self._forgot[n] += kept[-1][1]
                self._ngrams[n] = Counter(dict(kept))

    def _compare(self, hash: int, text: str, size: int) -> None:
        """Counts a document as a duplicate if an equal or similar document came before."""
        shingles = self._minhash.get_shingles(text)
        buckets = set(enumerate(map(tuple, self._minhash.get_signature(shingles)))) if len(shingles) else set()
        kind = "exact" if hash in self._seen else "" if buckets.isdisjoint(self._buckets) else "near"
        if kind:
            documents, num_bytes = self._duplicates[kind]
            self._duplicates[kind] = documents + 1, num_bytes + size
        self._seen.add(hash)
        self._buckets |= buckets

    def result(self) -> dict:
        languages = {
            name: {"documents": documents, "bytes": self._languages[1][name]}
            for name, documents in self._languages[0].most_common()
        }
        ngrams = {
            str(n): {
                "total": self._words[n],
                "counted_low_by_at_most": self._forgot[n],
                "most_frequent": [[" ".join(words), count] for words, count in _most(counter)],
            }
            for n, counter in self._ngrams.items()
        }
        return {
            "tokens_per_document": _lengths(self._tokens),
            "bytes_per_document": _lengths(self._bytes),
            "duplicates": {
                kind: {"documents": documents, "bytes": num_bytes}
                for kind, (documents, num_bytes) in self._duplicates.items()
            },
            "languages": languages,
            "ngrams": ngrams,
        }


def _most(counter: Counter) -> list[tuple]:
    """The most frequent items; ties are in alphabetical order, so that the result is the same every time."""
    return heapq.nsmallest(TOP, counter.items(), key=lambda item: (-item[1], item[0]))


def _lengths(lengths: list[int]) -> dict:
    """Mean, quantiles, and a histogram whose bins double: `counts[i]` covers `edges[i]` to below `edges[i + 1]`."""
    values = np.array(lengths or [0])
    edges = 2 ** np.arange(int(values.max()).bit_length() + 1)
    counts, _ = np.histogram(values, edges)
    quantiles = {name: int(np.quantile(values, q, method="inverted_cdf")) for name, q in QUANTILES.items()}
    return {"mean": float(values.mean())} | quantiles | {"edges": edges.tolist(), "counts": counts.tolist()}
