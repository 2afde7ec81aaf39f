"""The command `gptjax sweep`."""

import argparse

from gptjax.cli.flags import add_command, add_config


def add(commands) -> None:
    text = "search for the values of some keys with which a config learns best"
    parser = add_command(commands, "sweep", text, sweep)
    add_config(parser)
    parser.add_argument("--space", required=True, help="Python file with get_space(): keys, and the values to try")
    text = "folder of the sweep; the same command goes on there"
    parser.add_argument("--workdir", default="runs/sweep", help=text)
    parser.add_argument("--trials", type=int, default=0, help="number of runs; 0 is 20, or all points of a grid")
    text = "runs at once; an accelerator mostly has room for one run"
    parser.add_argument("--workers", type=int, default=1, help=text)
    samplers = ("grid", "random", "tpe", "gp")
    parser.add_argument("--sampler", choices=samplers, default="tpe", help="rule that chooses the values")
    text = "rule that stops hopeless runs, by the held-out loss at each evaluation"
    parser.add_argument("--pruner", choices=("median", "hyperband", "none"), default="median", help=text)


def sweep(args: argparse.Namespace) -> None:
    import jax

    from gptjax.runtime import optional

    jax.config.update("jax_platforms", "cpu")  # the trials use the accelerator
    study = optional.package("gptjax.experiments.sweep.study", "gptjax sweep", "sweep")
    made = study.Sweep(args.config, args.overrides, args.space, args.workdir)
    made.run(args.trials, args.workers, args.sampler, args.pruner)
