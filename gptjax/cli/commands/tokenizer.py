"""The command `gptjax tokenizer`."""

import argparse
import json
import sys

from gptjax.cli.flags import add_actions, add_command, add_config, add_json, add_workers, check_workers


def add(commands) -> None:
    text = "train a tokenizer, or compare several on held-out text"
    actions = add_actions(add_command(commands, "tokenizer", text, tokenizer))

    text = "train the tokenizer of a config on its training documents, for use by tokenizer.path"
    parser = add_command(actions, "train", text)
    add_config(parser)
    parser.add_argument("--target", required=True, help="new folder for the tokenizer, local or gs://")
    add_workers(parser, 1)

    text = "compare tokenizers on the held-out text: bytes per token, ids used, exactness, speed"
    parser = add_command(actions, "eval", text)
    add_config(parser)
    parser.add_argument("--tokenizers", default="", help="PATH,PATH,… or byte; without it, that of the config")
    add_json(parser)
    add_workers(parser, 1)


def tokenizer(args: argparse.Namespace) -> None:
    import contextlib

    from etils import epath

    from gptjax.data.preparation import tokenizer_study
    from gptjax.runtime.files import user_path
    from gptjax.training.config import files

    check_workers(args.workers)
    loaded = files.load(args.config, args.overrides)
    if args.action == "train":
        tokenizer_study.train(loaded.data, loaded.clean, loaded.tokenizer, epath.Path(args.target), args.workers)
    else:
        with contextlib.redirect_stdout(sys.stderr):  # progress goes to stderr; stdout has only the result
            paths = [user_path(path) for path in args.tokenizers.split(",")] if args.tokenizers else []
            found = tokenizer_study.compare(loaded.data, loaded.clean, loaded.tokenizer, paths, args.workers)
        print(json.dumps(found) if args.json else tokenizer_study.table(found))
