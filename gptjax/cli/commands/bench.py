"""The command `gptjax bench`."""

import argparse
import json

from gptjax.cli.flags import add_command, add_config, add_json


def add(commands) -> None:
    text = "time a config's train step on this machine with synthetic data"
    parser = add_command(commands, "bench", text, bench)
    add_config(parser)
    parser.add_argument("--steps", type=int, default=10, help="train steps to time, after two to warm up")
    add_json(parser)


def bench(args: argparse.Namespace) -> None:
    from gptjax.planning import benchmark
    from gptjax.training.config import files

    result = benchmark.bench(files.load(args.config, args.overrides), args.steps)
    print(json.dumps(result) if args.json else benchmark.text(result))
