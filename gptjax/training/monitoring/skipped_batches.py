"""The ledger of batches that a rollback skips."""


def batch_index(ledger: list[dict], step: int) -> int:
    """Returns the index of the batch that is read after `step` steps.

    Args:
      ledger: rollbacks as rows of step (the one rolled back to), first_batch, num_batches and reason.
      step: completed updates.
    """
    return step + sum(row["num_batches"] for row in ledger if row["step"] <= step)


def steps_within(ledger: list[dict], step: int, first: int, stop: int) -> int:
    """Counts the steps up to `step` that read a batch from `first` up to but not including `stop`."""
    gone = [range(row["first_batch"], row["first_batch"] + row["num_batches"]) for row in ledger if row["step"] < step]
    last = min(stop, batch_index(ledger, step - 1) + 1) if step else first
    return max(last - first, 0) - sum(max(min(last, each.stop) - max(first, each.start), 0) for each in gone)
