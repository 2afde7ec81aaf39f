"""The command `gptjax scale`."""

import argparse
import json
import sys


def scale(args: argparse.Namespace) -> None:
    import jax
    from etils import epath

    from gptjax.runtime import optional

    jax.config.update("jax_platforms", "cpu")  # the accelerator is for the runs
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
