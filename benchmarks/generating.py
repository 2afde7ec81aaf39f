"""Tokens a second beside `generate` of Hugging Face's transformers, in one process, in turns.

    python -m benchmarks.generating [--layers=12] [--rounds=5] [--tokens=64] [--rows=1,8]

The shape of GPT-2 124M, random weights, float32, prompts of 63 tokens and the end of a text before them. Both sides
make all the tokens that are asked for, prefill included, and transformers does it as it does by itself: its dynamic
cache, PyTorch's own threads, and no compilation, which its `generate` takes for a static cache on accelerators alone.
"""

import argparse
import functools
import statistics
import time

import jax
import numpy as np
import torch
import transformers
from flax import nnx

from gptjax.inference.generate import Request, generate
from gptjax.inference.sampling import Sampling
from gptjax.models import int8
from gptjax.models.config import ModelConfig
from gptjax.models.transformer import Transformer
from gptjax.parallel import mesh

VOCAB, LENGTH, PROMPT = 50257, 1024, 63
HOW = {
    "greedy": (Sampling(temperature=0), {"do_sample": False}),
    "top-k 50, top-p 0.95": (Sampling(1.0, 50, 0.95), {"do_sample": True, "top_k": 50, "top_p": 0.95}),
}


class Ids:
    """A tokenizer for ids alone, without an end."""

    vocab_size, begin, ends, end_of_text = VOCAB, VOCAB - 1, (VOCAB - 1,), VOCAB - 1

    def decode(self, ids) -> str:
        return ""


def timed(function) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def ours(model, prompts: list[list[int]], request: Request) -> None:
    made = generate(model, prompts, Ids(), request)
    assert all(len(row) == request.max_tokens for row in made)


@torch.no_grad()
def peer(model, ids: torch.Tensor, tokens: int, options: dict) -> None:
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), min_new_tokens=tokens, max_new_tokens=tokens,
        pad_token_id=VOCAB - 1, **options,
    )  # fmt: skip
    assert made.shape[1] == ids.shape[1] + tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rows", default="1,8")
    parser.add_argument("--int8", action="store_true", help="also with int8 weights")
    args = parser.parse_args()
    jax.set_mesh(mesh.make_mesh(mesh.MeshConfig(), jax.devices()))
    config = ModelConfig(num_layers=args.layers, num_heads=12, embed_dim=768).resolved()
    stacked = jax.jit(lambda: Transformer(config, VOCAB, LENGTH, nnx.Rngs(0)))()
    models = {"gptjax": stacked.for_decoding()}
    if args.int8:
        models["gptjax int8"] = int8.quantized(stacked)
    del stacked
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=args.layers)).eval()
    print(f"{args.layers} layers, {args.tokens} tokens a row, {args.rounds} rounds; tokens/s, then ours over theirs")
    for rows in map(int, args.rows.split(",")):
        prompts = np.random.default_rng(0).integers(0, VOCAB - 1, (rows, PROMPT)).tolist()
        ids = torch.tensor([[VOCAB - 1, *prompt] for prompt in prompts])
        for name, (sampling, options) in HOW.items():
            request = Request(LENGTH, max_tokens=args.tokens, sampling=sampling, seed=0)
            sides = {side: functools.partial(ours, model, prompts, request) for side, model in models.items()}
            sides["transformers"] = functools.partial(peer, theirs, ids, args.tokens, options)
            times = {side: [] for side in sides}
            for side in sides.values():
                side()  # compiles
            for round in range(args.rounds):
                order = list(sides)[round % len(sides) :] + list(sides)[: round % len(sides)]
                for side in order:
                    times[side].append(timed(sides[side]))
            for side in models:
                ratios = [one / other for one, other in zip(times["transformers"], times[side], strict=True)]
                speeds = (rows * args.tokens / statistics.median(times[which]) for which in (side, "transformers"))
                quartiles = ", ".join(f"{ratio:.2f}" for ratio in statistics.quantiles(ratios, n=4))
                print(f"{rows} rows, {name}, {side}: {' and '.join(f'{speed:.1f}' for speed in speeds)}; {quartiles}")


if __name__ == "__main__":
    main()
