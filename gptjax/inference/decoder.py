"""Decoding: prompts all at once (prefill), then token by token.

A `Decoder` has a fixed number of rows. A row takes a prompt and grows by a token a step. A row that is done takes the
next prompt, wherever the other rows are. So `generate` and `gptjax serve` are the same few compiled programs.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec, reshard

from gptjax.inference.sampling import Sampling, Settings, sample
from gptjax.models.interface import LanguageModel, PyTree
from gptjax.models.loss import next_token_logits
from gptjax.parallel import batches, sharding, trees

# Prompts are padded to this many tokens times a power of two, so a few compiled programs serve all lengths.
PROMPT_TOKENS = 64
# The most steps between two looks at the new tokens; at each look the devices wait for the host.
CHUNK = 32


def doubled(least: int, needed: int, most: int) -> int:
    """`least` times the power of two that holds `needed`, or `most`: few lengths, so few compiled programs."""
    while least < needed:
        least *= 2
    return min(least, most)


class Prompt(NamedTuple):
    """The text that a row continues."""

    ids: list[int]  # at least one; a whole document starts with the tokenizer's `begin`
    max_tokens: int
    sampling: Sampling
    seed: int
    number: int  # tells prompts with the same seed apart


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows between two steps. Every device holds all of them whole, but for `state`, which the model cuts."""

    state: PyTree  # of the model: interface.LanguageModel.empty_state
    filled_B: jax.Array  # tokens that the state has read
    last_B: jax.Array  # the token that follows them
    left_B: jax.Array  # tokens still to draw; 0 for a row that is done
    drawn_B: jax.Array
    seed_B: jax.Array  # uint32
    number_B: jax.Array
    seen_BV: jax.Array  # whether the row has the token already
    settings: Settings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts as arrays, one a row."""

    tokens_RT: jax.Array  # ids, padded on the right
    length_R: jax.Array  # tokens before the padding
    max_R: jax.Array  # tokens to draw
    seed_R: jax.Array
    number_R: jax.Array
    seen_RV: jax.Array
    settings: Settings


class Decoder:
    """Rows that continue prompts, each at its own position. Use with the mesh of the model set.

    Args:
      model: a `LanguageModel.for_decoding`.
      slots: positions that a row may have.
    """

    def __init__(self, model: LanguageModel, tokenizer, rows: int, slots: int):
        self._mesh = jax.sharding.get_mesh()
        self._shards = batches.row_shards(self._mesh)
        self.rows, self.slots = -(-rows // self._shards) * self._shards, slots
        self._model, self._tokenizer = model, tokenizer
        self._static = {"vocab_size": tokenizer.vocab_size, "ends": tokenizer.ends}
        self._rows = empty(model, self.rows, slots, tokenizer.vocab_size)

    def begin(self, prompts: dict[int, Prompt]) -> dict[int, list[int]]:
        """Gives rows new prompts, and drops their old ones. Returns the first token of each row."""
        rows, longest = list(prompts), max(len(prompt.ids) for prompt in prompts.values())
        # The prefill has one shard's rows or all rows, so that there are two programs a width.
        size = self._shards if len(rows) <= self._shards else self.rows
        given = [prompts[row] for row in rows] + [next(iter(prompts.values()))] * (size - len(rows))
        tokens = np.full((size, doubled(PROMPT_TOKENS, longest, self.slots)), self._tokenizer.end_of_text, np.int32)
        seen = np.zeros((size, self._tokenizer.vocab_size), bool)
        for place, prompt in enumerate(given):
            tokens[place, : len(prompt.ids)] = prompt.ids
            seen[place, prompt.ids] = True
        seen[:, self._tokenizer.begin] = False  # the token that opens a document is no part of the text
        origin = np.full(self.rows, -1, np.int32)
        origin[rows] = np.arange(len(rows))
        arrays = Prompts(
            self._put(tokens, "act_batch", "act_seq"),
            self._put(np.array([len(prompt.ids) for prompt in given], np.int32)),
            self._put(np.array([prompt.max_tokens for prompt in given], np.int32)),
            self._put(np.array([prompt.seed for prompt in given], np.uint32)),
            self._put(np.array([prompt.number for prompt in given], np.uint32)),
            self._put(seen),
            jax.tree.map(lambda *each: self._put(np.array(each)), *(prompt.sampling.row() for prompt in given)),
        )
        self._rows, first = begin(self._model, self._rows, arrays, self._put(origin), **self._static)
        first = jax.device_get(first)
        return {row: [int(first[row])] for row in rows}

    def step(self, going: list[int], steps: int) -> dict[int, list[int]]:
        """Draws up to `steps` more tokens, at most CHUNK, for the rows `going`. All other rows are done."""
        goes = np.zeros(self.rows, bool)
        goes[going] = True
        self._rows, made = advance(
            self._model, self._rows, self._put(goes), self._put(np.array(steps, np.int32)), **self._static
        )
        made = jax.device_get(made)
        return {row: made[row][made[row] >= 0].tolist() for row in going}

    def _put(self, array: np.ndarray, *names: str):
        return trees.put(array, jax.NamedSharding(self._mesh, sharding.spec(*names)))


@functools.partial(jax.jit, static_argnames=("rows", "slots", "vocab_size"))
def empty(model: LanguageModel, rows: int, slots: int, vocab_size: int) -> Rows:
    """Rows without prompts."""
    integers = [jnp.zeros(rows, jnp.int32) for _ in range(4)]
    unsigned = [jnp.zeros(rows, jnp.uint32) for _ in range(2)]
    settings = jax.tree.map(lambda number: jnp.full(rows, number), Sampling().row())
    seen_BV = jnp.zeros((rows, vocab_size), bool)
    return Rows(model.empty_state(rows, slots), *integers, *unsigned, seen_BV, settings)


@functools.partial(jax.jit, static_argnames=("vocab_size", "ends"), donate_argnames="rows")
def begin(model: LanguageModel, rows: Rows, prompts: Prompts, origin_B, *, vocab_size: int, ends: tuple[int, ...]):
    """Starts row b with prompt origin_B[b], unless that is -1. Returns: the rows, and the first token of each [B]."""
    x_RD, state = model.prefill(prompts.tokens_RT, prompts.length_R)
    zeros_R = jnp.zeros_like(prompts.length_R)
    fresh = Rows(
        state, prompts.length_R, zeros_R, prompts.max_R, zeros_R, prompts.seed_R, prompts.number_R, prompts.seen_RV,
        prompts.settings,
    )  # fmt: skip
    fresh = drawn(model, fresh, x_RD, vocab_size, ends)
    new_B, origin_B = origin_B >= 0, jnp.maximum(origin_B, 0)

    def merged(old, new):
        """Replaces the chosen rows. Where the prefill's state is shorter, only the beginning of a row is replaced."""
        here_B = reshard(new_B, PartitionSpec(jax.typeof(old).sharding.spec[0])).reshape(-1, *[1] * (old.ndim - 1))
        new = reshard(new, PartitionSpec(None, *jax.typeof(new).sharding.spec[1:]))
        new = new.at[origin_B].get(out_sharding=jax.typeof(old).sharding)
        if old.shape == new.shape:
            return jnp.where(here_B, new, old)
        sizes = zip(old.shape, new.shape, strict=True)
        beginning = tuple(slice(None) if whole == size else slice(size) for whole, size in sizes)
        return old.at[beginning].set(jnp.where(here_B, new, old[beginning]))

    rows = jax.tree.map(merged, rows, fresh)
    return rows, rows.last_B


