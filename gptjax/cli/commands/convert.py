"""The command `gptjax convert`."""

import argparse


def convert(args: argparse.Namespace) -> None:
    import jax
    from etils import epath

    from gptjax.interop.huggingface import convert

    jax.config.update("jax_platforms", "cpu")  # the accelerator may be a run's
    if args.action == "from-hf":
        convert.from_hf(args.source, args.workdir)
    else:
        convert.to_hf(epath.Path(args.workdir), args.target, args.step)
