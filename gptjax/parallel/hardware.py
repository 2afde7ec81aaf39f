"""Figures of accelerators: peak FLOP/s, memory, links."""

import dataclasses

# Dense bfloat16 FLOP/s of one device as JAX counts devices, by `device_kind`. TPUs: Google Cloud's "System
# architecture" page of each version (a TPU7x chip of 2307 TFLOP/s is two devices); NVIDIA: the data sheet of each card,
# which gives twice these figures, with sparsity.
PEAK_BF16_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
}


def peak_flops(devices, dtype: str) -> float | None:
    """FLOP/s of all the devices together; None for unknown devices and for dtypes other than bfloat16."""
    peak = PEAK_BF16_FLOPS.get(devices[0].device_kind) if dtype == "bfloat16" else None
    return peak and peak * len(devices)


GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of accelerator; all numbers are per device as JAX counts devices. None if no source was found."""

    device_kind: str  # as JAX calls it
    hbm_bytes: int  # memory that a program can use
    clock: float | None  # Hz, of the compiler's cycle estimates
    ici_bytes: float  # per second out of a device into its slice (GPUs: its host), over all links
    dcn_bytes: float | None  # per second out of a device between slices (GPUs: between hosts)
    devices_per_chip: int = 1
    shapes: tuple[str, ...] = ()  # of TPU slices below a cube of 4x4x4, or of all slices if the torus is flat
    max_chips: int = 0  # of TPU slices made of cubes

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


# Facts of a card that the compiler needs (CUDA C++ programming guide, "Compute capabilities", and the data sheets):
# compute capability, streaming multiprocessors, their float32 lanes and shared memory, level-2 cache,
# memory's bytes a second, GHz.
CARDS = {
    "a100": (8, 0, 108, 64, 167_936, 41_943_040, 2_039_000_000_000, 1.41),
    "h100": (9, 0, 132, 128, 233_472, 52_428_800, 3_350_000_000_000, 1.98),
    "h200": (9, 0, 132, 128, 233_472, 52_428_800, 4_800_000_000_000, 1.98),
    "b200": (10, 0, 148, 128, 233_472, 132_644_864, 8_000_000_000_000, 1.965),
}
