"""Maps the tensors of a Hugging Face model to slices of our arrays.

`Part.view` shows a tensor in the shape of the slice, so both directions only copy between views. torch's Linear keeps
[out, in]. GPT-2's Conv1D keeps [in, out] like our arrays, and GPT-2 has queries, keys and values side by side in one
tensor.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gptjax.errors import Refused
from gptjax.interop.huggingface.safetensors import DTYPES, Tensor

ROTARY_BLOCK = {
    "norm_attention.gain": "input_layernorm.weight",
    "query": "self_attn.q_proj.weight",
    "key": "self_attn.k_proj.weight",
    "value": "self_attn.v_proj.weight",
    "query_norm.gain": "self_attn.q_norm.weight",
    "key_norm.gain": "self_attn.k_norm.weight",
    "output": "self_attn.o_proj.weight",
    "norm_mlp.gain": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
ROTARY = {"embedding": "model.embed_tokens.weight", "norm.gain": "model.norm.weight", "head": "lm_head.weight"}
GPT2_BLOCK = {
    "norm_attention.gain": "ln_1.weight",
    "norm_attention.bias": "ln_1.bias",
    "query": "attn.c_attn.weight",
    "key": "attn.c_attn.weight",
    "value": "attn.c_attn.weight",
    "query_bias": "attn.c_attn.bias",
    "key_bias": "attn.c_attn.bias",
    "value_bias": "attn.c_attn.bias",
    "output": "attn.c_proj.weight",
    "output_bias": "attn.c_proj.bias",
    "norm_mlp.gain": "ln_2.weight",
    "norm_mlp.bias": "ln_2.bias",
    "up": "mlp.c_fc.weight",
    "up_bias": "mlp.c_fc.bias",
    "down": "mlp.c_proj.weight",
    "down_bias": "mlp.c_proj.bias",
}
GPT2 = {
    "embedding": "transformer.wte.weight",
    "positions": "transformer.wpe.weight",
    "norm.gain": "transformer.ln_f.weight",
    "norm.bias": "transformer.ln_f.bias",
    "head": "lm_head.weight",
}
# The number of leading axes in a matrix's slice that are inputs; the other axes are outputs.
INPUTS = {"query": 1, "key": 1, "value": 1, "output": 2, "gate": 1, "up": 1, "down": 1}
SIDE_BY_SIDE = {"query": 0, "key": 1, "value": 2, "query_bias": 0, "key_bias": 1, "value_bias": 2}  # in c_attn
# Buffers in older files that are not weights: masks, and the frequencies of RoPE.
BUFFERS = re.compile(
    r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)


class Part(NamedTuple):
    """A slice of one of our arrays, and the tensor, or part of a tensor, with the same content."""

    tensor: str
    tensor_shape: tuple[int, ...]
    shape: tuple[int, ...]  # shape of the slice, without rows that pad the vocabulary
    outputs: int  # number of last axes that are outputs, for a tensor kept as [out, in]; else 0
    place: int  # index of the part along the tensor's last axis
    places: int  # parts along the tensor's last axis

    def view(self, tensor: np.ndarray) -> np.ndarray:
        """Shows the tensor in the shape of the slice, without a copy."""
        width = self.tensor_shape[-1] // self.places
        tensor = tensor[..., self.place * width : (self.place + 1) * width]
        inputs = len(self.shape) - self.outputs
        if not self.outputs:
            return tensor.reshape(self.shape)
        axes = [*range(self.outputs, len(self.shape)), *range(self.outputs)]
        return tensor.reshape(self.shape[inputs:] + self.shape[:inputs]).transpose(axes)

    @property
    def order(self) -> tuple[int, ...]:
        """The slice's axes in the order of the tensor, the outermost first."""
        inputs = len(self.shape) - self.outputs
        return (*range(inputs, len(self.shape)), *range(inputs))


