"""A workdir: what belongs to one run, and what must hold before a run goes on in it."""

import sys

import jax
from etils import epath

from gptjax.checkpoints import retention
from gptjax.errors import Refused, nearest, shown
from gptjax.models.build import check_divides
from gptjax.parallel.xla import options
from gptjax.runtime import distributed, files, untrusted
from gptjax.runtime.files import check_writable, write_whole
from gptjax.tokenizers import tokenizer
from gptjax.training.config import resume, schema
from gptjax.training.config.schema import Config
from gptjax.training.monitoring import records

MAX_CONFIG_BYTES = 1 << 20
CONVERTED = 0  # the step of a checkpoint that no run has saved


def check(config: Config, folder: epath.Path, mesh: jax.sharding.Mesh) -> None:
    """What can be refused before anything is written. Raises: Refused."""
    schema.check_batch(config, mesh)
    check_divides(config.model, tokenizer.expected_vocab_size(config.tokenizer), config.seq_len, mesh)
    options.check(config.compiler_options, mesh.devices.flat[0].platform)
    if "://" not in str(folder):
        check_writable(folder)
    if retention.at(folder / "checkpoints", CONVERTED).exists():
        raise Refused(
            f"{folder} holds a converted model, weights alone, and no run to go on with: begin one in another --workdir "
            f"with --config.init_from={folder}."
        )
    if (folder / "config.json").exists():
        check_same_run(config, read_config(folder), folder)
    elif (folder / "checkpoints").exists():
        raise Refused(
            f"{folder} has checkpoints but no config.json, so nothing says what run they are of: put it back, "
            "or give an empty --workdir."
        )


def check_empty(folder: epath.Path) -> None:
    """Raises: Refused, where a run has begun in a folder, or anything else is in it."""
    inside = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if inside:
        raise Refused(
            f"--fresh begins a run in an empty --workdir, and {folder} holds {', '.join(inside[:3])}"
            f"{', …' * (len(inside) > 3)}: give another --workdir, or go on without --fresh."
        )


def check_never_saved(folder: epath.Path) -> None:
    """A run without a checkpoint has begun just now, and not lost those that it had. Raises: Refused."""
    saved = [row["step"] for row in _rows(folder, sys.maxsize) if "save_seconds" in row]
    if saved:
        raise Refused(
            f"{folder / 'checkpoints'} holds no checkpoint, but metrics.jsonl says that this run saved step "
            f"{max(saved)}: put the checkpoints back, or begin anew in an empty --workdir."
        )


def read_config(folder: epath.Path) -> dict:
    """The resolved config that the run in a workdir last went on with. Raises: Refused."""
    path = folder / "config.json"
    if not path.exists():
        known = folder.parent.glob("*") if folder.parent.exists() else ()
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


def check_same_run(config: Config, saved: dict, where: epath.Path) -> None:
    """Raises: Refused, naming the keys by which `config` and the `saved` one are different runs."""
    differing = resume.differences(saved, config)
    if differing:
        raise Refused(
            f"{where} belongs to a run of another config: {', '.join(differing)}. Use the old values, or "
            "another --workdir."
        )


def write_config(config: Config, folder: epath.Path) -> None:
    """Says what the run in a workdir is; once it is sure that it goes on with this config."""
    write_whole(folder / "config.json", schema.to_json(config).encode())
    (folder / "samples.txt").unlink(missing_ok=True)  # of a run that is not complete any more


def losses(folder: epath.Path, until: int = sys.maxsize) -> dict[int, float]:
    """On the held-out text, by step up to `until`, as metrics.jsonl has them; the same on all processes."""
    found = {}
    with distributed.together():
        if distributed.first():
            found = records.evaluations(_rows(folder, until))
    return dict(distributed.shared(lambda: [*found.items()]))


def _rows(folder: epath.Path, until: int) -> list[dict]:
    """Of metrics.jsonl, up to a step. Raises: Refused."""
    path = folder / "metrics.jsonl"
    try:
        return records.rows_until(path, until)
    except Exception as error:  # those of gcsfs and google-auth are no OSError
        raise Refused(f"{path} can't be read ({files.reason(error)}): run the command again once it can.") from error
