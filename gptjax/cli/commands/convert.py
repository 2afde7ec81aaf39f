"""The command `gptjax convert`."""

import argparse

from gptjax.cli.flags import add_actions, add_command, add_step, add_workdir


def add(commands) -> None:
    text = "make a workdir from a Hugging Face model, or a Hugging Face model from a workdir"
    actions = add_actions(add_command(commands, "convert", text, convert))

    text = "make a workdir of a folder with config.json, safetensors and a tokenizer: gpt2, llama, mistral or qwen3"
    parser = add_command(actions, "from-hf", text)
    parser.add_argument("--source", required=True, help="folder of the Hugging Face model")
    add_workdir(parser, "new folder, for generate, eval and the others")

    text = "make a Hugging Face model of a checkpoint, for AutoModelForCausalLM.from_pretrained and compatible readers"
    parser = add_command(actions, "to-hf", text)
    add_workdir(parser)
    parser.add_argument("--target", required=True, help="new folder")
    add_step(parser, "convert")


def convert(args: argparse.Namespace) -> None:
    import jax
    from etils import epath

    from gptjax.interop.huggingface import convert

    jax.config.update("jax_platforms", "cpu")  # a run may be using the accelerator
    if args.action == "from-hf":
        convert.from_hf(args.source, args.workdir)
    else:
        convert.to_hf(epath.Path(args.workdir), args.target, args.step)
