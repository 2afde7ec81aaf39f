"""Parses the command line of tpu_vm.py and refuses mistakes before any resource is requested."""

import argparse
import math
import re
import shlex
import shutil

from gptjax.errors import Refused, nearest
from launch.tree import ROOT, tracked

EXIT_CODES = """exit codes: 0 done · 2 refused, or refused by the command · 130 Ctrl-C · 1 there was no resource to be
had, or it could not be used · else the code of the worker that failed first"""
# First word of --type → image of the machines for JAX, and how many units of the type's number make a chip.
# https://cloud.google.com/tpu/docs/runtimes, and the page of each kind there (v4, v5e, v5p, v6e).
KINDS = {
    "v4": ("tpu-ubuntu2204-base", 2),
    "v5litepod": ("v2-alpha-tpuv5-lite", 1),
    "v5p": ("v2-alpha-tpuv5", 2),
    "v6e": ("v2-alpha-tpuv6e", 1),
}


class Parser(argparse.ArgumentParser):
    """Raises Refused where argparse would exit."""

    def error(self, message: str):
        raise Refused(f"{message}: see {self.prog} --help.")


def parse(argv: list[str], text: str) -> argparse.Namespace:
    """Parses the flags, and the command after `--`. text: the description for --help. Raises: Refused."""
    parser = Parser(
        prog="tpu_vm.py",
        usage="%(prog)s --name=NAME --zone=ZONE --type=TYPE [flags] -- gptjax train --config=FILE --workdir=gs://…",
        description=text,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--name", required=True, help="name of the queued resource, and of its nodes")
    add("--zone", required=True, help="such as us-east5-b")
    add("--type", required=True, help="accelerator type: v5p-1024 or v4-64 (cores, 2 a chip), v6e-256 or v5litepod-256")
    add("--slices", type=int, default=1, help="how many of that type, as one run (1)")
    tier = parser.add_mutually_exclusive_group()
    tier.add_argument(
        "--spot", action="store_true", help="capacity that may be preempted; with neither flag, on demand"
    )
    tier.add_argument("--reserved", action="store_true", help="capacity of a reservation")
    add("--project", default="", help="if not the one that gcloud is set to")
    add("--runtime", default="", help="image of the machines, if not the one for JAX on this type")
    add(
        "--create_flag",
        action="append",
        default=[],
        metavar="FLAG",
        help="a flag more for `gcloud compute tpus queued-resources create`, such as "
        "--create_flag=--valid-until-duration=2d or --create_flag=--service-account=EMAIL; may be repeated",
    )
    add("--keep", action="store_true", help="do not delete the resource in the end")
    add("--poll", type=float, default=30, metavar="SECONDS", help="between two looks at what is waited for (30)")
    add(
        "--dry-run",
        nargs="?",
        const="plain",
        choices=("plain", "preemption"),
        help="run no gcloud, and print every command of a run that ends well, or that is preempted once",
    )
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:split])
    args.command = argv[split + 1 :]
    if not re.fullmatch("[a-z]([a-z0-9-]{0,60}[a-z0-9])?", args.name):
        raise Refused(f"--name={args.name} must be lower-case letters, digits and hyphens, a letter first, 62 at most.")
    if args.slices < 1:
        raise Refused(f"--slices={args.slices} must be at least 1.")
    if args.poll <= 0:
        raise Refused(f"--poll={args.poll:g} must be above 0 seconds.")
    runtime, args.chips = check_type(args.type)
    args.runtime = args.runtime or runtime
    check_command(args.command)
    if not args.dry_run and not shutil.which("gcloud"):
        raise Refused("gcloud is not on the PATH: install it (https://cloud.google.com/sdk/docs/install).")
    return args


def check_type(accelerator: str) -> tuple[str, int]:
    """Returns the image and the number of chips of an accelerator type. Raises: Refused."""
    kind, _, size = re.sub("^v5e", "v5litepod", accelerator).replace(":", "-").partition("-")
    if kind not in KINDS:
        raise Refused(f"--type={accelerator} must begin with one of {', '.join(KINDS)}.{nearest(kind, KINDS)}")
    runtime, cores = KINDS[kind]
    if re.fullmatch("[0-9]+(x[0-9]+)+", size):  # as `gptjax plan` writes it
        size = str(cores * math.prod(int(side) for side in size.split("x")))
        raise Refused(f"--type={accelerator} is a topology: give the accelerator type of so many chips, {kind}-{size}.")
    number = int(size) if size.isdecimal() else 0
    few, more = ((8, 16, 32, 64), 128) if cores == 2 else ((1, 4, 8, 16, 32, 64, 128, 256), 0)
    if number not in few and not (more and number and number % more == 0):
        sizes = f"{', '.join(map(str, few))}{f' or a multiple of {more}' * bool(more)}"
        raise Refused(f"--type={accelerator}: the number of {'cores' if more else 'chips'} of {kind} must be {sizes}.")
    if not accelerator.startswith(kind + "-"):
        raise Refused(f"--type={accelerator} is called {kind}-{number} by gcloud: write that.")
    return runtime, number // cores


def check_command(command: list[str]) -> None:
    """Checks that the command trains, with a workdir on gs:// and a config that git tracks. Raises: Refused."""
    if "gptjax train" not in " ".join(command):
        raise Refused(f"{shlex.join(command) or 'Nothing'} follows --: write -- gptjax train --config=… --workdir=…")
    flags = dict(word.split("=", 1) for word in command if word.startswith("--") and "=" in word)
    workdir, config = flags.get("--workdir", ""), flags.get("--config", "")
    if not re.fullmatch("gs://[^/]+/.+", workdir):
        raise Refused(f"--workdir={workdir} must be gs://BUCKET/FOLDER: it must be there when the machines are gone.")
    if config not in tracked():
        raise Refused(
            f"--config={config} must be a file that git tracks in {ROOT}, since only those are shipped; run git add."
        )
