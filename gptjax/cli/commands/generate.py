"""The command `gptjax generate`."""

import argparse

from gptjax.cli.distributed import join
from gptjax.errors import Refused
from gptjax.training import loading


def generate(args: argparse.Namespace) -> None:
    import jax
    from etils import epath

    from gptjax.inference.generate import STREAM, Request, grow, read_prompts
    from gptjax.inference.sampling import Sampling
    from gptjax.tokenizers.tokenizer import encode_prompt

    if args.num_samples < 1:
        raise Refused(f"--num_samples={args.num_samples} must be at least 1.")
    texts = args.prompt + (read_prompts(epath.Path(args.prompts_file)) if args.prompts_file else []) or [""]
    join(args, {"prompts": texts})
    run = loading.load(epath.Path(args.workdir), args.step)
    texts = [(number, text, sample + 1) for number, text in enumerate(texts, 1) for sample in range(args.num_samples)]
    several_prompts, at, begun = texts[-1][0] > 1, 0, False
    with jax.set_mesh(run.mesh):
        for rows in grow(
            for_decoding(run.model, args.weights),
            [encode_prompt(run.tokenizer, text).tolist() for _, text, _ in texts],
            run.tokenizer,
            Request(
                seq_len=run.config.seq_len,
                max_tokens=args.max_tokens,
                sampling=Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty),
                seed=args.seed,
                stop=tuple(args.stop),
            ),
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


def for_decoding(model, weights: str):
    """A model as `generate` uses it, with weights as the flag says."""
    from gptjax.models import int8

    return int8.quantized(model) if weights == "int8" else model.for_decoding()
