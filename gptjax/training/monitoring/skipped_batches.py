"""The ledger of batches that a rollback skips."""

from etils import epath

from gptjax.errors import Refused, shown
from gptjax.runtime import untrusted

NOTHING = {"ledger": [], "losses": []}  # what a run knows before its first step


ROW = dict.fromkeys(("step", "first_batch", "num_batches"), int) | {"reason": str}  # of the ledger


MAX_BATCHES = 1 << 53


def check_saved(saved: dict, step: int, where: epath.Path) -> None:
    """What the checkpoint of a step in `where` holds for a `Watch` has its form. Raises: Refused."""
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