@functools.partial(jax.jit, static_argnames=("vocab_size", "ends"), donate_argnames="rows")
def advance(model: LanguageModel, rows: Rows, going_B, steps, *, vocab_size: int, ends: tuple[int, ...]):
    """Draws up to `steps` more tokens for each row in `going_B`.

    Returns: the rows, and their new tokens [B, CHUNK], -1 where a row has none.
    """
    by_row = sharding.spec("act_batch")

    def goes_on(carry):
        index, _, rows = carry
        return (index < steps) & (rows.left_B > 0).any()

    def step(carry):
        index, made_BC, rows = carry
        goes_B = rows.left_B > 0
        x_BD, state = model.decode(reshard(rows.last_B, by_row), reshard(rows.filled_B, by_row), rows.state)
        filled_B = rows.filled_B + goes_B
        rows = dataclasses.replace(rows, state=state, filled_B=filled_B)
        rows = drawn(model, rows, x_BD, vocab_size, ends)
        return index + 1, made_BC.at[:, index].set(jnp.where(goes_B, rows.last_B, -1)), rows

    rows = dataclasses.replace(rows, left_B=jnp.where(going_B, rows.left_B, 0))
    made_BC = jnp.full((rows.left_B.shape[0], CHUNK), -1)
    _, made_BC, rows = jax.lax.while_loop(goes_on, step, (0, made_BC, rows))
    return rows, made_BC


def drawn(model: LanguageModel, rows: Rows, x_BD, vocab_size: int, ends: tuple[int, ...]) -> Rows:
    """The rows, each with the token drawn after hidden states x_BD."""
    logits_BV = reshard(next_token_logits(x_BD, model.output()), PartitionSpec())[:, :vocab_size]
    token_B = sample(logits_BV, rows.seen_BV, keys(rows), rows.settings)
    return dataclasses.replace(
        rows,
        last_B=token_B,
        left_B=jnp.where(jnp.isin(token_B, jnp.array(ends)), 0, jnp.maximum(rows.left_B - 1, 0)),
        drawn_B=rows.drawn_B + 1,
        seen_BV=rows.seen_BV.at[jnp.arange(token_B.shape[0]), token_B].set(True),
    )


def keys(rows: Rows):
    """A random key for the next token of each row, which depends on the row's seed, number and length alone."""

    def key(seed, number, drawn):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), drawn)

    return jax.vmap(key)(rows.seed_B, rows.number_B, rows.drawn_B)
