"""Machines that can be rented: their names, shapes, and stated figures, each with its source."""

import dataclasses
import math
import re

from gptjax.errors import Refused, nearest
from gptjax.training.monitoring.metrics import PEAK_BF16_FLOPS

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of accelerator, by device as JAX counts them. None where no source was found."""

    device_kind: str  # as JAX calls it
    hbm_bytes: int  # what a program can have
    clock: float | None  # Hz, of the compiler's cycle estimates
    ici_bytes: float  # a second out of a device to others of its slice (of its host, for GPUs), over all its links
    dcn_bytes: float | None  # a second out of a device between slices (between hosts, for GPUs)
    devices_per_chip: int = 1
    shapes: tuple[str, ...] = ()  # of TPU slices: below a cube of 4x4x4, or all of them where the torus is flat
    max_chips: int = 0  # of TPU slices that are made of cubes

    @property
    def peak_flops(self) -> float:
        """Dense bfloat16 FLOP/s."""
        return PEAK_BF16_FLOPS[self.device_kind]


FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
BELOW_A_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")

# TPUs. Links and shapes: Google Cloud's page of each version ("TPU v5e" … "TPU7x") and Kubernetes Engine's table
# of topologies; links are half of the "bidirectional ICI bandwidth", and between slices a pod's DCN bandwidth over its
# chips. v4's links: Jouppi et al. 2023, table 4. Memory: what libtpu 0.0.52 calls available when a program does not
# fit. Clock: the peak over the FLOPs that the matrix units do in a cycle; v6e's is an assumption (one 8192³ product is
# 70 % of the peak by it, 88 to 93 % on the others), and for tpu7x there is none.
# GPUs. The SXM cards' data sheets, without sparsity; NVLink's total counts both directions. Between hosts: one adapter
# a card, as in NVIDIA's DGX A100, H100, H200 and B200.
KINDS = {
    "v4": Kind("TPU v4", int(30.75 * GIB), 1.05e9, 300e9, None, shapes=BELOW_A_CUBE, max_chips=4096),
    "v5e": Kind("TPU v5 lite", int(15.75 * GIB), 1.5e9, 200e9, 3.125e9, shapes=FLAT),
    "v5p": Kind("TPU v5", int(95.73 * GIB), 1.75e9, 600e9, 6.25e9, shapes=BELOW_A_CUBE, max_chips=6144),
    "v6e": Kind("TPU v6 lite", int(31.24 * GIB), 1.75e9, 400e9, 12.5e9, shapes=FLAT),
    "tpu7x": Kind("TPU7x", int(94.74 * GIB), None, 300e9, 6.25e9, 2, BELOW_A_CUBE, 9216),
    "a100": Kind("NVIDIA A100-SXM4-80GB", 80 * GIB, None, 300e9, 25e9),
    "h100": Kind("NVIDIA H100 80GB HBM3", 80 * GIB, None, 450e9, 50e9),
    "h200": Kind("NVIDIA H200", 141 * GIB, None, 450e9, 50e9),
    "b200": Kind("NVIDIA B200", 180 * GIB, None, 900e9, 50e9),
}

# What the compiler has to know of a card (CUDA C++ programming guide, "Compute capabilities", and the data sheets):
# compute capability, streaming multiprocessors, their float32 lanes and shared memory, level-2 cache,
# memory's bytes a second, GHz.
CARDS = {
    "a100": (8, 0, 108, 64, 167_936, 41_943_040, 2_039_000_000_000, 1.41),
    "h100": (9, 0, 132, 128, 233_472, 52_428_800, 3_350_000_000_000, 1.98),
    "h200": (9, 0, 132, 128, 233_472, 52_428_800, 4_800_000_000_000, 1.98),
    "b200": (10, 0, 148, 128, 233_472, 132_644_864, 8_000_000_000_000, 1.965),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for."""

    kind: str
    shape: tuple[int, ...]  # chips along each side of a TPU slice; (cards a host, hosts) of GPUs
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
        if self.kind == "v4":  # both cores of a chip as one device, as on a TPU VM
            wanted["chip_config_name"] = "megacore"
        return wanted


def parse(name: str, slices: int) -> Topology:
    """Of `v5p:8x8x8` (chips of a TPU slice), `h100:8` or `h100:8x4` (cards a host, hosts).

    Raises: Refused, for a kind that is not known or a shape that can't be rented.
    """
    kind, colon, shape = name.partition(":")
    if kind not in KINDS:
        raise Refused(f"--topology={name} is of no known kind: {', '.join(KINDS)} are.{nearest(kind, KINDS)}")
    if slices < 1:
        raise Refused(f"--slices={slices} must be at least 1.")
    words = shape.split("x") if colon else []
    if not 0 < len(words) <= 3 or not all(re.fullmatch("[1-9][0-9]{0,4}", word) for word in words):
        raise Refused(f"--topology={name} has no shape: write {kind}:{'8' if kind in CARDS else shapes(kind)[-1]}.")
    sides = tuple(map(int, words))
    if kind in CARDS:
        if len(sides) > 2 or sides[0] > 8:
            raise Refused(f"--topology={name} is no shape of GPUs: write {kind}:CARDSxHOSTS with at most 8 a host.")
        if slices > 1:
            raise Refused(f"--slices={slices} is for TPUs: for GPUs write the hosts as in {kind}:8x{slices}.")
        return Topology(kind, (*sides, 1)[:2])
    if "x".join(words) not in shapes(kind):
        chips = math.prod(sides)
        near = sorted(shapes(kind), key=lambda other: abs(math.log(chips / math.prod(map(int, other.split("x"))))))
        most = max(math.prod(map(int, other.split("x"))) for other in shapes(kind))
        more = f" A slice has at most {most} chips: for more, give --slices." if chips > most else ""
        raise Refused(
            f"--topology={name} ({chips} chips) can't be rented: near it are "
            f"{', '.join(f'{kind}:{other}' for other in near[:3])}.{more}"
        )
    return Topology(kind, sides, slices)


def shapes(kind: str) -> list[str]:
    """Slices of a TPU kind that can be rented; whole cubes are put together with sides in ascending order, up to 24."""
    figures = KINDS[kind]
    sides = range(4, 25, 4)
    cubes = [
        f"{a}x{b}x{c}" for a in sides for b in sides for c in sides if a <= b <= c and a * b * c <= figures.max_chips
    ]
    return [*figures.shapes, *sorted(cubes, key=lambda cube: math.prod(map(int, cube.split("x"))))]


def target_config(kind: str) -> str:
    """A card as XLA's GPU compiler wants it: the text of a `GpuTargetConfigProto`."""
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
