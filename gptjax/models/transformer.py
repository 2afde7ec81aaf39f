"""A decoder-only transformer: GPT-2 (Radford et al. 2019) and Llama (Touvron et al. 2023) from the same words.

Letters in tensors: B batch, T position, S cached position, D embed_dim, N num_heads, K num_kv_heads, H head_dim,
F mlp_dim, V padded vocabulary, L layers of a segment, R rows of a prefill.

The blocks of a segment carry the repeats as the leading axis of their weights. `jax.lax.scan` runs over that axis, so
the program that XLA compiles does not grow with the depth.

Between blocks the residual stream is cut over `tensor` along the sequence. A half-block gathers the stream, works on
its part of the heads or of the MLP, and reduce-scatters what it adds.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.models import blocks, moe, remat
from gptjax.models.attention import attention, cached_attention
from gptjax.models.config import ModelConfig, padded_vocab
from gptjax.models.interface import Hidden, Inputs, Output
from gptjax.models.layers import Norm, Weights, dropout, looked_up_in, rope, rope_frequencies, stretched
from gptjax.parallel.collectives import manual, reduce_sequence
from gptjax.parallel.sharding import spec

EMBEDDING_STD = 0.02  # GPT-2 (Radford et al. 2019); Llama keeps it


class Transformer(nnx.Module):
    """The `LanguageModel` of `ModelConfig`: see interface.py."""

    def __init__(self, config: ModelConfig, vocab_size: int, seq_len: int, rngs: nnx.Rngs):
        c = self.config = config
        V, D, w = padded_vocab(vocab_size), c.embed_dim, Weights(rngs, c.param_dtype)
        learned = c.positions == "learned"
        self.embedding = w.matrix((V, D), "vocab embed", "embed", EMBEDDING_STD)
        self.positions = w.matrix((seq_len, D), "positions embed", "", EMBEDDING_STD / 2) if learned else None
        self.blocks = blocks.stacked_blocks(c, w._replace(widened=c.widened))
        self.norm = Norm(c.norm, c.norm_eps, w, (D,), "norm", c.biases)
        self.head = None if c.tied_embeddings else w.matrix((V, D), "vocab embed", "embed", EMBEDDING_STD)
        self.stacked = True

    def output(self) -> Output:
        """The table and cap that turn hidden states into logits."""
        return Output(self.embedding if self.head is None else self.head, self.config.logits_softcap)

    def embed(self, tokens_BT, positions_BT, sequence: str):
        """The residual stream before the first block. sequence: the logical name of the stream's sequence axis."""

        def local(self, tokens_BT, positions_BT):
            x_BTD = looked_up_in(self.embedding, tokens_BT, self.config.dtype)
            if self.positions is not None:
                x_BTD += looked_up_in(self.positions, positions_BT, self.config.dtype)
            return reduce_sequence(x_BTD, sequence)

        with jax.named_scope("embed"):
            return manual(local, f"act_batch {sequence} act_embed")(self, tokens_BT, positions_BT)

    def rotation(self, positions_BT):
        """Cosines and sines that turn queries and keys, or None if positions are learned."""
        c = self.config
        if c.positions != "rope":
            return None
        frequencies = rope_frequencies(c.head_dim, c.rope_theta)
        if c.rope_scaling == "linear":
            frequencies /= c.rope_factor
        elif c.rope_scaling == "llama3":
            frequencies = stretched(
                frequencies, c.rope_factor, c.rope_low_turns, c.rope_high_turns, c.rope_original_len
            )
        return rope(positions_BT, frequencies)

    def hidden(self, inputs: Inputs, key) -> Hidden:
        """Hidden states after the last norm, their sequence cut as `act_stream`. key: for dropout, or None for none."""
        c = self.config
        key = key if c.dropout else None
        rotation = self.rotation(inputs.positions_BT)
        x_BTD = self.embed(inputs.tokens_BT, inputs.positions_BT, "act_stream")
        x_BTD = dropout(x_BTD, c.dropout, key, c.num_layers)
        attend = functools.partial(attention, segments_BT=inputs.segments_BT, window=c.sliding_window)

        def run(x_BTD, period_and_repeat, first: int):
            period, repeat = period_and_repeat
            of_period = []
            for place, block in enumerate(period, first):
                layer = repeat * len(period) + place if len(period) > 1 or place else repeat
                block_key = None if key is None else jax.random.fold_in(key, layer)
                x_BTD, sums = block(x_BTD, rotation, block_key, attend, "act_stream")
                of_period.append(sums)
            return x_BTD, of_period

        first, of_layers = 0, []  # layer of the segment; sums of the feed-forwards
        for period, segment in zip(blocks.periods(self.blocks), c.segments, strict=True):
            # Inside a loop nothing can be merged with its recomputation. A segment that is unrolled whole has no loop,
            # so a barrier has to keep the two apart.
            apart = c.remat != "none" and c.scan_unroll >= segment.repeats
            step = functools.partial(run, first=first)
            step = jax.checkpoint(step, policy=remat.policy(c.remat), prevent_cse=apart)
            x_BTD, of_segment = jax.lax.scan(step, x_BTD, (period, jnp.arange(segment.repeats)), unroll=c.scan_unroll)
            first += segment.num_layers
            of_layers += of_segment
        return Hidden(self.last(x_BTD), *moe.combined(of_layers, c))

    def last(self, x_BTD):
        """Norms the stream for the unembedding."""
        x_BTD = self.norm(x_BTD)
        return x_BTD if self.config.widened == 1 else x_BTD / self.config.widened

    def after_update(self, sums) -> "Transformer":
        """The model with router biases that follow the load of the experts."""
        if not self.config.router_bias:
            return self
        model = jax.tree.map(lambda leaf: leaf, self)  # modules of its own, with the same arrays
        routed = [block for period in blocks.periods(model.blocks) for block in period if hasattr(block, "router")]
        moe.move_biases(routed, sums["expert_tokens"], self.config.router_bias)
        return model

    def for_decoding(self) -> "Transformer":
        """The same model with a list of single blocks in place of stacks, for `prefill` and `decode`.

        Decoding reads each weight once a token, so cutting a layer out of the stack first would triple the bytes.
        """
        if not self.stacked:
            return self
        model = jax.tree.map(lambda leaf: leaf, self)  # modules of its own, with the same arrays
        model.blocks = nnx.List(blocks.unstacked(self.blocks, self.config.segments))
        model.stacked = False
        return model

    def empty_state(self, rows: int, slots: int) -> list:
        """The state of each block before any token. Call on a model `for_decoding`."""
        return [block.empty_state(rows, slots) for block in self.blocks]

    def prefill(self, tokens_RT, lengths_R):
        """Reads prompts. Call on a model `for_decoding`.

        Returns: (hidden states of each row's last token [R, D], keys and values of the T positions of each block).
        """
        positions_RT = jax.lax.broadcasted_iota(
            jnp.int32, tokens_RT.shape, 1, out_sharding=spec("act_batch", "act_seq")
        )
        attend = functools.partial(attention, segments_BT=jnp.zeros_like(tokens_RT), window=self.config.sliding_window)
        state = []

        def attend_and_keep(q_BTNH, k_BTKH, v_BTKH):
            state.append((jnp.swapaxes(k_BTKH, 1, 2), jnp.swapaxes(v_BTKH, 1, 2)))
            return attend(q_BTNH, k_BTKH, v_BTKH)

        x_RTD = self.through(tokens_RT, positions_RT, [attend_and_keep] * self.config.num_layers)
        rows = jnp.arange(tokens_RT.shape[0])
        return x_RTD.at[rows, lengths_R - 1].get(out_sharding=spec("act_batch", "act_embed")), state

    def decode(self, tokens_B, positions_B, state: list):
        """Reads one more token a row, each at a position of its own. Call on a model `for_decoding`.

        Returns: (hidden states after the last norm [B, D], the state with the tokens in it).
        """
        made = list(state)

        def attend_at(layer, q_BTNH, k_BTKH, v_BTKH):
            window = self.config.sliding_window
            a_BTNH, made[layer] = cached_attention(q_BTNH, k_BTKH, v_BTKH, state[layer], positions_B, window)
            return a_BTNH

        attends = [functools.partial(attend_at, layer) for layer in range(len(state))]
        return self.through(tokens_B[:, None], positions_B[:, None], attends)[:, 0], made

    def through(self, tokens_BT, positions_BT, attends):
        """Hidden states after the last norm of a model `for_decoding`. attends: the attention of each block."""
        rotation = self.rotation(positions_BT)
        x_BTD = self.embed(tokens_BT, positions_BT, "act_seq")
        for block, attend in zip(self.blocks, attends, strict=True):
            x_BTD, _ = block(x_BTD, rotation, None, attend, "act_seq")
        return self.last(x_BTD)
