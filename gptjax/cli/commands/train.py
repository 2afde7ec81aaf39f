"""The command `gptjax train`."""

import argparse

from gptjax.cli.distributed import join
from gptjax.cli.flags import add_command, add_config, add_processes, add_workdir
from gptjax.cli.importing import quickly


def add(commands) -> None:
    parser = add_command(commands, "train", "train a model, or resume a run where it stopped", train)
    add_config(
        parser,
        "Python file with get_config(); --config.KEY=VALUE changes a key, "
        "as in --config.num_steps=500 or --config.model.num_layers=4",
    )
    add_workdir(parser, "folder of the run, local or gs://; all hosts must see this folder")
    parser.add_argument("--fresh", action="store_true", help="refuse to start in a workdir that is not empty")
    parser.add_argument("--profile_steps", default="", help="A:B traces the steps after A, up to B, to WORKDIR/profile")
    add_processes(parser)


def train(args: argparse.Namespace) -> None:
    from gptjax.runtime import supervisor

    with supervisor.alive():  # before JAX is imported, so that signals are answered from here on
        from gptjax.training.config import files

        config = files.load(args.config, args.overrides)
        with quickly():
            import dataclasses

            from etils import epath

            from gptjax.runtime.files import flatten
            from gptjax.training import loop
        profile = loop.profiled(args.profile_steps, config.num_steps)
        supervisor.watch(config.watchdog)
        join(args, flatten({"config": dataclasses.asdict(config)}), config.watchdog.silent_seconds)
        loop.train(config, epath.Path(args.workdir), profile, args.fresh)
