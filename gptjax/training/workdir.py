"""The files of a run's workdir, and the checks before a run starts in it."""

import sys

import jax
from etils import epath

from gptjax.checkpoints import retention
from gptjax.errors import Refused, nearest, shown
from gptjax.parallel.xla import options
from gptjax.runtime import distributed, files, untrusted
from gptjax.runtime.files import check_writable, write_whole
from gptjax.training import resume_point
from gptjax.training.config import resume, schema
from gptjax.training.config.schema import Config
from gptjax.training.monitoring import records

CONVERTED = 0  # the step of a converted model's checkpoint, which no run saved


def check(config: Config, folder: epath.Path, mesh: jax.sharding.Mesh) -> None:
    """Checks everything that can be checked before the first write. Raises: Refused."""
    schema.check_batch(config, mesh)
    options.check(config.compiler_options, mesh.devices.flat[0].platform)
    if "://" not in str(folder):
        check_writable(folder)
    if retention.at(folder / "checkpoints", CONVERTED).exists():
        raise Refused(
            f"{folder} holds a converted model, which has weights alone and cannot resume: begin a run in another "
            f"--workdir with --config.init_from={folder}."
        )
    if (folder / "config.json").exists():
        resume_point.check_same_run(config, read_config(folder), folder)
    elif (folder / "checkpoints").exists():
        raise Refused(
            f"{folder} has checkpoints but no config.json, so their run is unknown: put config.json back, or give an "
            "empty --workdir."
        )


def as_begun(config: Config, folder: epath.Path) -> Config:
    """The config with which the run in the workdir goes on; the config itself for a new run. Raises: Refused."""
    return resume.as_begun(read_config(folder), config) if (folder / "config.json").exists() else config


def check_empty(folder: epath.Path) -> None:
    """Raises: Refused, if the folder holds a run or anything else."""
    inside = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if inside:
        raise Refused(
            f"--fresh begins a run in an empty --workdir, and {folder} holds {', '.join(inside[:3])}"
            f"{', …' * (len(inside) > 3)}: give another --workdir, or go on without --fresh."
        )


def check_never_saved(rows: list[dict], folder: epath.Path) -> None:
    """Checks that a run without checkpoints has lost none.

    Args:
      rows: the rows of metrics.jsonl.
      folder: the workdir.

    Raises: Refused.
    """
    saved = [row["step"] for row in rows if "save_seconds" in row]
    if saved:
        raise Refused(
            f"{folder / 'checkpoints'} holds no checkpoint, but metrics.jsonl says that this run saved step "
            f"{max(saved)}: put the checkpoints back, or begin anew in an empty --workdir."
        )


def read_config(folder: epath.Path) -> dict:
    """Reads config.json, the resolved config of the latest start. Raises: Refused."""
    path = folder / "config.json"
    if not path.exists():
        known = files.listed(folder.parent)
        raise Refused(
            f"{path} does not exist: {folder} is not the workdir of a run."
            f"{nearest(folder.name, [p.name for p in known if p.name != folder.name])}"
        )
    remedy = "put back the file that the run wrote"
    config = untrusted.read_json(path, schema.MAX_JSON_BYTES, remedy)
    for key, value in files.flatten(config).items():
        if type(value) not in (bool, int, float, str):
            raise Refused(f"{path} is damaged ({shown(key)} is {shown(value)}): {remedy}.")
    return config


def write_config(config: Config, folder: epath.Path) -> None:
    """Writes config.json, once nothing more can refuse the run."""
    write_whole(folder / "config.json", schema.to_json(config).encode())
    (folder / "samples.txt").unlink(missing_ok=True)  # they describe the end of a run that now goes on


def losses(folder: epath.Path) -> dict[int, float]:
    """The held-out losses in metrics.jsonl by step; the same on all processes. Raises: Refused."""
    with distributed.together():
        rows = read_rows(folder) if distributed.first() else []
    return dict(distributed.shared(lambda: [*records.evaluations(rows).items()]))


def read_rows(folder: epath.Path, until: int = sys.maxsize) -> list[dict]:
    """Reads the rows of metrics.jsonl up to a step. Raises: Refused."""
    path = folder / "metrics.jsonl"
    try:
        return records.rows_until(path, until)
    except Exception as error:  # gcsfs and google-auth raise errors that are not OSError
        raise Refused(f"{path} can't be read ({files.reason(error)}): run the command again once it can.") from error
