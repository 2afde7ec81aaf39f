"""Next-token cross entropy that never holds the logits of a whole batch."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.errors import Refused
from gptjax.models.interface import Output
from gptjax.models.layers import product, soft_capped
from gptjax.models.sections import LossConfig
from gptjax.parallel.collectives import gather, gather_sequence, index, largest, manual, summed, varying
from gptjax.parallel.sharding import BATCH_AXES


class Fixed(NamedTuple):
    """The parts of a loss that are known when it is compiled."""

    vocab_size: int
    softcap: float
    config: LossConfig


class Sums(NamedTuple):
    """Weighted sums over tokens, float32 scalars. Only the objective has a gradient."""

    objective: jax.Array  # nll + z_loss · z
    nll: jax.Array  # negative log likelihood, nats
    z: jax.Array  # log² of the partition function
    correct: jax.Array  # targets that were the most likely token


def next_token_sums(x_BTD, output: Output, targets_BT, weights_BT, *, vocab_size: int, config: LossConfig) -> Sums:
    """Sums of the cross entropy of softmax(x · wᵀ) over all tokens.

    The gradient of the objective is computed along with the value, chunk by chunk. So the backward pass neither holds
    logits nor computes them again.

    Args:
      x_BTD: hidden states in the compute dtype, the sequence cut as `act_stream`.
      output: the table w, whose rows past `vocab_size` are padding and take no part, and the cap of the logits.
      targets_BT: int32.
      weights_BT: float32, 0 where there is nothing to predict.
    """
    if x_BTD.shape[1] % config.num_chunks:
        raise Refused(
            f"seq_len={x_BTD.shape[1]} is not divisible by loss.num_chunks={config.num_chunks}: choose a divisor."
        )
    fixed = Fixed(vocab_size, output.softcap, config)

    def local(table, x_BTD, targets_BT, weights_BT):
        x_BTD = gather_sequence(x_BTD, "act_stream")
        # The gradient of the table is summed on each device over all chunks, and over devices once, at the end.
        w_VD = gather(table, x_BTD.dtype)
        objective, sums = chunked(x_BTD, w_VD, targets_BT, weights_BT, fixed)
        return summed((objective, *sums), *BATCH_AXES)

    with jax.named_scope("loss"):
        return Sums(*manual(local, "", "", "", "")(output.table, x_BTD, targets_BT, weights_BT))


def next_token_scores(x_BTD, output: Output, targets_BT, *, vocab_size: int):
    """Scores each target; arguments as of `next_token_sums`.

    Returns: (log probability in nats, float32 [B, T]; whether no token was more likely, bool [B, T]).
    """
    chunks = math.gcd(x_BTD.shape[1], 8)

    def local(table, x_BTD, targets_BT):
        x_BTD = gather_sequence(x_BTD, "act_stream")
        w_VD = gather(table, x_BTD.dtype)

        def one(carry, chunk):
            x_BtD, targets_Bt = chunk
            *_, peak_Bt, total_Bt, target_Bt = scored(x_BtD, w_VD, targets_Bt, vocab_size, output.softcap)
            return carry, (target_Bt - peak_Bt - jnp.log(total_Bt), target_Bt >= peak_Bt)

        _, found = jax.lax.scan(one, (), (split(x_BTD, chunks), split(targets_BT, chunks)))
        return tuple(jnp.moveaxis(each, 0, 1).reshape(targets_BT.shape) for each in found)

    return manual(local, "act_batch act_seq", "act_batch act_seq")(output.table, x_BTD, targets_BT)


def next_token_logits(x_BD, output: Output):
    """Scores of the next token from last hidden states: float32 [B, V], padding included."""

    def local(table, x_BD):
        return product("BD,VD->BV", x_BD, table, dtype=jnp.float32)

    return soft_capped(manual(local, "act_batch act_vocab")(output.table, x_BD), output.softcap)


def split(array, chunks: int):
    """[B, T, …] as [chunks, B, T / chunks, …]."""
    return jnp.moveaxis(array.reshape(array.shape[0], chunks, -1, *array.shape[2:]), 1, 0)


def scored(x_BtD, w_VD, targets_Bt, vocab_size: int, softcap: float):
    """Scores the chunk t of this device's rows.

    Returns:
      For this device's part of the vocabulary: the capped logits [B, t, V], whether each is the target's, and
      exp(logits - peak). For the whole vocabulary: the largest logit [B, t], the sum of the exp, the target's logit.
    """
    ids_V = index("tensor") * w_VD.shape[0] + jnp.arange(w_VD.shape[0])
    raw_BtV = jnp.einsum("BtD,VD->BtV", x_BtD, w_VD, preferred_element_type=jnp.float32)
    capped_BtV = soft_capped(raw_BtV, softcap)
    logits_BtV = jnp.where(ids_V < vocab_size, capped_BtV, -jnp.inf)
    is_target_BtV = ids_V == targets_Bt[..., None]
    peak_Bt = largest(logits_BtV.max(-1), "tensor")
    exp_BtV = jnp.exp(logits_BtV - peak_Bt[..., None])
    total_Bt = summed(exp_BtV.sum(-1), "tensor")
    target_Bt = summed(jnp.where(is_target_BtV, logits_BtV, 0).sum(-1), "tensor")
    return capped_BtV, is_target_BtV, exp_BtV, peak_Bt, total_Bt, target_Bt


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def chunked(x_BTD, w_VD, targets_BT, weights_BT, fixed: Fixed):
    """(objective, (nll, z, correct)) over this device's rows and its part of the vocabulary, chunk by chunk."""
    sums, _ = scan_chunks(x_BTD, w_VD, targets_BT, weights_BT, fixed, with_gradient=False)
    return sums


