"""Machines for rent: names, shapes and descriptors. Figures and their sources are in gptjax/parallel/hardware.py."""

import dataclasses
import math
import re

from gptjax.errors import Refused, nearest
from gptjax.parallel.hardware import CARDS, KINDS, Kind


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for."""

    kind: str
    shape: tuple[int, ...]  # chips along each side of a TPU slice; (cards per host, hosts) of GPUs
    slices: int = 1

    @property
    def name(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    @property
    def figures(self) -> Kind:
        return KINDS[self.kind]

    @property
    def is_tpu(self) -> bool:
        return self.kind not in CARDS

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.figures.devices_per_chip

    @property
    def descriptor(self) -> dict:
        """The arguments of `jax.experimental.topologies.get_topology_desc`."""
        if not self.is_tpu:
            cards, hosts = self.shape
            layout = {"target_config": target_config(self.kind), "topology": f"1x{hosts}x{cards}"}
            return {"platform": "cuda", "topology_name": "aot"} | layout
        wanted = {"platform": "tpu", "topology_name": self.name}
        if self.slices > 1:
            wanted["num_slices"] = self.slices
        if self.kind == "v4":  # on a TPU VM, both cores of a chip form one device
            wanted["chip_config_name"] = "megacore"
        return wanted


def parse(name: str, slices: int) -> Topology:
    """Parses `v5p:8x8x8` (chips of a TPU slice), `h100:8` or `h100:8x4` (cards per host, hosts).

    Raises: Refused, for an unknown kind or a shape that can't be rented.
    """
    kind, colon, shape = name.partition(":")
    if kind not in KINDS:
        raise Refused(f"--topology={name}: unknown accelerator; known are {', '.join(KINDS)}.{nearest(kind, KINDS)}")
    if slices < 1:
        raise Refused(f"--slices={slices} must be at least 1.")
    words = shape.split("x") if colon else []
    if not 0 < len(words) <= 3 or not all(re.fullmatch("[1-9][0-9]{0,4}", word) for word in words):
        example = f"{kind}:{'8' if kind in CARDS else shapes(kind)[-1]}"
        raise Refused(f"--topology={name} must name a shape; write for example {example}.")
    sides = tuple(map(int, words))
    if kind in CARDS:
        if len(sides) > 2 or sides[0] > 8:
            raise Refused(f"--topology={name} must be {kind}:CARDSxHOSTS with at most 8 cards per host.")
        if slices > 1:
            raise Refused(
                f"--slices={slices} must be 1 for GPUs; write the hosts in the shape, as in {kind}:8x{slices}."
            )
        return Topology(kind, (*sides, 1)[:2])
    if "x".join(words) not in shapes(kind):
        chips = math.prod(sides)
        near = sorted(shapes(kind), key=lambda other: abs(math.log(chips / math.prod(map(int, other.split("x"))))))
        most = max(math.prod(map(int, other.split("x"))) for other in shapes(kind))
        more = f" A slice has at most {most} chips; for more, give --slices." if chips > most else ""
        raise Refused(
            f"--topology={name} ({chips} chips) can't be rented; near shapes are "
            f"{', '.join(f'{kind}:{other}' for other in near[:3])}.{more}"
        )
    return Topology(kind, sides, slices)


def shapes(kind: str) -> list[str]:
    """Returns the slices of a TPU kind that can be rented; whole cubes combine into ascending sides up to 24."""
    figures = KINDS[kind]
    sides = range(4, 25, 4)
    cubes = [
        f"{a}x{b}x{c}" for a in sides for b in sides for c in sides if a <= b <= c and a * b * c <= figures.max_chips
    ]
    return [*figures.shapes, *sorted(cubes, key=lambda cube: math.prod(map(int, cube.split("x"))))]


def target_config(kind: str) -> str:
    """Describes a card to XLA's GPU compiler: the text of a `GpuTargetConfigProto`."""
    major, minor, cores, lanes, shared, cache, bandwidth, clock = CARDS[kind]
    return f"""
        platform_name: "CUDA"
        device_description_str: "{KINDS[kind].device_kind}"
        dnn_version_info {{ major: 9 minor: 8 }}
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          core_count: {cores} fpus_per_core: {lanes} clock_rate_ghz: {clock}
          shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared - 1024} shared_memory_per_core: {shared}
          l2_cache_size: {cache} memory_bandwidth: {bandwidth} device_memory_size: {KINDS[kind].hbm_bytes}
          threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
          registers_per_block_limit: 65536 registers_per_core_limit: 65536
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        }}"""
