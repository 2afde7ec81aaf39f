"""The command line: `gptjax VERB --flag=value …`; a verb's module is imported only when it is called.

On several hosts it is the same command on each. What runs there (train, eval, generate) joins the others before JAX
looks for devices; from then on only process 0 prints, and a refusal is the same on all.

Exit codes: 0 done · 2 refused before compute (flag, key, value, path, mesh, corpus, processes) · 1 a failure during the
run.
"""

import argparse
import json
import sys

from gptjax import __version__
from gptjax.errors import Refused, nearest


def train(args: argparse.Namespace) -> None:
    import dataclasses

    from etils import epath

    from gptjax import config, train

    loaded = config.load(args.config, args.overrides)
    profile = train.profiled(args.profile_steps, loaded.num_steps)
    join(args, config.flatten({"config": dataclasses.asdict(loaded)}))
    train.train(loaded, epath.Path(args.workdir), profile)


def evaluate(args: argparse.Namespace) -> None:
    import jax
    from etils import epath

    from gptjax import hosts, workdir
    from gptjax.data.store import Store
    from gptjax.evaluate import evaluate

    join(args, {})
    folder = epath.Path(args.workdir)
    run = workdir.load(folder, args.step)
    with hosts.together():
        store = Store.open(run.store)
        if store.tokenizer.hash != run.tokenizer.hash:
            raise Refused(
                f"{run.store} was made by tokenizer {store.tokenizer.hash[:12]}, and step {run.step} was trained "
                f"with {run.tokenizer.hash[:12]}: put back the store of that run."
            )
    with jax.set_mesh(run.mesh):
        result = evaluate(
            run.model,
            store=store,
            mesh=run.mesh,
            seq_len=run.config.seq_len,
            batch_size=run.config.micro_batch_size,
            max_windows=run.config.eval_batches * run.config.batch_size,
            loss=run.config.loss,
        )
    row = {"step": run.step, "loss": result.loss, "perplexity": result.perplexity}
    row |= {"bits_per_byte": result.bits_per_byte, "accuracy": result.accuracy, "tokens": result.tokens}
    print(json.dumps(row))


def generate(args: argparse.Namespace) -> None:
    import jax
    from etils import epath

    from gptjax import workdir
    from gptjax.generate import Sampling, generate

    if args.num_samples < 1:
        raise Refused(f"--num_samples={args.num_samples} must be at least 1.")
    join(args, {})
    run = workdir.load(epath.Path(args.workdir), args.step)
    prompt = run.tokenizer.encode(args.prompt).tolist()
    with jax.set_mesh(run.mesh):
        made = generate(
            run.model,
            [prompt] * args.num_samples,
            run.tokenizer,
            seq_len=run.config.seq_len,
            max_tokens=args.max_tokens,
            sampling=Sampling(args.temperature, args.top_k, args.top_p),
            seed=args.seed,
        )
    for number, ids in enumerate(made, 1):
        if args.num_samples > 1:
            print(f"{'—' * 30} sample {number}")
        print(run.tokenizer.decode(prompt + ids))


def join(args: argparse.Namespace, facts: dict) -> None:
    """Joins the other processes of the run, and keeps its compiled programs in its workdir.

    Args:
      facts: what all processes must agree on besides the flags, by name.
    """
    import jax

    from gptjax import hosts

    given = {name: getattr(args, name) for name in hosts.FLAGS if getattr(args, name) is not None}
    own = (*hosts.FLAGS, "function", "overrides", "config")
    flags = {f"--{name}": value for name, value in vars(args).items() if name not in own}
    hosts.join(given, facts | flags, args.coordinator_timeout)
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", f"{args.workdir}/compiled")


def plan(args: argparse.Namespace) -> None:
    from gptjax import config, plan, report, search, topology

    where = topology.parse(args.topology, args.slices)
    best = config.load(args.config, args.overrides)
    if args.search:
        path = search.output(args.config, where)
        best, result = search.search(best, where, lambda line: print(line, file=sys.stderr, flush=True))
        search.write(best, args.config, args.overrides, result, path)
        print(f"wrote {path}: {search.shown(best)}", file=sys.stderr)
    else:
        result = plan.plan(best, where)
    print(json.dumps(result) if args.json else report.text(result))


def bench(args: argparse.Namespace) -> None:
    from gptjax import bench, config

    result = bench.bench(config.load(args.config, args.overrides), args.steps)
    print(json.dumps(result) if args.json else bench.text(result))


class Parser(argparse.ArgumentParser):
    """One whose complaints are refusals like any other."""

    def error(self, message: str):
        raise Refused(f"{message}: see {self.prog} --help.")


