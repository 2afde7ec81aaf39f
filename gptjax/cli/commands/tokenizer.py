"""The command `gptjax tokenizer`."""

import argparse
import json
import sys

from gptjax.cli.commands.data import _check_workers


def tokenizer(args: argparse.Namespace) -> None:
    import contextlib

    from etils import epath

    from gptjax.data.preparation import tokenizer_study
    from gptjax.training.config import files

    _check_workers(args)
    loaded = files.load(args.config, args.overrides)
    if args.action == "train":
        tokenizer_study.train(loaded.data, loaded.clean, loaded.tokenizer, epath.Path(args.target), args.workers)
    else:
        with contextlib.redirect_stdout(sys.stderr):  # the progress of reading; stdout has the result alone
            paths = args.tokenizers.split(",") if args.tokenizers else []
            found = tokenizer_study.compare(loaded.data, loaded.clean, loaded.tokenizer, paths, args.workers)
        print(json.dumps(found) if args.json else tokenizer_study.table(found))
