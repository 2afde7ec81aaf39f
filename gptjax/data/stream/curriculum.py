"""Changes in the course of a run: the mixture's weights, the sequence length, the batch size.

A run is a list of phases, each starting at a batch. Phases come from the config, and from the checkpoint for the
batches before it. Data that was read therefore stays as it was read, whatever the config says now, and each store
continues where it was. Batches that recovery skipped are counted too, so a batch does not depend on earlier skips.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TypeVar

from etils import epath

from gptjax.data.stream.mixture import PERIOD, MixtureConfig, folders, given, shares
from gptjax.errors import Refused, shown
from gptjax.runtime import untrusted

MAX_TOKENS = 1 << 53  # far more than any run reads, and far below the end of int64
T = TypeVar("T")


@dataclass(frozen=True)
class CurriculumConfig:
    """Changes that take effect from a batch on; empty means never. A resumed run may change what is still to come.

    seq_len: lengths that divide the config's own seq_len, which is the longest, for example "0: 256; 2000: 1024".
    batch_size: for example "0: 32; 2000: 64".
    """

    seq_len: str = ""
    batch_size: str = ""


@dataclass(frozen=True)
class Phase:
    """Consecutive batches of one shape, from batch `first` on. shares: windows of each store in `PERIOD`, by name."""

    first: int
    seq_len: int
    batch_size: int
    shares: dict[str, int]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of a batch."""
        return self.batch_size, self.seq_len

    def like(self, other: "Phase") -> bool:
        return asdict(self) | {"first": 0} == asdict(other) | {"first": 0}


def phases(mixture: MixtureConfig, curriculum: CurriculumConfig, seq_len: int, batch_size: int) -> list[Phase]:
    """The phases that a config plans, from batch 0 on. Raises: Refused."""
    if mixture.stores and not mixture.weights:
        raise Refused('mixture.weights="" must give the weight of each store, for example "code 0.7, web 0.3".')
    if mixture.weights and not mixture.stores:
        raise Refused('mixture.stores="" must name the stores of mixture.weights, for example "code=/data/code".')
    if mixture.stores:
        names = list(folders(mixture.stores))
        mixed = _schedule("mixture.weights", mixture.weights, lambda text: shares(text, names))
    else:
        mixed = {0: {"": PERIOD}}
    lengths = _schedule("curriculum.seq_len", curriculum.seq_len or str(seq_len), int)
    sizes = _schedule("curriculum.batch_size", curriculum.batch_size or str(batch_size), int)
    for key, schedule in (("seq_len", lengths), ("batch_size", sizes)):
        for value in schedule.values():
            if not 1 <= value < 1 << 31:
                raise Refused(f"curriculum.{key} has {value}: each value must be at least 1.")
    for length in lengths.values():
        if seq_len % length:
            raise Refused(
                f"curriculum.seq_len has {length}, which does not divide seq_len={seq_len}, the longest: change one."
            )
    found = []
    for first in sorted(mixed.keys() | lengths.keys() | sizes.keys()):
        _append(found, Phase(first, _holding(lengths, first), _holding(sizes, first), _holding(mixed, first)))
    return found


def _holding(schedule: dict[int, T], batch: int) -> T:
    """The value of a schedule at a batch."""
    return schedule[max(at for at in schedule if at <= batch)]


def _schedule(key: str, text: str, read: Callable[[str], T]) -> dict[int, T]:
    """Parses "0: A; 2000: B", or "A" alone, to values by their first batch. Raises: Refused."""
    found = {}
    for part in text.split(";"):
        first, colon, value = part.rpartition(":")
        try:
            at = int(first) if colon else 0
            if at < 0 or at >= 1 << 53 or (found and at <= max(found)) or (not found and at):
                raise ValueError
            found[at] = read(value)
        except ValueError:
            raise Refused(
                f'{key} has "{part.strip()}"; "BATCH: VALUE" must start at 0 and ascend, for example "0: A; 2000: B".'
            ) from None
    return found


