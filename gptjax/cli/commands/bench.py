"""The command `gptjax bench`."""

import argparse
import json


def bench(args: argparse.Namespace) -> None:
    from gptjax.planning import benchmark
    from gptjax.training.config import files

    result = benchmark.bench(files.load(args.config, args.overrides), args.steps)
    print(json.dumps(result) if args.json else benchmark.text(result))
