"""What each verb does with its flags; a verb's modules are imported only when it is called."""

import argparse

from gptjax.cli.distributed import join
from gptjax.runtime import files


def train(args: argparse.Namespace) -> None:
    from gptjax.runtime import supervisor

    with supervisor.alive():  # before JAX is imported, so that signals are answered from here on
        import dataclasses

        from etils import epath

        from gptjax.training import loop
        from gptjax.training.config import files as config_file

        loaded = config_file.load(args.config, args.overrides)
        profile = loop.profiled(args.profile_steps, loaded.num_steps)
        supervisor.watch(loaded.watchdog)
        join(args, files.flatten({"config": dataclasses.asdict(loaded)}), loaded.watchdog.silent_seconds)
        loop.train(loaded, epath.Path(args.workdir), profile, args.fresh)
