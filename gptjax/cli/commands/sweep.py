"""The command `gptjax sweep`."""

import argparse


def sweep(args: argparse.Namespace) -> None:
    import jax

    from gptjax.runtime import optional

    jax.config.update("jax_platforms", "cpu")  # the accelerator is the trials'
    study = optional.package("gptjax.experiments.sweep.study", "gptjax sweep", "sweep")
    made = study.Sweep(args.config, args.overrides, args.space, args.workdir)
    made.run(args.trials, args.workers, args.sampler, args.pruner)
