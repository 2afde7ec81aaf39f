"""What each verb does with its flags; a verb's modules are imported only when it is called."""

import argparse
import json
import sys

from gptjax.errors import Failed, Refused


def train(args: argparse.Namespace) -> None:
    from gptjax.runtime import supervisor as lifeline

    with lifeline.alive():  # before JAX is imported, so that signals are answered from here on
        import dataclasses

        from etils import epath

        from gptjax.training import loop as train
        from gptjax.training.config import files as config_file
        from gptjax.training.config import schema as config

        loaded = config_file.load(args.config, args.overrides)
        profile = train.profiled(args.profile_steps, loaded.num_steps)
        lifeline.watch(loaded.watchdog)
        join(args, config.flatten({"config": dataclasses.asdict(loaded)}), loaded.watchdog.silent_seconds)
        train.train(loaded, epath.Path(args.workdir), profile, args.fresh)


def evaluate(args: argparse.Namespace) -> None:
    import jax
    from etils import epath

    from gptjax.evaluation.heldout import TasksConfig, Unreadable, check, evaluate
    from gptjax.models import int8
    from gptjax.runtime import distributed as hosts
    from gptjax.training import workdir

    tasks = TasksConfig(args.tasks, args.tasks_folder, limit=args.limit, num_fewshot=args.num_fewshot)
    check(tasks)
    for key, value in (("tasks_folder", ""), ("limit", 0), ("num_fewshot", -1)):
        if not args.tasks and getattr(args, key) != value:
            raise Refused(f"--{key}={getattr(args, key)} is about tasks, and --tasks names none: name some there.")
    join(args, {})
    folder = epath.Path(args.workdir)
    run = workdir.load(folder, args.step)
    if args.weights == "int8":
        with jax.set_mesh(run.mesh):
            run = run._replace(model=int8.rounded(run.model))
    if args.tasks:
        print(score(run, tasks, args.json))
        return
    with hosts.together():
        corpus = workdir.open_corpus(run.latest, folder)
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

    from gptjax.runtime import distributed as hosts
    from gptjax.runtime import optional as extra

    harness = extra.package("gptjax.evaluation.lm_eval", f"--tasks={tasks.names}", "eval")
    with hosts.together():
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


def generate(args: argparse.Namespace) -> None:
    import jax
    from etils import epath

    from gptjax.inference.generate import STREAM, grow, read_prompts
    from gptjax.inference.sampling import Sampling
    from gptjax.tokenizers.tokenizer import encode_prompt
    from gptjax.training import workdir

    if args.num_samples < 1:
        raise Refused(f"--num_samples={args.num_samples} must be at least 1.")
    texts = args.prompt + (read_prompts(epath.Path(args.prompts_file)) if args.prompts_file else []) or [""]
    join(args, {"prompts": texts})
    run = workdir.load(epath.Path(args.workdir), args.step)
    texts = [(number, text, sample + 1) for number, text in enumerate(texts, 1) for sample in range(args.num_samples)]
    several_prompts, at, begun = texts[-1][0] > 1, 0, False
    with jax.set_mesh(run.mesh):
        for rows in grow(
            for_decoding(run.model, args.weights),
            [encode_prompt(run.tokenizer, text).tolist() for _, text, _ in texts],
            run.tokenizer,
            seq_len=run.config.seq_len,
            max_tokens=args.max_tokens,
            sampling=Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty),
            seed=args.seed,
            stop=tuple(args.stop),
            steps=STREAM,
        ):
            while at < len(rows):  # in order: the first that is not whole yet as it comes, and those after it later
                if not begun:
                    number, text, sample = texts[at]
                    title = f"prompt {number}, sample {sample}" if several_prompts else f"sample {sample}"
                    print(f"{'—' * 30} {title}\n" * (len(texts) > 1) + text, end="")
                print(rows[at].news(), end="\n" * bool(rows[at].finish), flush=True)
                begun = not rows[at].finish
                if begun:
                    break
                at += 1


