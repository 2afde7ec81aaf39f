"""Models of Hugging Face, taken for a workdir and given back: tensor by tensor, through pieces of some 64 MB.

A converted model is a workdir with one checkpoint, of step 0, which holds the weights alone. What is made is made beside
its place, and renamed at the end.
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
from gptjax.interop.huggingface import config as architectures
from gptjax.interop.huggingface import safetensors, weights
from gptjax.interop.huggingface import tokenizer as carried
from gptjax.models import build
from gptjax.models.lora import Adapters, LoraConfig
from gptjax.models.size import num_parameters
from gptjax.parallel import mesh
from gptjax.parallel.mesh import MeshConfig
from gptjax.parallel.trees import named_leaves
from gptjax.runtime.files import check_writable
from gptjax.tokenizers import tokenizer
from gptjax.training import loading, workdir
from gptjax.training.config import schema
from gptjax.training.config.schema import Config


def from_hf(source: str, target: str) -> None:
    """Makes a workdir of a folder with config.json, safetensors and a tokenizer.

    float16 becomes float32, which holds it exactly; bfloat16 stays where nothing is in another dtype.

    Raises: Refused, for what has no equal here; Failed, where it can't be written.
    """
    source, target = _local("--source", source), _local("--workdir", target)
    if not source.is_dir():
        raise Refused(f"--source={source} is no folder: give one that holds config.json and safetensors.")
    described = architectures.read(source)
    gpt2 = described.family == "gpt2"
    tensors = weights.named(safetensors.found(source), described.model["tied_embeddings"])
    model = schema.parse({"model": described.model}).model
    asked = num_parameters(model, described.vocab_size, described.seq_len)
    held = sum(math.prod(tensor.shape) for tensor in tensors.values())
    if asked > 4 * held + (1 << 20):  # before anything is laid out by its sizes; `layout.check` tells what is otherwise
        raise Refused(
            f"{source / 'config.json'} describes {asked:,} parameters, and the tensors beside it hold {held:,}: correct it."
        )
    taken = carried.taken(source, described.vocab_size, described.ends)
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
    print(f"wrote {target}: {_told(described.family, shapes, config.model.param_dtype)}")
    if taken.note:
        print(f"Note: {taken.note}")


def to_hf(folder: epath.Path, target: str, step: int | str, shard_bytes: int = safetensors.SHARD_BYTES) -> None:
    """Makes a folder of a checkpoint that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer` load.

    Args:
      step: as of `workdir.chosen`. shard_bytes: of weights that a file has at most.

    Raises: Refused, for a model that none of Hugging Face's computes; Failed, where it can't be written.
    """
    target = _local("--target", target)
    workdir.read_config(folder)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        step = loading.chosen(checkpoints, folder, step)
        record = checkpoints.record(step)
        config = schema.parse(record.config)
        family = architectures.family_of(config.model)
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
    texts, ends, note = carried.given(record.tokenizer, known, config.seq_len)
    spelled = {"float32": "F32", "bfloat16": "BF16"}
    wanted = {each.tensor: (spelled[dtypes[name]], each.tensor_shape) for name in shapes for each in parts[name]}
    with _new_folder("--target", target) as made:
        described = architectures.written(
            family, config.model, known.vocab_size, config.seq_len, dtypes["embedding"], ends
        )
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
    print(f"wrote {target}: {_told(family, shapes, dtypes['embedding'])}, step {step}")
    if note:
        print(f"Note: {note}")


def _config(described: architectures.Described, tensors: dict, known: tokenizer.Tokenizer) -> Config:
    """What a run of a model would have said of it. Raises: Refused."""
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
    """The shape of each array of a model, by name."""
    with jax.set_mesh(mesh.make_mesh(MeshConfig(), jax.local_devices()[:1])):
        return {
            name: leaf.shape
            for name, leaf in named_leaves(build.abstract_model(config.model, vocab_size, config.seq_len)).items()
        }


def _adapters(config: Config, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """The shapes of LoRA's two sides of each matrix, by its name; of a model without, none."""
    if not config.lora.rank:
        return {}
    with jax.set_mesh(mesh.make_mesh(MeshConfig(), jax.local_devices()[:1])):
        made = jax.eval_shape(
            lambda model: Adapters(model, config.lora, 0),
            build.abstract_model(config.model, vocab_size, config.seq_len),
        )
        return {name: leaf.shape for name, leaf in named_leaves(made).items()}


def _adapted(block: np.ndarray, region: tuple[slice, ...], a, b, lora: LoraConfig) -> np.ndarray:
    """A region of a matrix with what LoRA adds to it: as `lora.merged`, but in the matrix's own dtype."""
    layers, inputs, outputs = region[0], region[1 : len(a.shape) - 1], region[len(a.shape) - 1 :]
    a, b = chunked.piece(a, (layers, *inputs, slice(None))), chunked.piece(b, (layers, slice(None), *outputs))
    product = a.reshape(len(a), -1, lora.rank) @ b.reshape(len(b), lora.rank, -1)
    return (block + lora.alpha / lora.rank * product.reshape(block.shape)).astype(block.dtype)


def _gathered(parts: list[weights.Part], region: tuple[slice, ...], tensors: dict, dtype: np.dtype) -> np.ndarray:
    """A region of one of our arrays from their tensors; 0 where the vocabulary is padded."""
    block = np.zeros([cut.stop - cut.start for cut in region], dtype)
    for part, where, inside in weights.within(parts, region):
        piece = part.view(tensors[part.tensor].mapped())[inside]
        block[where][tuple(slice(size) for size in piece.shape)] = piece
    return block


def _scatter(block: np.ndarray, parts: list[weights.Part], region: tuple[slice, ...], tensors: dict) -> None:
    """Writes a region of one of our arrays into their tensors, but for what pads the vocabulary."""
    for part, where, inside in weights.within(parts, region):
        piece = part.view(tensors[part.tensor].mapped("r+"))[inside]
        piece[...] = block[where][tuple(slice(size) for size in piece.shape)]


def _told(family: str, shapes: dict, dtype: str) -> str:
    count = sum(math.prod(shape) for shape in shapes.values())
    return f"{family} of {count:,} parameters in {dtype}"


def _local(flag: str, path: str) -> epath.Path:
    if "://" in path:
        raise Refused(f"{flag}={path} is not on a local disk, and files are mapped into memory: copy it here.")
    return epath.Path(path).absolute()


@contextlib.contextmanager
def _new_folder(flag: str, target: epath.Path) -> Iterator[epath.Path]:
    """A folder that takes its name when all of it is there, and of which otherwise nothing stays.

    Raises: Refused, where the name is taken; Failed, for a disk that can't be written.
    """
    check_writable(target, flag)
    if target.exists() and any(target.iterdir()):
        raise Refused(f"{flag}={target} is not empty: give a new folder.")
    beside = target.with_name(f"{target.name}.partial")
    try:
        shutil.rmtree(beside, ignore_errors=True)  # of a conversion that was killed
        beside.mkdir(parents=True)
        yield beside
        beside.replace(target)
    except OSError as error:
        raise Failed(
            f"{target} can't be written ({error.strerror or error}): make room, or give another {flag}."
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
