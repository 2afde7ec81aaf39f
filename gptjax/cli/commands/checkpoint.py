"""The command `gptjax checkpoint`."""

import argparse
import json


def checkpoint(args: argparse.Namespace) -> None:
    import jax
    from etils import epath

    from gptjax.checkpoints import inspection
    from gptjax.training.workdir import losses, read_config

    jax.config.update("jax_platforms", "cpu")  # the accelerator may be a run's
    folder = epath.Path(args.workdir)

    def config() -> dict:
        return read_config(folder) if (folder / "config.json").exists() else {}

    if args.action == "ls":
        inspection.checkpoints_of(folder)  # refused for want of checkpoints first
        rows = inspection.ls(folder, config(), losses(folder))
        print(json.dumps(rows) if args.json else inspection.table(rows))
    elif args.action == "verify":
        inspection.verify(folder, args.step)
    elif args.action == "diff":
        found = inspection.diff(folder, args.steps)
        print(json.dumps(found) if args.json else inspection.differences(found))
    else:
        inspection.prune(folder, args.keep, args.dry_run, config(), losses(folder))
