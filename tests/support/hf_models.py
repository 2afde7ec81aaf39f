"""Tiny models of Hugging Face's families, and what `transformers` computes with their weights.

    python tests/support/hf_models.py

records tests/interop/recorded_logits.json anew: the config.json of each model, the shapes of its tensors, and the
logits that `transformers` gives for `ids`. The weights are drawn with NumPy from the tensors' names, so a test makes
the same model without PyTorch.
"""

import importlib.metadata
import json
import pathlib
import tempfile
import zlib

import numpy as np
from safetensors.numpy import save_file

LENGTH = 96
RECORDED = pathlib.Path(__file__).parents[1] / "interop" / "recorded_logits.json"
NO_ENDS = {"bos_token_id": None, "eos_token_id": None}
ROTARY = {"num_hidden_layers": 2, "intermediate_size": 88, "max_position_embeddings": LENGTH} | NO_ENDS
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def models() -> dict:
    """The configurations. No tokenizer is beside the models, so ids are bytes; one vocabulary is a multiple of 128."""
    from transformers import GPT2Config, LlamaConfig, MistralConfig, Qwen3Config

    return {
        "gpt2, tied": GPT2Config(n_layer=2, n_embd=60, n_head=5, vocab_size=389, n_positions=LENGTH, **NO_ENDS),
        "gpt2, untied, exact gelu": GPT2Config(
            n_layer=2, n_embd=48, n_head=3, n_inner=100, vocab_size=261, n_positions=LENGTH, activation_function="gelu",
            tie_word_embeddings=False, **NO_ENDS,
        ),
        "llama, 4 heads a group": LlamaConfig(
            hidden_size=64, num_attention_heads=8, num_key_value_heads=2, vocab_size=300, **ROTARY
        ),
        "llama 3, tied, scaled": LlamaConfig(
            hidden_size=48, num_attention_heads=6, num_key_value_heads=2, head_dim=10, vocab_size=384,
            rms_norm_eps=1e-5, tie_word_embeddings=True,
            rope_parameters=LLAMA3 | {"original_max_position_embeddings": 32}, **ROTARY,
        ),
        "llama, linear": LlamaConfig(
            hidden_size=48, num_attention_heads=4, num_key_value_heads=4, vocab_size=301,
            rope_parameters={"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}, **ROTARY,
        ),
        "qwen3, tied": Qwen3Config(
            hidden_size=60, num_attention_heads=6, num_key_value_heads=3, head_dim=14, vocab_size=300,
            tie_word_embeddings=True, **ROTARY,
        ),
        "qwen3, window": Qwen3Config(
            hidden_size=40, num_attention_heads=3, num_key_value_heads=1, head_dim=18, vocab_size=257,
            sliding_window=20, use_sliding_window=True, max_window_layers=0, **ROTARY,
        ),
        "mistral, window": MistralConfig(
            hidden_size=60, num_attention_heads=4, num_key_value_heads=1, head_dim=22, vocab_size=333,
            sliding_window=24, **ROTARY,
        ),
        "mistral, no window": MistralConfig(
            hidden_size=50, num_attention_heads=4, num_key_value_heads=2, head_dim=6, vocab_size=400,
            sliding_window=None, **ROTARY,
        ),
    }  # fmt: skip


def weight(name: str, shape) -> np.ndarray:
    """A weight that makes a difference: gains around 1, everything else around 0."""
    drawn = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    gain = name.endswith(".weight") and len(shape) == 1
    return (gain + 0.1 * drawn).astype(np.float32)


def ids(vocab_size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, (8, LENGTH), np.int32)


def recorded() -> dict:
    return json.loads(RECORDED.read_text())["models"]


def write(name: str, folder: pathlib.Path) -> None:
    """Writes a recorded model as `transformers` saves it."""
    folder.mkdir(parents=True)
    model = recorded()[name]
    (folder / "config.json").write_text(json.dumps(model["config"]))
    tensors = {tensor: weight(tensor, shape) for tensor, shape in model["tensors"].items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def record() -> None:
    import torch
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM

    found = {}
    for name, config in models().items():
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            shapes = {key: value.shape for key, value in load_file(f"{folder}/model.safetensors").items()}
            described = json.loads(pathlib.Path(folder, "config.json").read_text(encoding="utf-8"))
            tensors = {key: weight(key, shape) for key, shape in shapes.items()}
            save_file(tensors, f"{folder}/model.safetensors", {"format": "pt"})
            model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
            with torch.no_grad():
                logits = model(torch.tensor(ids(config.vocab_size)[:2])).logits[:, -1].numpy()
        rounded = [[float(f"{value:.7g}") for value in row] for row in logits.tolist()]
        found[name] = {"config": described, "tensors": {key: list(shape) for key, shape in shapes.items()}}
        found[name]["logits"] = rounded
    versions = {package: importlib.metadata.version(package) for package in ("torch", "transformers", "safetensors")}
    parts = ",\n".join(f" {json.dumps(name)}: {json.dumps(model)}" for name, model in found.items())
    RECORDED.write_text(f'{{"versions": {json.dumps(versions)},\n"models": {{\n{parts}\n}}}}\n')


if __name__ == "__main__":
    record()
