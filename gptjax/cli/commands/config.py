"""The command `gptjax config`."""

import argparse

from gptjax.cli.flags import add_command


def add(commands) -> None:
    text = "print the keys of a config with their default, type and meaning"
    parser = add_command(commands, "config", text, config)
    parser.add_argument("word", nargs="?", default="", metavar="WORD", help="only keys that have this word")


def config(args: argparse.Namespace) -> None:
    from gptjax.errors import Refused, nearest
    from gptjax.training.config import reference

    keys = reference.keys()
    word = args.word.lower().removeprefix("--config.")
    chosen = [key for key in keys if word in key.name] or [key for key in keys if word in key.meaning.lower()]
    if not chosen:
        names = {name for key in keys for name in (key.name, *key.name.split("."))}
        raise Refused(f"No key of a config has the word {args.word}.{nearest(word, names)}")
    print(reference.text(chosen))
