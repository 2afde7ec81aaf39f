"""Estimates the needs of a train step from shapes alone, without compiling and without devices.

The step is traced on an abstract mesh of the topology, so shapes, shardings and the choice of kernels are real.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.data.batch import Batch
from gptjax.models import build
from gptjax.models.config import padded_vocab
from gptjax.models.objective import batch_sums
from gptjax.parallel import batches, sharding
from gptjax.parallel.mesh import AXES, mesh_shape
from gptjax.parallel.trees import is_param
from gptjax.parallel.xla import flops
from gptjax.planning.topology import Topology
from gptjax.tokenizers.tokenizer import expected_vocab_size
from gptjax.training import step
from gptjax.training.config import schema
from gptjax.training.config.schema import Config


class Shapes(NamedTuple):
    """The arguments of a step as shapes, without contents."""

    mesh: jax.sharding.AbstractMesh
    state: step.TrainState
    batch: Batch


def abstract_mesh(config: Config, topology: Topology) -> jax.sharding.AbstractMesh:
    """Makes the mesh of a config on a topology, without devices. Raises: Refused, for sizes that do not fit."""
    *sizes, tensor = mesh_shape(config.mesh, topology.num_devices, topology.slices)
    device = jax.sharding.AbstractDevice(
        device_kind=topology.figures.device_kind, num_cores=None, platform="tpu" if topology.is_tpu else "gpu"
    )
    explicit = (jax.sharding.AxisType.Explicit,) * len(AXES)
    # `ring` is a part of `fsdp` that only real devices show.
    return jax.sharding.AbstractMesh((*sizes, 1, tensor), AXES, axis_types=explicit, abstract_device=device)


def shapes(config: Config, mesh: jax.sharding.AbstractMesh) -> Shapes:
    """Returns the state and batch of a config on a mesh. Raises: Refused, if they do not divide over the mesh."""
    schema.check_batch(config, mesh)
    build.check_divides(config.model, expected_vocab_size(config.tokenizer), config.seq_len, mesh)
    with jax.sharding.use_abstract_mesh(mesh):
        state = step.abstract_state(config, expected_vocab_size(config.tokenizer), mesh)
    return Shapes(mesh, state, step.abstract_batch(config, mesh))


def shard_bytes(tree, memory: str = "device", itemsize: int = 0) -> int:
    """Returns the bytes of a device's part of a tree, in one kind of memory.

    Args:
      tree: arrays or shapes with shardings.
      memory: "device", or "pinned_host" for the memory of the host.
      itemsize: bytes per element; 0 uses the dtype of each leaf.
    """
    total = 0
    for leaf in jax.tree.leaves(tree):
        if (leaf.sharding.memory_kind or "device") == memory:
            total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * (itemsize or leaf.dtype.itemsize)
    return total


def step_flops(config: Config, given: Shapes) -> int:
    """Counts the FLOPs of the matrix products of a step over all devices, recomputation included."""
    with jax.sharding.use_abstract_mesh(given.mesh):
        traced = step.train_step.trace(
            given.state, given.batch, config=config, vocab_size=expected_vocab_size(config.tokenizer)
        )
    return flops.executed(traced, config.model.sliding_window)


class Kept(NamedTuple):
    """Bytes per device that the forward pass of a micro-batch leaves for the backward pass."""

    device: int
    host: int


def kept(config: Config, given: Shapes) -> Kept:
    """Returns the bytes that the rematerialization policy keeps, from the traced gradient, without weights."""

    def leftovers(model, micro):
        def objective(model):
            sums = batch_sums(model, micro, None, vocab_size=expected_vocab_size(config.tokenizer), loss=config.loss)
            return sums.objective

        return jax.tree.leaves(jax.vjp(objective, model)[1])

    with jax.sharding.use_abstract_mesh(given.mesh):
        micro = jax.tree.map(first, given.batch)
        leaves = jax.eval_shape(leftovers, given.state.model, micro)
    weights = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(given.state.model)}
    kept = [leaf for leaf in leaves if (leaf.shape, leaf.dtype) not in weights and leaf.sharding is not None]
    return Kept(shard_bytes(kept), shard_bytes(kept, "pinned_host"))


def first(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Returns the shape of one micro-batch of a batch."""
    place = jax.NamedSharding(leaf.sharding.mesh, jax.P(*leaf.sharding.spec[1:]))
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=place)


def chunk_bytes(config: Config, given: Shapes) -> int:
    """Returns the bytes per device of the largest float32 logits in the loss, and of their gradient."""
    rows = config.micro_batch_size // batches.row_shards(given.mesh)
    columns = padded_vocab(expected_vocab_size(config.tokenizer)) // given.mesh.shape["tensor"]
    return 2 * 4 * rows * (config.seq_len // config.loss.num_chunks) * columns


def collectives(config: Config, given: Shapes) -> dict[tuple[str, str], int]:
    """Maps (operation, mesh axes) to bytes of the arrays of a step, counted like `communication.Collective.bytes`.

    fsdp: every cut weight is gathered in the compute dtype; blocks once forward and once backward, embeddings once.
    Gradients are reduced once (ZeRO-3, Rajbhandari et al. 2020, section 7.2).
    data, slices: a device's part of the gradients is summed once.
    The activations' part is the architecture's (`expected_collectives`).
    """
    sizes, item = given.mesh.shape, jnp.dtype(config.model.dtype).itemsize
    cut = {True: 0, False: 0}
    for param in jax.tree.leaves(given.state.model, is_leaf=is_param):
        if any(sharding.fully_sharded(name) for name in param.axes):
            cut[bool(param.stacked)] += param.size * item // (sizes["tensor"] if shared(param) else 1)
    gradients = shard_bytes(given.state.model, itemsize=item)
    expected = {
        ("all-gather", "fsdp"): 2 * cut[True] + cut[False],
        ("reduce-scatter", "fsdp"): cut[True] + cut[False],
        ("all-reduce", "data"): gradients,
        ("all-reduce", "slices"): gradients,
    }
    rows = config.micro_batch_size // batches.row_shards(given.mesh)
    expected |= config.model.expected_collectives(given.mesh, rows, config.seq_len)
    sharded = {axis: size for axis, size in sizes.items() if size > 1} | (
        {"fsdp": 0} if sizes.get("ring", 1) > 1 else {}
    )
    return {key: config.grad_accum_steps * size for key, size in expected.items() if key[1] in sharded}


def shared(param) -> bool:
    """Tells whether a weight is cut over `tensor`."""
    return any(sharding.LOGICAL_AXES[name] == "tensor" for name in param.axes)