def forward(x_BTD, w_VD, targets_BT, weights_BT, fixed):
    return scan_chunks(x_BTD, w_VD, targets_BT, weights_BT, fixed, with_gradient=True)


def backward(fixed, gradients, cotangents):
    dx_BTD, dw_VD = gradients
    scale = cotangents[0]
    return dx_BTD * scale.astype(dx_BTD.dtype), dw_VD * scale.astype(dw_VD.dtype), None, None


chunked.defvjp(forward, backward)


def scan_chunks(x_BTD, w_VD, targets_BT, weights_BT, fixed: Fixed, *, with_gradient):
    """Returns ((objective, (nll, z, correct)), gradients of the objective (dx, dw), or () if not asked for)."""
    vocab_size, softcap, config = fixed
    chunks = config.num_chunks

    def one(carry, chunk):
        nll, z, correct, dw_VD = carry
        x_BtD, targets_Bt, weights_Bt = chunk
        capped_BtV, is_target_BtV, exp_BtV, peak_Bt, total_Bt, target_Bt = scored(
            x_BtD, w_VD, targets_Bt, vocab_size, softcap
        )
        log_z_Bt = peak_Bt + jnp.log(total_Bt)
        nll += (weights_Bt * (log_z_Bt - target_Bt)).sum()
        z += (weights_Bt * jnp.square(log_z_Bt)).sum()
        correct += (weights_Bt * (target_Bt >= peak_Bt)).sum()
        if not with_gradient:
            return (nll, z, correct, dw_VD), ()
        # d nll / d logits = p - onehot; d log²Z / d logits = 2 log Z · p.
        scale_Bt = weights_Bt * (1 + 2 * config.z_loss * log_z_Bt) / total_Bt
        d_BtV = exp_BtV * scale_Bt[..., None] - jnp.where(is_target_BtV, weights_Bt[..., None], 0)
        if softcap:
            d_BtV *= 1 - jnp.square(capped_BtV / softcap)
        d_BtV = d_BtV.astype(x_BtD.dtype)
        dx_BtD = jnp.einsum("BtV,VD->BtD", d_BtV, w_VD)  # over this part of the vocabulary
        dw_VD += jnp.einsum("BtV,BtD->VD", d_BtV, x_BtD, preferred_element_type=jnp.float32)
        return (nll, z, correct, dw_VD), dx_BtD

    zero = varying(jnp.zeros(()), *BATCH_AXES)
    dw_VD = jnp.zeros_like(w_VD, jnp.float32) if with_gradient else ()
    carry, dx = jax.lax.scan(
        one, (zero, zero, zero, dw_VD), tuple(split(each, chunks) for each in (x_BTD, targets_BT, weights_BT))
    )
    nll, z, correct, dw_VD = carry
    objective = nll + config.z_loss * z
    if not with_gradient:
        return (objective, (nll, z, correct)), ()
    return (objective, (nll, z, correct)), (jnp.moveaxis(dx, 0, 1).reshape(x_BTD.shape), dw_VD.astype(w_VD.dtype))
