"""Products of many experts, each over the tokens that chose it; no token is dropped.

Letters: T tokens of this device, E experts, k chosen by a token, A = T · k assignments, S slots, n blocks of slots,
b slots in a block, D width of the stream, F width of an expert; I and O inputs and outputs of a matrix.

Assignments are sorted by expert. Each expert's run of slots is filled up to whole blocks with empty slots, which hold
zeros. So a block needs the matrix of a single expert, and memory is linear in A: at most E · (b - 1) slots are empty.
XLA's `ragged_dot` is such a product on TPUs alone: elsewhere it becomes a dense product over all experts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Slots in a block: more make a product more efficient, and leave more slots empty. `ragged_dot` needs no blocks.
BLOCKS = {"tpu": 1, "cpu": 128}
OTHER_BLOCK = 256


class Slots(NamedTuple):
    """The places of a device's assignments, sorted by expert."""

    slots_Tk: jax.Array  # the slot of each assignment
    assignments_S: jax.Array  # the assignment in each slot; A in an empty slot
    experts_n: jax.Array  # the expert of each block; the last expert for blocks that are not used
    sizes_E: jax.Array  # slots of each expert, with the empty slots of its last block

    @property
    def block(self) -> int:
        """Slots in a block."""
        return self.assignments_S.shape[0] // self.experts_n.shape[0]

    def tokens_S(self):
        """The token in each slot, the last token in an empty slot."""
        tokens, chosen = self.slots_Tk.shape
        return jnp.minimum(self.assignments_S // chosen, tokens - 1)


def block_size(assignments: int, platform: str) -> int:
    """Slots in a block on a platform; small where there are few assignments, as in decoding."""
    size = BLOCKS.get(platform, OTHER_BLOCK)
    while size > 8 and size > assignments:
        size //= 2
    return size


def make_slots(experts_Tk, num_experts: int, block: int) -> Slots:
    """Sorts the assignments of tokens to experts, int32 [T, k], into slots."""
    A = experts_Tk.size
    experts_A = experts_Tk.reshape(A)
    order_A = jnp.argsort(experts_A)  # stable, so the order of sums does not depend on the platform
    sorted_A = experts_A[order_A]
    bounds = jnp.searchsorted(sorted_A, jnp.arange(num_experts + 1))
    sizes_E = -(-jnp.diff(bounds) // block) * block
    ends_E = jnp.cumsum(sizes_E)
    slots_A = (ends_E - sizes_E - bounds[:-1])[sorted_A] + jnp.arange(A)
    blocks = min(A, A // block + num_experts)  # an expert adds at most one block that is not full
    assignments_S = jnp.full_like(order_A, A, shape=blocks * block).at[slots_A].set(order_A, unique_indices=True)
    experts_n = jnp.searchsorted(ends_E, jnp.arange(blocks) * block, side="right")
    slots_Tk = jnp.zeros_like(slots_A).at[order_A].set(slots_A, unique_indices=True).reshape(experts_Tk.shape)
    return Slots(slots_Tk, assignments_S, jnp.minimum(experts_n, num_experts - 1), sizes_E)


# `filled` and `collected` gather in both directions: a scatter, the transpose that JAX would take, is slow everywhere.


@jax.custom_vjp
def filled(x_TD, slots: Slots):
    """The token of each slot [S, D], zeros in empty slots."""
    full_S = slots.assignments_S < slots.slots_Tk.size
    return jnp.where(full_S[:, None], x_TD[slots.tokens_S()], 0)


filled.defvjp(
    lambda x_TD, slots: (filled(x_TD, slots), slots), lambda slots, dx_SD: (dx_SD[slots.slots_Tk].sum(1), None)
)


@jax.custom_vjp
def collected(y_SD, weights_Tk, slots: Slots):
    """The weighted sum of each token's k slots [T, D]. weights_Tk: float32."""
    y_TkD = y_SD[slots.slots_Tk]
    return jnp.einsum("TkD,Tk->TD", y_TkD, weights_Tk, preferred_element_type=jnp.float32).astype(y_SD.dtype)


def collected_backward(residuals, dy_TD):
    y_SD, weights_Tk, slots = residuals
    full_S = slots.assignments_S < weights_Tk.size
    weights_S = jnp.where(full_S, weights_Tk.reshape(-1)[jnp.minimum(slots.assignments_S, weights_Tk.size - 1)], 0)
    dy_SD = dy_TD[slots.tokens_S()] * weights_S[:, None]
    dweights_Tk = jnp.einsum("TkD,TD->Tk", y_SD[slots.slots_Tk], dy_TD, preferred_element_type=jnp.float32)
    return dy_SD.astype(y_SD.dtype), dweights_Tk, None


collected.defvjp(lambda *arguments: (collected(*arguments), arguments), collected_backward)


def grouped_product(x_SI, w_EIO, slots: Slots):
    """Each slot times the matrix of its expert: [S, O] in the dtype of x. Slots of blocks in no use are 0."""
    if slots.block == 1:
        return jax.lax.ragged_dot(x_SI, w_EIO, slots.sizes_E.astype(jnp.int32))
    return blocked_product(x_SI, w_EIO, slots)


@jax.custom_vjp
def blocked_product(x_SI, w_EIO, slots: Slots):
    """`grouped_product` in a loop over the blocks in use."""

    def one(index, y_SO):
        y_bO = block_of(x_SI, index, slots) @ w_EIO[slots.experts_n[index]]
        return put(y_SO, y_bO, index, slots)

    return jax.lax.fori_loop(0, in_use(slots), one, zeros((x_SI.shape[0], w_EIO.shape[2]), x_SI, w_EIO, slots))


def blocked_backward(residuals, dy_SO):
    x_SI, w_EIO, slots = residuals

    def one(index, carry):
        dx_SI, dw_EIO = carry
        dy_bO, expert = block_of(dy_SO, index, slots), slots.experts_n[index]
        dw_IO = jnp.einsum("bI,bO->IO", block_of(x_SI, index, slots), dy_bO, preferred_element_type=jnp.float32)
        return put(dx_SI, dy_bO @ w_EIO[expert].T, index, slots), dw_EIO.at[expert].add(dw_IO)

    # Sums over blocks in float32: in bfloat16 the sum of a busy expert would stop growing.
    dw_EIO = zeros(w_EIO.shape, dy_SO, x_SI, slots).astype(jnp.float32)
    dx_SI, dw_EIO = jax.lax.fori_loop(0, in_use(slots), one, (zeros(x_SI.shape, dy_SO, w_EIO, slots), dw_EIO))
    return dx_SI, dw_EIO.astype(w_EIO.dtype), None


blocked_product.defvjp(lambda *arguments: (blocked_product(*arguments), arguments), blocked_backward)


def in_use(slots: Slots):
    """The number of blocks that hold assignments."""
    return slots.sizes_E.sum() // slots.block


def block_of(x_SI, index, slots: Slots):
    return jax.lax.dynamic_slice_in_dim(x_SI, index * slots.block, slots.block)


def put(x_SI, x_bI, index, slots: Slots):
    return jax.lax.dynamic_update_slice_in_dim(x_SI, x_bI, index * slots.block, 0)


def zeros(shape: tuple[int, ...], x, *others):
    """Inside `manual`: zeros in the dtype of x that differ over the mesh axes over which any of these arrays differ."""
    axes = sorted(
        {axis for array in jax.tree.leaves((x, others)) for axis in jax.typeof(array).manual_axis_type.varying}
    )
    made = jnp.zeros(shape, x.dtype)
    return jax.lax.pcast(made, tuple(axes), to="varying") if axes else made
