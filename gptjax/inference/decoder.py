"""Decoding: prompts all at once (prefill), then token by token with a key/value cache.

A `Decoder` has a fixed number of rows. A row takes a prompt, grows by a token a step, and when it is done takes the
next prompt, whatever the others are at; so `generate` and `gptjax serve` are the same few compiled programs.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec, reshard

from gptjax.inference.sampling import Sampling, Settings, sample
from gptjax.models.transformer import Transformer
from gptjax.parallel import batches, sharding, trees

# Prompts are padded to this many tokens times a power of two, so that a few compiled programs do for all lengths.
PROMPT_TOKENS = 64
# The most steps between two looks at what came, for which the devices wait for the host.
CHUNK = 32


def doubled(least: int, needed: int, most: int) -> int:
    """`least` times a power of two, that holds what is needed, or `most`: few lengths, so few compiled programs."""
    while least < needed:
        least *= 2
    return min(least, most)


class Prompt(NamedTuple):
    """What a row is to go on from."""

    ids: list[int]  # at least one; of a whole document with the `begin` that opens it
    max_tokens: int
    sampling: Sampling
    seed: int
    number: int  # of several with one seed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """What goes on from step to step; whole on all devices, but for the cache, which is cut by rows and heads."""

    cache: list  # of each block keys and values [B, K, S, H]
    filled_B: jax.Array  # slots of the cache
    last_B: jax.Array  # the token that follows them
    left_B: jax.Array  # tokens to draw yet; 0 where nothing goes on
    drawn_B: jax.Array
    seed_B: jax.Array  # uint32
    number_B: jax.Array
    seen_BV: jax.Array  # which tokens a row has
    settings: Settings


class Decoder:
    """Rows that go on from prompts, each at its own place. To be used with the mesh of the model set.

    Args:
      model: `Transformer.unstacked`. slots: positions that a row may have.
    """

    def __init__(self, model: Transformer, tokenizer, rows: int, slots: int):
        self._mesh = jax.sharding.get_mesh()
        self._shards = batches.row_shards(self._mesh)
        self.rows, self.slots = -(-rows // self._shards) * self._shards, slots
        self._model, self._tokenizer = model, tokenizer
        self._static = {"vocab_size": tokenizer.vocab_size, "ends": tokenizer.ends}
        self._state = empty(model, self.rows, slots, tokenizer.vocab_size)

    def begin(self, prompts: dict[int, Prompt]) -> dict[int, list[int]]:
        """Gives rows new prompts; what they were at before is lost. Returns the first token of each."""
        rows, longest = list(prompts), max(len(prompt.ids) for prompt in prompts.values())
        # One or all, so that there are two programs a width.
        size = self._shards if len(rows) <= self._shards else self.rows
        given = [prompts[row] for row in rows] + [next(iter(prompts.values()))] * (size - len(rows))
        tokens = np.full((size, doubled(PROMPT_TOKENS, longest, self.slots)), self._tokenizer.end_of_text, np.int32)
        seen = np.zeros((size, self._tokenizer.vocab_size), bool)
        for place, prompt in enumerate(given):
            tokens[place, : len(prompt.ids)] = prompt.ids
            seen[place, prompt.ids] = True
        seen[:, self._tokenizer.begin] = False  # what opens a document was not said
        origin = np.full(self.rows, -1, np.int32)
        origin[rows] = np.arange(len(rows))
        column = lambda numbers, dtype: self._put(np.array(list(numbers), dtype))
        self._state, first = begin(
            self._model,
            self._state,
            self._put(tokens, "act_batch", "act_seq"),
            column((len(prompt.ids) for prompt in given), np.int32),
            column((prompt.max_tokens for prompt in given), np.int32),
            column((prompt.seed for prompt in given), np.uint32),
            column((prompt.number for prompt in given), np.uint32),
            self._put(seen),
            jax.tree.map(lambda *each: self._put(np.array(each)), *(prompt.sampling.row() for prompt in given)),
            self._put(origin),
            **self._static,
        )
        first = jax.device_get(first)
        return {row: [int(first[row])] for row in rows}

    def step(self, going: list[int], steps: int) -> dict[int, list[int]]:
        """Up to so many more tokens, at most CHUNK, of the rows that are `going`; the others are done."""
        goes = np.zeros(self.rows, bool)
        goes[going] = True
        self._state, made = advance(
            self._model, self._state, self._put(goes), self._put(np.array(steps, np.int32)), **self._static
        )
        made = jax.device_get(made)
        return {row: made[row][made[row] >= 0].tolist() for row in going}

    def _put(self, array: np.ndarray, *names: str):
        return trees.put(array, jax.NamedSharding(self._mesh, sharding.spec(*names)))


@functools.partial(jax.jit, static_argnames=("rows", "slots", "vocab_size"))
def empty(model: Transformer, rows: int, slots: int, vocab_size: int) -> Rows:
    zeros = lambda dtype: jnp.zeros(rows, dtype)
    return Rows(
        model.empty_cache(rows, slots), zeros(jnp.int32), zeros(jnp.int32), zeros(jnp.int32), zeros(jnp.int32),
        zeros(jnp.uint32), zeros(jnp.uint32), jnp.zeros((rows, vocab_size), bool),
        jax.tree.map(lambda number: jnp.full(rows, number), Sampling().row()),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("vocab_size", "ends"), donate_argnames="state")
def begin(
    model: Transformer, state: Rows, tokens_RT, length_R, max_R, seed_R, number_R, seen_RV, settings: Settings,
    origin_B, *, vocab_size: int, ends: tuple[int, ...],
):  # fmt: skip
    """Row b begins with prompt origin_B[b], where that is not -1.

    Args:
      tokens_RT: ids, padded on the right; length_R: how many are a prompt's own.

    Returns: the rows, and the first token of each [B].
    """
    x_RTD, cache = model.prefill(tokens_RT)
    last = sharding.spec("act_batch", "act_embed")
    x_RD = x_RTD.at[jnp.arange(tokens_RT.shape[0]), length_R - 1].get(out_sharding=last)
    zeros_R = jnp.zeros_like(length_R)
    fresh = Rows(cache, length_R, zeros_R, max_R, zeros_R, seed_R, number_R, seen_RV, settings)
    fresh = drawn(model, fresh, x_RD, vocab_size, ends)
    new_B, origin_B = origin_B >= 0, jnp.maximum(origin_B, 0)

    def merged(old, new):
        """Of arrays by row; of the cache only the slots that prompts fill, the rest being whatever it was."""
        here_B = reshard(new_B, PartitionSpec(jax.typeof(old).sharding.spec[0])).reshape(-1, *[1] * (old.ndim - 1))
        new = reshard(new, PartitionSpec(None, *jax.typeof(new).sharding.spec[1:]))
        new = new.at[origin_B].get(out_sharding=jax.typeof(old).sharding)
        if old.ndim < 4:
            return jnp.where(here_B, new, old)
        slots = new.shape[2]
        return old.at[:, :, :slots].set(jnp.where(here_B, new, old[:, :, :slots]))

    state = jax.tree.map(merged, state, fresh)
    return state, state.last_B


@functools.partial(jax.jit, static_argnames=("vocab_size", "ends"), donate_argnames="state")
def advance(model: Transformer, state: Rows, going_B, steps, *, vocab_size: int, ends: tuple[int, ...]):
    """Up to `steps` tokens more of each row that is `going_B`, and the tokens [B, CHUNK], -1 where there are none."""
    rows = sharding.spec("act_batch")

    def goes_on(carry):
        index, _, state = carry
        return (index < steps) & (state.left_B > 0).any()

    def step(carry):
        index, made_BC, state = carry
        goes_B = state.left_B > 0
        x_B1D, cache = model.decode(reshard(state.last_B, rows), reshard(state.filled_B, rows), state.cache)
        filled_B = state.filled_B + goes_B
        state = dataclasses.replace(state, cache=cache, filled_B=filled_B)
        state = drawn(model, state, x_B1D[:, 0], vocab_size, ends)
        return index + 1, made_BC.at[:, index].set(jnp.where(goes_B, state.last_B, -1)), state

    state = dataclasses.replace(state, left_B=jnp.where(going_B, state.left_B, 0))
    made_BC = jnp.full((state.left_B.shape[0], CHUNK), -1)
    _, made_BC, state = jax.lax.while_loop(goes_on, step, (0, made_BC, state))
    return state, made_BC


def drawn(model: Transformer, state: Rows, x_BD, vocab_size: int, ends: tuple[int, ...]) -> Rows:
    """The rows with the token that follows hidden states."""
    logits_BV = reshard(model.logits(x_BD), PartitionSpec())[:, :vocab_size]
    key = lambda seed, number, drawn: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), drawn)
    keys_B = jax.vmap(key)(state.seed_B, state.number_B, state.drawn_B)
    token_B = sample(logits_BV, state.seen_BV, keys_B, state.settings)
    return dataclasses.replace(
        state,
        last_B=token_B,
        left_B=jnp.where(jnp.isin(token_B, jnp.array(ends)), 0, jnp.maximum(state.left_B - 1, 0)),
        drawn_B=state.drawn_B + 1,
        seen_BV=state.seen_BV.at[jnp.arange(token_B.shape[0]), token_B].set(True),
    )
