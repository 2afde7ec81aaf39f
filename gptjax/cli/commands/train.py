"""What each verb does with its flags; a verb's modules are imported only when it is called."""

import argparse

from gptjax.cli.distributed import join
from gptjax.runtime import files


def train(args: argparse.Namespace) -> None:
    from gptjax.runtime import supervisor as lifeline

    with lifeline.alive():  # before JAX is imported, so that signals are answered from here on
        import dataclasses

        from etils import epath

        from gptjax.training import loop as train
        from gptjax.training.config import files as config_file

        loaded = config_file.load(args.config, args.overrides)
        profile = train.profiled(args.profile_steps, loaded.num_steps)
        lifeline.watch(loaded.watchdog)
        join(args, files.flatten({"config": dataclasses.asdict(loaded)}), loaded.watchdog.silent_seconds)
        train.train(loaded, epath.Path(args.workdir), profile, args.fresh)
