"""The command `gptjax generate`."""

import argparse

from gptjax.cli.distributed import join
from gptjax.cli.flags import add_command, add_processes, add_step, add_weights, add_workdir
from gptjax.cli.importing import quickly
from gptjax.errors import Refused


def add(commands) -> None:
    parser = add_command(commands, "generate", "continue prompts, and print the text as it is made", generate)
    add_workdir(parser)
    add_step(parser, "use")
    parser.add_argument("--prompt", action="append", default=[], help="text to continue; may be given again")
    parser.add_argument("--prompts_file", default="", help="UTF-8 text with one prompt per line")
    parser.add_argument("--max_tokens", type=int, default=100, help="most tokens to add")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token")
    parser.add_argument("--top_k", type=int, default=0, help="draw among the k most likely tokens; 0 is off")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw among the tokens with this much probability")
    text = "draw among tokens with at least this share of the likeliest token's probability"
    parser.add_argument("--min_p", type=float, default=0.0, help=text)
    text = "above 1, tokens that the text already has become less likely"
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help=text)
    parser.add_argument("--stop", action="append", default=[], help="end before this text; may be given again")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text")
    parser.add_argument("--num_samples", type=int, default=1, help="number of texts for each prompt")
    add_weights(parser)
    add_processes(parser)


def generate(args: argparse.Namespace) -> None:
    with quickly():
        import jax
        from etils import epath

        from gptjax.inference.generate import STREAM, Request, grow, read_prompts
        from gptjax.inference.sampling import Sampling
        from gptjax.tokenizers.tokenizer import encode_prompt
        from gptjax.training import loading

    if args.num_samples < 1:
        raise Refused(f"--num_samples={args.num_samples} must be at least 1.")
    texts = args.prompt + (read_prompts(epath.Path(args.prompts_file)) if args.prompts_file else []) or [""]
    join(args, {"prompts": texts})
    run = loading.load(epath.Path(args.workdir), args.step)
    texts = [(number, text, sample + 1) for number, text in enumerate(texts, 1) for sample in range(args.num_samples)]
    several_prompts, at, started = texts[-1][0] > 1, 0, False
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
            while at < len(rows):  # in order: the first unfinished text as its tokens come, later texts afterwards
                if not started:
                    number, text, sample = texts[at]
                    title = f"prompt {number}, sample {sample}" if several_prompts else f"sample {sample}"
                    print(f"{'—' * 30} {title}\n" * (len(texts) > 1) + text, end="")
                print(rows[at].news(), end="\n" * bool(rows[at].finish), flush=True)
                started = not rows[at].finish
                if started:
                    break
                at += 1


def for_decoding(model, weights: str):
    """The model for `generate`, with the weights that --weights names."""
    from gptjax.models import int8

    return int8.quantized(model) if weights == "int8" else model.for_decoding()
