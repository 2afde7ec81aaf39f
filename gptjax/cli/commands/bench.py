"""The command `gptjax bench`."""

import argparse
import json


def bench(args: argparse.Namespace) -> None:
    from gptjax.planning import benchmark as bench
    from gptjax.training.config import files as config_file

    result = bench.bench(config_file.load(args.config, args.overrides), args.steps)
    print(json.dumps(result) if args.json else bench.text(result))
