"""Builds a model from its config."""

import jax
from flax import nnx

from gptjax.models.config import AXIS_KEYS, ModelConfig
from gptjax.models.transformer import Transformer
from gptjax.parallel import sharding
from gptjax.parallel.mesh import MeshConfig, make_mesh


def abstract_model(config: ModelConfig, vocab_size: int, seq_len: int) -> Transformer:
    """Shapes, dtypes and shardings of a model's weights."""
    return jax.eval_shape(lambda: Transformer(config, vocab_size, seq_len, nnx.Rngs(0)))


def check_divides(config: ModelConfig, vocab_size: int, seq_len: int, mesh: jax.sharding.Mesh) -> None:
    """Checks that every weight divides over the mesh. Raises: Refused."""
    # Shapes on one device: on the mesh itself JAX would raise, in words of its own.
    with jax.set_mesh(make_mesh(MeshConfig(), jax.local_devices()[:1])):
        shapes = abstract_model(config, vocab_size, seq_len)
    sharding.check_divides(shapes, mesh, AXIS_KEYS)
