"""`tracker=wandb`: sends rows to Weights & Biases. A resumed run continues the same wandb run, by WORKDIR/wandb_id.

Environment variables of wandb set everything else: WANDB_PROJECT (gptjax by default), or WANDB_MODE=offline, which
keeps all rows in the workdir until `wandb sync`.
"""

import os
import re
import uuid

import wandb
from etils import epath

from gptjax.errors import Refused
from gptjax.runtime import untrusted


def check() -> None:
    """Raises: Refused, if wandb would have to prompt for a login. Needs no network."""
    if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
        return
    if not wandb.login(prompt=False, verify=False):
        raise Refused("tracker=wandb has no key: run wandb login, set WANDB_API_KEY, or set WANDB_MODE=offline.")


def start(config: dict, workdir: str):
    """Starts or resumes the wandb run; returns the function that logs a row."""
    folder = epath.Path(workdir)
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "gptjax"),
        name=folder.name,
        id=run_id(folder),
        dir=None if "://" in workdir else workdir,
        config=config,
        resume="allow",
        settings=wandb.Settings(console="off", silent=True),
    )
    # A save's row comes after later steps, and a rollback repeats steps, so wandb's own step counter can't be used.
    run.define_metric("*", step_metric="step")
    return lambda step, row: run.log({"step": step} | row)


def run_id(folder: epath.Path) -> str:
    """Returns the wandb id of the run: made when the run starts, and kept in the workdir."""
    path = folder / "wandb_id"
    if path.exists():
        known = untrusted.read(path, 100, "remove it").decode(errors="replace").strip()
        if re.fullmatch("[0-9a-f]{32}", known):
            return known
    made = uuid.uuid4().hex
    path.write_text(made + "\n")
    return made
