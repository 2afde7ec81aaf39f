"""Reads the communication of a compiled step from XLA's text: bytes, devices, and overlap with compute."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax

from gptjax.parallel.mesh import num_slices, slice_index
from gptjax.parallel.xla import hlo

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
COMPUTE = ("fusion", "convolution", "dot", "custom-call", "while")


class Collective(NamedTuple):
    """Communication of one sort, added up over a step."""

    operation: str  # "PURPOSE by all-reduce" if the compiler serves the purpose by an all-reduce
    axes: str  # mesh axes, joined by +
    between: bool  # between slices (hosts of GPUs) rather than within a slice
    calls: int = 0
    bytes: int = 0  # size of the whole arrays: gathered, to be reduced, or sent
    overlapped_bytes: int = 0  # the part of `bytes` that moves while the device computes
    link_bytes: int = 0  # bytes that a device sends, by the algorithms that send least


class Unreadable(Exception):
    """XLA can't print a program (some programs for TPUs), or prints a form that `hlo` does not know."""


def of_step(step: jax.stages.Compiled, mesh: jax.sharding.Mesh) -> list[Collective]:
    """Returns the communication of a step compiled for a mesh of this process's devices; nothing for one device.

    Raises: Unreadable.
    """
    if mesh.size == 1:
        return []
    devices = list(mesh.devices.flat)
    slices = num_slices(devices)
    places = [slice_index(device) for device in devices]
    try:
        return collectives(hlo.parse(step.as_text()), numbering(mesh, slices), places, slices)
    except (jax.errors.JaxRuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unreadable(f"{type(error).__name__}: {error}") from error


def numbering(mesh: jax.sharding.Mesh, slices: int) -> list[tuple[str, int]]:
    """Returns names and sizes of the mesh axes in the order in which a program numbers devices.

    On several TPU slices a program covers one slice. `ring` counts as a part of `fsdp`.
    """
    inside = [(axis, size) for axis, size in mesh.shape.items() if slices == 1 or axis != "slices"]
    return [("fsdp" if axis == "ring" else axis, size) for axis, size in inside]


def collectives(
    program: hlo.Program, axes: Sequence[tuple[str, int]], places: Sequence[int], slices: int
) -> list[Collective]:
    """Returns the communication of a step by sort, largest first.

    Bytes on the links: with n devices, (n - 1) / n of the array for all-gather, reduce-scatter and all-to-all, twice
    as many for all-reduce (Patarasuk and Yuan 2009).

    Args:
      axes: the result of `numbering`.
      places: the slice or host of each device, in the same numbering.
      slices: TPU slices that the program spans.
    """
    found, chains = {}, set()
    for computation, step, times in hlo.schedule(program):
        if step.opcode == "send" and "_xla_megascale_transfer_type" in step.text:
            # XLA hands the array to the library for the data-centre network.
            operation = re.search(r'_xla_megascale_transfer_type="(\w+)"', step.text)[1].lower().replace("_", "-")
            size = hlo.num_bytes(program.computations[computation][step.operands[0]].shape)
            add(found, Collective(operation, "slices", True), size, times, slices, True)
            continue
        candidates = [(computation, step)] if step.opcode.removesuffix("-start") in COLLECTIVES else []
        if step.opcode in ("fusion", "async-start"):
            candidates = [(c, inner) for c, inner in hlo.inside(program, step) if inner.opcode in COLLECTIVES]
        for where, inner in candidates:
            # A collective fused with the compute that hides the transfer appears in each fusion of a chain: count once.
            chained = "async_collective_fusion_config" in inner.text
            channel = computation, re.search(r"channel_id=(\d+)|$", inner.text)[1], inner.opcode
            if chained and channel in chains:
                continue
            chains.add(channel)
            siblings = program.computations[where]
            operation = inner.opcode.removesuffix("-start")
            size = sum(hlo.num_bytes(siblings[name].shape) for name in inner.operands)
            group, count = first_group(inner.text, places)
            if operation == "all-gather":
                size *= count
            elif operation == "all-reduce":
                # A dedicated fusion reduces to a slice; a plain all-reduce sends everything to all devices.
                operation = purpose(program, where, inner) + ("" if where != computation else " by all-reduce")
                operation = operation.replace("all-reduce by all-reduce", "all-reduce")
            key = Collective(operation, axes_of(group, axes), len({places[device] for device in group}) > 1)
            add(found, key, size, times, count, chained or hidden(program.computations[computation], step))
    return sorted(found.values(), key=lambda row: -row.link_bytes)


def add(found: dict, key: Collective, size: int, times: int, count: int, overlapped: bool) -> None:
    """Adds `times` collectives of `size` bytes among `count` devices to the row `key`."""
    share = 1 if key.operation == "collective-permute" else (count - 1) / count
    link = int(size * share * (2 if key.operation.endswith("all-reduce") else 1))
    row = found.get(key, key)
    found[key] = row._replace(
        calls=row.calls + times,
        bytes=row.bytes + size * times,
        overlapped_bytes=row.overlapped_bytes + (size * times if overlapped else 0),
        link_bytes=row.link_bytes + link * times,
    )


def purpose(program: hlo.Program, computation: str, step: hlo.Instruction) -> str:
    """Names the purpose of an all-reduce.

    Returns "reduce-scatter" if each device uses only a slice of the result, "all-gather" if each device has put a part
    into zeros, else "all-reduce".
    """
    siblings = program.computations[computation]
    if any("dynamic-update-slice" in hlo.source(siblings, name).opcode for name in step.operands):
        return "all-gather"
    return "reduce-scatter" if sliced(program, computation, step.name) else "all-reduce"


def sliced(program: hlo.Program, computation: str, name: str) -> bool:
    """Whether all uses of a value take a slice that depends on the device or the turn of a loop."""
    siblings = program.computations[computation]
    users = [step for step in siblings.values() if name in step.operands]

    def takes_slice(user: hlo.Instruction) -> bool:
        if user.opcode == "fusion":
            inner, position = user.called("calls"), str(user.operands.index(name))
            parameters = [step for step in program.computations[inner].values() if step.opcode == "parameter"]
            return all(sliced(program, inner, step.name) for step in parameters if step.operands[0] == position)
        if user.opcode in (*hlo.COPIES, "get-tuple-element"):
            return sliced(program, computation, user.name)
        return user.opcode == "dynamic-slice"

    return bool(users) and all(takes_slice(user) for user in users)


def hidden(siblings: dict[str, hlo.Instruction], step: hlo.Instruction) -> bool:
    """Whether there is compute between an asynchronous start and the operation that waits for the result."""
    if not step.opcode.endswith("-start"):
        return False
    steps, name = list(siblings.values()), step.name
    for other in steps[steps.index(step) + 1 :]:
        if name in other.operands and not other.opcode.endswith("-update"):
            return False
        name = other.name if name in other.operands else name
        if other.opcode in COMPUTE:
            return True
    return True  # the wait is in another turn of the loop


def first_group(text: str, places: Sequence[int]) -> tuple[list[int], int]:
    """Returns the first group of devices that a collective joins, and the number of devices in the group.

    XLA writes groups as lists ({{0,1},{2,3}}), as a grid of numbers ([2,2]<=[4], transposed or not), or by axes of a
    mesh (mesh['a'=2,'b'=2] {'b'}). A permutation has pairs.
    """
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", text):
        return [int(device) for device in pairs[1].split("}")[0].strip("{").split(",")], 2
    if mesh := re.search(r"replica_groups=\w*mesh\[(.*?)\]\s*\{(.*?)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        grid, joined = list(sizes.values()), [list(sizes).index(name) for name in re.findall(r"'([^']+)'", mesh[2])]
        numbers = [
            sum(at * math.prod(grid[axis + 1 :]) for axis, at in zip(joined, where, strict=True))
            for where in places_in([grid[axis] for axis in joined])
        ]
        return numbers, len(numbers)
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        grid = [int(size) for size in iota[3].split(",")]
        order = [int(axis) for axis in iota[4].split(",")] if iota[4] else list(range(len(grid)))
        strides = [math.prod(grid[axis + 1 :]) for axis in range(len(grid))]
        numbers = [
            sum(at * strides[axis] for axis, at in zip(order, where, strict=True))
            for where in places_in([grid[axis] for axis in order])
        ]
        return numbers[: int(iota[2])], int(iota[2])
    written = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
    numbers = [int(device) for device in written[1].split(",")] if written else list(range(len(places)))
    return numbers, len(numbers)


def places_in(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Returns all coordinates of a grid; the last side changes fastest."""
    coordinates = [()]
    for size in sizes:
        coordinates = [(*before, at) for before in coordinates for at in range(size)]
    return coordinates


def axes_of(group: Sequence[int], axes: Sequence[tuple[str, int]]) -> str:
    """Returns the mesh axes along which the devices of a group differ."""
    strides = [math.prod(size for _, size in axes[index + 1 :]) for index in range(len(axes))]
    differ = [
        name
        for (name, size), stride in zip(axes, strides, strict=True)
        if len({device // stride % size for device in group}) > 1
    ]
    return "+".join(dict.fromkeys(differ)) or "none"
