"""Locks a workdir: one run at a time, and nobody removes checkpoints beside a run.

On a disk the kernel locks owner.json; that lock ends with the process, even after a kill. A bucket has no locks: an
owner there counts as alive while beats (hosts/0.json) keep coming. A preparation writes no beats, so a second
preparation on a bucket is not detected.
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

SILENT_SECONDS = 30  # on a bucket an owner without a beat for so long, at least three beats, counts as gone
SETTLE_SECONDS = 2.0  # without locks: of two runs that start together, only the last writer then reads its own name


@contextlib.contextmanager
def locked(folder: epath.Path, state: str, remedy: str):
    """Context manager in which this process alone works in `folder`, created if missing and removed if left empty.

    Args:
      folder: the folder to lock.
      state: first part of the refusal, which reads `FOLDER state host NAME, process N: remedy.`
      remedy: last part of the refusal.

    Raises: Refused, if another process holds the lock.
    """
    # A bucket keeps no empty folders, and the topmost parent is the list of all buckets.
    new = [] if "://" in str(folder) else [path for path in (folder, *folder.parents) if not path.exists()]
    lock = _lock(folder, state, remedy)
    try:
        yield
    finally:
        with contextlib.suppress(Exception):  # the lock ends with the process; other code reports a full or lost disk
            (folder / "owner.json").unlink(missing_ok=True)
            for path in new:  # a run refused before the first write leaves no folder
                if path.exists() and not any(path.iterdir()):
                    path.rmdir()
        if lock is not None:
            os.close(lock)


def _lock(folder: epath.Path, state: str, remedy: str) -> int | None:
    """Writes owner.json; returns the open file that holds the kernel's lock, or None without locks. Raises: Refused."""
    path, me = folder / "owner.json", {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = None if "://" in str(folder) else _flock(path)
        if lock is None and path.exists() and beating(folder):
            raise BlockingIOError
        try:
            path.write_text(json.dumps(me))
        except Exception:  # a full disk: release the lock before failing
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
    except Exception as error:  # errors of gcsfs and google-auth are not OSError
        raise Refused(
            f"{path} can't be written ({files.reason(error)}): make it writable, or give another folder."
        ) from error


def _flock(path: epath.Path) -> int | None:
    """Opens and locks the file; None on a disk without locks. Raises: BlockingIOError, if another process holds it."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The previous owner may have removed the file between the two calls.
            if path.exists() and os.fstat(lock).st_ino == os.stat(path).st_ino:
                return lock
        except OSError as error:
            os.close(lock)
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                return None
            raise
        os.close(lock)


def beating(folder: epath.Path, seconds: float = SILENT_SECONDS) -> bool:
    """Watches a run's beats in `folder` for so many seconds, and says whether a new beat came."""
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
        return untrusted.read_json(path, 1 << 16, "the file is not needed")
    return {}
