"""The parser of the command line, and the flags that several commands share."""

import argparse

from gptjax.errors import Refused

CONFIG = "Python file with get_config(); --config.KEY=VALUE changes a key"


class Parser(argparse.ArgumentParser):
    """A parser that raises Refused where argparse would print its usage and exit."""

    def error(self, message: str):
        raise Refused(f"{message}: see {self.prog} --help.")


def add_command(commands, name: str, text: str, function=None) -> Parser:
    """Adds a command, or an action of a command, and returns its parser.

    Args:
      commands: the subparsers to add to.
      name: the word on the command line.
      text: the help.
      function: called with the parsed arguments; an action leaves this to its command.
    """
    parser = commands.add_parser(
        name, help=text, description=text, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    if function:
        parser.set_defaults(function=function)
    return parser


def add_actions(parser: Parser):
    """The subparsers of a command that has actions, such as `gptjax data prepare`."""
    return parser.add_subparsers(dest="action", required=True, metavar="ACTION")


def add_config(parser: Parser, text: str = CONFIG) -> None:
    parser.add_argument("--config", required=True, help=text)


def add_workdir(parser: Parser, text: str = "folder of the run") -> None:
    parser.add_argument("--workdir", required=True, help=text)


def add_step(parser: Parser, purpose: str) -> None:
    """--step of a command that does one thing to one checkpoint, such as `evaluate`."""
    parser.add_argument("--step", type=step, default=-1, help=f"checkpoint to {purpose}; -1 is the newest, or `best`")


def add_json(parser: Parser, text: str = "print one JSON object") -> None:
    parser.add_argument("--json", action="store_true", help=text)


def add_weights(parser: Parser) -> None:
    text = "int8 keeps the weights in a quarter of float32's bytes, rounded"
    parser.add_argument("--weights", choices=("float", "int8"), default="float", help=text)


def add_workers(parser: Parser, default: int | None) -> None:
    parser.add_argument("--workers", type=int, default=default, help="processes; 1 works in this process alone")


def add_processes(parser: Parser) -> None:
    """The flags of a command that runs on several hosts."""
    group = parser.add_argument_group("several processes", "Found without flags on TPU VMs, GKE, Slurm and Open MPI.")
    group.add_argument("--coordinator", help="HOST:PORT of process 0")
    group.add_argument("--num_processes", type=int, help="number of processes")
    group.add_argument("--process_id", type=int, help="number of this process, from 0")
    group.add_argument("--coordinator_timeout", type=int, default=300, help="seconds to wait for the others")


def step(text: str) -> int | str:
    """A checkpoint: its step, or `best` for the lowest held-out loss."""
    return text if text == "best" else int(text)


def check_workers(workers: int) -> None:
    """Raises: Refused."""
    if workers < 1:
        raise Refused(f"--workers={workers} must be at least 1.")
