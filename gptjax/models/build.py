"""The table of architectures, and models built from their configs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptjax.errors import Refused, nearest, shown
from gptjax.models.config import ModelConfig
from gptjax.models.interface import Architecture, LanguageModel

if TYPE_CHECKING:  # configs are parsed before JAX is imported
    import jax

# By `model.architecture`; only the parser of configs reads this table.
ARCHITECTURES = {"transformer": ModelConfig}


def architecture(section) -> type[Architecture]:
    """The dataclass that the section `model` of a config is parsed as. Raises: Refused."""
    name = section.get("architecture", "transformer") if hasattr(section, "get") else "transformer"
    if not isinstance(name, str) or name not in ARCHITECTURES:
        close = nearest(str(name), ARCHITECTURES)
        raise Refused(f"model.architecture={shown(name)} must be one of {', '.join(ARCHITECTURES)}.{close}")
    return ARCHITECTURES[name]


def abstract_model(config: Architecture, vocab_size: int, seq_len: int) -> LanguageModel:
    """Shapes, dtypes and shardings of a model's weights."""
    import jax
    from flax import nnx

    return jax.eval_shape(lambda: config.build(vocab_size, seq_len, nnx.Rngs(0)))


def check_divides(config: Architecture, vocab_size: int, seq_len: int, mesh: jax.sharding.Mesh) -> None:
    """Checks that every weight divides over the mesh. Raises: Refused."""
    import jax

    from gptjax.parallel import sharding
    from gptjax.parallel.mesh import MeshConfig, make_mesh

    # Shapes are made on one device; on the mesh itself JAX would raise an error with words of its own.
    with jax.set_mesh(make_mesh(MeshConfig(), jax.local_devices()[:1])):
        shapes = abstract_model(config, vocab_size, seq_len)
    sharding.check_divides(shapes, mesh, config.axis_keys)
