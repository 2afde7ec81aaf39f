"""The command `gptjax scale`."""

import argparse
import json
import sys

from gptjax.cli.flags import add_command, add_config, add_json, add_workdir


def add(commands) -> None:
    text = "train models of several sizes on the same compute, and say which size is best for more"
    parser = add_command(commands, "scale", text, scale)
    add_config(
        parser,
        "Python file with get_config(size, tokens), such as configs/dial.py; --config.KEY=VALUE changes a key",
    )
    add_workdir(parser, "folder of the runs; the same command goes on there")
    parser.add_argument("--sizes", required=True, help="SIZE,SIZE,…: at least four, on both sides of the best size")
    text = "FLOPs,FLOPs,… of a run: at least two, as in 1e13,3e13,1e14"
    parser.add_argument("--budgets", required=True, help=text)
    text = "FLOPs to say the best size for; by default ten times the largest budget"
    parser.add_argument("--compute", default="", help=text)
    add_json(parser)


def scale(args: argparse.Namespace) -> None:
    import jax
    from etils import epath

    from gptjax.runtime import optional

    jax.config.update("jax_platforms", "cpu")  # the runs use the accelerator
    scale, laws, isoflops = (
        optional.package(f"gptjax.experiments.scaling.{name}", "gptjax scale", "scale")
        for name in ("study", "laws", "plot")
    )
    folder, budgets = epath.Path(args.workdir), scale.numbers("--budgets", args.budgets)
    compute = scale.numbers("--compute", args.compute)[0] if args.compute else 10 * max(budgets)
    found = laws.scaling(scale.scale(args.config, args.overrides, folder, args.sizes.split(","), budgets))
    summary = scale.summary(found, compute)
    (folder / "scale.json").write_text(json.dumps(summary, indent=1) + "\n")
    isoflops.draw(found, compute, folder / "scale.png")
    print(json.dumps(summary) if args.json else scale.text(summary))
    print(f"wrote {folder}/scale.json and {folder}/scale.png", file=sys.stderr)
