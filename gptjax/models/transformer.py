"""A decoder-only transformer: GPT-2 (Radford et al. 2019) and Llama (Touvron et al. 2023) from the same words.

Letters in tensors: B batch, T position, S cached position, D embed_dim, N num_heads, K num_kv_heads, H head_dim,
F mlp_dim, V padded vocabulary, L num_layers.

All blocks are one `Block` whose weights carry the layers as their leading axis; `jax.lax.scan` runs over it, so the
program that XLA compiles does not grow with the depth.

Between blocks the residual stream is cut over `tensor` along its sequence; a half-block gathers it, works on its part
of the heads or of the MLP, and reduce-scatters what it adds.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from gptjax.models import remat
from gptjax.models.attention import attention, cached_attention
from gptjax.models.config import ModelConfig, padded_vocab
from gptjax.models.layers import (
    ACTIVATIONS,
    Norm,
    bias,
    dropout,
    looked_up_in,
    product,
    rope,
    rope_frequencies,
    rotate,
    soft_capped,
    stretched,
    weight,
)
from gptjax.parallel.collectives import gather_sequence, manual, reduce_sequence
from gptjax.parallel.sharding import spec

EMBEDDING_STD = 0.02  # GPT-2 (Radford et al. 2019); Llama keeps it


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) (pre-norm, Xiong et al. 2020)."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        L, D, N, K, H, F = c.num_layers, c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim, c.mlp_dim
        w = functools.partial(weight, rngs, c.param_dtype, widened=c.widened)
        b = functools.partial(bias, c.param_dtype)
        norm = functools.partial(Norm, c.norm, c.norm_eps, c.param_dtype, (L, D), "layers norm", c.biases)
        head_norm = functools.partial(Norm, "rmsnorm", c.norm_eps, c.param_dtype, (L, H), "layers norm", False)
        residual = (2 * L) ** -0.5  # 2L terms add up in the residual stream (GPT-2, 2019, section 2.3)
        self.config = c
        self.norm_attention = norm()
        self.query = w((L, D, N, H), "layers embed heads head_dim", D**-0.5)
        self.key = w((L, D, K, H), "layers embed kv_heads head_dim", D**-0.5)
        self.value = w((L, D, K, H), "layers embed kv_heads head_dim", D**-0.5)
        self.output = w((L, N, H, D), "layers heads head_dim embed", residual * (N * H) ** -0.5)
        self.query_norm = head_norm() if c.qk_norm else None
        self.key_norm = head_norm() if c.qk_norm else None
        self.norm_mlp = norm()
        self.gate = w((L, D, F), "layers embed mlp", D**-0.5) if c.activation == "swiglu" else None
        self.up = w((L, D, F), "layers embed mlp", D**-0.5)
        self.down = w((L, F, D), "layers mlp embed", residual * F**-0.5)
        self.query_bias = b((L, N, H), "layers heads head_dim") if c.biases else None
        self.key_bias = b((L, K, H), "layers kv_heads head_dim") if c.biases else None
        self.value_bias = b((L, K, H), "layers kv_heads head_dim") if c.biases else None
        self.output_bias = b((L, D), "layers norm") if c.biases else None
        self.up_bias = b((L, F), "layers mlp") if c.biases else None
        self.down_bias = b((L, D), "layers norm") if c.biases else None

    def __call__(self, x_BTD, rotation, key, attend, sequence):
        """One block.

        Args:
          rotation: of `rope`, or None. key: of the dropout, or None. attend: (q, k, v) → attention's output, all
            [B, T, heads, H]. sequence: logical name of the sequence of x_BTD.
        """
        c = self.config
        stream = f"act_batch {sequence} act_embed"
        queries, keys = "act_batch act_seq act_heads act_head_dim", "act_batch act_seq act_kv_heads act_head_dim"
        heads = manual(functools.partial(Block.heads, sequence=sequence), queries, keys, keys)
        mix = manual(functools.partial(Block.mix, sequence=sequence), stream)
        widen = manual(functools.partial(Block.widen, sequence=sequence), "act_batch act_seq act_mlp")
        narrow = manual(functools.partial(Block.narrow, sequence=sequence), stream)

        x_BTD = checkpoint_name(x_BTD, "block_input")
        with jax.named_scope("attention"):
            qkv = heads(self, x_BTD, rotation)
            q_BTNH, k_BTKH, v_BTKH = (checkpoint_name(x, name) for x, name in zip(qkv, ("query", "key", "value")))
            a_BTD = checkpoint_name(mix(self, attend(q_BTNH, k_BTKH, v_BTKH)), "attention_out")
            x_BTD = x_BTD + dropout(a_BTD, c.dropout, key, 0)
        with jax.named_scope("mlp"):
            m_BTD = checkpoint_name(narrow(self, widen(self, x_BTD)), "mlp_out")
            return x_BTD + dropout(m_BTD, c.dropout, key, 1)

    # What follows runs inside `manual`, on this device's rows, heads and part of the MLP.

    def project(self, equation: str, x, weight: nnx.Param, bias: nnx.Param | None = None):
        """A matrix product in the compute dtype, and its bias."""
        y = product(equation, x, weight)
        return y if bias is None else y + bias[...].astype(y.dtype)

    def heads(self, x_BTD, rotation, sequence):
        """Queries, keys and values of every position."""
        h_BTD = gather_sequence(self.norm_attention(x_BTD), sequence)
        q_BTNH = self.project("BTD,DNH->BTNH", h_BTD, self.query, self.query_bias)
        k_BTKH = self.project("BTD,DKH->BTKH", h_BTD, self.key, self.key_bias)
        v_BTKH = self.project("BTD,DKH->BTKH", h_BTD, self.value, self.value_bias)
        if self.config.qk_norm:
            q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
        if rotation is not None:
            q_BTNH, k_BTKH = rotate(q_BTNH, rotation), rotate(k_BTKH, rotation)
        if self.config.query_scale != 1:
            q_BTNH = q_BTNH * jnp.asarray(self.config.query_scale, q_BTNH.dtype)
        return q_BTNH, k_BTKH, v_BTKH

    def mix(self, a_BTNH, sequence):
        """What attention adds to the stream."""
        a_BTD = reduce_sequence(self.project("BTNH,NHD->BTD", a_BTNH, self.output), sequence)
        return a_BTD if self.output_bias is None else a_BTD + self.output_bias[...].astype(a_BTD.dtype)

    def widen(self, x_BTD, sequence):
        h_BTD = gather_sequence(self.norm_mlp(x_BTD), sequence)
        u_BTF = checkpoint_name(self.project("BTD,DF->BTF", h_BTD, self.up, self.up_bias), "mlp_up")
        activation = ACTIVATIONS[self.config.activation]
        if self.gate is None:
            return activation(u_BTF)
        return activation(checkpoint_name(self.project("BTD,DF->BTF", h_BTD, self.gate), "mlp_gate")) * u_BTF

    def narrow(self, u_BTF, sequence):
        """What the MLP adds to the stream."""
        m_BTD = reduce_sequence(self.project("BTF,FD->BTD", u_BTF, self.down), sequence)
        return m_BTD if self.down_bias is None else m_BTD + self.down_bias[...].astype(m_BTD.dtype)


class Transformer(nnx.Module):
    """Token ids in, the last hidden states out; `unembedding` is what turns them into logits (see loss.py)."""

    def __init__(self, config: ModelConfig, vocab_size: int, seq_len: int, rngs: nnx.Rngs):
        c = self.config = config
        V, D = padded_vocab(vocab_size), c.embed_dim
        w = functools.partial(weight, rngs, c.param_dtype)
        learned = c.positions == "learned"
        self.embedding = w((V, D), "vocab embed", EMBEDDING_STD)
        self.positions = w((seq_len, D), "positions embed", EMBEDDING_STD / 2) if learned else None
        self.blocks = Block(c, rngs)
        self.norm = Norm(c.norm, c.norm_eps, c.param_dtype, (D,), "norm", c.biases)
        self.head = None if c.tied_embeddings else w((V, D), "vocab embed", EMBEDDING_STD)

    @property
    def unembedding(self) -> nnx.Param:
        """[V, D], as stored."""
        return self.embedding if self.head is None else self.head

    def embed(self, tokens_BT, positions_BT, sequence: str):
        """The residual stream before the first block, its sequence cut as `sequence` says."""

        def local(self, tokens_BT, positions_BT):
            x_BTD = looked_up_in(self.embedding, tokens_BT, self.config.dtype)
            if self.positions is not None:
                x_BTD += looked_up_in(self.positions, positions_BT, self.config.dtype)
            return reduce_sequence(x_BTD, sequence)

        with jax.named_scope("embed"):
            return manual(local, f"act_batch {sequence} act_embed")(self, tokens_BT, positions_BT)

    def rotation(self, positions_BT):
        """What turns queries and keys, or None where positions are learned."""
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

    def __call__(self, tokens_BT, positions_BT, segments_BT, dropout_key):
        """Hidden states after the last norm, [B, T, D] in the compute dtype, their sequence cut as `act_stream`.

        Args:
          tokens_BT, positions_BT (within the document), segments_BT (document number): int32.
          dropout_key: a key, or None for no dropout.
        """
        c = self.config
        key = dropout_key if c.dropout else None
        rotation = self.rotation(positions_BT)
        x_BTD = dropout(self.embed(tokens_BT, positions_BT, "act_stream"), c.dropout, key, c.num_layers)

        def layer(x_BTD, block_and_index):
            block, index = block_and_index
            attend = functools.partial(attention, segments_BT=segments_BT, window=c.sliding_window)
            layer_key = None if key is None else jax.random.fold_in(key, index)
            return block(x_BTD, rotation, layer_key, attend, "act_stream"), None

        # Within a loop nothing can be merged with its recomputation; unrolled whole, there is no loop, and a barrier
        # has to keep them apart.
        apart = c.remat != "none" and c.scan_unroll >= c.num_layers
        layer = jax.checkpoint(layer, policy=remat.policy(c.remat), prevent_cse=apart)
        layers = (self.blocks, jnp.arange(c.num_layers))
        x_BTD, _ = jax.lax.scan(layer, x_BTD, layers, unroll=c.scan_unroll)
        return self.last(x_BTD)

    def last(self, x_BTD):
        """What the unembedding reads."""
        x_BTD = self.norm(x_BTD)
        return x_BTD if self.config.widened == 1 else x_BTD / self.config.widened

    def unstacked(self) -> "Transformer":
        """The same with a list of blocks in place of stacked ones, for `prefill` and `decode`.

        There each weight is read once a token, so that to cut a layer's out of the stack first would triple the bytes.
        """
        if isinstance(self.blocks, nnx.List):
            return self
        model = jax.tree.map(lambda leaf: leaf, self)  # modules of its own, with the same arrays
        model.blocks = nnx.List(one_by_one(self.blocks, self.config.num_layers))
        return model

    def empty_cache(self, rows: int, slots: int) -> list:
        """Keys and values of no positions, of each block: zeros [B, K, S, H]."""
        c = self.config
        axes = spec("act_batch", "act_kv_heads", "act_seq", "act_head_dim")
        zeros = lambda: jnp.zeros((rows, c.num_kv_heads, slots, c.head_dim), c.dtype, out_sharding=axes)
        return [(zeros(), zeros()) for _ in range(c.num_layers)]

    def prefill(self, tokens_BT):
        """Of an `unstacked` model: rows from their beginning on.

        Returns: hidden states after the last norm [B, T, D], and the T positions as the beginning of a cache.
        """
        positions_BT = jax.lax.broadcasted_iota(
            jnp.int32, tokens_BT.shape, 1, out_sharding=spec("act_batch", "act_seq")
        )
        attend = functools.partial(attention, segments_BT=jnp.zeros_like(tokens_BT), window=self.config.sliding_window)
        cache = []

        def attend_and_keep(q_BTNH, k_BTKH, v_BTKH):
            cache.append((jnp.swapaxes(k_BTKH, 1, 2), jnp.swapaxes(v_BTKH, 1, 2)))
            return attend(q_BTNH, k_BTKH, v_BTKH)

        return self.through(tokens_BT, positions_BT, [attend_and_keep] * self.config.num_layers), cache

    def decode(self, tokens_B, positions_B, cache: list):
        """Of an `unstacked` model: one more token a row, each at a position of its own.

        Returns: hidden states after the last norm [B, 1, D], and the cache with the tokens in it.
        """
        made = list(cache)

        def attend_at(layer, q_BTNH, k_BTKH, v_BTKH):
            window = self.config.sliding_window
            a_BTNH, made[layer] = cached_attention(q_BTNH, k_BTKH, v_BTKH, cache[layer], positions_B, window)
            return a_BTNH

        attends = [functools.partial(attend_at, layer) for layer in range(len(cache))]
        return self.through(tokens_B[:, None], positions_B[:, None], attends), made

    def through(self, tokens_BT, positions_BT, attends):
        """Hidden states after the last norm, of blocks that attend as each is told."""
        rotation = self.rotation(positions_BT)
        x_BTD = self.embed(tokens_BT, positions_BT, "act_seq")
        for block, attend in zip(self.blocks, attends, strict=True):
            x_BTD = block(x_BTD, rotation, None, attend, "act_seq")
        return self.last(x_BTD)

    def logits(self, x_BD):
        """Scores of the next token from last hidden states: float32 [B, V], padding included."""

        def local(table_VD, x_BD):
            return product("BD,VD->BV", x_BD, table_VD, dtype=jnp.float32)

        logits_BV = manual(local, "act_batch act_vocab")(self.unembedding, x_BD)
        return soft_capped(logits_BV, self.config.logits_softcap)


@functools.partial(jax.jit, static_argnums=1)
def one_by_one(blocks: Block, num_layers: int) -> list[Block]:
    """The blocks of a stack."""
    return [jax.tree.map(lambda leaf: leaf[layer], blocks) for layer in range(num_layers)]
