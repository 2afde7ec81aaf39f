"""Converts models from Hugging Face's format into a workdir, and back: tensor by tensor, in pieces of about 64 MB.

A converted model is a workdir with one checkpoint at step 0, which holds the weights alone. The result is written to a
folder beside the target, which is renamed at the end.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import shutil
from collections.abc import Iterator

import jax
import numpy as np
from etils import epath

from gptjax.checkpoints import chunked
from gptjax.checkpoints.manager import Checkpoints
from gptjax.checkpoints.record import RunRecord
from gptjax.checkpoints.retention import at
from gptjax.errors import Failed, Refused
from gptjax.interop.huggingface import safetensors, weights
from gptjax.interop.huggingface.config import Described, family_of, make_config, read_config
from gptjax.interop.huggingface.tokenizer import read_tokenizer, tokenizer_files
from gptjax.models import build
from gptjax.models.lora import Adapters, LoraConfig
from gptjax.parallel import mesh
from gptjax.parallel.mesh import MeshConfig
from gptjax.parallel.trees import named_leaves
from gptjax.runtime.files import check_writable, contents, fill
from gptjax.tokenizers import tokenizer
from gptjax.training import loading, workdir
from gptjax.training.config import schema
from gptjax.training.config.schema import Config


def from_hf(source: str, target: str) -> None:
    """Makes a workdir from a folder with config.json, safetensors and a tokenizer.

    float16 becomes float32, which holds float16 exactly. bfloat16 stays if all weights are bfloat16.

    Raises:
      Refused: something in the folder has no equal here.
      Failed: the workdir can't be written.
    """
    source, target = _local("--source", source), _local("--workdir", target)
    if not source.is_dir():
        raise Refused(f"--source={source} must be a folder with config.json and safetensors; no folder is there.")
    described = read_config(source)
    gpt2 = described.family == "gpt2"
    tensors = weights.named(safetensors.found(source), described.model["tied_embeddings"])
    model = schema.parse({"model": described.model}).model
    asked = model.num_parameters(described.vocab_size, described.seq_len).total
    held = sum(math.prod(tensor.shape) for tensor in tensors.values())
    if asked > 4 * held + (1 << 20):  # before sizes decide any layout; `weights.check` finds smaller differences
        raise Refused(
            f"{source / 'config.json'} describes {asked:,} parameters, and the tensors in the same folder hold "
            f"{held:,}; correct config.json."
        )
    taken = read_tokenizer(source, described.vocab_size, described.ends, described.begin)
    config = _config(described, tensors, taken.tokenizer)
    shapes = _shapes(config, described.vocab_size)
    parts = weights.parts(gpt2, shapes, described.vocab_size)
    weights.check(tensors, parts, source)
    with _new_folder("--workdir", target) as folder:
        checkpoints = folder / "checkpoints"
        state = at(checkpoints, workdir.CONVERTED) / "state"
        arrays = {}
        for name, shape in shapes.items():
            order = parts[name][0].order
            order = order if len(order) == len(shape) else (0, *(axis + 1 for axis in order))
            leaf = f"model.{name}"
            arrays[leaf] = array = chunked.create(state, leaf, shape, config.model.param_dtype, order)
            for region in chunked.regions(array):
                block = _gathered(parts[name], region, tensors, array.dtype.numpy_dtype)
                chunked.write(array, region, block)
        record = RunRecord(dataclasses.asdict(config), taken.tokenizer.hash, {}, taken.files)
        chunked.seal(checkpoints, workdir.CONVERTED, record, arrays)
        (folder / "tokenizer").mkdir()
        for name, content in taken.files.items():
            (folder / "tokenizer" / name).write_bytes(content)
        workdir.write_config(config, folder)
    print(f"wrote {target}: {_summary(described.family, shapes, config.model.param_dtype)}")
    if taken.note:
        print(f"Note: {taken.note}")


def to_hf(folder: epath.Path, target: str, step: int | str, shard_bytes: int = safetensors.SHARD_BYTES) -> None:
    """Writes a checkpoint as a folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer` load.

    Args:
      folder: the workdir.
      target: the new folder.
      step: the checkpoint, as in `loading.chosen`.
      shard_bytes: bytes of weights in one file, at most.

    Raises:
      Refused: no family of Hugging Face computes this model.
      Failed: the folder can't be written.
    """
    target = _local("--target", target)
    workdir.read_config(folder)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        step = loading.chosen(checkpoints, folder, step)
        record = checkpoints.record(step)
        config = schema.parse(record.config)
        family = family_of(config.model)
        known = loading.saved_tokenizer(record, f"{checkpoints.folder} (step {step})")
        shapes, adapters = _shapes(config, known.vocab_size), _adapters(config, known.vocab_size)
        part = "ema" if config.optimizer.ema_decay else "model"
        whole = "base" if adapters else part
        asked = {f"{whole}.{name}": shape for name, shape in shapes.items()}
        asked |= {f"{part}.{name}": shape for name, shape in adapters.items()}
        checkpoints.check_shapes(step, {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in asked.items()})
    parts = weights.parts(family == "gpt2", shapes, known.vocab_size)
    state = at(checkpoints.folder, step) / "state"
    arrays = {name: chunked.read(state, f"{whole}.{name}", shape) for name, shape in shapes.items()}
    sides = {name: chunked.read(state, f"{part}.{name}", shape) for name, shape in adapters.items()}
    dtypes = {name: array.dtype.name for name, array in arrays.items()}
    texts, ends, note = tokenizer_files(record.tokenizer, known, config.seq_len)
    spelled = {"float32": "F32", "bfloat16": "BF16"}
    wanted = {each.tensor: (spelled[dtypes[name]], each.tensor_shape) for name in shapes for each in parts[name]}
    with _new_folder("--target", target) as made:
        described = make_config(family, config.model, known.vocab_size, config.seq_len, dtypes["embedding"], ends)
        for name, content in {"config.json": described, "generation_config.json": ends}.items():
            (made / name).write_text(json.dumps(content, indent=2) + "\n")
        for name, content in texts.items():
            (made / name).write_bytes(content)
        tensors = safetensors.create(pathlib.Path(made), wanted, shard_bytes)
        for name, array in arrays.items():
            for region in chunked.regions(array):
                block, matrix = chunked.piece(array, region), name.removeprefix("blocks.")
                if f"{matrix}.a" in sides:
                    block = _adapted(block, region, sides[f"{matrix}.a"], sides[f"{matrix}.b"], config.lora)
                _scatter(block, parts[name], region, tensors)
    print(f"wrote {target}: {_summary(family, shapes, dtypes['embedding'])}, step {step}")
    if note:
        print(f"Note: {note}")


def _config(described: Described, tensors: dict, known: tokenizer.Tokenizer) -> Config:
    """Makes the config with which a run would build the model. Raises: Refused."""
    dtypes = {tensor.dtype for name, tensor in tensors.items() if not weights.BUFFERS.fullmatch(name)}
    dtype = "bfloat16" if dtypes == {"BF16"} else "float32"
    kind = next(kind for kind, of in KINDS.items() if isinstance(known, of))
    values = {
        "seq_len": described.seq_len,
        "model": described.model | {"dtype": dtype, "param_dtype": dtype},
        "loss": {"num_chunks": math.gcd(8, described.seq_len)},
        "tokenizer": {"kind": kind, "vocab_size": known.vocab_size},
    }
    return schema.parse(values)


KINDS = {
    "byte": tokenizer.ByteTokenizer,
    "sentencepiece": tokenizer.SentencePieceTokenizer,
    "huggingface": tokenizer.HuggingFaceTokenizer,
}


def _shapes(config: Config, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each array of a model, by name."""
    with jax.set_mesh(mesh.make_mesh(MeshConfig(), mesh.devices()[:1])):
        return {
            name: leaf.shape
            for name, leaf in named_leaves(build.abstract_model(config.model, vocab_size, config.seq_len)).items()
        }


def _adapters(config: Config, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of LoRA's two factors by name of the matrix; nothing for a model without LoRA."""
    if not config.lora.rank:
        return {}
    with jax.set_mesh(mesh.make_mesh(MeshConfig(), mesh.devices()[:1])):
        made = jax.eval_shape(
            lambda model: Adapters(model, config.lora, 0),
            build.abstract_model(config.model, vocab_size, config.seq_len),
        )
        return {name: leaf.shape for name, leaf in named_leaves(made).items()}


def _adapted(block: np.ndarray, region: tuple[slice, ...], a, b, lora: LoraConfig) -> np.ndarray:
    """Adds LoRA's product to a region of a matrix, like `lora.merged`, but in the matrix's own dtype."""
    layers, inputs, outputs = region[0], region[1 : len(a.shape) - 1], region[len(a.shape) - 1 :]
    a, b = chunked.piece(a, (layers, *inputs, slice(None))), chunked.piece(b, (layers, slice(None), *outputs))
    product = a.reshape(len(a), -1, lora.rank) @ b.reshape(len(b), lora.rank, -1)
    return (block + lora.alpha / lora.rank * product.reshape(block.shape)).astype(block.dtype)


def _gathered(parts: list[weights.Part], region: tuple[slice, ...], tensors: dict, dtype: np.dtype) -> np.ndarray:
    """Reads a region of one of our arrays from Hugging Face's tensors; rows that pad the vocabulary are 0."""
    block = np.zeros([cut.stop - cut.start for cut in region], dtype)
    for part, where, inside in weights.within(parts, region):
        piece = part.view(tensors[part.tensor].mapped())[inside]
        block[where][tuple(slice(size) for size in piece.shape)] = piece
    return block


def _scatter(block: np.ndarray, parts: list[weights.Part], region: tuple[slice, ...], tensors: dict) -> None:
    """Writes a region of one of our arrays into Hugging Face's tensors, without rows that pad the vocabulary."""
    for part, where, inside in weights.within(parts, region):
        piece = part.view(tensors[part.tensor].mapped("r+"))[inside]
        piece[...] = block[where][tuple(slice(size) for size in piece.shape)]


def _summary(family: str, shapes: dict, dtype: str) -> str:
    count = sum(math.prod(shape) for shape in shapes.values())
    return f"{family} of {count:,} parameters in {dtype}"


def _local(flag: str, path: str) -> epath.Path:
    if "://" in path:
        raise Refused(
            f"{flag}={path} must be on a local disk, since files are mapped into memory; copy the folder here."
        )
    return epath.Path(path).absolute()


@contextlib.contextmanager
def _new_folder(flag: str, target: epath.Path) -> Iterator[epath.Path]:
    """Context manager. Yields a temporary folder, renamed to `target` on success and removed on failure.

    An empty target that exists is filled from a folder inside of it, since a mount can't be renamed over.

    Raises:
      Refused: the target is not empty.
      Failed: the disk can't be written.
    """
    check_writable(target, flag)
    there = target.is_dir()
    made = target / "partial" if there else target.with_name(f"{target.name}.partial")
    if any(path != made for path in contents(target)):
        raise Refused(f"{flag}={target} must be a new or empty folder; found files there.")
    try:
        shutil.rmtree(made, ignore_errors=True)  # left by a killed conversion
        made.mkdir(parents=True)
        yield made
        if there:
            fill(target, made, last="config.json")
        else:
            made.replace(target)
    except OSError as error:
        raise Failed(
            f"{target} can't be written ({error.strerror or error}); make room, or give another {flag}."
        ) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
