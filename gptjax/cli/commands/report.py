"""The command `gptjax report`."""

import argparse

from gptjax.cli.flags import add_command


def add(commands) -> None:
    text = "write one HTML page on one or several runs: curves, evaluations, samples"
    parser = add_command(commands, "report", text, report)
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="folder of a run")
    parser.add_argument("--target", default="report.html", help="file to write, over an old one")


def report(args: argparse.Namespace) -> None:
    from etils import epath

    from gptjax.runtime import optional

    page = optional.package("gptjax.experiments.report.page", "gptjax report", "report")
    page.write([epath.Path(folder) for folder in args.workdirs], epath.Path(args.target))
    print(f"wrote {args.target}")