def serve(args: argparse.Namespace) -> None:
    import jax
    from etils import epath

    from gptjax.runtime import optional as extra
    from gptjax.training import workdir

    serve = extra.package("gptjax.inference.server", "gptjax serve", "serve")
    if args.rows < 1:
        raise Refused(f"--rows={args.rows} must be at least 1.")
    folder = epath.Path(args.workdir)
    with serve.listen(args.host, args.port) as where:
        if not jax.config.jax_compilation_cache_dir:
            jax.config.update("jax_compilation_cache_dir", f"{args.workdir}/compiled")
        run = workdir.load(folder, args.step)
        context = serve.context(args.context, run.config.seq_len)
        with jax.set_mesh(run.mesh):
            run = run._replace(model=for_decoding(run.model, args.weights))
        serve.serve(run, folder.name, where, args.rows, context)


def for_decoding(model, weights: str):
    """A model as `generate` uses it, with weights as the flag says."""
    from gptjax.models import int8

    return int8.quantized(model) if weights == "int8" else model.unstacked()


def join(args: argparse.Namespace, facts: dict, silence: float = 0) -> None:
    """Joins the other processes of the run, and keeps its compiled programs in its workdir.

    Args:
      facts: what all processes must agree on besides the flags, by name.
      silence: as in `hosts.join`.
    """
    import jax

    from gptjax.runtime import distributed as hosts

    given = {name: getattr(args, name) for name in hosts.FLAGS if getattr(args, name) is not None}
    own = (*hosts.FLAGS, "function", "overrides", "config")
    flags = {f"--{name}": value for name, value in vars(args).items() if name not in own}
    hosts.join(given, facts | flags, args.coordinator_timeout, silence)
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", f"{args.workdir}/compiled")


def status(args: argparse.Namespace) -> None:
    from etils import epath

    from gptjax.training.monitoring import status

    found = status.status(epath.Path(args.workdir))
    print(json.dumps(found) if args.json else status.text(found))


def plan(args: argparse.Namespace) -> None:
    from gptjax.planning import plan, search, topology
    from gptjax.planning import text as plan_text
    from gptjax.training.config import files as config_file

    where = topology.parse(args.topology, args.slices)
    best = config_file.load(args.config, args.overrides)
    if args.search:
        path = search.output(args.config, where)
        best, result = search.search(best, where, lambda line: print(line, file=sys.stderr, flush=True))
        search.write(best, args.config, args.overrides, result, path)
        print(f"wrote {path}: {search.shown(best)}", file=sys.stderr)
    else:
        result = plan.plan(best, where)
    print(json.dumps(result) if args.json else plan_text.text(result))


def sweep(args: argparse.Namespace) -> None:
    import jax

    from gptjax.runtime import optional as extra

    jax.config.update("jax_platforms", "cpu")  # the accelerator is the trials'
    study = extra.package("gptjax.experiments.sweep.study", "gptjax sweep", "sweep")
    made = study.Sweep(args.config, args.overrides, args.space, args.workdir)
    made.run(args.trials, args.workers, args.sampler, args.pruner)


def report(args: argparse.Namespace) -> None:
    from etils import epath

    from gptjax.runtime import optional as extra

    page = extra.package("gptjax.experiments.report.page", "gptjax report", "report")
    page.write([epath.Path(folder) for folder in args.workdirs], epath.Path(args.target))
    print(f"wrote {args.target}")


def bench(args: argparse.Namespace) -> None:
    from gptjax.planning import benchmark as bench
    from gptjax.training.config import files as config_file

    result = bench.bench(config_file.load(args.config, args.overrides), args.steps)
    print(json.dumps(result) if args.json else bench.text(result))


