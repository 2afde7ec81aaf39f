"""The command `gptjax checkpoint`."""

import argparse
import json

from gptjax.cli.flags import add_actions, add_command, add_json, add_workdir


def add(commands) -> None:
    text = "look at the checkpoints of a run, compare them, or remove some"
    actions = add_actions(add_command(commands, "checkpoint", text, checkpoint))

    text = "list them: age, size, files, where their config differs from config.json, and visible damage"
    parser = add_command(actions, "ls", text)
    add_workdir(parser)
    add_json(parser, "print a JSON list")

    text = "read every file and compare it with its hash; exit code 1 if a file is damaged"
    parser = add_command(actions, "verify", text)
    add_workdir(parser)
    parser.add_argument("--step", type=int, default=-1, help="checkpoint to verify; -1 is all")

    parser = add_command(actions, "diff", "compare the settings and the arrays of two checkpoints")
    add_workdir(parser)
    parser.add_argument("--steps", required=True, help="A:B")
    add_json(parser)

    text = "remove all but the newest checkpoints that verify, damaged ones, and the rest of killed saves"
    parser = add_command(actions, "prune", text)
    add_workdir(parser)
    parser.add_argument("--keep", type=int, required=True, help="number of checkpoints that stay")
    parser.add_argument("--dry_run", action="store_true", help="only print what would be removed")


def checkpoint(args: argparse.Namespace) -> None:
    import jax
    from etils import epath

    from gptjax.checkpoints import inspection
    from gptjax.runtime.files import flatten
    from gptjax.training.workdir import losses, read_config

    jax.config.update("jax_platforms", "cpu")  # a run may be using the accelerator
    folder = epath.Path(args.workdir)

    def config() -> dict:
        return read_config(folder) if (folder / "config.json").exists() else {}

    if args.action == "ls":
        inspection.checkpoints_of(folder)  # refuses a folder without checkpoints before anything else
        rows = inspection.ls(folder, config(), losses(folder))
        print(json.dumps(rows) if args.json else inspection.table(rows))
    elif args.action == "verify":
        inspection.verify(folder, args.step)
    elif args.action == "diff":
        found = inspection.diff(folder, args.steps)
        print(json.dumps(found) if args.json else inspection.differences(found))
    else:
        saved = config()
        known = losses(folder) if flatten(saved).get("stopping.patience") else {}  # read only if the best must stay
        inspection.prune(folder, args.keep, args.dry_run, saved, known)
