"""The ledger of batches that a rollback skips."""

from etils import epath

from gptjax.errors import Refused, shown
from gptjax.runtime import untrusted

NOTHING = {"ledger": [], "losses": []}  # the record before the first step
ROW = dict.fromkeys(("step", "first_batch", "num_batches"), int) | {"reason": str}  # types of a row of the ledger
MAX_BATCHES = 1 << 53


def check_saved(saved: dict, step: int, where: epath.Path) -> None:
    """Checks the form of the record for `rollback.Watch` in the checkpoint of a step at `where`. Raises: Refused."""
    remedy = "put back the checkpoint that the run wrote"
    untrusted.check_types(saved, {"recovery": dict}, where, remedy)
    untrusted.check_types(saved["recovery"], {"ledger": list, "losses": list}, where, remedy)
    latest = 0
    for row in saved["recovery"]["ledger"]:
        untrusted.check_types({"a row of the ledger": row}, {"a row of the ledger": dict}, where, remedy)
        untrusted.check_types(row, ROW, where, remedy)
        for name, most in (("step", step), ("first_batch", MAX_BATCHES), ("num_batches", MAX_BATCHES)):
            least = latest if name == "step" else 0
            if not least <= row[name] <= most:
                raise Refused(f"{where} is damaged ({name} of the ledger is {shown(row[name])}): {remedy}.")
        latest = row["step"]
    for loss in saved["recovery"]["losses"]:
        if loss is not None:
            untrusted.check_types({"a loss": loss}, {"a loss": float}, where, remedy)


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
