"""Which tensor of a Hugging Face model is which slice of which of our arrays.

A tensor is looked at in the shape that the slice has (`Part.view`), so that copying from one view to the other is all
that either direction does. torch's Linear keeps [out, in], GPT-2's Conv1D [in, out] as we do, and GPT-2 has queries,
keys and values side by side in one tensor.
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
# Leading axes of a matrix's slice that are its inputs; the others are its outputs.
INPUTS = {"query": 1, "key": 1, "value": 1, "output": 2, "gate": 1, "up": 1, "down": 1}
SIDE_BY_SIDE = {"query": 0, "key": 1, "value": 2, "query_bias": 0, "key_bias": 1, "value_bias": 2}  # in c_attn
# What older files also hold, and no weight: masks, and the frequencies of RoPE.
BUFFERS = re.compile(
    r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)


class Part(NamedTuple):
    """A slice of one of our arrays, and the tensor, or the part of it, that it is."""

    tensor: str
    tensor_shape: tuple[int, ...]
    shape: tuple[int, ...]  # of the slice, without what pads the vocabulary
    outputs: int  # of a matrix that the tensor has as [out, in]: how many of the slice's last axes are outputs; else 0
    place: int  # along the tensor's last axis
    places: int

    def view(self, tensor: np.ndarray) -> np.ndarray:
        """The tensor in the shape of the slice, without copying it."""
        width = self.tensor_shape[-1] // self.places
        tensor = tensor[..., self.place * width : (self.place + 1) * width]
        inputs = len(self.shape) - self.outputs
        if not self.outputs:
            return tensor.reshape(self.shape)
        axes = [*range(self.outputs, len(self.shape)), *range(self.outputs)]
        return tensor.reshape(self.shape[inputs:] + self.shape[:inputs]).transpose(axes)

    @property
    def order(self) -> tuple[int, ...]:
        """The slice's axes as they lie in the tensor, the outermost first."""
        inputs = len(self.shape) - self.outputs
        return (*range(inputs, len(self.shape)), *range(inputs))


def parts(gpt2: bool, arrays: dict[str, tuple[int, ...]], vocab_size: int) -> dict[str, list[Part]]:
    """Of each array, given by its shape, the parts by layer; one part where it has no layers."""
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
    """Of a region of an array: each part that it touches, where that is in the region, and where in the part."""
    if len(region) == len(parts[0].shape):
        yield parts[0], (), region
        return
    for index, layer in enumerate(range(region[0].start, region[0].stop)):
        yield parts[layer], (index,), region[1:]


def check(tensors: dict[str, Tensor], parts: dict[str, list[Part]], where) -> None:
    """Raises: Refused, for tensors that are missing, too many, or of another shape or dtype."""
    wanted = {part.tensor: part for each in parts.values() for part in each}
    for name, part in wanted.items():
        if name not in tensors:
            raise Refused(f"{where} has no tensor {name}, which its config.json asks for: fetch the folder again.")
        if tensors[name].shape != part.tensor_shape:
            raise Refused(
                f"{where} has {name} of shape {tensors[name].shape}, and its config.json makes it {part.tensor_shape}: "
                "correct one of them."
            )
        if tensors[name].dtype not in DTYPES:
            raise Refused(
                f"{where} has {name} in {tensors[name].dtype}, and {', '.join(DTYPES)} are read: convert it before."
            )
    if extra := [name for name in tensors if name not in wanted and not BUFFERS.fullmatch(name)]:
        raise Refused(
            f"{where} has {len(extra)} tensors that its config.json does not ask for, such as {extra[0]}: it is not a "
            "plain model of its kind."
        )


def named(tensors: dict[str, Tensor], tied: bool) -> dict[str, Tensor]:
    """The tensors by the names that the tables above have, without a copy of a tied embedding.

    GPT-2's own files have no `transformer.` before its names.
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
