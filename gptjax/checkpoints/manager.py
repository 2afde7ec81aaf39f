"""Save, verify and restore the state and what belongs to it.

A checkpoint is named by its step, the number of completed updates, which is also the cursor of the data: the stream is
a function of the step. It is a folder of `state`, one array a leaf, named as in the tree (`model.blocks.query`), and
`manifest.json`, written last: the hash of every file, and what the run says of itself (config, tokenizer).
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import jax
import numpy as np
from etils import epath

from gptjax.checkpoints import manifest, record, retention, verification
from gptjax.checkpoints.async_save import Save
from gptjax.checkpoints.config import CheckpointConfig
from gptjax.checkpoints.record import RunRecord
from gptjax.errors import Failed, Refused
from gptjax.parallel.trees import named_leaves
from gptjax.runtime import distributed, files

if TYPE_CHECKING:
    from gptjax.checkpoints.arrays import Arrays


class Checkpoints:
    """The checkpoints of a workdir. A context manager: leaving it waits for the last save."""

    def __init__(self, folder: epath.PathLike, config: CheckpointConfig = CheckpointConfig()):
        folder = epath.Path(folder)
        if "://" in str(folder) and retention.PATTERN.search(str(folder)):
            raise Refused(f"--workdir={folder.parent} must be a path on a bucket without *, ?, [ and \\: give another.")
        self.folder = folder if "://" in str(folder) else folder.resolve()  # TensorStore takes no relative path
        self._config = config
        self._passed_over = []  # damaged steps above the step that the run resumes from
        self._saving: Save | None = None  # the latest save, until its end is known
        self._count, self._saved = 0, []
        self._failures, self._look_at = 0, 0  # in a row; the step after which to see how it ended

    def __enter__(self):
        return self

    def __exit__(self, *error):
        # No exchange here: if one process raises, the others may not reach it.
        if self._saving is not None:
            self._saving.join()
            self._conclude(self._saving, [self._saving.failure])

    @functools.cached_property
    def _arrays(self) -> Arrays:
        from gptjax.checkpoints.arrays import Arrays  # imports orbax, which the first step does without

        return Arrays(self.folder)  # created late, since orbax asks for the devices

    def _at(self, step: int) -> epath.Path:
        return retention.at(self.folder, step)

    # Reading

    def steps(self) -> list[int]:
        """The saved steps, ascending, whole or damaged; the same on all processes."""
        found = []
        with distributed.together():
            if distributed.first():
                found, _ = retention.found(self.folder)
        return distributed.shared(lambda: found)

    def newest(self) -> int:
        """The newest step that verifies, or 0 if nothing was saved. Newer damaged ones are named and kept.

        Raises: Refused, if there are checkpoints but none verifies.
        """
        damages = {}
        for step in reversed(self.steps()):
            damages[step] = self._damage(step)
            if not damages[step]:
                self._passed_over = [other for other in damages if other != step]
                for other in self._passed_over:
                    _warn(f"passed over the checkpoint of step {other} in {self.folder}: {damages[other]}")
                return step
        if damages:
            named = "; ".join(f"of step {step}, {damage}" for step, damage in damages.items())
            raise Refused(
                f"None of the {len(damages)} checkpoints in {self.folder} can be used ({named}): put the files back, "
                "or begin anew in an empty --workdir."
            )
        return 0

    def choose(self, step: int) -> int:
        """Returns `step`, or the newest that verifies for -1. Raises: Refused, if it does not exist or is damaged."""
        steps = self.steps()
        if not steps:
            raise Refused(f"{self.folder} holds no checkpoint: train first, or give another --workdir.")
        if step == -1:
            return self.newest()
        if step not in steps:
            raise Refused(f"{self.folder} has no checkpoint of step {step}: it has {', '.join(map(str, steps))}.")
        if damage := self._damage(step):
            raise self._refusal(step, damage)
        return step

    def _damage(self, step: int) -> str:
        """The reason why a checkpoint is unusable, or an empty string. Each process reads its share; all agree.

        Raises: Refused, on all processes, for an error that says nothing about the content.
        """
        damage = unreadable = ""
        try:
            damage = verification.damage(self._at(step), step, jax.process_index(), jax.process_count())
        except manifest.Unreadable as error:
            unreadable = str(error)
        damages, unreadables = zip(*distributed.exchange([damage, unreadable]), strict=True)
        if reason := next(filter(None, unreadables), ""):
            raise Refused(
                f"The checkpoint of step {step} in {self.folder} may be whole, but {reason}: make it readable, or move "
                "it away."
            )
        return next(filter(None, damages), "")

    def verified(self) -> list[int]:
        """The steps that verify, ascending. Raises: Refused."""
        return [step for step in self.steps() if not self._damage(step)]

    def remove_after(self, step: int) -> list[int]:
        """Removes the checkpoints of later steps, the newest first; returns their steps. Raises: Refused."""
        later = [other for other in self.steps() if other > step]
        with distributed.together():
            if distributed.first():
                try:
                    for other in reversed(later):
                        retention.remove(self._at(other))
                except Exception as error:  # of whatever file system
                    raise Refused(
                        f"{self._at(other)} can't be removed ({files.reason(error)}): make it writable."
                    ) from error
        return later

    def manifest(self, step: int) -> dict:
        """Reads the whole manifest of a step. Raises: Refused."""
        with distributed.together():
            return self._manifest(step)

    def record(self, step: int) -> RunRecord:
        """Reads the record of the run in the manifest of a step. Raises: Refused."""
        with distributed.together():
            return record.read(self._manifest(step), step, f"{self.folder} (step {step})")

    def _manifest(self, step: int) -> dict:
        try:
            return manifest.read(self._at(step), step)
        except manifest.Damaged as damage:
            raise self._refusal(step, str(damage)) from damage

    def restore(self, step: int, state, cut: Sequence[str] = ()):
        """The state of a step, placed as the abstract `state` says, whatever mesh it was saved from.

        Args:
          state: a tree of `jax.ShapeDtypeStruct` with shardings; it may be a part of what was saved (only the model).
          cut: names of arrays that may be longer there than in `state`, which takes their beginning.

        Raises: Refused.
        """
        wanted = named_leaves(state)
        with distributed.together():
            self.check_shapes(step, wanted, cut)
            arrays = self._read(step, wanted, cut)
        return jax.tree.unflatten(jax.tree.structure(state), [arrays[name] for name in wanted])

    def array(self, step: int, name: str) -> np.ndarray:
        """One array of a step, on the host. Raises: Refused."""
        described = self._manifest(step)["arrays"][name]
        wanted = {name: jax.ShapeDtypeStruct(described["shape"], described["dtype"])}
        return self._read(step, wanted)[name]

    def _read(self, step: int, wanted: dict, cut: Sequence[str] = ()) -> dict:
        try:
            return self._arrays.read(self._at(step) / "state", wanted, cut)
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # orbax and TensorStore raise many kinds for damaged files
            raise self._refusal(step, f"its state can't be read ({files.reason(error)})") from error

    def check_shapes(self, step: int, wanted: dict, cut: Sequence[str] = ()) -> None:
        """Compares the arrays of a step with `wanted` by name and shape; those named in `cut` may be longer.

        Raises: Refused.
        """
        saved = self._manifest(step)["arrays"]
        for name in wanted.keys() & saved.keys() & set(cut):
            rows, row = saved[name]["shape"][:1], saved[name]["shape"][1:]
            saved[name] = saved[name] | {"shape": [*(min(n, wanted[name].shape[0]) for n in rows), *row]}
        for name, leaf in wanted.items():
            there = f"shape {tuple(saved[name]['shape'])}" if name in saved else "no such array"
            if there != f"shape {leaf.shape}":
                raise Refused(
                    f"The checkpoint of step {step} in {self.folder} has {there} for {name}, and this config "
                    f"has {leaf.shape}: use the config of that run."
                )

    def _refusal(self, step: int, damage: str) -> Refused:
        return Refused(f"The checkpoint of step {step} in {self.folder} can't be used, {damage}: use another step.")

    # Writing

    def save(
        self, step: int, state, run: RunRecord, losses: Mapping[int, float] = MappingProxyType({}), rotate: bool = True
    ) -> None:
        """Copies the state off the devices and writes it in the background, once the save before it has ended.

        Renames whatever occupies the target folder: a skipped damaged checkpoint, or an existing one of this step. A
        failed save leaves the earlier checkpoints untouched; see `failed` and `insist`.

        Args:
          step: completed updates.
          state: the state to save.
          run: the record of the run, for the manifest.
          losses: held-out losses by step; the checkpoint with the lowest always stays.
          rotate: whether to remove the checkpoints that the config does not keep.
        """
        began = time.perf_counter()
        self.wait()
        self._count += 1
        saving = Save(self.folder, step, f"save-{self._count}", began)
        saving.failure = distributed.shared(functools.partial(self._make_room, step))
        leaves = named_leaves(state)
        # The copy runs beside this thread; the next step, which takes these buffers, waits for the copy.
        hosted = {name: leaf.sharding.with_memory_kind("pinned_host") for name, leaf in leaves.items()}
        # Offloaded moments lie in host memory already; without a copy, the step would delete the arrays being saved.
        copies = {} if saving.failure else jax.device_put(leaves, hosted, may_alias=False)
        content = {"format": manifest.FORMAT, "step": step, "cursor": step, "saved_at": int(time.time())}
        content |= (
            {"versions": manifest.VERSIONS}
            | run.to_json()
            | {"arrays": {name: _described(leaf) for name, leaf in leaves.items()}}
        )
        self._look_at = step + 2**self._failures
        self._saving = saving
        folder = self._at(step) / "state"
        saving.begin(
            lambda: self._arrays.write(folder, copies),  # called in the thread of the save, which imports orbax
            lambda: self._arrays.finalize(folder),
            content,
            self._config,
            dict(losses),
            rotate,
        )

    def _make_room(self, step: int) -> str:
        """Makes an empty folder for a step. Returns the reason if that fails, or an empty string."""
        folder = self._at(step)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            steps, left = retention.found(self.folder)
            for path in left:
                retention.remove(path)
            in_the_way = {step: "replaced"} | dict.fromkeys(self._passed_over, "damaged")
            for other in in_the_way.keys() & set(steps):
                moved = retention.put_aside(self.folder, other, in_the_way[other])
                _warn(f"moved the checkpoint of step {other} aside, to {moved}")
            self._passed_over = []
            folder.mkdir()
            (folder / retention.UNFINISHED).touch()
            # Otherwise, if process 0 failed, the others would wait ten minutes for orbax to make this folder.
            (folder / "state" / "array_metadatas").mkdir(parents=True)
        except Exception as error:  # gcsfs and google-auth raise errors that are not OSError
            return files.reason(error)
        return ""

    def failed(self, step: int) -> bool:
        """Whether the latest save is known to have failed, so that the state of `step` should be saved instead.

        Every process asks after every step. They look 1, 2, 4, 8, … steps after the save began until it has ended;
        each failure in a row doubles the wait before the first look.
        """
        if self._saving is None or step < self._look_at:
            return False
        self._look_at = step + max(1, step - self._saving.step)
        if not any(distributed.exchange(self._saving.is_alive())):
            self.wait()
        return self._saving is None and self._failures > 0

    def wait(self) -> None:
        """Waits until the latest save has ended on every process, on disk or with a warning."""
        if self._saving is not None:
            self._saving.join()
            self._conclude(self._saving, distributed.exchange(self._saving.failure))
            distributed.forget(f"save-{self._count}")

    def _conclude(self, saving: Save, failures: list[str]) -> None:
        self._saving = None
        failure = next(filter(None, failures), "")
        self._failures = self._failures + 1 if failure else 0
        if failure:
            _warn(
                f"the checkpoint of step {saving.step} was not saved in {self.folder}: {failure}; those before it stay"
            )
        else:
            self._saved.append(saving)

    def saved(self) -> list[Save]:
        """The saves that reached the disk since the last call."""
        saved, self._saved = self._saved, []
        return saved

    def insist(
        self, step: int, state, run: RunRecord, losses: Mapping[int, float] = MappingProxyType({}), rotate: bool = True
    ) -> None:
        """Waits until the latest save is on disk; a failed save is repeated after 1, 2 and 4 seconds.

        Raises: Failed.
        """
        self.wait()
        for seconds in (1, 2, 4):
            if self._failures:
                time.sleep(seconds)
                self.save(step, state, run, losses, rotate)
                self.wait()
        if self._failures:
            raise Failed(
                f"The state of step {step} could not be saved in {self.folder}, as the warnings say: make room there, "
                "and run the same command again to go on from the last checkpoint."
            )


def _described(array: jax.Array) -> dict:
    return {"shape": list(array.shape), "dtype": str(array.dtype), "bytes": array.nbytes}


def _warn(text: str) -> None:
    if distributed.first():
        print(f"gptjax: warning: {text}", file=sys.stderr, flush=True)
