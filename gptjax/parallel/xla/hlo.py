"""Reads the text of a compiled program: instructions, shapes, and how often each instruction runs.

The text is XLA's HLO (`Compiled.as_text()`, or a file of `--xla_dump_to`). A computation has one instruction per line,
`%name = shape opcode(operands), attributes`. The schedule of a program follows the entry computation and the bodies of
loops; a whole fusion is one step of the schedule.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

ITEM_BITS = {"pred": 8, "token": 0, "opaque": 0} | {
    f"{kind}{bits}": bits for kind in "suf" for bits in (2, 4, 8, 16, 32, 64)
}
ITEM_BITS |= {"bf16": 16, "c64": 64, "c128": 128, "f8e5m2": 8, "f8e4m3fn": 8, "f8e4m3": 8}
COPIES = ("copy", "copy-start", "copy-done", "bitcast", "reshape", "convert")


class Instruction(NamedTuple):
    """One line. `text` holds the attributes, after the operands."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    text: str

    def called(self, attribute: str) -> str | None:
        """Returns the computation that `calls=`, `body=`, `condition=` or `to_apply=` names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.text)
        return found and found[1]

    @property
    def op_name(self) -> str:
        """JAX's name of the place in the Python program; empty for instructions that XLA added."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""


class Program(NamedTuple):
    """Computations by name, each a dict of instructions in order."""

    computations: dict[str, dict[str, Instruction]]
    entry: str


def parse(text: str) -> Program:
    """Parses the text of a program. Raises: ValueError, if there is no entry computation."""
    computations, entry, current, pending = {}, "", None, ""
    for line in text.splitlines():
        begins = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if begins:
            current = computations[begins[2]] = {}
            entry = begins[2] if begins[1] else entry
        elif current is not None and re.match(r"\}($|, execution_thread)|\s+(ROOT )?%[\w.\-]+ = ", line):
            if pending:
                made = instruction(pending)
                for name in made.operands:
                    add_element(current, name)
                current[made.name] = made
            pending = line
            if line.startswith("}"):
                current, pending = None, ""
        elif pending:  # an attribute may hold line breaks
            pending += line
    if not entry:
        raise ValueError("the text of the compiled program has no ENTRY computation")
    return Program(computations, entry)


def instruction(line: str) -> Instruction:
    """Parses `  ROOT %name = shape opcode(%a, %b), attributes`; the shape of a tuple has spaces and parentheses."""
    name, rest = re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*)", line, re.DOTALL).groups()
    end = closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    end = closing(rest, start)
    opcode, inside = rest[:start], rest[start + 1 : end]
    operands = tuple(re.findall(r"%([\w.\-#]+)", inside)) if opcode not in ("parameter", "constant") else (inside,)
    return Instruction(name, shape, opcode, operands, rest[end + 1 :])


def add_element(siblings: dict[str, Instruction], name: str) -> None:
    """Adds the get-tuple-element that an operand `tuple#1` stands for, the short form since jax 0.11."""
    whole, _, index = name.rpartition("#")
    if whole and name not in siblings:
        add_element(siblings, whole)
        shape = elements(siblings[whole].shape)[int(index)]
        siblings[name] = Instruction(name, shape, "get-tuple-element", (whole,), f"index={index}")


def elements(shape: str) -> list[str]:
    """Splits the shape of a tuple into the shapes of the elements."""
    depth, found = 0, [""]
    for letter in re.sub(r"/\*.*?\*/", "", shape)[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            found.append("")
        else:
            found[-1] += letter
    return [each.strip() for each in found]


def closing(text: str, start: int) -> int:
    """Returns the index of the parenthesis that closes the parenthesis at `start`."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return start + found.start()
    raise ValueError(f"an open parenthesis in the compiled program: {text[:80]}")


def num_bytes(shape: str) -> int:
    """Returns the bytes of an array, or of all arrays in a tuple, without the padding of the layout."""
    arrays = re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", shape)
    return sum(ITEM_BITS[kind] * math.prod(map(int, filter(None, sizes.split(",")))) // 8 for kind, sizes in arrays)


def dimensions(shape: str) -> tuple[int, ...]:
    """Returns the dimensions of the first array in a shape."""
    return tuple(int(size) for size in re.search(r"\[([\d,]*)\]", shape)[1].split(",") if size)


def schedule(program: Program) -> Iterator[tuple[str, Instruction, int]]:
    """Yields (computation, instruction, number of runs) for each step of the schedule, bodies of loops included.

    Branches of conditionals and work on other cores than the main core (`async_execution_thread`) are left out.
    """

    def walk(computation: str, times: int):
        for step in program.computations[computation].values():
            yield computation, step, times
            if step.opcode == "while":
                yield from walk(step.called("body"), times * trips(program, computation, step))
            elif step.opcode == "call":
                yield from walk(step.called("to_apply"), times)

    return walk(program.entry, 1)


def inside(program: Program, step: Instruction) -> Iterator[tuple[str, Instruction]]:
    """Yields (computation, instruction) within a fusion, a call or an asynchronous start, to any depth."""
    offloaded = re.search(r"called_computations=\{%?([\w.\-]+)", step.text)
    called = offloaded[1] if offloaded else step.called("to_apply" if step.opcode == "call" else "calls")
    for inner in program.computations.get(called, {}).values():
        yield called, inner
        yield from inside(program, inner)


def trips(program: Program, computation: str, loop: Instruction) -> int:
    """Returns how often the body of a loop runs: XLA's own count, or limit - start of the counter in the condition.

    The start matters: a loop whose first turn was peeled off begins at 1. JAX's counters go up by 1.

    Raises:
      ValueError: the condition has another form.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text)
    if known:
        return int(known[1])
    condition = program.computations[loop.called("condition")]
    for compare in condition.values():
        if compare.opcode == "fusion":  # GPUs wrap the comparison
            inner = [step for _, step in inside(program, compare) if step.opcode == "compare"]
            limits = [condition.get(name) for name in compare.operands] if inner else []
        elif compare.opcode == "compare" and "direction=LT" in compare.text:
            limits = [condition.get(name) for name in compare.operands]
        else:
            continue
        counter = next((step for step in limits if step and step.opcode == "get-tuple-element"), None)
        limit = next((step for step in limits if step and step.opcode == "constant"), None)
        if counter and limit:
            index = int(re.search(r"index=(\d+)", counter.text)[1])
            return int(limit.operands[0]) - start(program, computation, loop, index)
    raise ValueError(f"can't tell how often the loop {loop.name} of the compiled program runs")


def start(program: Program, computation: str, loop: Instruction, index: int) -> int:
    """Returns the constant in element `index` of a loop's state before the first turn.

    Raises:
      ValueError: the element is not a constant.
    """
    steps = program.computations[computation]
    step = steps[loop.operands[0]]
    if step.opcode == "tuple":
        step = source(steps, step.operands[index])
    if step.opcode != "constant":
        raise ValueError(f"can't tell where the loop {loop.name} of the compiled program begins ({step.opcode})")
    return int(step.operands[0])


def source(siblings: dict[str, Instruction], name: str) -> Instruction:
    """Returns the instruction that made a value, behind all copies."""
    step = siblings[name]
    while step.opcode in COPIES:
        step = siblings[step.operands[0]]
    return step
