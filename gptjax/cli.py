"""The command line: `gptjax VERB --flag=value …`; a verb's module is imported only when it is called.

Exit codes: 0 done · 2 refused before compute (flag, key, value, path, mesh, corpus) · 1 a failure during the run.
"""

import argparse
import json
import sys

from gptjax import __version__
from gptjax.errors import Refused, nearest


def train(args: argparse.Namespace) -> None:
    from etils import epath

    from gptjax import config, train

    train.train(config.load(args.config, args.overrides), epath.Path(args.workdir))


def evaluate(args: argparse.Namespace) -> None:
    import jax
    from etils import epath

    from gptjax import workdir
    from gptjax.data.store import Store
    from gptjax.evaluate import evaluate

    folder = epath.Path(args.workdir)
    run = workdir.load(folder, args.step)
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

    one = verb("train", train, "train a model, or go on where its run stopped")
    one.add_argument(
        "--config",
        required=True,
        help="Python file with get_config(); --config.KEY=VALUE changes a key, "
        "as in --config.num_steps=500 or --config.model.num_layers=4",
    )
    one.add_argument("--workdir", required=True, help="folder of the run, local or gs://")

    one = verb("eval", evaluate, "evaluate a checkpoint on the held-out text; prints one JSON object")
    one.add_argument("--workdir", required=True, help="folder of the run")
    one.add_argument("--step", type=int, default=-1, help="checkpoint to evaluate; -1 is the newest")

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
    return top


def parse(argv: list[str]) -> argparse.Namespace:
    """Flags of the verb, and its `--config.KEY=VALUE` overrides. Raises: Refused, for one that is neither."""
    args, rest = parser().parse_known_args(argv)
    if not args.workdir:
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
