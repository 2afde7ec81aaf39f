"""Ships the files that git tracks, in the state of the working tree."""

import pathlib
import subprocess
import tarfile

from gptjax.errors import Refused
from launch.gcloud import say

ROOT = pathlib.Path(__file__).resolve().parent.parent


def git(*words: str) -> str:
    """Returns the stdout of a git command in the repository. Raises: Refused."""
    try:
        return subprocess.run(["git", "-C", str(ROOT), *words], check=True, capture_output=True, text=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        raise Refused(
            f"git can't read {ROOT}, and only what it tracks is shipped: install git, clone, commit."
        ) from None


def tracked() -> list[str]:
    """Returns the names of the existing files that git tracks. Raises: Refused."""
    return [name for name in git("ls-files", "-z").split("\0") if (ROOT / name).is_file()]


def pack(folder: str) -> str:
    """Writes the tarball into a folder. Returns its path. Raises: Refused."""
    path = f"{folder}/gptjax.tar.gz"
    names = tracked()
    with tarfile.open(path, "w:gz") as tarball:
        for name in names:
            tarball.add(ROOT / name, name)
    changed = len(git("status", "--porcelain", "--untracked-files=no").splitlines())
    say(f"packed {len(names)} files of commit {git('rev-parse', '--short', 'HEAD').strip()}, {changed} changed since")
    return path