def _append(found: list[Phase], phase: Phase) -> None:
    if not found or not phase.like(found[-1]):
        found.append(phase)


def going_on(history: list[Phase], planned: list[Phase], batch: int) -> list[Phase]:
    """The phases of a run that resumes at a batch: earlier phases stay, later phases are as planned now.

    Raises: Refused, if the history has more tokens than can be counted.
    """
    found = [phase for phase in history if phase.first < batch]
    tokens = sum((stop - first) * phase.batch_size * phase.seq_len for phase, first, stop in parts(found, 0, batch))
    if tokens >= MAX_TOKENS:
        raise Refused(
            f"The checkpoint says that {shown(tokens)} tokens were read or skipped; at most {MAX_TOKENS} can be: put "
            "back the checkpoint that the run wrote."
        )
    last = [phase for phase in planned if phase.first <= batch][-1]
    for phase in [last, *planned[planned.index(last) + 1 :]]:
        _append(found, Phase(max(phase.first, batch if found else 0), phase.seq_len, phase.batch_size, phase.shares))
    return found


def parts(phases: list[Phase], first: int, stop: int) -> Iterator[tuple[Phase, int, int]]:
    """The phases that cover batches `first` to `stop`, each with its own first batch and stop within that range."""
    ends = [phase.first for phase in phases[1:]] + [stop]
    for phase, end in zip(phases, ends, strict=False):
        begin, end = max(first, phase.first), min(stop, end)
        if begin < end:
            yield phase, begin, end


def starts(phases: list[Phase]) -> list[dict[str, int]]:
    """For each phase, the position of each store at its start, in tokens of the store's own endless order.

    Where the sequence length changes, a store continues at the next multiple of the new length, so less than a window
    is left out.
    """
    found, at = [], dict.fromkeys((name for phase in phases for name in phase.shares), 0)
    for phase, following in zip(phases, [*phases[1:], None], strict=False):
        at = {name: -(-tokens // phase.seq_len) * phase.seq_len for name, tokens in at.items()}
        found.append(at)
        if following:
            windows = given(phase.shares, (following.first - phase.first) * phase.batch_size)
            at = at | {name: at[name] + count * phase.seq_len for name, count in windows.items()}
    return found


def saved(phases: list[Phase]) -> list[dict]:
    """The phases as JSON values, for a checkpoint."""
    return [asdict(phase) for phase in phases]


def read_saved(content: dict, seq_len: int, where: epath.Path) -> list[Phase]:
    """The phases in the checkpoint at `where`. Raises: Refused."""
    remedy = "put back the checkpoint that the run wrote"
    untrusted.check_types(content, {"phases": list}, where, remedy)
    numbers = dict.fromkeys(("first", "seq_len", "batch_size"), int)
    found = []
    for row in content["phases"]:
        untrusted.check_types({"a phase": row}, {"a phase": dict}, where, remedy)
        untrusted.check_types(row, numbers | {"shares": dict}, where, remedy)
        untrusted.check_types(row["shares"], dict.fromkeys(row["shares"], int), where, remedy)
        phase = Phase(**{name: row[name] for name in (*numbers, "shares")})
        whole = all(1 <= share for share in phase.shares.values()) and sum(phase.shares.values()) == PERIOD
        in_order = found[-1].first < phase.first < 1 << 53 if found else phase.first == 0
        if not (whole and in_order and 1 <= phase.seq_len and seq_len % phase.seq_len == 0):
            raise Refused(f"{where} is damaged (a phase from batch {phase.first} that can't be): {remedy}.")
        if not 1 <= phase.batch_size < 1 << 31:
            raise Refused(f"{where} is damaged (a phase of {phase.batch_size} sequences): {remedy}.")
        found.append(phase)
    if not found:
        raise Refused(f"{where} is damaged (it has no phases): {remedy}.")
    return found
