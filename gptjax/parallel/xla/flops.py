"""Counts the FLOPs that a step executes, recomputation included: a traced program, and attention kernels by name."""

import math

import jax
from jax.interpreters import partial_eval


def executed(traced: jax.stages.Traced, window: int) -> int:
    """Counts the FLOPs of all matrix products over all devices, attention kernels included.

    Each turn of a loop counts. Operations that no result needs are left out, as by a compiler.

    Args:
      traced: the traced step.
      window: positions that a query sees; 0 is all earlier positions.
    """
    program = traced.jaxpr.jaxpr
    needed, _ = partial_eval.dce_jaxpr(program, [True] * len(program.outvars))
    kernels = []
    total = count(needed, 1, kernels)
    names = [name for name, _, _ in kernels]
    return total + sum(times * kernel(name, names, shape, window) for name, shape, times in kernels)


def count(jaxpr, times: int, kernels: list) -> int:
    """Adds up 2 · size of the result · contracted size over the products outside kernels.

    Args:
      jaxpr: the program.
      times: runs of the program, over all devices.
      kernels: a list that receives (name, shape of the queries, times) of each attention kernel.
    """
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += times * 2 * eqn.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
        elif name.startswith("dot_product_attention"):  # cuDNN, with queries as [B, T, N, H]
            batch, length, heads, head_dim = eqn.invars[0].aval.shape
            phase = "cudnn_bwd" if "bwd" in name else "cudnn_fwd"
            kernels.append((phase, (batch, heads, length, head_dim), times))
        elif name == "pallas_call":
            kernels.append((str(eqn.params["name"]), queries(eqn.invars), times))
        else:
            turns = eqn.params["length"] if name == "scan" else eqn.params["mesh"].size if name == "shard_map" else 1
            inner = [count(sub, times * turns, kernels) for sub in inside(eqn)]
            total += max(inner, default=0) if name == "cond" else sum(inner)
    return total


def queries(invars) -> tuple[int, ...]:
    """Returns the shape of a splash kernel's first floating-point operand, [..., heads, T, H]."""
    floating = (v.aval.shape for v in invars if jax.numpy.issubdtype(v.aval.dtype, jax.numpy.floating))
    return next(floating, ())


def inside(eqn) -> list:
    """Returns the programs within an equation: bodies of loops, branches, calls and recomputation."""
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                found.append(item)
    return found


def kernel(name: str, others: list[str], queries: tuple[int, ...], window: int) -> int:
    """Counts the FLOPs of one call of a flash-attention kernel; 0 for other names.

    A product of queries and keys (or scores and values) covers the T (T + 1) / 2 pairs of a causal mask, or the pairs
    within `window` positions. Forward has 2 products. The gradient of the queries has 3, that of keys and values 4, and
    a kernel for all gradients 5, since scores are computed again (Dao 2023, algorithms 1 and 2).

    Args:
      name: the kernel.
      others: the names of all kernels of the program; they show whether the gradients are one kernel or two.
      queries: shape [..., heads, T, H] on a device.
      window: positions that a query sees; 0 is all earlier positions.
    """
    products = {"fwd": 2, "bwd": 5, "dq": 3, "dkv": 4 if any("_dq" in other for other in others) else 5}
    phase = next((phase for phase in products if f"_{phase}" in name), None)
    if phase is None or not name.startswith(("splash", "cudnn")):
        return 0
    *rows, length, head_dim = queries
    near = min(window or length, length)
    pairs = near * length - near * (near - 1) // 2
    return products[phase] * 2 * math.prod(rows) * pairs * head_dim
