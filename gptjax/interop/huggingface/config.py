"""Translates Hugging Face's config.json into the keys of ModelConfig, and back.

`transformers` 5 keeps the settings of RoPE in `rope_parameters`; older versions keep them in `rope_theta` and
`rope_scaling`. Both forms are read. The older form is written, since every version reads the older form.
"""

import dataclasses
import pathlib
from typing import NamedTuple

from etils import epath

from gptjax.errors import Refused, nearest, shown
from gptjax.models.config import ModelConfig
from gptjax.runtime import untrusted

MAX_BYTES = 1 << 20
REMEDY = "give a folder as transformers' save_pretrained writes it"
FAMILIES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Hugging Face's keys and ours. A missing key takes the default of `transformers`; a null key is derived from others.
GPT2_KEYS = {
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "n_embd": "embed_dim",
    "n_inner": "mlp_dim",
    "layer_norm_epsilon": "norm_eps",
    "tie_word_embeddings": "tied_embeddings",
}
ROTARY_KEYS = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "hidden_size": "embed_dim",
    "intermediate_size": "mlp_dim",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied_embeddings",
}
ROTARY_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu"}
DEFAULTS = {
    "gpt2": {"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "activation_function": "gelu_new"},
    "llama": ROTARY_DEFAULTS,
    "mistral": ROTARY_DEFAULTS | {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen3": ROTARY_DEFAULTS | {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
}
# Keys that must have these values, because other values compute another function.
FIXED = {
    "gpt2": {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    "llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    "mistral": {"hidden_act": "silu"},
    "qwen3": {"hidden_act": "silu", "attention_bias": False},
}
ACTIVATIONS = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
    "gelu": "gelu_exact",
}
ROTARY = {"norm": "rmsnorm", "positions": "rope", "activation": "swiglu", "biases": False}
WINDOWED = {"full_attention": False, "sliding_attention": True}  # values of layer_types
LLAMA3_KEYS = {
    "low_freq_factor": "rope_low_turns",
    "high_freq_factor": "rope_high_turns",
    "original_max_position_embeddings": "rope_original_len",
}


class Described(NamedTuple):
    """The content of a config.json."""

    family: str
    model: dict[str, object]  # values of ModelConfig, not yet checked together
    vocab_size: int
    seq_len: int
    ends: list[int]  # the ids that end a text
    begin: int | None = None  # the id that opens a text


def read_config(folder: pathlib.Path) -> Described:
    """Reads the config.json of a folder. Raises: Refused, for an unsupported architecture or setting."""
    path = folder / "config.json"
    config = untrusted.read_json(epath.Path(path), MAX_BYTES, REMEDY)
    family = config.get("model_type")
    if type(family) is not str or family not in FAMILIES:
        raise Refused(
            f"{path}: model_type must be one of {', '.join(FAMILIES)}; found {shown(family)}."
            f"{nearest(str(family), FAMILIES)}"
        )
    classes = config.get("architectures") or [FAMILIES[family]]
    if classes not in ([FAMILIES[family]], ["GPT2Model"]):
        raise Refused(f"{path}: architectures must be [{FAMILIES[family]!r}] for {family}; found {shown(classes)}.")
    for key, value in (FIXED[family] | {"quantization_config": None, "partial_rotary_factor": 1.0}).items():
        if config.get(key) not in (None, value):
            raise Refused(f"{path}: {key}={shown(config[key])} must be {value}.")
    config = {key: value for key, value in (DEFAULTS[family] | config).items() if value is not None}
    gpt2 = family == "gpt2"
    kinds = {field.name: field.type for field in dataclasses.fields(ModelConfig)}
    keys = GPT2_KEYS if gpt2 else ROTARY_KEYS
    model = {ours: _value(config, key, kinds[ours], path) for key, ours in keys.items() if key in config}
    for key, ours in keys.items():
        if ours in ("num_layers", "num_heads", "embed_dim") or (not gpt2 and ours == "mlp_dim"):
            if model.get(ours, 0) < 1:
                raise Refused(f"{path}: {key}={shown(config.get(key))} must be a number of at least 1.")
    if gpt2:
        activation = config["activation_function"]
        if activation not in ACTIVATIONS:
            raise Refused(f"{path}: activation_function={shown(activation)} must be one of {', '.join(ACTIVATIONS)}.")
        model |= {"activation": ACTIVATIONS[activation]}
    else:
        model |= ROTARY | _rope(config, path) | {"qk_norm": family == "qwen3"}
        model["sliding_window"] = _window(config, family, path)
    seq_len = _value(config, "n_positions" if gpt2 else "max_position_embeddings", int, path)
    vocab_size = _value(config, "vocab_size", int, path)
    ends, begins = (_ids(folder, config, key, vocab_size) for key in ("eos_token_id", "bos_token_id"))
    return Described(family, model, vocab_size, seq_len, ends, begins[0] if begins else None)


def _ids(folder: pathlib.Path, config: dict, key: str, vocab_size: int) -> list[int]:
    """Reads special ids like `transformers`: from generation_config.json, else config.json. Raises: Refused."""
    path = folder / "generation_config.json"
    asked = untrusted.read_json(epath.Path(path), MAX_BYTES, REMEDY) if path.exists() else {}
    ids = config.get(key) if asked.get(key) is None else asked[key]
    ids = [] if ids is None else ids if type(ids) is list else [ids]
    if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise Refused(f"{folder}: {key}={shown(ids)} must be below the vocabulary of {vocab_size} ids.")
    return ids


def _value(config: dict, key: str, kind: type, path) -> object:
    """Returns the value of a key, of type `kind`. Raises: Refused."""
    value = config.get(key)
    value = float(value) if kind is float and type(value) is int and value.bit_length() < 64 else value
    if type(value) is not kind or (kind is int and not 0 <= value < 1 << 31):
        found = shown(value) if key in config else "nothing"
        raise Refused(f"{path} is damaged: {key} must be of type {kind.__name__}; found {found}; {REMEDY}.")
    return value


def _rope(config: dict, path) -> dict[str, object]:
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if type(rope) is not dict or any(type(value) is dict for value in rope.values()):
        raise Refused(f"{path}: the settings of RoPE must be the same for all layers; found {shown(rope)}.")
    theta = {"rope_theta": 10_000.0} | {key: value for key, value in config.items() if key == "rope_theta"} | rope
    model = {"rope_theta": _value(theta, "rope_theta", float, path)}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise Refused(f"{path}: the type of RoPE must be default, linear or llama3; found {shown(kind)}.")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise Refused(f"{path}: partial_rotary_factor={rope['partial_rotary_factor']} must be 1.0.")
    if kind != "default":
        model |= {"rope_scaling": kind, "rope_factor": _value(rope, "factor", float, path)}
    if kind == "llama3":
        original = {"original_max_position_embeddings": config.get("max_position_embeddings")} | rope
        kinds = {"rope_original_len": int}
        model |= {ours: _value(original, key, kinds.get(ours, float), path) for key, ours in LLAMA3_KEYS.items()}
    return model


def _window(config: dict, family: str, path) -> int:
    """Returns the positions that attention sees in every layer; 0 is all earlier positions. Raises: Refused."""
    window = _value(config, "sliding_window", int, path) if "sliding_window" in config else 0
    layers, of_all = config["num_hidden_layers"], "full_attention"
    if family == "mistral" and window:
        of_all = "sliding_attention"
    if family == "qwen3" and config.get("use_sliding_window"):
        first = _value({"max_window_layers": 28} | config, "max_window_layers", int, path)
        of_all = "sliding_attention" if first == 0 else "full_attention" if first >= layers else "both kinds"
    kinds = config.get("layer_types") or [of_all]
    if type(kinds) is not list or any(kind != kinds[0] for kind in kinds) or kinds[0] not in [*WINDOWED]:
        raise Refused(f"{path}: all layers must have a sliding window, or none; found layer_types={shown(kinds)}.")
    return window if WINDOWED[kinds[0]] and family != "llama" else 0


def family_of(c: ModelConfig) -> str:
    """Returns the family that computes the same function as a resolved model.

    Raises: Refused, with the key that no family supports.
    """
    gpt2 = c.norm == "layernorm"
    wanted = {"logits_softcap": 0.0, "layers": ""}
    if gpt2:
        alike = {"positions": "learned", "biases": True, "qk_norm": False, "sliding_window": 0}
        wanted |= alike | {"num_kv_heads": c.num_heads, "head_dim": c.embed_dim / c.num_heads}
    else:
        wanted |= {key: value for key, value in ROTARY.items() if key != "norm"}
    if (c.widened, c.query_scale) != (1, 1):
        raise Refused(
            f"model.mup_base_width={c.mup_base_width} must be 0: with model.embed_dim={c.embed_dim}, logits are "
            f"divided by {c.widened:g} and queries multiplied by {c.query_scale:g}, which no family of Hugging "
            "Face does."
        )
    for key, value in wanted.items():
        if getattr(c, key) != value:
            raise Refused(
                f"model.{key}={getattr(c, key)} must be {value}: with model.norm={c.norm}, Hugging Face's "
                f"{'gpt2 computes' if gpt2 else 'llama, mistral and qwen3 compute'} nothing else."
            )
    if gpt2 and c.activation not in ACTIVATIONS.values():
        raise Refused(
            f"model.activation={c.activation} must be gelu or gelu_exact, which Hugging Face's gpt2 computes too."
        )
    if gpt2 or c.qk_norm:
        return "gpt2" if gpt2 else "qwen3"
    # Llama needs heads that together are as wide as the stream. Mistral without a window is equal to Llama otherwise.
    return "mistral" if c.sliding_window or c.embed_dim % c.num_heads else "llama"


def make_config(family: str, c: ModelConfig, vocab_size: int, seq_len: int, dtype: str, ends: dict) -> dict:
    """Makes the config.json of a resolved model, for `transformers` 4 and 5. ends: bos_token_id and eos_token_id."""
    config = {"architectures": [FAMILIES[family]], "model_type": family, "torch_dtype": dtype, "vocab_size": vocab_size}
    config |= {key: getattr(c, ours) for key, ours in (GPT2_KEYS if family == "gpt2" else ROTARY_KEYS).items()}
    config |= FIXED[family] | ends | {"use_cache": True}
    if family == "gpt2":
        activation = {"gelu": "gelu_new", "gelu_exact": "gelu"}[c.activation]
        dropout = {"resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": 0.0}
        return config | dropout | {"activation_function": activation, "n_positions": seq_len, "n_ctx": seq_len}
    rope = {"rope_type": c.rope_scaling, "factor": c.rope_factor} if c.rope_scaling else None
    if c.rope_scaling == "llama3":
        rope |= {key: getattr(c, ours) for key, ours in LLAMA3_KEYS.items()}
    config |= {"max_position_embeddings": seq_len, "rope_theta": c.rope_theta, "rope_scaling": rope}
    if family != "llama":
        config["sliding_window"] = c.sliding_window or None
    if family == "qwen3":
        kind = next(kind for kind, windowed in WINDOWED.items() if windowed == bool(c.sliding_window))
        config |= {"use_sliding_window": bool(c.sliding_window), "layer_types": [kind] * c.num_layers}
        config["max_window_layers"] = 0 if c.sliding_window else c.num_layers
    return config
