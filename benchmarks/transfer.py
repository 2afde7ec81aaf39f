"""Fine-tuning with what a model knows beside without: the name of a function, by its docstring.

    python -m benchmarks.transfer [--pretrain=600] [--steps=200] [--peaks=0.01,0.003] [--folder=DIR]

The standard library's files are cut in two by a hash of their names. On one half the quickstart's model is trained for
`--pretrain` steps. Of the functions of the other half pairs are made: the prompt is the docstring's first line and the
arguments, the response the name. On these the same model is trained for `--steps` steps of 8 rows of 128 tokens, with
`init_from`, with adapters alone, and from the beginning, each at each of `--peaks` of the learning rate; the table
has the held-out loss of the responses by the best. About five minutes on two cores.
"""

import argparse
import ast
import json
import pathlib
import subprocess
import sys
import tempfile
import zlib

from gptjax.data.sources import sources
from gptjax.data.sources.documents import DataConfig

QUICKSTART = pathlib.Path(__file__).resolve().parents[1] / "configs" / "quickstart.py"


def pairs(code: str):
    """(prompt, response) of each function with a docstring."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)) and not node.name.startswith("_"):
            yield f'"""{text.splitlines()[0]}"""\n({ast.unparse(node.args)})\n', f"{node.name}\n"


def prepare(folder: pathlib.Path) -> int:
    """Writes text/ and pairs.jsonl; returns the number of pairs."""
    (folder / "text").mkdir(parents=True)
    found = {}
    for document in sources.documents(DataConfig()):
        if zlib.crc32(document.name.encode()) % 2:
            (folder / "text" / document.name.replace("/", ".")).write_text(document.text)
        else:
            found |= dict(pairs(document.text))
    rows = (json.dumps({"prompt": prompt, "response": response}) + "\n" for prompt, response in found.items())
    (folder / "pairs.jsonl").write_text("".join(rows))
    return len(found)


def train(folder: pathlib.Path, **keys) -> dict:
    """Trains the quickstart's model; returns the last evaluation."""
    command = [sys.executable, "-m", "gptjax", "train", f"--config={QUICKSTART}", f"--workdir={folder}"]
    done = subprocess.run(
        [*command, *(f"--config.{key.replace('__', '.')}={value}" for key, value in keys.items())],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    print(done.stdout.splitlines()[0], file=sys.stderr)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "eval_loss" in row][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrain", type=int, default=600)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--peaks", default="0.01,0.003")
    parser.add_argument("--folder", default=tempfile.mkdtemp(prefix="gptjax_transfer_"))
    args = parser.parse_args()
    folder = pathlib.Path(args.folder)
    print(f"{prepare(folder):,} pairs", flush=True)
    base = folder / "base"
    kept = dict(checkpoint_every=100_000, num_samples=0, model__scan_unroll=1)
    train(base, num_steps=args.pretrain, data__source="code", data__path=folder / "text", **kept)
    task = dict(num_steps=args.steps, seq_len=128, eval_every=args.steps, optimizer__warmup_steps=20, **kept)
    task |= dict(data__source="jsonl", data__path=folder / "pairs.jsonl", data__heldout_fraction=0.1)
    task |= dict(data__prompt_field="prompt", data__text_field="response", data__store=folder / "store")
    task |= dict(packing__method="best_fit", tokenizer__path=base / "tokenizer")
    ways = {"all weights, from the base": dict(init_from=base)}
    ways |= {"adapters of rank 8": dict(init_from=base, lora__rank=8), "from the beginning": {}}
    print("| | peak | nats a token | bits a byte | tokens right |\n|---|---|---|---|---|")
    for way, keys in ways.items():
        found = {}
        for peak in args.peaks.split(","):
            workdir = folder / f"{way.replace(' ', '_').replace(',', '')}_{peak}"
            found[peak] = train(workdir, optimizer__peak_learning_rate=peak, **task, **keys)
        peak = min(found, key=lambda peak: found[peak]["eval_loss"])
        row = found[peak]
        print(
            f"| {way} | {peak} | {row['eval_loss']:.3f} | {row['eval_bits_per_byte']:.3f} | "
            f"{row['eval_accuracy']:.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