def parser() -> Parser:
    top = Parser(
        prog="gptjax",
        description="Pretrain GPT-style language models with JAX.",
        epilog=__doc__.partition("\n\n")[2],
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"gptjax {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name, function, text):
        made = verbs.add_parser(
            name,
            help=text,
            description=text,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        made.set_defaults(function=function)
        return made

    def several(made):
        group = made.add_argument_group("several processes", "Found by themselves on TPU VMs, GKE, Slurm and Open MPI.")
        group.add_argument("--coordinator", help="HOST:PORT of process 0")
        group.add_argument("--num_processes", type=int, help="how many there are")
        group.add_argument("--process_id", type=int, help="which one this is, from 0")
        group.add_argument("--coordinator_timeout", type=int, default=300, help="seconds to wait for the others")

    one = verb("train", train, "train a model, or go on where its run stopped")
    one.add_argument(
        "--config",
        required=True,
        help="Python file with get_config(); --config.KEY=VALUE changes a key, "
        "as in --config.num_steps=500 or --config.model.num_layers=4",
    )
    one.add_argument("--workdir", required=True, help="folder of the run, local or gs://; all hosts must see it")
    one.add_argument("--profile_steps", default="", help="A:B traces the steps after A, up to B, into WORKDIR/profile")
    several(one)

    one = verb("eval", evaluate, "evaluate a checkpoint on the held-out text; prints one JSON object")
    one.add_argument("--workdir", required=True, help="folder of the run")
    one.add_argument("--step", type=int, default=-1, help="checkpoint to evaluate; -1 is the newest")
    several(one)

    one = verb("generate", generate, "continue a prompt")
    one.add_argument("--workdir", required=True, help="folder of the run")
    one.add_argument("--step", type=int, default=-1, help="checkpoint to use; -1 is the newest")
    one.add_argument("--prompt", default="", help="text to continue")
    one.add_argument("--max_tokens", type=int, default=100, help="most tokens to add")
    one.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token")
    one.add_argument("--top_k", type=int, default=0, help="draw among the k most likely; 0 is off")
    one.add_argument("--top_p", type=float, default=1.0, help="draw among those that hold this much probability")
    one.add_argument("--seed", type=int, default=0, help="the same seed gives the same text")
    one.add_argument("--num_samples", type=int, default=1, help="number of texts")
    several(one)

    one = verb("plan", plan, "compile a config's train step for machines that are not at hand, and say what it needs")
    one.add_argument("--config", required=True, help="Python file with get_config(); --config.KEY=VALUE changes a key")
    one.add_argument(
        "--topology", required=True, help="chips of a TPU slice, as v5p:8x8x8, or cards a host x hosts, as h100:8x4"
    )
    one.add_argument("--slices", type=int, default=1, help="number of TPU slices")
    one.add_argument("--json", action="store_true", help="print one JSON object")
    one.add_argument(
        "--search",
        action="store_true",
        help="try meshes, rematerialization and accumulation, and write the fastest that fits as a config file here",
    )

    one = verb("bench", bench, "time a config's train step on this machine with synthetic data")
    one.add_argument("--config", required=True, help="Python file with get_config(); --config.KEY=VALUE changes a key")
    one.add_argument("--steps", type=int, default=10, help="train steps to time, after two to warm up")
    one.add_argument("--json", action="store_true", help="print one JSON object")
    return top


def parse(argv: list[str]) -> argparse.Namespace:
    """Flags of the verb, and its `--config.KEY=VALUE` overrides. Raises: Refused, for one that is neither."""
    args, rest = parser().parse_known_args(argv)
    if "workdir" in args and not args.workdir:
        raise Refused("--workdir is empty: give a folder.")
    args.overrides = {}
    flags = ["--" + name for name in vars(args) if name not in ("verb", "function", "overrides")]
    rest = iter(rest)
    for word in rest:
        flag, equals, value = word.partition("=")
        if not (flag.startswith("--config.") and "--config" in flags):
            raise Refused(
                f"{flag} is no flag of gptjax {args.verb}: see gptjax {args.verb} --help.{nearest(flag, flags)}"
            )
        if not equals:
            value = next(rest, None)
            if value is None:
                raise Refused(f"{flag} has no value: write {flag}=VALUE.")
        args.overrides[flag.removeprefix("--config.")] = value
    return args


def main() -> None:
    try:
        args = parse(sys.argv[1:])
        args.function(args)
    except Refused as refusal:
        print(f"gptjax: {refusal}", file=sys.stderr)
        sys.exit(2)
    except ImportError as error:
        if "gcsfs" not in str(error):
            raise
        print("gptjax: A path on gs:// needs a package that is missing: pip install 'gptjax[gcs]'.", file=sys.stderr)
        sys.exit(2)
