"""The command `gptjax serve`."""

import argparse

from gptjax.cli.commands.generate import for_decoding
from gptjax.errors import Refused
from gptjax.training import loading


def serve(args: argparse.Namespace) -> None:
    import jax
    from etils import epath

    from gptjax.runtime import optional

    serve = optional.package("gptjax.inference.server", "gptjax serve", "serve")
    if args.rows < 1:
        raise Refused(f"--rows={args.rows} must be at least 1.")
    folder = epath.Path(args.workdir)
    with serve.listen(args.host, args.port) as where:
        if not jax.config.jax_compilation_cache_dir:
            jax.config.update("jax_compilation_cache_dir", f"{args.workdir}/compiled")
        run = loading.load(folder, args.step)
        context = serve.context(args.context, run.config.seq_len)
        with jax.set_mesh(run.mesh):
            run = run._replace(model=for_decoding(run.model, args.weights))
        serve.serve(run, folder.name, where, args.rows, context)
