"""The command `gptjax status`."""

import argparse
import json

from gptjax.cli.flags import add_command, add_json, add_workdir


def add(commands) -> None:
    text = "show what the processes of a run do now, and which is the slowest"
    parser = add_command(commands, "status", text, status)
    add_workdir(parser)
    add_json(parser)


def status(args: argparse.Namespace) -> None:
    from etils import epath

    from gptjax.training.monitoring import status

    found = status.status(epath.Path(args.workdir))
    print(json.dumps(found) if args.json else status.text(found))
