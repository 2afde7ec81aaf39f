"""The command `gptjax report`."""

import argparse


def report(args: argparse.Namespace) -> None:
    from etils import epath

    from gptjax.runtime import optional

    page = optional.package("gptjax.experiments.report.page", "gptjax report", "report")
    page.write([epath.Path(folder) for folder in args.workdirs], epath.Path(args.target))
    print(f"wrote {args.target}")
