"""The report of cleaning: removed and changed documents and bytes by step and reason, and samples."""

import hashlib
import itertools
from collections.abc import Callable, Iterable

# Number of samples for each step and reason.
SAMPLES = 10
SHOWN = 500  # characters of a sample
CHANGED = "changed"  # stands in place of a reason


class Account:
    """Counts the fate of a task's documents, and draws samples by a hash of their name and offset.

    Documents are datatrove's, or any object with `text` and `metadata`.
    """

    def __init__(self):
        self.read = [0, 0]  # documents and bytes
        self._counts: dict[tuple[str, str], list[int]] = {}
        self._samples: dict[tuple[str, str], list[dict]] = {}

    def add(self, text: str) -> None:
        """Counts a document that was read."""
        _add(self.read, text)

    def remove(self, step: str, reason: str, document) -> None:
        _add(self._counts.setdefault((step, reason), [0, 0]), document.text)
        self._sample(step, reason, document, lambda: document.text)

    def change(self, step: str, before: str, document, private: bool) -> None:
        """Counts a document whose text a step changed, and the bytes that were lost.

        The sample begins near the change. It shows the old text, or the new text if the old one is `private`.
        """
        if before == document.text:
            return
        count = self._counts.setdefault((step, CHANGED), [0, 0])
        count[0] += 1
        count[1] += len(before.encode()) - len(document.text.encode())

        def text() -> str:
            same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, document.text, strict=False))
            begin = max(0, sum(1 for _ in same) - SHOWN // 5)
            return (document.text if private else before)[begin:]

        self._sample(step, CHANGED, document, text)

    def _sample(self, step: str, reason: str, document, text: Callable[[], str]) -> None:
        name, offset = document.metadata["name"], document.metadata["offset"]
        hash = hashlib.blake2b(f"{name}\0{offset}".encode(), digest_size=8).hexdigest()
        kept = self._samples.setdefault((step, reason), [])
        if len(kept) == SAMPLES and hash > kept[-1]["hash"]:
            return  # the usual case, for which the text is never computed
        row = {"hash": hash, "name": name, "offset": offset, "reason": reason, "text": text()[:SHOWN]}
        kept[:] = drawn([*kept, row])

    def result(self) -> dict:
        """The counts and samples as plain data, for `merged`."""
        counts = [[*key, *count] for key, count in self._counts.items()]
        samples = [[step, rows] for (step, _), rows in self._samples.items()]
        return {"documents": self.read[0], "bytes": self.read[1], "counts": counts, "samples": samples}


def drawn(rows: list[dict]) -> list[dict]:
    """Keeps, among samples with one reason, those with the smallest hashes, whatever the order of `rows`."""
    return sorted(rows, key=lambda row: (row["hash"], row["name"], row["offset"]))[:SAMPLES]


def merged(results: Iterable[dict], steps: list[str]) -> tuple[dict, dict[str, list[dict]]]:
    """Merges the accounts of all tasks to one report, and samples by step.

    Args:
      results: each task's `Account.result`; a task has several if several stages kept accounts.
      steps: the steps that are on, in their order.

    Returns:
      The report: `read`, `kept` and a list `steps` of dicts with `step`, `removed`, `changed` and `reasons`. Counts are
      `documents` and `bytes`; for `changed`, the bytes that were lost.
      The samples: rows by step.
    """
    read, counts, samples = [0, 0], {}, {}
    for result in results:
        read = [read[0] + result["documents"], read[1] + result["bytes"]]
        for step, reason, documents, num_bytes in result["counts"]:
            old = counts.get((step, reason), [0, 0])
            counts[step, reason] = [old[0] + documents, old[1] + num_bytes]
        for step, rows in result["samples"]:
            known = samples.setdefault((step, rows[0]["reason"]), [])
            known[:] = drawn(known + rows)
    rows = []
    for step in steps:
        reasons = {reason: count for (of, reason), count in sorted(counts.items()) if of == step}
        changed = reasons.pop(CHANGED, [0, 0])
        removed = [sum(column) for column in zip([0, 0], *reasons.values(), strict=True)]
        rows.append(
            {
                "step": step,
                "removed": _named(removed),
                "changed": _named(changed),
                "reasons": {reason: _named(count) for reason, count in reasons.items()},
            }
        )
    kept = [
        read[0] - sum(row["removed"]["documents"] for row in rows),
        read[1] - sum(row[key]["bytes"] for row in rows for key in ("removed", "changed")),
    ]
    report = {"read": _named(read), "kept": _named(kept), "steps": rows}
    return report, {
        step: [row for (of, _), rows in sorted(samples.items()) if of == step for row in rows] for step in steps
    }


def _add(count: list[int], text: str) -> None:
    count[0] += 1
    count[1] += len(text.encode())


def _named(count: list[int]) -> dict[str, int]:
    """A pair of numbers as documents and bytes."""
    documents, num_bytes = count
    return {"documents": documents, "bytes": num_bytes}
