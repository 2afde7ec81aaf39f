"""Save, verify and restore the state and what belongs to it; the only importer of orbax.

A checkpoint is named by its step, the number of completed updates, which is also the cursor of the data: the stream is
a function of the step. It is a folder of `state`, one array a leaf, named as in the tree (`model.blocks.query`), and
`manifest.json`, written last: the hash of every file, and what the run says of itself (config, tokenizer).

Orbax's handler writes and reads the arrays. What orbax has around it is not used: there a host that can't write lets
the others wait twenty minutes and then fail one by one, and here all of them know of it and go on together.
"""

import asyncio
import dataclasses
import functools
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from types import MappingProxyType

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from gptjax import __version__
from gptjax.checkpoints import manifest, record, retention
from gptjax.checkpoints.async_save import Save
from gptjax.checkpoints.record import RunRecord
from gptjax.errors import Failed, Refused
from gptjax.parallel.trees import named_leaves
from gptjax.runtime import distributed, files

VERSIONS = {"gptjax": __version__} | {name: metadata.version(name) for name in ("jax", "orbax-checkpoint")}

# Orbax warns of what is no fault, and logs the errors that it raises; asyncio those of the writes that orbax dropped.
for name in ("absl", "asyncio"):
    logging.getLogger(name).setLevel(logging.CRITICAL)


def _unraisable(found, show=sys.unraisablehook) -> None:
    # Such a write, at its end, finds nobody to tell.
    if str(found.exc_value) != "Event loop is closed":
        show(found)


