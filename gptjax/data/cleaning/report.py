"""What cleaning removed and changed: counts of documents and bytes by step and reason, and samples."""

import hashlib
import os
from collections.abc import Callable, Iterable

# How many documents are shown of those that a step removed for the same reason.
SAMPLES = 10
SHOWN = 500  # characters of a sample
CHANGED = "changed"  # in place of a reason


class Account:
    """Counts what happens to the documents of a task, and draws samples by a hash of their name and offset.

    It takes datatrove's documents, or whatever else has their `text` and `metadata`.
    """

    def __init__(self):
        self.read = [0, 0]
        self._counts, self._samples = {}, {}

    def add(self, text: str) -> None:
        """Counts a document that was read."""
        _add(self.read, text)

    def remove(self, step: str, reason: str, document) -> None:
        _add(self._counts.setdefault((step, reason), [0, 0]), document.text)
        self._sample(step, reason, document, lambda: document.text)

    def change(self, step: str, before: str, document, private: bool) -> None:
        """Counts a document whose text a step changed, and the bytes that it lost by that.

        The sample is from where the change begins: as it was, or as it is now where what was there is `private`.
        """
        if before == document.text:
            return
        count = self._counts.setdefault((step, CHANGED), [0, 0])
        count[0] += 1
        count[1] += len(before.encode()) - len(document.text.encode())

        def text() -> str:
            begin = max(0, len(os.path.commonprefix([before, document.text])) - SHOWN // 5)
            return (document.text if private else before)[begin:]

        self._sample(step, CHANGED, document, text)

    def _sample(self, step: str, reason: str, document, text: Callable[[], str]) -> None:
        name, offset = document.metadata["name"], document.metadata["offset"]
        hash = hashlib.blake2b(f"{name}\0{offset}".encode(), digest_size=8).hexdigest()
        kept = self._samples.setdefault((step, reason), [])
        if len(kept) == SAMPLES and hash > kept[-1]["hash"]:
            return  # as nearly all, so that their text is not looked for
        row = {"hash": hash, "name": name, "offset": offset, "reason": reason, "text": text()[:SHOWN]}
        kept[:] = drawn([*kept, row])

    def result(self) -> dict:
        """Plain data, which `merged` takes."""
        counts = [[*key, *count] for key, count in self._counts.items()]
        samples = [[step, rows] for (step, _), rows in self._samples.items()]
        return {"documents": self.read[0], "bytes": self.read[1], "counts": counts, "samples": samples}


def drawn(rows: list[dict]) -> list[dict]:
    """Of samples of one reason those with the smallest hashes, whatever the order in which they come."""
    return sorted(rows, key=lambda row: (row["hash"], row["name"], row["offset"]))[:SAMPLES]


def merged(results: Iterable[dict], steps: list[str]) -> tuple[dict, dict[str, list[dict]]]:
    """The report of all tasks, and samples by step.

    Args:
      results: what each task's `Account.result` was, and more than one of a task where it is that of other steps.
      steps: those that are on, in their order.

    Returns:
      The report has `read`, `kept` and a list `steps`, each of which has `step`, `removed`, `changed` and `reasons`;
      counts are `documents` and `bytes`, of `changed` those that were lost.
    """
    read, counts, samples = [0, 0], {}, {}
    for result in results:
        read = [read[0] + result["documents"], read[1] + result["bytes"]]
        for step, reason, *count in result["counts"]:
            counts[step, reason] = [old + new for old, new in zip(counts.get((step, reason), [0, 0]), count)]
        for step, rows in result["samples"]:
            known = samples.setdefault((step, rows[0]["reason"]), [])
            known[:] = drawn(known + rows)
    rows = []
    for step in steps:
        reasons = {reason: count for (of, reason), count in sorted(counts.items()) if of == step}
        changed = reasons.pop(CHANGED, [0, 0])
        removed = [sum(column) for column in zip([0, 0], *reasons.values())]
        rows.append({"step": step, "removed": removed, "changed": changed, "reasons": reasons})
    kept = [
        read[0] - sum(row["removed"][0] for row in rows),
        read[1] - sum(row[key][1] for row in rows for key in ("removed", "changed")),
    ]
    report = {"read": read, "kept": kept, "steps": rows}
    return _named(report), {
        step: [row for (of, _), rows in sorted(samples.items()) if of == step for row in rows] for step in steps
    }


def _add(count: list[int], text: str) -> None:
    count[0] += 1
    count[1] += len(text.encode())


def _named(value):
    """Pairs of numbers as documents and bytes."""
    if isinstance(value, dict):
        return {key: _named(item) for key, item in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], int):
        return dict(zip(("documents", "bytes"), value))
    return [_named(item) for item in value] if isinstance(value, list) else value
