"""The command `gptjax status`."""

import argparse
import json


def status(args: argparse.Namespace) -> None:
    from etils import epath

    from gptjax.training.monitoring import status

    found = status.status(epath.Path(args.workdir))
    print(json.dumps(found) if args.json else status.text(found))
