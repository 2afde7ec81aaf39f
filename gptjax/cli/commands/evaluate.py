"""The command `gptjax evaluate`."""

import argparse
import json

from gptjax.cli.distributed import join
from gptjax.errors import Refused
from gptjax.training import loading
from gptjax.training.corpus import open_corpus


def evaluate(args: argparse.Namespace) -> None:
    import jax
    from etils import epath

    from gptjax.evaluation.config import TasksConfig, check
    from gptjax.evaluation.heldout import Unreadable, evaluate
    from gptjax.models import int8
    from gptjax.runtime import distributed

    tasks = TasksConfig(args.tasks, args.tasks_folder, limit=args.limit, num_fewshot=args.num_fewshot)
    check(tasks)
    for key, value in (("tasks_folder", ""), ("limit", 0), ("num_fewshot", -1)):
        if not args.tasks and getattr(args, key) != value:
            raise Refused(f"--{key}={getattr(args, key)} is about tasks, and --tasks names none: name some there.")
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
                f"{next(iter(corpus.stores.values())).folder} was made by tokenizer {corpus.tokenizer.hash[:12]}, and "
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
    """What `gptjax eval --tasks` prints of a `workdir.Run`."""
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
