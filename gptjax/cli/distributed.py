"""Joins the processes of a run before JAX looks for devices."""

import argparse


def join(args: argparse.Namespace, facts: dict, silence: float = 0) -> None:
    """Joins the other processes of the run, and sets the cache of compiled programs to a folder of the workdir.

    Args:
      facts: values that all processes must agree on besides the flags, by name.
      silence: as in `gptjax.runtime.distributed.join`.
    """
    import jax

    from gptjax.runtime import distributed, rendezvous

    given = {name: getattr(args, name) for name in rendezvous.FLAGS if getattr(args, name) is not None}
    own = (*rendezvous.FLAGS, "function", "overrides", "config")
    flags = {f"--{name}": value for name, value in vars(args).items() if name not in own}
    distributed.join(given, facts | flags, args.coordinator_timeout, silence)
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", f"{args.workdir}/compiled")
