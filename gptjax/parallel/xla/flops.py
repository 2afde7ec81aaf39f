"""The FLOPs that a step executes, recomputation included: of a traced program, and of attention kernels by name."""

import math

import jax
from jax.interpreters import partial_eval


def executed(traced: jax.stages.Traced, window: int) -> int:
    """FLOPs of all matrix products over all devices, those in attention kernels included.

    Loops count as often as they run, and what no result needs is left out, as a compiler would.

    Args:
      window: positions that a query sees; 0 is all before it.
    """
    program = traced.jaxpr.jaxpr
    needed, _ = partial_eval.dce_jaxpr(program, [True] * len(program.outvars))
    kernels = []
    total = count(needed, 1, kernels)
    names = [name for name, _, _ in kernels]
    return total + sum(times * kernel(name, names, shape, window) for name, shape, times in kernels)


def count(jaxpr, times: int, kernels: list) -> int:
    """2 · size of the result · contracted size for each product outside kernels.

    Args:
      times: how often this is run, over all devices.
      kernels: gets (name, shape of the queries, times) of each attention kernel.
    """
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += times * 2 * eqn.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
        elif name.startswith("dot_product_attention"):  # cuDNN's, with queries as [B, T, N, H]
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
    """The shape of a splash kernel's first floating-point operand, [..., heads, T, H]."""
    floating = (v.aval.shape for v in invars if jax.numpy.issubdtype(v.aval.dtype, jax.numpy.floating))
    return next(floating, ())


def inside(eqn) -> list:
    """The programs within an equation: bodies of loops and branches, of calls, of recomputation."""
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                found.append(item)
    return found


def kernel(name: str, others: list[str], queries: tuple[int, ...], window: int) -> int:
    """FLOPs of one call of a flash-attention kernel; 0 for a name that is not one.

    A product of queries and keys (or scores and values) looks at the T (T + 1) / 2 pairs of a causal mask, or at those
    within `window` positions. Forward has 2 of them; of the gradients, that of the queries has 3, that of keys and
    values 4, and all in one 5, as scores are computed again (Dao 2023, algorithms 1 and 2).

    Args:
      others: the names of all kernels of the program, which tell whether the gradients are one kernel or two.
      queries: [..., heads, T, H] of a device.
    """
    products = {"fwd": 2, "bwd": 5, "dq": 3, "dkv": 4 if any("_dq" in other for other in others) else 5}
    phase = next((phase for phase in products if f"_{phase}" in name), None)
    if phase is None or not name.startswith(("splash", "cudnn")):
        return 0
    *rows, length, head_dim = queries
    near = min(window or length, length)
    pairs = near * length - near * (near - 1) // 2
    return products[phase] * 2 * math.prod(rows) * pairs * head_dim
