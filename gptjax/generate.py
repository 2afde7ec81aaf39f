"""Sampling with a key/value cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec, reshard

from gptjax import hosts, sharding
from gptjax.errors import Refused
from gptjax.models.transformer import Transformer

# Prompts are padded to a multiple of this, so that prompts of similar length share a compiled program.
PROMPT_MULTIPLE = 64


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 1.0  # 0 takes the most likely token
    top_k: int = 0  # only among the k most likely; 0 is off
    top_p: float = 1.0  # only among the most likely that hold this much probability (Holtzman et al. 2020, section 3.1)

    def check(self) -> None:
        """Raises: Refused."""
        if not 0 <= self.temperature:
            raise Refused(f"--temperature={self.temperature} is below 0: 0 takes the most likely token.")
        if self.top_k < 0:
            raise Refused(f"--top_k={self.top_k} is below 0: 0 turns it off.")
        if not 0 < self.top_p <= 1:
            raise Refused(f"--top_p={self.top_p} must be more than 0 and at most 1, which turns it off.")


def generate(
    model: Transformer,
    prompts: list[list[int]],
    tokenizer,
    *,
    seq_len: int,
    max_tokens: int,
    sampling: Sampling,
    seed: int,
) -> list[list[int]]:
    """Continues prompts of token ids, each as a document of its own, until it ends or has `max_tokens` more.

    Row i of the same prompts and seed gets the same tokens however many rows there are.

    Raises: Refused, when a prompt and what is asked for exceed the context.
    """
    sampling.check()
    if not 0 <= seed < 1 << 32:
        raise Refused(f"--seed={seed} does not fit the 32 bits of a JAX key: use one from 0 to {(1 << 32) - 1}.")
    if not prompts:
        return []
    longest = 1 + max(len(prompt) for prompt in prompts)
    if max_tokens < 1:
        raise Refused(f"--max_tokens={max_tokens} must be at least 1.")
    if longest > seq_len:
        raise Refused(
            f"The prompt has {longest - 1} tokens, and the context of {seq_len} takes at most {seq_len - 1}: "
            "shorten it."
        )
    if longest + max_tokens > seq_len + 1:
        raise Refused(
            f"The prompt has {longest - 1} tokens and --max_tokens={max_tokens} asks for more than the context "
            f"of {seq_len} holds: ask for at most {seq_len + 1 - longest}."
        )
    mesh = jax.sharding.get_mesh()
    shards = sharding.row_shards(mesh)
    rows = -(-len(prompts) // shards) * shards
    width = min(-(-longest // PROMPT_MULTIPLE) * PROMPT_MULTIPLE, seq_len)
    tokens = np.full((rows, width), tokenizer.end_of_text, np.int32)
    start = np.full(rows, width - 1, np.int32)
    for row, prompt in enumerate(prompts):
        start[row] = width - 1 - len(prompt)
        tokens[row, start[row] + 1 :] = prompt
    put = lambda array, *names: hosts.put(array, jax.NamedSharding(mesh, sharding.spec(*names)))
    made, lengths = decode(
        model, put(tokens, "act_batch", "act_seq"), put(start, "act_batch"), jax.random.key(seed),
        max_tokens=max_tokens, sampling=sampling, vocab_size=tokenizer.vocab_size, end_of_text=tokenizer.end_of_text,
    )  # fmt: skip
    made, lengths = jax.device_get((made, lengths))
    return [made[row, : lengths[row]].tolist() for row in range(len(prompts))]


@functools.partial(jax.jit, static_argnames=("max_tokens", "sampling", "vocab_size", "end_of_text"))
def decode(
    model: Transformer,
    prompt_BT,
    start_B,
    key,
    *,
    max_tokens: int,
    sampling: Sampling,
    vocab_size: int,
    end_of_text: int,
):
    """Prefill, then one token at a time.

    Args:
      prompt_BT: ids, padded on the left; start_B: where each row's own begin.

    Returns:
      ids [B, max_tokens], and how many of them come before the document's end [B].
    """
    B = prompt_BT.shape[0]
    row_keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(B))
    everywhere = PartitionSpec()

    def draw(x_BTD, index):
        logits_BV = reshard(model.logits(x_BTD[:, -1]), everywhere)[:, :vocab_size]
        return sample(logits_BV, jax.vmap(lambda k: jax.random.fold_in(k, index))(row_keys), sampling)

    def going_on(carry):
        index, _, done_B, *_ = carry
        return (index < max_tokens) & ~done_B.all()

    def step(carry):
        index, made_BM, done_B, length_B, next_B, cache = carry
        done_B |= next_B == end_of_text
        length_B += ~done_B
        made_BM = made_BM.at[:, index].set(next_B)
        x_BTD, cache = model.decode(reshard(next_B, sharding.spec("act_batch"))[:, None], cache)
        return index + 1, made_BM, done_B, length_B, draw(x_BTD, index + 1), cache

    x_BTD, cache = model.decode(prompt_BT, model.empty_cache(start_B, prompt_BT.shape[1] + max_tokens))
    made_BM = jnp.full((B, max_tokens), end_of_text)
    carry = 0, made_BM, jnp.zeros(B, bool), jnp.zeros(B, jnp.int32), draw(x_BTD, 0), cache
    _, made_BM, _, length_B, *_ = jax.lax.while_loop(going_on, step, carry)
    return made_BM, length_B


def sample(logits_BV, keys_B, sampling: Sampling):
    """One id a row."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k or sampling.top_p < 1:
        descending_BV = -jnp.sort(-logits_BV, axis=-1)
        k = min(sampling.top_k or logits_BV.shape[-1], logits_BV.shape[-1])
        probability_BV = jax.nn.softmax(jnp.where(jnp.arange(logits_BV.shape[-1]) < k, descending_BV, -jnp.inf))
        # A token stays while the more likely ones hold less than top_p; the most likely always does.
        stays_BV = (jnp.cumsum(probability_BV, -1) - probability_BV < sampling.top_p) & (probability_BV > 0)
        least_B = jnp.where(stays_BV, descending_BV, jnp.inf).min(-1)
        logits_BV = jnp.where(logits_BV >= least_B[:, None], logits_BV, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def samples(model: Transformer, tokenizer, prompt: str, *, seq_len: int, count: int, seed: int) -> list[str]:
    """Texts that go on from a prompt, for the end of a run; of a prompt over half the context, its end is used."""
    ids = tokenizer.encode(prompt).tolist()[-(seq_len // 2) :]
    length = min(seq_len - len(ids), 200)
    sampling = Sampling(temperature=0.7, top_p=0.95)
    made = generate(model, [ids] * count, tokenizer, seq_len=seq_len, max_tokens=length, sampling=sampling, seed=seed)
    return [tokenizer.decode(ids + more) for more in made]
