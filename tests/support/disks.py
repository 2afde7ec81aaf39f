"""A disk that is full."""

import contextlib
import os


def filled(disk, left=0):
    """A file that leaves so many bytes of a disk."""
    path = disk / "ballast"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as ballast:
        while ballast.write(bytes(4096)) == 4096:
            pass
    os.truncate(path, path.stat().st_size - left)
    return path
