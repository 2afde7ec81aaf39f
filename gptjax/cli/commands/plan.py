"""The command `gptjax plan`."""

import argparse
import json
import sys

from gptjax.cli.flags import add_command, add_config, add_json


def add(commands) -> None:
    text = "compile a config's train step for machines that are not at hand, and say what the step needs"
    parser = add_command(commands, "plan", text, plan)
    add_config(parser)
    text = "chips of a TPU slice, as v5p:8x8x8, or cards a host x hosts, as h100:8x4"
    parser.add_argument("--topology", required=True, help=text)
    parser.add_argument("--slices", type=int, default=1, help="number of TPU slices")
    add_json(parser)
    text = "try meshes, rematerialization and accumulation, and write the fastest that fits as a config file here"
    parser.add_argument("--search", action="store_true", help=text)


def plan(args: argparse.Namespace) -> None:
    from gptjax.planning import plan, search, text, topology
    from gptjax.training.config import files

    where = topology.parse(args.topology, args.slices)
    best = files.load(args.config, args.overrides)
    if args.search:
        path = search.output(args.config, where)
        best, result = search.search(best, where, lambda line: print(line, file=sys.stderr, flush=True))
        search.write(best, args.config, args.overrides, result, path)
        print(f"wrote {path}: {search.shown(best)}", file=sys.stderr)
    else:
        result = plan.plan(best, where)
    print(json.dumps(result) if args.json else text.text(result))
