"""The command line: `gptjax VERB --flag=value …`.

On several hosts it is the same command on each. What runs there (train, eval, generate) joins the others before JAX
looks for devices; from then on only process 0 prints, and a refusal is the same on all.

Exit codes: 0 done · 2 refused before compute (flag, key, value, path, mesh, corpus, processes) · 1 a failure ·
75 try again: the same command goes on (train was asked to stop by SIGTERM or SIGINT, or a host was lost)
"""

import argparse
import os
import sys

from gptjax import __version__
from gptjax.cli.commands import (
    bench,
    checkpoint,
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
from gptjax.cli.flags import WEIGHTS, Parser, step
from gptjax.errors import TRY_AGAIN, Failed, Preempted, Refused, nearest, one_line


def parser() -> Parser:
    top = Parser(
        prog="gptjax",
        description="Pretrain GPT-style language models with JAX.",
        epilog=__doc__.partition("\n\n")[2],
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"gptjax {__version__}")
    known = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name, function, text):
        made = known.add_parser(
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

    one = verb("train", train.train, "train a model, or go on where its run stopped")
    one.add_argument(
        "--config",
        required=True,
        help="Python file with get_config(); --config.KEY=VALUE changes a key, "
        "as in --config.num_steps=500 or --config.model.num_layers=4",
    )
    one.add_argument("--workdir", required=True, help="folder of the run, local or gs://; all hosts must see it")
    one.add_argument("--fresh", action="store_true", help="refuse to begin in a workdir that is not empty")
    one.add_argument("--profile_steps", default="", help="A:B traces the steps after A, up to B, into WORKDIR/profile")
    several(one)

    one = verb("eval", evaluate.evaluate, "evaluate a checkpoint on the held-out text, as one JSON object, or on tasks")
    one.add_argument("--workdir", required=True, help="folder of the run")
    one.add_argument("--step", type=step, default=-1, help="checkpoint to evaluate; -1 is the newest, or `best`")
    one.add_argument("--tasks", default="", help="NAME,NAME,… of lm-eval, in place of the held-out text")
    one.add_argument("--tasks_folder", default="", help="with YAML files of more tasks; they may run code")
    one.add_argument("--limit", type=int, default=0, help="documents of each task; 0 is all")
    one.add_argument("--num_fewshot", type=int, default=-1, help="examples before a question; -1: as the task says")
    one.add_argument("--json", action="store_true", help="print the scores of tasks as one JSON object")
    one.add_argument("--weights", **WEIGHTS)
    several(one)

    one = verb("generate", generate.generate, "continue prompts; prints the text as it comes")
    one.add_argument("--workdir", required=True, help="folder of the run")
    one.add_argument("--step", type=step, default=-1, help="checkpoint to use; -1 is the newest, or `best`")
    one.add_argument("--prompt", action="append", default=[], help="text to continue; may be given again")
    one.add_argument("--prompts_file", default="", help="UTF-8 text with a prompt a line")
    one.add_argument("--max_tokens", type=int, default=100, help="most tokens to add")
    one.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token")
    one.add_argument("--top_k", type=int, default=0, help="draw among the k most likely; 0 is off")
    one.add_argument("--top_p", type=float, default=1.0, help="draw among those that hold this much probability")
    one.add_argument("--min_p", type=float, default=0.0, help="draw among those this many times as likely as the first")
    one.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1, what was there is less likely")
    one.add_argument("--stop", action="append", default=[], help="end before this text; may be given again")
    one.add_argument("--seed", type=int, default=0, help="the same seed gives the same text")
    one.add_argument("--num_samples", type=int, default=1, help="number of texts for each prompt")
    one.add_argument("--weights", **WEIGHTS)
    several(one)

    one = verb("serve", serve.serve, "answer OpenAI's completions protocol")
    one.add_argument("--workdir", required=True, help="folder of the run, whose name is the model's")
    one.add_argument("--step", type=step, default=-1, help="checkpoint to use; -1 is the newest, or `best`")
    one.add_argument("--host", default="127.0.0.1", help="address to listen on; anyone who reaches it may ask")
    one.add_argument("--port", type=int, default=8000, help="0 is a free one")
    one.add_argument("--rows", type=int, default=8, help="texts that are decoded at once; others wait")
    text = "tokens that a text may have with its prompt; memory is taken for rows x context, and 0 is up to 4096"
    one.add_argument("--context", type=int, default=0, help=text)
    one.add_argument("--weights", **WEIGHTS)

    one = verb("checkpoint", checkpoint.checkpoint, "look at the checkpoints of a run, compare them, or remove some")
    actions = one.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name, text):
        made = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        made.add_argument("--workdir", required=True, help="folder of the run")
        return made

    one = action("ls", "list them: age, size, files, what config.json has otherwise, and what seems damaged")
    one.add_argument("--json", action="store_true", help="print a JSON list")
    one = action("verify", "read every file and compare it with its hash; exit code 1 where one is damaged")
    one.add_argument("--step", type=int, default=-1, help="of one checkpoint; -1 is all")
    one = action("diff", "what two of them say otherwise, and how far apart their arrays are")
    one.add_argument("--steps", required=True, help="A:B")
    one.add_argument("--json", action="store_true", help="print one JSON object")
    one = action("prune", "remove all but the newest that verify, and what is damaged or was left by a kill")
    one.add_argument("--keep", type=int, required=True, help="how many stay")
    one.add_argument("--dry_run", action="store_true", help="only print what would be removed")

    one = verb("tokenizer", tokenizer.tokenizer, "train a tokenizer, or compare several on held-out text")
    actions = one.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text in (
        ("train", "train the tokenizer of a config on its training documents, for use by tokenizer.path"),
        ("eval", "compare tokenizers on the held-out text: bytes a token, ids used, exactness, speed"),
    ):
        one = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        one.add_argument(
            "--config", required=True, help="Python file with get_config(); --config.KEY=VALUE changes a key"
        )
        if name == "train":
            one.add_argument("--target", required=True, help="new folder for it, local or gs://")
        else:
            one.add_argument("--tokenizers", default="", help="PATH,PATH,… or byte; without it, the config's own")
            one.add_argument("--json", action="store_true", help="print one JSON object")
        one.add_argument("--workers", type=int, default=1, help="processes that read the corpus; 1 is this one alone")

    one = verb("data", data.data, "prepare a corpus, or look at what is in it")
    actions = one.add_subparsers(dest="action", required=True, metavar="ACTION")
    text = "make the token store of a config, by several processes; the same command goes on where one was stopped"
    one = actions.add_parser("prepare", help=text, description=text, allow_abbrev=False)
    one.add_argument("--config", required=True, help="Python file with get_config(); --config.KEY=VALUE changes a key")
    one.add_argument("--workdir", default="", help="folder of a run, for whose store it is; not with data.store")
    one.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; 1 is this one alone")
    text = "write what is in a prepared store, as numbers and as a picture: stats.json, stats.png"
    one = actions.add_parser("stats", help=text, description=text, allow_abbrev=False)
    one.add_argument("--store", default="", help="folder of the token store")
    one.add_argument("--config", default="", help="in place of it, the Python file whose data.store it is")
    one.add_argument("--target", default="", help="folder to write to; by default STORE/stats")
    text = "print what a step reads: the documents of its rows, where they are from, and their text"
    one = actions.add_parser("show", help=text, description=text, allow_abbrev=False)
    one.add_argument("--config", required=True, help="Python file with get_config(); --config.KEY=VALUE changes a key")
    one.add_argument("--step", type=int, required=True, help="as in metrics.jsonl, from 1 on")
    one.add_argument("--row", type=int, default=-1, help="of the step's batch, from 0 on; -1 is all")
    one.add_argument("--workdir", default=argparse.SUPPRESS, help="of a run, to show what it truly reads")

    one = verb("convert", convert.convert, "take a model of Hugging Face for a workdir, or give one to it")
    actions = one.add_subparsers(dest="action", required=True, metavar="ACTION")
    text = "make a workdir of a folder with config.json, safetensors and a tokenizer: gpt2, llama, mistral or qwen3"
    one = actions.add_parser("from-hf", help=text, description=text, allow_abbrev=False)
    one.add_argument("--source", required=True, help="the folder")
    one.add_argument("--workdir", required=True, help="new folder, for generate, eval and the others")
    text = "make such a folder of a checkpoint, for AutoModelForCausalLM.from_pretrained and what reads the same"
    one = actions.add_parser("to-hf", help=text, description=text, allow_abbrev=False)
    one.add_argument("--workdir", required=True, help="folder of the run")
    one.add_argument("--target", required=True, help="new folder")
    one.add_argument("--step", type=step, default=-1, help="checkpoint to convert; -1 is the newest, or `best`")

    one = verb("status", status.status, "what the processes of a run do now, and which is the slowest")
    one.add_argument("--workdir", required=True, help="folder of the run")
    one.add_argument("--json", action="store_true", help="print one JSON object")

    one = verb("report", report.report, "write one HTML page on one or several runs: curves, evaluations, samples")
    one.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="folder of a run")
    one.add_argument("--target", default="report.html", help="file to write, over an old one")

    one = verb("sweep", sweep.sweep, "search for the values of some keys with which a config learns best")
    one.add_argument("--config", required=True, help="Python file with get_config(); --config.KEY=VALUE changes a key")
    one.add_argument("--space", required=True, help="Python file with get_space(): keys, and the values to try")
    one.add_argument("--workdir", default="runs/sweep", help="folder of the sweep; the same command goes on there")
    one.add_argument("--trials", type=int, default=0, help="runs in all; 0 is 20, or all points of a grid")
    one.add_argument("--workers", type=int, default=1, help="runs at once; an accelerator mostly has room for one")
    one.add_argument(
        "--sampler", choices=("grid", "random", "tpe", "gp"), default="tpe", help="what chooses the values"
    )
    text = "what stops hopeless runs, by the held-out loss at each evaluation"
    one.add_argument("--pruner", choices=("median", "hyperband", "none"), default="median", help=text)

    one = verb(
        "plan", plan.plan, "compile a config's train step for machines that are not at hand, and say what it needs"
    )
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

    one = verb(
        "scale", scale.scale, "train models of several sizes on the same compute, and say which size is best for more"
    )
    one.add_argument(
        "--config",
        required=True,
        help="Python file with get_config(size, tokens), such as configs/dial.py; --config.KEY=VALUE changes a key",
    )
    one.add_argument("--workdir", required=True, help="folder of the runs; the same command goes on there")
    one.add_argument("--sizes", required=True, help="SIZE,SIZE,…: four at least, on both sides of what is best")
    one.add_argument("--budgets", required=True, help="FLOPs,FLOPs,… of a run: two at least, as in 1e13,3e13,1e14")
    one.add_argument("--compute", default="", help="FLOPs to say the best size for; by default ten times the most")
    one.add_argument("--json", action="store_true", help="print one JSON object")

    one = verb("bench", bench.bench, "time a config's train step on this machine with synthetic data")
    one.add_argument("--config", required=True, help="Python file with get_config(); --config.KEY=VALUE changes a key")
    one.add_argument("--steps", type=int, default=10, help="train steps to time, after two to warm up")
    one.add_argument("--json", action="store_true", help="print one JSON object")
    return top


def parse(argv: list[str]) -> argparse.Namespace:
    """Flags of the verb, and its `--config.KEY=VALUE` overrides. Raises: Refused, for one that is neither."""
    args, rest = parser().parse_known_args(argv)
    if "workdir" in args and not args.workdir and args.verb != "data":
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
        print(f"gptjax: {one_line(str(refusal))}", file=sys.stderr)
        sys.exit(2)
    except Failed as failure:
        failed(str(failure))
    except KeyboardInterrupt:
        sys.exit(130)  # as of a command that SIGINT ends; verbs with anything to save answer it themselves
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
    """Ends a command that could not do its work, and tells the other processes of a run."""
    print(f"gptjax: {one_line(why)}", file=sys.stderr, flush=True)
    if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
        sys.modules["gptjax.runtime.distributed"].fail()
    sys.exit(1)
