"""Save and restore the state and what belongs to it; the only importer of orbax.

A checkpoint is named by its step, the number of completed updates, which is also the cursor of the data: the stream is
a function of the step. It holds two items: `state`, one array a leaf, named as in the tree (`model.blocks.query`), and
`run`, a JSON object with the resolved config, the tokenizer, the hashes of tokenizer and text, and the versions.
"""

import dataclasses
import json
import logging
from importlib import metadata

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from gptjax import __version__, hosts
from gptjax.errors import Refused

# Orbax warns of what is no fault, as of the save that a kill interrupted; its errors are exceptions.
logging.getLogger("absl").setLevel(logging.ERROR)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoints stay."""

    keep: int = 2  # the newest so many
    keep_every: int = 0  # and each at a multiple of this step, for good; 0: no others


def named_leaves(tree) -> dict:
    """A tree's leaves by path: {"model.blocks.query": leaf, …}."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf for path, leaf in leaves
    }


def placed(shapes, mesh: jax.sharding.Mesh):
    """Of an abstract tree: the same on the devices of `mesh`; a leaf without a sharding is whole on each."""

    def put(leaf):
        spec = leaf.sharding.spec if leaf.sharding is not None else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(put, shapes)


class Checkpoints:
    """The checkpoints of a workdir. A context manager: leaving it waits for the last save."""

    def __init__(self, folder: epath.PathLike, config: CheckpointConfig = CheckpointConfig(), owner: bool = False):
        """`owner`: the run that writes here, which clears away what an earlier one was killed in the midst of."""
        folder = epath.Path(folder)
        self.folder = folder if "://" in str(folder) else folder.resolve()  # orbax takes no relative path
        self._config, self._owner = config, owner
        self._manager = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self._manager is not None:
            self._manager.close()

    def _open(self) -> ocp.CheckpointManager:
        # Made late, because making it makes the folder.
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._config.keep, keep_period=self._config.keep_every or None, step_prefix="step",
                step_format_fixed_length=8, cleanup_tmp_directories=self._owner,
            )  # fmt: skip
            handlers = {"state": ocp.PyTreeCheckpointHandler(), "run": ocp.JsonCheckpointHandler()}
            self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)
        return self._manager

    def steps(self) -> list[int]:
        """Steps that were saved whole, ascending."""
        # All processes open it, or none: they wait for each other as they do.
        return sorted(self._open().all_steps()) if hosts.shared(self.folder.exists) else []

    def choose(self, step: int) -> int:
        """`step`, or the newest for -1. Raises: Refused, where there is none."""
        steps = self.steps()
        if not steps:
            raise Refused(f"{self.folder} holds no checkpoint: train first, or give another --workdir.")
        if step == -1:
            return steps[-1]
        if step not in steps:
            raise Refused(f"{self.folder} has no checkpoint of step {step}: it has {', '.join(map(str, steps))}.")
        return step

    def save(self, step: int, state, run: dict) -> None:
        """Copies the state off the devices and writes it in the background."""
        versions = {"gptjax": __version__} | {name: metadata.version(name) for name in ("jax", "orbax-checkpoint")}
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(named_leaves(state)),
            run=ocp.args.JsonSave(run | {"step": step, "versions": versions}),
        )
        self._open().save(step, args=items)

    def run(self, step: int) -> dict:
        """What was saved beside the state, as `train.train` and `save` put it together."""
        try:
            return self._open().restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
        except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
            raise self._damaged(step, error) from error

    def restore(self, step: int, state):
        """The state of a step, placed as the abstract `state` says, whatever mesh it was saved from.

        Args:
          state: a tree of `jax.ShapeDtypeStruct` with shardings; it may be a part of what was saved (only the model).
        """
        wanted = named_leaves(state)
        try:
            described = self._open().item_metadata(step)["state"]
            if described is None:
                raise ValueError("state/_METADATA is missing")
            self._check_shapes(step, described.tree, wanted)
            restore_args = jax.tree.map(
                lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype),
                wanted,
            )
            arrays = self._open().restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args, partial_restore=True)
                ),
            )["state"]
        except (Refused, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # orbax and TensorStore raise many kinds for damaged files
            raise self._damaged(step, error) from error
        return jax.tree.unflatten(jax.tree.structure(state), [arrays[name] for name in wanted])

    def _check_shapes(self, step: int, saved: dict, wanted: dict) -> None:
        for name, leaf in wanted.items():
            there = f"shape {tuple(saved[name].shape)}" if name in saved else "no such array"
            if there != f"shape {leaf.shape}":
                raise Refused(
                    f"The checkpoint of step {step} in {self.folder} has {there} for {name}, and this config "
                    f"has {leaf.shape}: use the config of that run."
                )

    def _damaged(self, step: int, error: Exception) -> Refused:
        reason = " ".join(str(error).partition("See full TensorStore details")[0].split())[:200]
        earlier = [other for other in sorted(self._open().all_steps()) if other < step]
        remedy = (f"move {self.folder}/step_{step:08} away to go on from step {earlier[-1]}" if earlier else
                  "there is no earlier one, so begin anew in another --workdir")  # fmt: skip
        return Refused(
            f"The checkpoint of step {step} in {self.folder} can't be read ({type(error).__name__}: {reason})"
            f": {remedy}."
        )

    def wait(self) -> None:
        """Returns when everything that was saved is on disk. Raises what a save in the background raised."""
        if self._manager is not None:
            self._manager.wait_until_finished()