def scale(args: argparse.Namespace) -> None:
    import jax
    from etils import epath

    from gptjax.runtime import optional as extra

    jax.config.update("jax_platforms", "cpu")  # the accelerator is for the runs
    scale, laws, isoflops = (
        extra.package(f"gptjax.experiments.scaling.{name}", "gptjax scale", "scale")
        for name in ("study", "laws", "plot")
    )
    folder, budgets = epath.Path(args.workdir), scale.numbers("--budgets", args.budgets)
    compute = scale.numbers("--compute", args.compute)[0] if args.compute else 10 * max(budgets)
    found = laws.scaling(scale.scale(args.config, args.overrides, folder, args.sizes.split(","), budgets))
    summary = scale.summary(found, compute)
    (folder / "scale.json").write_text(json.dumps(summary, indent=1) + "\n")
    isoflops.draw(found, compute, folder / "scale.png")
    print(json.dumps(summary) if args.json else scale.text(summary))
    print(f"wrote {folder}/scale.json and {folder}/scale.png", file=sys.stderr)


def _check_workers(args: argparse.Namespace) -> None:
    if args.workers < 1:
        raise Refused(f"--workers={args.workers} must be at least 1.")


def data(args: argparse.Namespace) -> None:
    from gptjax.runtime import supervisor as lifeline

    with lifeline.alive():
        {"prepare": prepare, "show": show, "stats": stats}[args.action](args)


def prepare(args: argparse.Namespace) -> None:
    from etils import epath

    from gptjax.data.preparation.prepare import prepare
    from gptjax.runtime import heartbeat
    from gptjax.training.config import files as config_file

    loaded = config_file.load(args.config, args.overrides)
    _check_workers(args)
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

    from gptjax.training import batch_audit as audit
    from gptjax.training.config import files as config_file

    jax.config.update("jax_platforms", "cpu")  # the accelerator may be a run's
    folder = epath.Path(args.workdir) if "workdir" in args else None
    print(audit.show(config_file.load(args.config, args.overrides), folder, args.step, args.row))


def stats(args: argparse.Namespace) -> None:
    from etils import epath

    from gptjax.data.store.store import Store
    from gptjax.runtime import optional as extra
    from gptjax.training.config import files as config_file

    where = args.store or args.config and config_file.load(args.config, args.overrides).data.store
    if not where or bool(args.store) == bool(args.config):
        raise Refused("Give --store=DIR, such as WORKDIR/store, or a --config that has data.store.")
    store = Store.open(epath.Path(where))
    stats, picture = (
        extra.package(f"gptjax.data.store.{name}", "gptjax data stats") for name in ("stats", "stats_plot")
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


def convert(args: argparse.Namespace) -> None:
    import jax
    from etils import epath

    from gptjax.interop.huggingface import convert

    jax.config.update("jax_platforms", "cpu")  # the accelerator may be a run's
    if args.action == "from-hf":
        convert.from_hf(args.source, args.workdir)
    else:
        convert.to_hf(epath.Path(args.workdir), args.target, args.step)


def checkpoint(args: argparse.Namespace) -> None:
    import jax
    from etils import epath

    from gptjax.checkpoints import inspection

    jax.config.update("jax_platforms", "cpu")  # the accelerator may be a run's
    folder = epath.Path(args.workdir)
    if args.action == "ls":
        rows = inspection.ls(folder)
        print(json.dumps(rows) if args.json else inspection.table(rows))
    elif args.action == "verify":
        inspection.verify(folder, args.step)
    elif args.action == "diff":
        found = inspection.diff(folder, args.steps)
        print(json.dumps(found) if args.json else inspection.differences(found))
    else:
        inspection.prune(folder, args.keep, args.dry_run)


def tokenizer(args: argparse.Namespace) -> None:
    import contextlib

    from etils import epath

    from gptjax.data.preparation import tokenizer_study as tokenizing
    from gptjax.training.config import files as config_file

    _check_workers(args)
    loaded = config_file.load(args.config, args.overrides)
    if args.action == "train":
        tokenizing.train(loaded, epath.Path(args.target), args.workers)
    else:
        with contextlib.redirect_stdout(sys.stderr):  # the progress of reading; stdout has the result alone
            found = tokenizing.compare(loaded, args.tokenizers.split(",") if args.tokenizers else [], args.workers)
        print(json.dumps(found) if args.json else tokenizing.table(found))
