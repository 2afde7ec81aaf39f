"""The command line: `gptjax COMMAND --flag=value …`."""

import argparse
import sys

from gptjax import __version__
from gptjax.cli.commands import (
    bench,
    checkpoint,
    config,
    convert,
    data,
    evaluate,
    generate,
    plan,
    report,
    scale,
    serve,
    status,
    sweep,
    tokenizer,
    train,
)
from gptjax.cli.flags import Parser
from gptjax.errors import TRY_AGAIN, Failed, Preempted, Refused, nearest, one_line

# The end of `gptjax --help`; no docstring, which Python drops with -OO.
EPILOG = """
On several hosts the command is the same on each. train, eval and generate join the other processes before JAX looks for
devices. From then on only process 0 prints, and every process refuses alike.

Exit codes: 0 done · 2 refused before compute (flag, key, value, path, mesh, corpus, processes) · 1 a failure ·
75 try again: the same command goes on (train was stopped by SIGTERM, SIGHUP or SIGINT, or a host was lost)
"""

# In the order of `gptjax --help`.
COMMANDS = (
    train,
    evaluate,
    generate,
    serve,
    checkpoint,
    tokenizer,
    data,
    convert,
    status,
    report,
    sweep,
    plan,
    scale,
    bench,
    config,
)


# The flags that are paths, whatever the command.
PATHS = {"workdir", "config", "target", "source", "store", "space", "tasks_folder", "prompts_file"}


def parser() -> Parser:
    top = Parser(
        prog="gptjax",
        description="Pretrain GPT-style language models with JAX.",
        epilog=EPILOG,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"gptjax {__version__}")
    commands = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for command in COMMANDS:
        command.add(commands)
    return top


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags of the command, and its `--config.KEY=VALUE` overrides. Raises: Refused, for an unknown flag."""
    args, rest = parser().parse_known_args(argv)
    from gptjax.runtime.files import user_path  # --help does not wait for what this imports

    for name in PATHS & vars(args).keys():
        setattr(args, name, user_path(getattr(args, name)))
    if "workdirs" in args:
        args.workdirs = [user_path(folder) for folder in args.workdirs]
    if "workdir" in args and not args.workdir and args.verb != "data":
        raise Refused("--workdir is empty: give a folder.")
    args.overrides = {}
    flags = ["--" + name for name in vars(args) if name not in ("verb", "function", "overrides")]
    rest = iter(rest)
    for word in rest:
        flag, equals, value = word.partition("=")
        if not (flag.startswith("--config.") and "--config" in flags):
            raise Refused(
                f"{flag} is not a flag of gptjax {args.verb}: see gptjax {args.verb} --help.{_hint(flag, flags)}"
            )
        if not equals:
            value = next(rest, None)
            if value is None:
                raise Refused(f"{flag} has no value: write {flag}=VALUE.")
        args.overrides[flag.removeprefix("--config.")] = value
    return args


def _hint(flag: str, flags: list[str]) -> str:
    """The flag, or the key of the config, that an unknown flag means."""
    from gptjax.runtime.files import flatten
    from gptjax.training.config import schema, synonyms

    word = flag.removeprefix("--").removeprefix("config.").replace("-", "_")
    if (named := synonyms.FLAGS.get(word)) in flags:
        return f' Did you mean "{named}"?'
    keys = flatten(schema.default())
    exact = word in keys or word in synonyms.KEYS
    close = nearest(flag, flags)
    return synonyms.hint(word, keys, "--config.") if "--config" in flags and (exact or not close) else close


def main() -> None:
    try:
        args = parse(sys.argv[1:])
        args.function(args)
    except Refused as refusal:
        print(f"gptjax: {one_line(str(refusal))}", file=sys.stderr)
        sys.exit(2)
    except Failed as failure:
        failed(str(failure))
    except KeyboardInterrupt:
        sys.exit(130)  # as any command that SIGINT ends; commands with unsaved work handle SIGINT themselves
    except Preempted as stop:
        print(f"gptjax: {stop}.", file=sys.stderr)
        sys.exit(TRY_AGAIN)
    except ImportError as error:
        if "gcsfs" not in str(error):
            raise
        print("gptjax: A path on gs:// needs a package that is missing: pip install 'gptjax[gcs]'.", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if not type(error).__module__.startswith(("gcsfs.", "google.")):
            raise
        failed(
            f"gs:// can't be used ({type(error).__name__}: {error}): look at the bucket's name and rights, and at this "
            "machine's credentials (gcloud auth application-default login)."
        )


def failed(why: str) -> None:
    """Ends a command that could not do its work, and informs the other processes of the run."""
    print(f"gptjax: {one_line(why)}", file=sys.stderr, flush=True)
    if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
        sys.modules["gptjax.runtime.distributed"].fail()
    sys.exit(1)