sys.unraisablehook = _unraisable


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoints stay."""

    keep: int = 2  # the newest so many
    keep_every: int = 0  # and each at a multiple of this step, for good; 0: no others
    write_seconds: int = 1800  # a save that takes longer to write has failed: storage that is lost may never answer


class Checkpoints:
    """The checkpoints of a workdir. A context manager: leaving it waits for the last save."""

    def __init__(self, folder: epath.PathLike, config: CheckpointConfig = CheckpointConfig()):
        folder = epath.Path(folder)
        self.folder = folder if "://" in str(folder) else folder.resolve()  # TensorStore takes no relative path
        self._config = config
        self._passed_over = []  # steps of the damaged ones above the one that is gone on from
        self._saving: Save | None = None  # the last one, until it is known how it ended
        self._count, self._saved = 0, []
        self._failures, self._look_at = 0, 0  # in a row; the step after which to see how it ended

    def __enter__(self):
        return self

    def __exit__(self, *error):
        # Each process for itself: where one of them raises, the others may not come to an exchange.
        if self._saving is not None:
            self._saving.join()
            self._conclude([self._saving.failure])

    @functools.cached_property
    def _handler(self) -> ocp.PyTreeCheckpointHandler:
        # Late, since it asks for the devices. To compress weights saves 8 % of the disk, and costs 250 MB of memory.
        return ocp.PyTreeCheckpointHandler(use_compression=False)

    def _at(self, step: int) -> epath.Path:
        return retention.at(self.folder, step)

    # Reading

    def steps(self) -> list[int]:
        """Steps that were saved, ascending, whole or damaged since; the same on all processes."""
        found = []
        with distributed.together():
            if distributed.first():
                found, _ = retention.found(self.folder)
        return distributed.shared(lambda: found)

    def newest(self) -> int:
        """The newest step that verifies; 0 where nothing was saved. Newer ones that do not are named, and kept.

        Raises: Refused, where there are checkpoints and none of them verifies.
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
                f"None of the {len(damages)} checkpoints in {self.folder} can be used ({named}): put the files back, or "
                "begin anew in an empty --workdir."
            )
        return 0

    def choose(self, step: int) -> int:
        """`step`, or the newest that verifies for -1. Raises: Refused, where there is none."""
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
        """Why a checkpoint can't be used, or an empty string; each process reads its share, and all agree."""
        try:
            manifest.verify(self._at(step), step, jax.process_index(), jax.process_count())
            damage = ""
        except manifest.Damaged as error:
            damage = str(error)
        return next(filter(None, distributed.exchange(damage)), "")

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
        # Orbax cuts, and fills up with zeros, where it is not strict.
        restore_args = {
            name: ocp.ArrayRestoreArgs(
                sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype, strict=name not in cut
            )
            for name, leaf in wanted.items()
        }
        with distributed.together():
            self.check_shapes(step, wanted, cut)
            arrays = self._read(step, wanted, restore_args)
        return jax.tree.unflatten(jax.tree.structure(state), [arrays[name] for name in wanted])

    def array(self, step: int, name: str) -> np.ndarray:
        """One array of a step, on the host. Raises: Refused."""
        described = self._manifest(step)["arrays"][name]
        wanted = {name: jax.ShapeDtypeStruct(described["shape"], described["dtype"])}
        return self._read(step, wanted, {name: ocp.RestoreArgs(restore_type=np.ndarray)})[name]

    def _read(self, step: int, wanted: dict, restore_args: dict) -> dict:
        args = ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args, partial_restore=True)
        try:
            return self._handler.restore(self._at(step) / "state", args=args)
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # orbax and TensorStore raise many kinds for damaged files
            raise self._refusal(step, f"its state can't be read ({files.reason(error)})") from error

    def check_shapes(self, step: int, wanted: dict, cut: Sequence[str] = ()) -> None:
        """The arrays of a step are those of `wanted`, by their names and shapes, or begin with them where their names are
        among `cut`. Raises: Refused."""
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

        What is in the way of it is renamed: damaged checkpoints that were passed over, or one of this step. A save that
        fails leaves those before it as they are; see `failed` and `insist`.

        Args:
          run: the record of the run, for the manifest. losses: on held-out text, by step; the checkpoint with the
            lowest stays, whatever the config says. rotate: whether those go that the config does not keep.
        """
        began = time.perf_counter()
        self.wait()
        self._count += 1
        saving = Save(self.folder, step, f"save-{self._count}", began)
        saving.failure = distributed.shared(functools.partial(self._make_room, step))
        leaves = named_leaves(state)
        # The copy runs beside this thread, and the step that is given these buffers next waits for it.
        hosted = {name: leaf.sharding.with_memory_kind("pinned_host") for name, leaf in leaves.items()}
        # Moments that wait in host memory are there already, and would be the very arrays that it deletes.
        copies = {} if saving.failure else jax.device_put(leaves, hosted, may_alias=False)
        content = {"format": manifest.FORMAT, "step": step, "cursor": step, "saved_at": int(time.time())}
        content |= {"versions": VERSIONS} | run.to_json() | {"arrays": {name: _described(leaf) for name, leaf in leaves.items()}}
        self._look_at = step + 2**self._failures
        self._saving = saving
        folder = self._at(step) / "state"
        saving.begin(
            functools.partial(self._write, folder, copies),
            functools.partial(self._handler.finalize, folder),
            content,
            self._config,
            dict(losses),
            rotate,
        )

    def _write(self, folder: epath.Path, copies: dict) -> list:
        """Begins to write arrays; returns what to wait for."""
        return asyncio.run(self._handler.async_save(folder, args=ocp.args.PyTreeSave(copies)))

    def _make_room(self, step: int) -> str:
        """An empty folder for a step. Returns why there is none, or an empty string."""
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
            # The other processes would wait ten minutes for orbax to make it here, should process 0 fail before.
            (folder / "state" / "array_metadatas").mkdir(parents=True)
        except Exception as error:  # those of gcsfs and google-auth are no OSError
            return files.reason(error)
        return ""

    def failed(self, step: int) -> bool:
        """Whether the last save is known to have failed, so that the state of `step` is to be saved instead.

        Every process asks after every step. They look 1, 2, 4, 8, … steps after the save began until it has ended, and
        for the first time so much the later as saves have failed in a row.
        """
        if self._saving is None or step < self._look_at:
            return False
        self._look_at = step + max(1, step - self._saving.step)
        if not any(distributed.exchange(self._saving.is_alive())):
            self.wait()
        return self._saving is None and self._failures > 0

    def wait(self) -> None:
        """Returns when the last save has ended on every process, on disk or in a warning."""
        if self._saving is not None:
            self._saving.join()
            self._conclude(distributed.exchange(self._saving.failure))
            distributed.forget(f"save-{self._count}")

    def _conclude(self, failures: list[str]) -> None:
        saving, self._saving = self._saving, None
        failure = next(filter(None, failures), "")
        self._failures = self._failures + 1 if failure else 0
        if failure:
            _warn(
                f"the checkpoint of step {saving.step} was not saved in {self.folder}: {failure}; those before it stay"
            )
        else:
            self._saved.append(saving)

    def saved(self) -> list[Save]:
        """The saves that are known to be on disk since the last call."""
        saved, self._saved = self._saved, []
        return saved

    def insist(
        self, step: int, state, run: RunRecord, losses: Mapping[int, float] = MappingProxyType({}), rotate: bool = True
    ) -> None:
        """Returns when the last save is on disk; where it failed, it is tried again 1, 2 and 4 seconds later.

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
                f"The state of step {step} could not be saved in {self.folder}, as the warnings say: make room there, and "
                "run the same command again to go on from the last checkpoint."
            )


def _described(array: jax.Array) -> dict:
    return {"shape": list(array.shape), "dtype": str(array.dtype), "bytes": array.nbytes}


def _warn(text: str) -> None:
    if distributed.first():
        print(f"gptjax: warning: {text}", file=sys.stderr, flush=True)
