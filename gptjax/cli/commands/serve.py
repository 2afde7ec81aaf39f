"""The command `gptjax serve`."""

import argparse

from gptjax.cli.commands.generate import for_decoding
from gptjax.cli.flags import add_command, add_step, add_weights, add_workdir
from gptjax.cli.importing import quickly
from gptjax.errors import Refused


def add(commands) -> None:
    parser = add_command(commands, "serve", "answer OpenAI's completions protocol", serve)
    add_workdir(parser, "folder of the run; its name is the model's name")
    add_step(parser, "use")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; anyone who reaches it may ask")
    parser.add_argument("--port", type=int, default=8000, help="0 is a free port")
    parser.add_argument("--rows", type=int, default=8, help="texts that are decoded at once; others wait")
    text = "most tokens of a text with its prompt; memory is taken for rows x context, and 0 is up to 4096"
    parser.add_argument("--context", type=int, default=0, help=text)
    add_weights(parser)


def serve(args: argparse.Namespace) -> None:
    with quickly():
        import jax
        from etils import epath

        from gptjax.runtime import optional
        from gptjax.training import loading

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
        serve.serve(run, folder.resolve().name, where, args.rows, context)
