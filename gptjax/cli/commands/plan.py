"""The command `gptjax plan`."""

import argparse
import json
import sys


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
