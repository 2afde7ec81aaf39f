"""`tracker=wandb`: rows to Weights & Biases. A run that goes on is the same run there, by WORKDIR/wandb_id.

Environment variables of wandb say the rest: WANDB_PROJECT (gptjax by default), WANDB_MODE=offline to keep all in the
workdir until `wandb sync`.
"""

import os
import re
import uuid

import wandb
from etils import epath

from gptjax.errors import Refused
from gptjax.runtime import untrusted


def check() -> None:
    """Raises: Refused, where wandb would have to ask who is there. Needs no network."""
    if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
        return
    if not wandb.login(prompt=False, verify=False):
        raise Refused("tracker=wandb has no key: run wandb login, set WANDB_API_KEY, or set WANDB_MODE=offline.")


def start(config: dict, workdir: str):
    """Begins the run there or goes on with it; returns what logs a row."""
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
    # A save's row comes after later steps, and a run that went back tells some again: wandb's own count can't be ours.
    run.define_metric("*", step_metric="step")
    return lambda step, row: run.log({"step": step} | row)


def run_id(folder: epath.Path) -> str:
    """What the run is called there: kept in its workdir, made when it begins."""
    path = folder / "wandb_id"
    if path.exists():
        known = untrusted.read(path, 100, "remove it").decode(errors="replace").strip()
        if re.fullmatch("[0-9a-f]{32}", known):
            return known
    made = uuid.uuid4().hex
    path.write_text(made + "\n")
    return made
