"""Verify a checkpoint: the content of its files, and that each of its arrays can be opened for a restore."""

from etils import epath

from gptjax.checkpoints import chunked, manifest
from gptjax.runtime.files import reason


def damage(checkpoint: epath.Path, step: int, share: int = 0, shares: int = 1) -> str:
    """The reason why a checkpoint can't be restored, or an empty string: reads a share of the files and arrays.

    The files are compared with the manifest, and each array of the manifest is opened, without reading the values.

    Raises: manifest.Unreadable, for an error that says nothing about the content.
    """
    try:
        content = manifest.verify(checkpoint, step, share, shares)
        for name, described in sorted(content["arrays"].items())[share::shares]:
            try:
                array = chunked.opened(checkpoint / "state", name)
                found = [list(array.shape), array.dtype.name]
            except ValueError as error:
                raise manifest.Damaged(f"its array {name} can't be opened ({reason(error)})") from error
            if found != [described["shape"], described["dtype"]]:
                raise manifest.Damaged(
                    f"its array {name} has shape {found[0]} and dtype {found[1]}, and the manifest says "
                    f"{described['shape']} and {described['dtype']}"
                )
    except manifest.Unreadable:
        raise
    except manifest.Damaged as found:
        return str(found)
    return ""
