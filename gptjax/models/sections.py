"""The config sections `loss` and `lora`; read before JAX is imported."""

import dataclasses

from gptjax.errors import Refused


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """How the loss is computed."""

    z_loss: float = 0.0  # weight of log²(partition function) (PaLM, Chowdhery et al. 2022, section 5); 1e-4 is usual
    num_chunks: int = 8  # pieces of the sequence; only the logits of a single piece are in memory at a time


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Adapters that are trained in place of the weights, in a run with init_from (Hu et al. 2021)."""

    rank: int = 0  # columns of A and rows of B; 0: all weights are trained, without adapters
    alpha: float = 16.0  # the added product is A · B times alpha / rank


def check_lora(config: LoraConfig, init_from: str) -> None:
    """Raises: Refused."""
    if config.rank < 0 or config.alpha <= 0:
        raise Refused(f"lora.rank={config.rank} must not be negative, and lora.alpha={config.alpha} be more than 0.")
    if config.rank and not init_from:
        raise Refused(
            f"lora.rank={config.rank} adds adapters to an existing model, and init_from is empty: name a workdir "
            "with a model."
        )
