"""Write and read the arrays of a checkpoint; the only importer of orbax.

Importing orbax takes a fifth of a second, so manager.py imports this file with the first save or restore, and a new run
reaches its first step without it.

Orbax's handler writes and reads the arrays. What orbax has around it is not used: there a host that can't write lets
the others wait twenty minutes and then fail one by one, and here all of them know of it and go on together.
"""

import asyncio
import logging
import os
import sys
import tempfile
from collections.abc import Collection
from typing import cast

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from gptjax.checkpoints import retention

# Orbax warns without need, and logs the errors that it raises; asyncio logs those of writes that orbax dropped.
for name in ("absl", "asyncio"):
    logging.getLogger(name).setLevel(logging.CRITICAL)


def _unraisable(found, show=sys.unraisablehook) -> None:
    # A dropped write that ends finds a closed event loop.
    if str(found.exc_value) != "Event loop is closed":
        show(found)


sys.unraisablehook = _unraisable


class Arrays:
    """Writes and reads the folders `state` of checkpoints: one array a leaf."""

    def __init__(self, checkpoints: epath.Path):
        # Compression would save 8 % of disk for 250 MB of memory.
        self._handler = ocp.PyTreeCheckpointHandler(use_compression=False)
        self._checkpoints = self._plain = checkpoints
        if retention.PATTERN.search(str(checkpoints)):
            # Orbax merges by a glob over the whole path, so it gets one without pattern signs: a link, while we live.
            self._link = tempfile.TemporaryDirectory(prefix="gptjax-", dir=_plain_folder())
            self._plain = epath.Path(self._link.name) / "checkpoints"
            os.symlink(checkpoints, self._plain)

    def _at(self, folder: epath.Path) -> epath.Path:
        return self._plain / folder.relative_to(self._checkpoints)

    def write(self, folder: epath.Path, copies: dict[str, jax.Array]) -> list:
        """Begins to write arrays by name; returns the futures to wait for."""
        futures = asyncio.run(self._handler.async_save(self._at(folder), args=ocp.args.PyTreeSave(copies)))
        return cast(list, futures)  # orbax declares an optional list, and always returns a list

    def finalize(self, folder: epath.Path) -> None:
        """Joins what the processes wrote, after the futures of all of them have ended."""
        self._handler.finalize(self._at(folder))

    def read(self, folder: epath.Path, wanted: dict[str, jax.ShapeDtypeStruct], cut: Collection[str] = ()) -> dict:
        """Reads arrays as `wanted` places them; those without a sharding as NumPy arrays.

        Args:
          folder: the folder `state`.
          wanted: shapes, dtypes and shardings by name.
          cut: names of arrays that may be longer in the folder; their beginning is read.
        """
        args = {name: _restore_args(leaf, name in cut) for name, leaf in wanted.items()}
        return self._handler.restore(
            self._at(folder), args=ocp.args.PyTreeRestore(item=wanted, restore_args=args, partial_restore=True)
        )


def _plain_folder() -> str:
    """A folder for temporary files whose path orbax takes for no pattern."""
    folders = [tempfile.gettempdir(), "/tmp", "/dev/shm"]
    return next(path for path in folders if os.access(path, os.W_OK) and not retention.PATTERN.search(path))


def _restore_args(leaf: jax.ShapeDtypeStruct, cut: bool) -> ocp.RestoreArgs:
    if leaf.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    # Without `strict`, orbax cuts arrays or fills them up with zeros.
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype, strict=not cut)
