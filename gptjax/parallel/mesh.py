"""The devices of a process, and the mesh over them: the axes, their sizes, and which devices are neighbours."""

import math
import os

import jax
import numpy as np
from jax.experimental import mesh_utils

from gptjax.errors import Refused
from gptjax.parallel.config import MeshConfig

# `ring` is a part of full sharding: the third side of a torus (see `ring_size`), 1 elsewhere.
AXES = ("slices", "data", "fsdp", "ring", "tensor")

# Variables of the environment may have set these otherwise. Our code and optax promote ranks and dtypes. A random
# number is the same on every mesh and in every process of a run. The loop guards its own transfers.
SETTINGS = {
    "jax_numpy_rank_promotion": "allow",
    "jax_numpy_dtype_promotion": "standard",
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_transfer_guard": "allow",
}
IMPOSSIBLE = {"JAX_DISABLE_JIT": "jax_disable_jit", "JAX_NO_TRACING": "jax_no_tracing"}


def settle() -> None:
    """Sets the options of JAX that results depend on. Raises: Refused, for variables under which no step compiles."""
    for variable, name in IMPOSSIBLE.items():
        if getattr(jax.config, name):
            raise Refused(
                f"{variable}={os.environ.get(variable, 'true')} must be unset: gptjax compiles each step before the "
                "step runs."
            )
    for name, value in SETTINGS.items():
        jax.config.update(name, value)


def devices() -> list[jax.Device]:
    """All devices of a run. Raises: Refused, if JAX_PLATFORMS asks for a platform that can't be had."""
    settle()
    asked = os.environ.get("JAX_PLATFORMS", "")
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # for an unknown platform JAX fails an assertion
        if not asked:
            raise
        reason = " ".join(str(error).split()).partition(" (set JAX_PLATFORMS")[0]
        jax.config.update("jax_platforms", "")
        there = ", ".join(sorted({device.platform for device in jax.devices()}))
        raise Refused(
            f"JAX_PLATFORMS={asked} must name platforms of this machine; found {there}"
            f"{f' ({reason})' * bool(reason)}; unset it, or install the JAX of that platform."
        ) from error


def num_slices(devices: list[jax.Device]) -> int:
    """The number of TPU slices among the devices. GPUs have a slice index too, one a host, ignored here."""
    return len({slice_index(device) for device in devices}) if devices[0].platform == "tpu" else 1


def slice_index(device: jax.Device) -> int:
    return getattr(device, "slice_index", None) or 0  # a single slice has none


def mesh_shape(config: MeshConfig, num_devices: int, tpu_slices: int) -> tuple[int, int, int, int]:
    """The sizes of (slices, data, fsdp, tensor) on `num_devices` in `tpu_slices`, with 0 and -1 filled in.

    Raises:
      Refused: more than one -1, a size below 1, a product other than the number of devices, or a number of slices
        other than `tpu_slices`.
    """
    sizes = {"slices": config.slices or tpu_slices} | {
        axis: getattr(config, axis) for axis in ("data", "fsdp", "tensor")
    }
    shown = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise Refused(f"mesh.{axis}={size} must be at least 1, or -1 for the devices that the other axes leave.")
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise Refused(f"Only one mesh axis may be -1, but {' and '.join('mesh.' + a for a in open_axes)} are.")
    taken = math.prod(size for size in sizes.values() if size != -1)
    if open_axes and num_devices % taken == 0:
        sizes[open_axes[0]] = num_devices // taken
    elif open_axes or taken != num_devices:
        raise Refused(
            f"{shown} asks for {'a multiple of ' if open_axes else ''}{taken} devices, but there are "
            f"{num_devices}: change a size, or set one to -1 to take what is left."
        )
    if tpu_slices > 1 and sizes["slices"] != tpu_slices:
        raise Refused(
            f"mesh.slices={sizes['slices']}, but the devices are {tpu_slices} TPU slices: set it to {tpu_slices}, or "
            "to 0."
        )
    return tuple(sizes.values())


def make_mesh(config: MeshConfig, devices: list[jax.Device]) -> jax.sharding.Mesh:
    """The mesh over these devices: slices outermost, and inside a slice the order of the hardware's links.

    Raises:
      Refused: sizes whose product is not the number of devices, or a wrong number of slices.
    """
    found = num_slices(devices)
    slices, *inside = mesh_shape(config, len(devices), found)
    devices = sorted(devices, key=slice_index) if found > 1 else devices
    order = np.stack([linked(inside, list(group)) for group in np.array(devices).reshape(slices, -1)])
    ring = ring_size(order[0, 0, :, 0])
    data, fsdp, tensor = inside
    order = order.reshape(slices, data, fsdp // ring, ring, tensor)
    return jax.sharding.Mesh(order, AXES, axis_types=(jax.sharding.AxisType.Explicit,) * len(AXES))


def ring_size(devices: np.ndarray) -> int:
    """If the devices of one model fill a 3D torus, the length of its side; otherwise 1.

    Over a whole 3D torus XLA makes an all-gather of an all-reduce, at twice the bytes. Along one side and then along
    the other two XLA gathers (benchmarks/NOTES.md, Collectives).
    """
    if devices[0].platform != "tpu":
        return 1
    places = np.array([device.coords for device in devices])
    sides = [len(set(places[:, side])) for side in range(3)]
    if min(sides) == 1 or math.prod(sides) != len(devices):
        return 1
    side = np.argmax(places[1] != places[0])
    rows = places.reshape(-1, sides[side], 3)
    others = np.delete(rows, side, axis=-1)
    return sides[side] if (others == others[:, :1]).all() else 1


def sizes(mesh: jax.sharding.Mesh) -> dict[str, int]:
    """The sizes of a mesh as a config gives them: `ring` is a part of `fsdp`."""
    shape = dict(mesh.shape)
    ring = shape.pop("ring")
    return shape | {"fsdp": shape["fsdp"] * ring}


def linked(shape: list[int], devices: list[jax.Device]) -> np.ndarray:
    """The devices of one slice in this shape, the last axis on the shortest rings."""
    try:
        return mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:  # an axis that is not a product of whole physical axes
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
