"""The record of a run in a checkpoint's manifest."""

import base64
import dataclasses

from etils import epath

from gptjax.data.stream import curriculum
from gptjax.data.stream.curriculum import Phase
from gptjax.errors import Refused, shown
from gptjax.runtime import untrusted

REMEDY = "put back the checkpoint that the run wrote"
LEDGER_ROW = dict.fromkeys(("step", "first_batch", "num_batches"), int) | {"reason": str}
MAX_BATCHES = 1 << 53


@dataclasses.dataclass(frozen=True)
class Recovery:
    """The memory that rollbacks need.

    Args:
      ledger: the skipped batches, as rows of step (to which the run went back), first_batch, num_batches and reason.
      losses: the latest training losses, in order; None where a number was not finite.
    """

    ledger: list[dict] = dataclasses.field(default_factory=list)
    losses: list[float | None] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Progress:
    """The part of a record that changes while the run trains; a converted model has none."""

    recovery: Recovery
    phases: list[Phase]


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The description of a run that each of its checkpoints carries.

    Args:
      config: the resolved config of the run, as nested dicts.
      tokenizer_hash: the hash of the tokenizer's files.
      text_hashes: the hash of each store's text, by the store's name.
      tokenizer: the content of each of the tokenizer's files, by name.
      progress: the position in the data and the memory of rollbacks.
    """

    config: dict
    tokenizer_hash: str = ""
    text_hashes: dict[str, str] = dataclasses.field(default_factory=dict)
    tokenizer: dict[str, bytes] = dataclasses.field(default_factory=dict)
    progress: Progress | None = None

    def to_json(self) -> dict:
        """The record as the manifest's keys and JSON values."""
        content = {
            "config": self.config,
            "tokenizer_hash": self.tokenizer_hash,
            "text_hashes": self.text_hashes,
            "tokenizer": {name: base64.b64encode(file).decode() for name, file in self.tokenizer.items()},
        }
        if self.progress is not None:
            content["recovery"] = dataclasses.asdict(self.progress.recovery)
            content["phases"] = curriculum.saved(self.progress.phases)
        return content


def read(content: dict, step: int, where) -> RunRecord:
    """Parses and validates the record in the manifest of a step.

    Args:
      content: the manifest.
      step: completed updates of the checkpoint.
      where: the folder that an error names.

    Raises: Refused.
    """
    found = {"tokenizer_hash": "", "text_hashes": {}, "tokenizer": {}} | content
    kinds = {"config": dict, "tokenizer_hash": str, "text_hashes": dict}
    untrusted.check_types(found, kinds, where, REMEDY)
    untrusted.check_types(found["text_hashes"], dict.fromkeys(found["text_hashes"], str), where, REMEDY)
    progress = None
    if "recovery" in content and "phases" in content:
        recovery = read_recovery(content, step, where)
        untrusted.check_types(found["config"], {"seq_len": int}, where, REMEDY)
        progress = Progress(recovery, curriculum.read_saved(content, found["config"]["seq_len"], where))
    files = _tokenizer_files(found["tokenizer"], where)
    return RunRecord(found["config"], found["tokenizer_hash"], found["text_hashes"], files, progress)


def _tokenizer_files(encoded: dict[str, str], where) -> dict[str, bytes]:
    try:
        return {name: base64.b64decode(text, validate=True) for name, text in encoded.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise Refused(f"{where} holds an unreadable tokenizer ({error}): {REMEDY}.") from error


def read_recovery(content: dict, step: int, where: epath.Path) -> Recovery:
    """Parses and validates the `recovery` of the manifest of a step. Raises: Refused."""
    untrusted.check_types(content, {"recovery": dict}, where, REMEDY)
    found = content["recovery"]
    untrusted.check_types(found, {"ledger": list, "losses": list}, where, REMEDY)
    latest = 0
    for row in found["ledger"]:
        untrusted.check_types({"a row of the ledger": row}, {"a row of the ledger": dict}, where, REMEDY)
        untrusted.check_types(row, LEDGER_ROW, where, REMEDY)
        for name, most in (("step", step), ("first_batch", MAX_BATCHES), ("num_batches", MAX_BATCHES)):
            least = latest if name == "step" else 0
            if not least <= row[name] <= most:
                raise Refused(f"{where} is damaged ({name} of the ledger is {shown(row[name])}): {REMEDY}.")
        latest = row["step"]
    for loss in found["losses"]:
        if loss is not None:
            untrusted.check_types({"a loss": loss}, {"a loss": float}, where, REMEDY)
    return Recovery(found["ledger"], found["losses"])
