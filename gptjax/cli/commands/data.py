"""The command `gptjax data`."""

import argparse
import json
import os

from gptjax.cli.flags import add_actions, add_command, add_config, add_workers, check_workers
from gptjax.errors import Failed, Refused


def add(commands) -> None:
    actions = add_actions(add_command(commands, "data", "prepare a corpus, or look at a prepared corpus", data))

    text = "make the token store of a config, by several processes; the same command goes on after a stop"
    parser = add_command(actions, "prepare", text)
    add_config(parser)
    parser.add_argument("--workdir", default="", help="folder of the run that the store is for; not with data.store")
    add_workers(parser, len(os.sched_getaffinity(0)))  # fewer than the machine has, under Slurm or taskset

    text = "write the statistics of a prepared store, as numbers and as a picture: stats.json, stats.png"
    parser = add_command(actions, "stats", text)
    parser.add_argument("--store", default="", help="folder of the token store")
    parser.add_argument("--config", default="", help="in place of --store, the Python file that has data.store")
    parser.add_argument("--target", default="", help="folder to write to; by default STORE/stats")

    text = "print what a step reads: the documents of its rows, their sources, and their text"
    parser = add_command(actions, "show", text)
    add_config(parser)
    parser.add_argument("--step", type=int, required=True, help="as in metrics.jsonl, from 1 on")
    parser.add_argument("--row", type=int, default=-1, help="row of the step's batch, from 0 on; -1 is all")
    text = "folder of a run, to show what that run truly reads"
    parser.add_argument("--workdir", default=argparse.SUPPRESS, help=text)


def data(args: argparse.Namespace) -> None:
    from gptjax.runtime import supervisor

    with supervisor.alive():
        {"prepare": prepare, "show": show, "stats": stats}[args.action](args)


def prepare(args: argparse.Namespace) -> None:
    from etils import epath

    from gptjax.data.preparation.prepare import prepare
    from gptjax.runtime import heartbeat
    from gptjax.training.config import files

    loaded = files.load(args.config, args.overrides)
    check_workers(args.workers)
    if bool(args.workdir) == bool(loaded.data.store):
        raise Refused(
            f'--workdir is "{args.workdir}" and data.store is "{loaded.data.store}": give one of them, which says '
            "where the store is to be."
        )
    folder = epath.Path(loaded.data.store or epath.Path(args.workdir) / "store")
    with heartbeat.phase("preparing data"):
        store = prepare(loaded.data, loaded.tokenizer, folder, args.workers, loaded.clean)
    for name, split in store.splits.items():
        print(f"{name}: {split.documents:,} documents, {split.bytes:,} bytes, {split.tokens:,} tokens")


def show(args: argparse.Namespace) -> None:
    import jax
    from etils import epath

    from gptjax.training import batch_audit
    from gptjax.training.config import files

    jax.config.update("jax_platforms", "cpu")  # a run may be using the accelerator
    folder = epath.Path(args.workdir) if "workdir" in args else None
    print(batch_audit.show(files.load(args.config, args.overrides), folder, args.step, args.row))


def stats(args: argparse.Namespace) -> None:
    from etils import epath

    from gptjax.data.store.store import Store
    from gptjax.runtime import optional
    from gptjax.training.config import files

    where = args.store or (args.config and files.load(args.config, args.overrides).data.store)
    if not where or bool(args.store) == bool(args.config):
        raise Refused("Give --store=DIR, such as WORKDIR/store, or a --config that has data.store.")
    store = Store.open(epath.Path(where))
    stats, picture = (
        optional.package(f"gptjax.data.store.{name}", "gptjax data stats") for name in ("stats", "stats_plot")
    )
    target = epath.Path(args.target or store.folder / "stats")
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"--target={target} can't be made ({error.strerror}): give another folder.") from error
    found = stats.stats(store)
    try:
        (target / "stats.json").write_text(json.dumps(found, indent=1) + "\n")
        picture.draw(found, target / "stats.png")
    except OSError as error:
        raise Failed(
            f"{target} can't be written ({error.strerror or error}): make room, or give another folder in --target."
        ) from error
    print(f"wrote {target}/stats.json and {target}/stats.png")
