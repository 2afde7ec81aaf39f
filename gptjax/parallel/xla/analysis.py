"""Reads memory, buffers, cycles and kernels from a compiled step. All figures are per device."""

import re
from typing import NamedTuple

import jax

from gptjax.errors import Refused
from gptjax.parallel.xla import flops, hlo


class Memory(NamedTuple):
    """Bytes of a device's memory in the compiler's layout."""

    arguments: int
    outputs: int  # outputs that do not reuse the memory of an argument
    temporaries: int
    code: int
    peak: int
    host: int  # bytes of the host's memory: arguments, outputs and temporaries placed there


def memory(compiled: jax.stages.Compiled) -> Memory:
    """Returns the compiler's memory layout of a program."""
    return laid_out(compiled.memory_analysis())


def laid_out(m) -> Memory:
    """Makes a layout from the compiler's statistics (`memory_analysis`).

    The statistics' peak leaves temporaries out on CPUs, is missing on GPUs, and includes host memory on TPUs. In these
    cases the sum of all parts replaces the peak.
    """
    stated = getattr(m, "peak_memory_in_bytes", 0)
    outputs = m.output_size_in_bytes - m.alias_size_in_bytes
    total = m.argument_size_in_bytes + outputs + m.temp_size_in_bytes
    return Memory(
        arguments=m.argument_size_in_bytes,
        outputs=outputs,
        temporaries=m.temp_size_in_bytes,
        code=m.generated_code_size_in_bytes,
        peak=min(stated, total) if stated > m.temp_size_in_bytes else total,
        host=m.host_argument_size_in_bytes
        + m.host_output_size_in_bytes
        - m.host_alias_size_in_bytes
        + m.host_temp_size_in_bytes,
    )


class Buffer(NamedTuple):
    """A part of a device's memory, named by the largest value in this part."""

    name: str
    shape: str
    bytes: int


def largest_buffers(assignment: str, program: hlo.Program, count: int) -> list[Buffer]:
    """Returns the largest values of a buffer assignment (`*buffer-assignment.txt`) that do not overlap in memory.

    Values that overlap are alive at different times, so the largest value stands for the others. The places add up to
    the whole memory.
    """
    values, allocation, wanted = [], 0, False
    for line in assignment.splitlines():
        if head := re.match(r"allocation (\d+): size \d+(.*)", line):
            # Colors other than 0 are on-chip memories.
            allocation, wanted = int(head[1]), "color" not in head[2] and "thread-local" not in head[2]
        elif wanted and (
            value := re.match(r" value: <\d+ ([^ ]+).*\(size=(\d+),offset=(\d+)\): (\w+\[[\d,]*\])", line)
        ):
            values.append((int(value[2]), allocation, int(value[3]), value[1], value[4]))
    chosen = []
    for size, place, offset, name, shape in sorted(values, reverse=True):
        if len(chosen) == count:
            break
        if all(place != p or offset + size <= o or o + s <= offset for s, p, o, *_ in chosen):
            chosen.append((size, place, offset, name, shape))
    return [Buffer(origin(program, name), shape, size) for size, _, _, name, shape in chosen]


def origin(program: hlo.Program, value: str) -> str:
    """Describes where a value comes from: `name`, or `name{3}` for an element of a tuple.

    For an element of a loop's state, this is the operation in the loop that writes the element.
    """
    name, _, index = value.partition("{")
    where = next((key for key, steps in program.computations.items() if name in steps), None)
    step = program.computations[where][name] if where else None
    if step and step.opcode in ("while", "parameter") and index.strip("}").isdecimal():
        loops = (each for steps in program.computations.values() for each in steps.values() if each.opcode == "while")
        loop = next(
            (each for each in loops if each is step or where in (each.called("body"), each.called("condition"))), None
        )
        last = list(program.computations[loop.called("body")].values())[-1] if loop else step
        if last.opcode == "tuple":
            step = hlo.source(program.computations[loop.called("body")], last.operands[int(index.strip("}"))])
    steps = [step, *(inner for _, inner in hlo.inside(program, step))] if step else []
    return next((readable(step.op_name) for step in steps if step.op_name), value)


def readable(op_name: str) -> str:
    """Turns `jit(f)/while/body/transpose(jvp(mlp))/DF->BTF/dot_general` into `backward: mlp/DF->BTF/dot_general`."""
    way = "backward: " if "transpose(jvp" in op_name else "forward: " if "jvp(" in op_name else ""
    noise = r"jit\(\w+\)|(transpose\()?jvp\((eval_jaxpr)?\)+|forward_backward|while|body|cond|closed_call|checkpoint|"
    noise += "rematted_computation|shard_map|eval_jaxpr"
    words = [word for word in op_name.split("/") if not re.fullmatch(noise, word)]
    words = [re.sub(r"^(transpose\()?jvp\((.*?)\)+$", r"\2", word) for word in words]
    # The path of a kernel repeats the kernel's name.
    return way + ("recomputed " if "rematted" in op_name else "") + "/".join(dict.fromkeys(words)) if words else op_name


def cycles(program: hlo.Program) -> int:
    """Adds up the compiler's cycle estimates of all operations on a TPU, over all turns of loops.

    Collectives, Pallas kernels and copies between memories carry no estimates, so the sum is a lower bound for a step.
    Other platforms have no estimates: 0.
    """
    total = 0
    for _, step, times in hlo.schedule(program):
        estimate = re.search(r'"estimated_cycles":"(\d+)"', step.text)
        if estimate and int(estimate[1]) < 1 << 62:  # a larger number stands for a missing estimate
            total += int(estimate[1]) * times
    return total


class Kernel(NamedTuple):
    """All calls of the Pallas kernels with one name."""

    name: str
    calls: int
    flops: int  # FLOPs of all calls; 0 if unknown


def kernels(program: hlo.Program, window: int) -> list[Kernel]:
    """Returns the Pallas kernels of a step on a TPU; `window` is that of `flops.kernel`."""
    calls = [
        (re.sub(r"(\.\d+|\.clone|\.remat\d*)+$", "", step.name), step, times)
        for _, step, times in hlo.schedule(program)
        if 'custom_call_target="tpu_custom_call"' in step.text
    ]
    names, found = [name for name, _, _ in calls], {}
    for name, step, times in calls:
        operands = re.search(r"operand_layout_constraints=\{(.*?\})\}", step.text)
        floating = re.search(r"\b(?:bf16|f32)\[[\d,]+\]", operands[1] if operands else "")
        size = flops.kernel(name, names, hlo.dimensions(floating[0]), window) if floating else 0
        row = found.get(name, Kernel(name, 0, 0))
        found[name] = row._replace(calls=row.calls + times, flops=row.flops + size * times)
    return list(found.values())


def out_of_memory(message: str) -> tuple[int, int] | None:
    """Reads (needed, available) bytes from the compiler's message that a program does not fit; None for others."""
    if "CompileTimeHbmOom" not in message and "Ran out of memory in memory space hbm" not in message:
        return None
    needed = re.search(r"\(([\d.]+)([KMG])\) exceeds available HBM \(([\d.]+)([KMG])\)", message)
    if not needed:
        needed = re.search(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG])", message)
    if not needed:
        raise Refused(f"The compiler says that the step does not fit, in an unknown form: {message[:300]}")
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(float(needed[1]) * unit[needed[2]]), int(float(needed[3]) * unit[needed[4]])
