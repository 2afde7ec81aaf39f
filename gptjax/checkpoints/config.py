"""The config section `checkpoint`; read before JAX is imported."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoints a run keeps."""

    keep: int = 2  # number of the newest checkpoints that stay
    keep_every: int = 0  # checkpoints at multiples of this step stay for good; 0: none
    write_seconds: int = 1800  # a save that takes longer has failed, because lost storage may never answer
