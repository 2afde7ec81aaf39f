"""The config section `mesh`; read before JAX is imported."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes. One of them may be -1, which takes the devices that the others leave."""

    data: int = 1  # replicas of the whole model
    fsdp: int = -1  # weights, gradients and optimizer state are cut over this many devices, and gathered for use
    tensor: int = 1  # heads, MLP, vocabulary and the sequence between blocks are cut over this many devices
    slices: int = 0  # replicas joined by the data-centre network; 0: the number of TPU slices, 1 on other devices
