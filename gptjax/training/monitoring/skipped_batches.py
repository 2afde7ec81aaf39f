"""The ledger of batches that a rollback skips."""


def batch_index(ledger: list[dict], step: int) -> int:
    """The batch that is read after `step` steps.

    Args:
      ledger: what was skipped, as rows of step (to which the run went back), first_batch, num_batches and reason.
    """
    return step + sum(row["num_batches"] for row in ledger if row["step"] <= step)


def steps_within(ledger: list[dict], step: int, first: int, stop: int) -> int:
    """How many of the steps up to `step` read one of the batches `first` to `stop`."""
    gone = [range(row["first_batch"], row["first_batch"] + row["num_batches"]) for row in ledger if row["step"] < step]
    last = min(stop, batch_index(ledger, step - 1) + 1) if step else first
    return max(last - first, 0) - sum(max(min(last, each.stop) - max(first, each.start), 0) for each in gone)
