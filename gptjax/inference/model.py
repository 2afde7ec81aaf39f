"""A trained model, ready for use."""

from typing import Generic, NamedTuple, TypeVar

import jax

from gptjax.models.interface import LanguageModel
from gptjax.tokenizers import tokenizer

Config = TypeVar("Config")  # the run's config, which inference hands on and never reads


class Run(NamedTuple, Generic[Config]):
    """A trained model on this machine's devices.

    Args:
      config: the config that the checkpoint was saved with.
      step: completed updates of the checkpoint.
      mesh: the mesh that the weights lie on.
      model: the weights.
      tokenizer: the tokenizer that the checkpoint brings.
      latest: config.json of the latest start; it locates the token stores.
    """

    config: Config
    step: int
    mesh: jax.sharding.Mesh
    model: LanguageModel
    tokenizer: tokenizer.Tokenizer
    latest: Config