def parts(gpt2: bool, arrays: dict[str, tuple[int, ...]], vocab_size: int) -> dict[str, list[Part]]:
    """Returns the parts of each array by layer; an array without layers has one part.

    Args:
      gpt2: whether the family is gpt2.
      arrays: shapes of our arrays, by name.
      vocab_size: ids of the tokenizer, without padding.
    """
    table = {f"blocks.{name}": f"transformer.h.{{}}.{tensor}" for name, tensor in GPT2_BLOCK.items()} | GPT2
    if not gpt2:
        table = {f"blocks.{name}": f"model.layers.{{}}.{tensor}" for name, tensor in ROTARY_BLOCK.items()} | ROTARY
    found = {}
    for array, shape in arrays.items():
        name = array.removeprefix("blocks.")
        layers, shape = (shape[0], shape[1:]) if name != array else (1, shape)
        shape = (vocab_size, *shape[1:]) if name in ("embedding", "head") else shape
        inputs = INPUTS.get(name, 0)
        flat = (math.prod(shape[:inputs]), math.prod(shape[inputs:])) if inputs else shape
        flat = (math.prod(shape),) if name.endswith("_bias") else flat
        outputs = len(shape) - inputs if inputs and not gpt2 else 0
        place, places = (SIDE_BY_SIDE[name], 3) if gpt2 and name in SIDE_BY_SIDE else (0, 1)
        tensor_shape = flat[::-1] if outputs else (*flat[:-1], places * flat[-1])
        found[array] = [
            Part(table[array].format(layer), tensor_shape, shape, outputs, place, places) for layer in range(layers)
        ]
    return found


def within(parts: list[Part], region: tuple[slice, ...]) -> Iterator[tuple[Part, tuple, tuple[slice, ...]]]:
    """Yields each part that a region of an array touches, with the index in the region and the slices in the part."""
    if len(region) == len(parts[0].shape):
        yield parts[0], (), region
        return
    for index, layer in enumerate(range(region[0].start, region[0].stop)):
        yield parts[layer], (index,), region[1:]


def check(tensors: dict[str, Tensor], parts: dict[str, list[Part]], where) -> None:
    """Raises: Refused, for missing or extra tensors, and for another shape or dtype."""
    wanted = {part.tensor: part for each in parts.values() for part in each}
    for name, part in wanted.items():
        if name not in tensors:
            raise Refused(f"{where} has no tensor {name}, which config.json asks for; fetch the folder again.")
        if tensors[name].shape != part.tensor_shape:
            raise Refused(
                f"{where}: {name} must have the shape {part.tensor_shape} by config.json; found "
                f"{tensors[name].shape}; correct one of both."
            )
        if tensors[name].dtype not in DTYPES:
            raise Refused(
                f"{where}: {name} must be {', '.join(DTYPES)}; found {tensors[name].dtype}; convert the tensor first."
            )
    if extra := [name for name in tensors if name not in wanted and not BUFFERS.fullmatch(name)]:
        raise Refused(
            f"{where} has {len(extra)} tensors that config.json does not ask for, such as {extra[0]}; only plain "
            "models of the family are supported."
        )


def named(tensors: dict[str, Tensor], tied: bool) -> dict[str, Tensor]:
    """Names the tensors as in the tables above, and drops a copy of a tied embedding.

    GPT-2's own files leave the prefix `transformer.` out.
    """
    if "wte.weight" in tensors:
        tensors = {
            name if name == "lm_head.weight" else f"transformer.{name}": place for name, place in tensors.items()
        }
    embedding = tensors.get("transformer.wte.weight", tensors.get("model.embed_tokens.weight"))
    head = tensors.get("lm_head.weight")
    if tied and head and embedding and _same(head, embedding):
        tensors = {name: place for name, place in tensors.items() if name != "lm_head.weight"}
    return tensors


def _same(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape) or one.dtype not in DTYPES:
        return False
    rows = range(0, len(one.mapped()), 4096)
    same = (
        np.array_equal(*(tensor.mapped()[row : row + 4096].view(np.uint8) for tensor in (one, other))) for row in rows
    )
    return all(same)
