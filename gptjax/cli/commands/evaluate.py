"""The command `gptjax eval`."""

import argparse
import json

from gptjax.cli.distributed import join
from gptjax.cli.flags import add_command, add_json, add_processes, add_step, add_weights, add_workdir
from gptjax.cli.importing import quickly
from gptjax.errors import Refused


def add(commands) -> None:
    text = "evaluate a checkpoint on the held-out text, as one JSON object, or on tasks"
    parser = add_command(commands, "eval", text, evaluate)
    add_workdir(parser)
    add_step(parser, "evaluate")
    parser.add_argument("--tasks", default="", help="NAME,NAME,… of lm-eval, in place of the held-out text")
    parser.add_argument("--tasks_folder", default="", help="folder with YAML files of more tasks; they may run code")
    parser.add_argument("--limit", type=int, default=0, help="documents of each task; 0 is all")
    text = "examples before a question; -1 is the number that the task gives"
    parser.add_argument("--num_fewshot", type=int, default=-1, help=text)
    add_json(parser, "print the scores of tasks as one JSON object")
    add_weights(parser)
    add_processes(parser)


def evaluate(args: argparse.Namespace) -> None:
    from gptjax.evaluation.config import TasksConfig, check

    tasks = TasksConfig(args.tasks, args.tasks_folder, limit=args.limit, num_fewshot=args.num_fewshot)
    check(tasks)
    for key, value in (("tasks_folder", ""), ("limit", 0), ("num_fewshot", -1)):
        if not args.tasks and getattr(args, key) != value:
            raise Refused(f"--{key}={getattr(args, key)} needs --tasks=NAME.")
    with quickly():
        import jax
        from etils import epath

        from gptjax.evaluation.heldout import Unreadable, evaluate
        from gptjax.models import int8
        from gptjax.runtime import distributed
        from gptjax.training import loading
        from gptjax.training.corpus import open_corpus
    join(args, {})
    folder = epath.Path(args.workdir)
    run = loading.load(folder, args.step)
    if args.weights == "int8":
        with jax.set_mesh(run.mesh):
            run = run._replace(model=int8.rounded(run.model))
    if args.tasks:
        print(score(run, tasks, args.json))
        return
    with distributed.together():
        corpus = open_corpus(run.latest, folder)
        if corpus.tokenizer.hash != run.tokenizer.hash:
            raise Refused(
                f"{next(iter(corpus.stores.values())).folder} was made by tokenizer {corpus.tokenizer.hash[:12]}, but "
                f"step {run.step} was trained with {run.tokenizer.hash[:12]}: put back the store of that run."
            )
    try:
        with jax.set_mesh(run.mesh):
            result = evaluate(
                run.model,
                corpus=corpus,
                mesh=run.mesh,
                seq_len=run.config.seq_len,
                batch_size=run.config.micro_batch_size,
                max_windows=run.config.eval_batches * run.config.batch_size,
                loss=run.config.loss,
            )
    except Unreadable as error:
        reason = str(error).rstrip(".")
        raise Refused(f"A whole copy of its store is needed to evaluate step {run.step}: {reason}.") from error
    row = {"step": run.step} | _row(result)
    if result.sources:
        row["sources"] = {name: _row(each) for name, each in result.sources.items()}
    print(json.dumps(row))


def score(run, tasks, as_json: bool) -> str:
    """The scores of a run on tasks, as `gptjax eval --tasks` prints them."""
    import jax

    from gptjax.runtime import distributed, optional

    harness = optional.package("gptjax.evaluation.lm_eval", f"--tasks={tasks.names}", "eval")
    with distributed.together():
        loaded = harness.load(tasks, run.config.seq_len)
    with jax.set_mesh(run.mesh):
        found = harness.scores(
            loaded,
            run.model,
            run.tokenizer,
            seq_len=run.config.seq_len,
            batch_size=run.config.micro_batch_size,
            limit=tasks.limit,
        )
    return json.dumps({"step": run.step, "tasks": found}) if as_json else harness.table(run.step, found)


def _row(result) -> dict:
    row = {"loss": result.loss, "perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte}
    return row | {"accuracy": result.accuracy, "tokens": result.tokens}
