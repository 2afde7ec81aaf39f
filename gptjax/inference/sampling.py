"""Draws the next token. Settings are arrays with one value per row, so a new request never recompiles."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.errors import Refused


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token of a row is drawn, in order of the steps; the temperature acts after the penalty."""

    temperature: float = 1.0  # 0 takes the most likely token
    top_k: int = 0  # draws among the k most likely; 0 is off
    top_p: float = 1.0  # draws among the most likely that hold this probability (Holtzman et al. 2020, section 3.1)
    # Draws among tokens at least this many times as likely as the most likely (Nguyen et al. 2024, section 3).
    min_p: float = 0.0
    # Divides the positive scores of tokens that the row has, and multiplies negative scores (Keskar et al. 2019,
    # section 4.1, for scores of one sign); 1 is off.
    repetition_penalty: float = 1.0

    def check(self) -> None:
        """Checks the ranges. Raises: Refused."""
        if not 0 <= self.temperature < math.inf:
            raise Refused(f"--temperature={self.temperature} is below 0 or not finite: 0 takes the most likely token.")
        if self.top_k < 0:
            raise Refused(f"--top_k={self.top_k} is below 0: 0 turns it off.")
        if not 0 < self.top_p <= 1:
            raise Refused(f"--top_p={self.top_p} must be more than 0 and at most 1, which turns it off.")
        if not 0 <= self.min_p <= 1:
            raise Refused(f"--min_p={self.min_p} must be at least 0, which turns it off, and at most 1.")
        if not 0 < self.repetition_penalty < math.inf:
            raise Refused(f"--repetition_penalty={self.repetition_penalty} must be more than 0 and finite: 1 is off.")

    def row(self) -> "Settings":
        """The same settings in a device's dtypes."""
        most = np.iinfo(np.int32).max
        return Settings(
            np.float32(self.temperature),
            np.int32(min(self.top_k, most) or most),
            np.float32(self.top_p),
            np.float32(self.min_p),
            np.float32(self.repetition_penalty),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """`Sampling` of several rows, each field [B]. A top_k that is off is larger than any vocabulary."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array


def sample(logits_BV, seen_BV, keys_B, settings: Settings):
    """Draws one id a row, int32 [B].

    Args:
      logits_BV: float32.
      seen_BV: whether the row has the token already.
      keys_B: keys of `jax.random`.
      settings: of each row.
    """
    s = settings
    logits_BV = when((s.repetition_penalty != 1).any(), penalized, logits_BV, seen_BV, s.repetition_penalty)
    greedy_B = logits_BV.argmax(-1).astype(jnp.int32)

    def drawn(logits_BV):
        logits_BV = logits_BV - logits_BV.max(-1, keepdims=True)  # so that no logit is divided to infinity
        logits_BV = logits_BV / jnp.where(s.temperature > 0, s.temperature, 1)[:, None]
        logits_BV = when((s.top_k < logits_BV.shape[-1]).any(), among_the_first, logits_BV, s.top_k)
        logits_BV = when((s.top_p < 1).any(), among_the_nucleus, logits_BV, s.top_p)
        logits_BV = jnp.where(logits_BV >= jnp.log(s.min_p)[:, None], logits_BV, -jnp.inf)
        probability_BV = jax.nn.softmax(logits_BV)
        # Takes the first token at which the cumulative sum exceeds a random share of the whole sum. A token of no
        # probability is never taken, even if a sum is rounded. One random number suffices; Gumbel noise takes V.
        sum_BV = jnp.cumsum(probability_BV, -1)
        share_B = jax.vmap(jax.random.uniform)(keys_B)
        below_B = jnp.minimum(share_B * sum_BV[:, -1], jnp.nextafter(sum_BV[:, -1], 0))
        found_B = ((sum_BV > below_B[:, None]) & (probability_BV > 0)).argmax(-1).astype(jnp.int32)
        return jnp.where(s.temperature > 0, found_B, greedy_B)

    return jax.lax.cond((s.temperature > 0).any(), drawn, lambda _: greedy_B, logits_BV)


def when(condition, function, array, *more):
    """`function` of an array if a condition holds at run time, else the array."""
    return jax.lax.cond(condition, function, lambda array, *_: array, array, *more)


def penalized(logits_BV, seen_BV, penalty_B):
    factor_BV = jnp.where(logits_BV > 0, 1 / penalty_B[:, None], penalty_B[:, None])
    return jnp.where(seen_BV, logits_BV * factor_BV, logits_BV)


def among_the_first(logits_BV, k_B):
    """The logits with fewer than k above them, and -inf for the rest."""
    return least(logits_BV, jnp.ones_like(logits_BV), k_B.astype(jnp.float32))


def among_the_nucleus(logits_BV, p_B):
    """The logits with less probability than p above them, and -inf for the rest. The most likely always stays."""
    return least(logits_BV, jax.nn.softmax(logits_BV), jnp.where(p_B < 1, p_B, jnp.inf))


def least(logits_BV, weights_BV, most_B):
    """The logits with less weight than `most_B` above them, and -inf for the rest.

    Bisects the 32 bits of a float to find the least such logit, with one pass over the vocabulary per bit. Sorting
    50,000 numbers takes XLA some 50 times as long on a CPU (benchmarks/NOTES.md, Generation).
    """
    bits_BV = jax.lax.bitcast_convert_type(logits_BV, jnp.int32)
    order_BV = jnp.where(bits_BV < 0, bits_BV ^ 0x7FFFFFFF, bits_BV)  # as integers, in the order of the floats

    def halve(_, ends):
        low_B, high_B = ends  # the least is above low, and not above high
        middle_B = (low_B >> 1) + (high_B >> 1) + (low_B & high_B & 1)
        stays_B = jnp.where(order_BV > middle_B[:, None], weights_BV, 0).sum(-1) < most_B
        return jnp.where(stays_B, low_B, middle_B), jnp.where(stays_B, middle_B, high_B)

    ends = order_BV.min(-1) - 1, order_BV.max(-1)
    least_B = jax.lax.fori_loop(0, 32, halve, ends)[1]
    return jnp.where(order_BV >= least_B[:, None], logits_BV, -jnp.inf)
