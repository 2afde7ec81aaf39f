"""Who works in a workdir: one run at a time, and nobody removes checkpoints beside it.

On a disk the lock is the kernel's, on owner.json: it ends with the process, however that ends. A bucket has no locks:
there an owner is alive as long as its beats (hosts/0.json) go on. A preparation writes none, so there it is not seen.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time

from etils import epath

from gptjax.errors import Refused
from gptjax.runtime import files, untrusted

SILENT_SECONDS = 30  # on a bucket: an owner that writes no beat for so long is gone; three beats and more
SETTLE_SECONDS = 2.0  # without locks: after it, of two that start together, only who wrote last finds its own name


@contextlib.contextmanager
def locked(folder: epath.Path, state: str, remedy: str):
    """A block in which this process alone works in `folder`, which is made if need be, and goes where it stays empty.

    Args:
      state, remedy: of the sentence that refuses another: `FOLDER state host NAME, process N: remedy.`

    Raises: Refused.
    """
    # A bucket keeps no empty folders, and the last of its parents is the list of all buckets.
    new = [] if "://" in str(folder) else [path for path in (folder, *folder.parents) if not path.exists()]
    lock = _lock(folder, state, remedy)
    try:
        yield
    finally:
        with contextlib.suppress(Exception):  # the lock goes with the process; a full or lost disk is told elsewhere
            (folder / "owner.json").unlink(missing_ok=True)
            for path in new:  # of one that was refused before it wrote
                if path.exists() and not any(path.iterdir()):
                    path.rmdir()
        if lock is not None:
            os.close(lock)


def _lock(folder: epath.Path, state: str, remedy: str) -> int | None:
    """Writes owner.json; returns the open file that holds the kernel's lock, if there is one. Raises: Refused."""
    path, me = folder / "owner.json", {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = None if "://" in str(folder) else _flock(path)
        if lock is None and path.exists() and beating(folder):
            raise BlockingIOError
        try:
            path.write_text(json.dumps(me))
        except Exception:  # a full disk: nothing is held by who goes no further
            path.unlink(missing_ok=True)
            if lock is not None:
                os.close(lock)
            raise
        if lock is None:
            time.sleep(SETTLE_SECONDS)
            if _read(path) != me:
                raise BlockingIOError
        return lock
    except BlockingIOError:
        other = _read(path)
        host, process = other.get("host", "unknown"), other.get("pid", "unknown")
        raise Refused(f"{folder} {state} host {host}, process {process}: {remedy}.") from None
    except Exception as error:  # those of gcsfs and google-auth are no OSError
        raise Refused(
            f"{path} can't be written ({files.reason(error)}): make it writable, or give another folder."
        ) from error


def _flock(path: epath.Path) -> int | None:
    """The file, open and locked; None on a disk without locks. Raises: BlockingIOError, where another has it."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The one before may have removed the file between our two calls.
            if path.exists() and os.fstat(lock).st_ino == os.stat(path).st_ino:
                return lock
        except OSError as error:
            os.close(lock)
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                return None
            raise
        os.close(lock)


def beating(folder: epath.Path, seconds: float = SILENT_SECONDS) -> bool:
    """Whether the beats of a run in `folder` go on; it watches them for so many seconds."""
    beat = folder / "hosts" / "0.json"
    before = beat.read_bytes() if beat.exists() else b""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(min(1, seconds / 10))
        if (beat.read_bytes() if beat.exists() else b"") != before:
            return True
    return False


def _read(path: epath.Path) -> dict:
    with contextlib.suppress(Refused):
        return untrusted.read_json(path, 1 << 16, "it is not needed")
    return {}
