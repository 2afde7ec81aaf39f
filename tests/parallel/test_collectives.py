"""The collectives of the compiled step on each mesh; no array that should be cut is held whole."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from support.runs import LLAMA, tiny

from gptjax.models.config import padded_vocab
from gptjax.parallel import batches, sharding
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.parallel.xla import communication, hlo
from gptjax.training import step

VOCAB = 257
SMALL = 2048  # bytes: losses, norms, gains, and the loss's maxima and sums over the vocabulary
MESHES = [
    (1, 1, 1, 1),
    (1, 8, 1, 1),
    (1, 1, 8, 1),
    (1, 1, 2, 4),
    (1, 2, 2, 2),
    (2, 1, 2, 2),
    (2, 2, 2, 1),
    (2, 1, 4, 1),
]
QUICK = [(1, 1, 2, 4), (1, 2, 2, 2)]


@pytest.fixture
def uncached():
    """Turns the compilation cache off, since a cached program gives no warnings."""
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()


def compile_on(slices, data, fsdp, tensor):
    """Returns (config, mesh, abstract state, text of the program) of the tiny Llama's step."""
    devices = jax.devices()[: slices * data * fsdp * tensor]
    mesh = make_mesh(MeshConfig(data, fsdp, tensor, slices), devices)
    config = tiny(LLAMA)
    with jax.set_mesh(mesh):
        state = step.abstract_state(config, VOCAB, mesh)
        return config, mesh, state, step.compile_step(config, VOCAB, state, mesh).as_text()


@pytest.mark.parametrize(
    "shape", [pytest.param(mesh, marks=() if mesh in QUICK else pytest.mark.slow, id=str(mesh)) for mesh in MESHES]
)
def test_collectives_are_those_of_the_mesh_and_no_others(shape, capfd, uncached):
    config, mesh, state, text = compile_on(*shape)
    assert WARNING not in capfd.readouterr().err
    sizes = mesh.shape
    rows = communication.collectives(hlo.parse(text), list(sizes.items()), range(mesh.size), 1)
    found = {(row.operation, row.axes): row.bytes for row in rows if row.bytes > SMALL}
    assert all(row.operation == "all-reduce" for row in rows if row.bytes <= SMALL)

    params = jax.tree.leaves(state.model, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
    # Bytes of the weights that full sharding cuts, still cut over `tensor`: the blocks, and the two tables.
    block, table = (
        4 * sum(p.size for p in params if "embed" in p.axes and (p.axes[0] == "layers") == layers) // sizes["tensor"]
        for layers in (True, False)
    )
    replicas = "+".join(axis for axis in ("slices", "data") if sizes[axis] > 1)
    stream = 4 * config.batch_size // batches.row_shards(mesh) * config.seq_len * config.model.embed_dim
    expected = {}
    if sizes["fsdp"] > 1:
        expected["all-gather", "fsdp"] = 2 * block + table  # blocks again for the backward pass
        expected["reduce-scatter", "fsdp"] = block + table
    if replicas:
        expected["all-reduce", replicas] = (block + table) // sizes["fsdp"]
    if sizes["tensor"] > 1:
        layers = config.model.num_layers
        expected["all-gather", "tensor"] = (4 * layers + 2) * stream
        expected["reduce-scatter", "tensor"] = (4 * layers + 2) * stream
    near = {key: pytest.approx(size, abs=SMALL) for key, size in expected.items()}  # gains are summed along
    assert found == near


WARNING = "Involuntary full rematerialization"


def test_the_warning_would_be_seen(capfd, uncached):
    """Moves a matrix from a cut both ways to a cut by rows alone, over axes in another order."""
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    before, after = jax.NamedSharding(mesh, jax.P("c", "b")), jax.NamedSharding(mesh, jax.P(("a", "c", "b"), None))
    matrix = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=before)
    jax.jit(lambda matrix: matrix + 1, out_shardings=after).lower(matrix).compile()
    assert WARNING in capfd.readouterr().err


@pytest.mark.parametrize("shape", [(1, 1, 8, 1), (2, 1, 2, 2)], ids=str)
def test_nothing_is_whole_that_is_cut(shape):
    """No device's program holds a whole stacked weight, gradient or moment, or the logits of a whole sequence."""
    config, mesh, state, text = compile_on(*shape)
    for param in jax.tree.leaves(state.model, is_leaf=lambda leaf: isinstance(leaf, nnx.Param)):
        if param.axes[0] == "layers" and "embed" in param.axes:
            cut = [mesh.shape["tensor"] if sharding.LOGICAL_AXES[name] == "tensor" else 1 for name in param.axes]
            gathered = ",".join(str(size // parts) for size, parts in zip(param.shape, cut, strict=True))
            assert f"[{gathered}]" not in text
            own = ",".join(map(str, param.sharding.shard_shape(param.shape)))
            assert f"[{own}]" in text
    vocab = padded_vocab(VOCAB) // mesh.shape["tensor"]
    assert f",{config.seq_len // config.loss.num_chunks},{vocab}]" in text
    assert f",{config.seq_len},{vocab}]" not in text
