"""Blocks: a mixer, which lets positions look at one another, then a feed-forward. Letters as in transformer.py.

The weights of both halves are attributes of the block, so a checkpoint names them `blocks.query` and `blocks.up`. A
block of a segment carries the repeats of the segment as the leading axis of each weight.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from gptjax.models.config import ModelConfig
from gptjax.models.layers import ACTIVATIONS, Norm, Weights, dropout, product, rotate
from gptjax.models.moe import Moe
from gptjax.models.pattern import Segment
from gptjax.parallel.collectives import gather_sequence, manual, reduce_sequence
from gptjax.parallel.sharding import spec


def project(equation: str, x, weight: nnx.Param, bias: nnx.Param | None = None):
    """Inside `manual`: a matrix product in the compute dtype, plus the bias."""
    y = product(equation, x, weight)
    return y if bias is None else y + bias[...].astype(y.dtype)


class Attention:
    """The mixer `attention`: grouped-query attention (Vaswani et al. 2017, Ainslie et al. 2023)."""

    def add_mixer(self, c: ModelConfig, w: Weights, L: int, residual: float) -> None:
        """Makes the weights. residual: the initial scale of a term of the residual stream."""
        D, N, K, H = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim
        self.norm_attention = Norm(c.norm, c.norm_eps, w, (L, D), "layers norm", c.biases)
        self.query = w.matrix((L, D, N, H), "layers embed heads head_dim", "embed", D**-0.5)
        self.key = w.matrix((L, D, K, H), "layers embed kv_heads head_dim", "embed", D**-0.5)
        self.value = w.matrix((L, D, K, H), "layers embed kv_heads head_dim", "embed", D**-0.5)
        scale = residual * (N * H) ** -0.5
        self.output = w.matrix((L, N, H, D), "layers heads head_dim embed", "heads head_dim", scale)
        self.query_norm = Norm("rmsnorm", c.norm_eps, w, (L, H), "layers norm", False) if c.qk_norm else None
        self.key_norm = Norm("rmsnorm", c.norm_eps, w, (L, H), "layers norm", False) if c.qk_norm else None
        self.query_bias = w.zeros((L, N, H), "layers heads head_dim") if c.biases else None
        self.key_bias = w.zeros((L, K, H), "layers kv_heads head_dim") if c.biases else None
        self.value_bias = w.zeros((L, K, H), "layers kv_heads head_dim") if c.biases else None
        self.output_bias = w.zeros((L, D), "layers norm") if c.biases else None

    def mixed(self, x_BTD, rotation, key, attend, sequence: str):
        """x plus attention(norm(x)); arguments as of `Block.__call__`."""
        queries, keys = "act_batch act_seq act_heads act_head_dim", "act_batch act_seq act_kv_heads act_head_dim"
        heads = manual(functools.partial(Attention.heads, sequence=sequence), queries, keys, keys)
        mix = manual(functools.partial(Attention.mix, sequence=sequence), f"act_batch {sequence} act_embed")
        with jax.named_scope("attention"):
            qkv, names = heads(self, x_BTD, rotation), ("query", "key", "value")
            q_BTNH, k_BTKH, v_BTKH = (checkpoint_name(x, name) for x, name in zip(qkv, names, strict=True))
            a_BTD = checkpoint_name(mix(self, attend(q_BTNH, k_BTKH, v_BTKH)), "attention_out")
            return x_BTD + dropout(a_BTD, self.config.dropout, key, 0)

    def heads(self, x_BTD, rotation, sequence: str):
        """Inside `manual`: queries, keys and values of every position, for this device's heads."""
        h_BTD = gather_sequence(self.norm_attention(x_BTD), sequence)
        q_BTNH = project("BTD,DNH->BTNH", h_BTD, self.query, self.query_bias)
        k_BTKH = project("BTD,DKH->BTKH", h_BTD, self.key, self.key_bias)
        v_BTKH = project("BTD,DKH->BTKH", h_BTD, self.value, self.value_bias)
        if self.config.qk_norm:
            q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
        if rotation is not None:
            q_BTNH, k_BTKH = rotate(q_BTNH, rotation), rotate(k_BTKH, rotation)
        if self.config.query_scale != 1:
            q_BTNH = q_BTNH * jnp.asarray(self.config.query_scale, q_BTNH.dtype)
        return q_BTNH, k_BTKH, v_BTKH

    def mix(self, a_BTNH, sequence: str):
        """Inside `manual`: projects attention's output back to the stream."""
        a_BTD = reduce_sequence(project("BTNH,NHD->BTD", a_BTNH, self.output), sequence)
        return a_BTD if self.output_bias is None else a_BTD + self.output_bias[...].astype(a_BTD.dtype)

    def empty_state(self, rows: int, slots: int) -> tuple:
        """Keys and values of no positions: zeros [B, K, S, H]."""
        c = self.config
        shape = rows, c.num_kv_heads, slots, c.head_dim
        axes = spec("act_batch", "act_kv_heads", "act_seq", "act_head_dim")
        return jnp.zeros(shape, c.dtype, out_sharding=axes), jnp.zeros(shape, c.dtype, out_sharding=axes)


class Mlp:
    """The feed-forward `mlp`: two matrices, or three with a gate for swiglu (Shazeer 2020)."""

    def add_feed_forward(self, c: ModelConfig, w: Weights, L: int, residual: float) -> None:
        """Makes the weights. residual: the initial scale of a term of the residual stream."""
        D, F = c.embed_dim, c.mlp_dim
        self.norm_mlp = Norm(c.norm, c.norm_eps, w, (L, D), "layers norm", c.biases)
        gated = c.activation == "swiglu"
        self.gate = w.matrix((L, D, F), "layers embed mlp", "embed", D**-0.5) if gated else None
        self.up = w.matrix((L, D, F), "layers embed mlp", "embed", D**-0.5)
        self.down = w.matrix((L, F, D), "layers mlp embed", "mlp", residual * F**-0.5)
        self.up_bias = w.zeros((L, F), "layers mlp") if c.biases else None
        self.down_bias = w.zeros((L, D), "layers norm") if c.biases else None

    def fed_forward(self, x_BTD, key, sequence: str):
        """x plus mlp(norm(x)), and no sums; arguments as of `Block.__call__`."""
        widen = manual(functools.partial(Mlp.widen, sequence=sequence), "act_batch act_seq act_mlp")
        narrow = manual(functools.partial(Mlp.narrow, sequence=sequence), f"act_batch {sequence} act_embed")
        with jax.named_scope("mlp"):
            m_BTD = checkpoint_name(narrow(self, widen(self, x_BTD)), "mlp_out")
            return x_BTD + dropout(m_BTD, self.config.dropout, key, 1), {}

    def widen(self, x_BTD, sequence: str):
        """Inside `manual`: the hidden units of this device's part of the MLP."""
        h_BTD = gather_sequence(self.norm_mlp(x_BTD), sequence)
        u_BTF = checkpoint_name(project("BTD,DF->BTF", h_BTD, self.up, self.up_bias), "mlp_up")
        activation = ACTIVATIONS[self.config.activation]
        if self.gate is None:
            return activation(u_BTF)
        return activation(checkpoint_name(project("BTD,DF->BTF", h_BTD, self.gate), "mlp_gate")) * u_BTF

    def narrow(self, u_BTF, sequence: str):
        """Inside `manual`: projects the hidden units back to the stream."""
        m_BTD = reduce_sequence(project("BTF,FD->BTD", u_BTF, self.down), sequence)
        return m_BTD if self.down_bias is None else m_BTD + self.down_bias[...].astype(m_BTD.dtype)


MIXERS = {"attention": Attention}
FEED_FORWARDS = {"mlp": Mlp, "moe": Moe}


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + feed_forward(norm(x)) (pre-norm, Xiong et al. 2020)."""

    def __init__(self, c: ModelConfig, w: Weights, repeats: int):
        residual = (2 * c.num_layers) ** -0.5  # 2L terms add up in the residual stream (GPT-2, 2019, section 2.3)
        self.config = c
        self.add_mixer(c, w, repeats, residual)
        self.add_feed_forward(c, w, repeats, residual)

    def __call__(self, x_BTD, rotation, key, attend, sequence: str):
        """Runs one block.

        Args:
          rotation: from `Transformer.rotation`, or None.
          key: for dropout, or None.
          attend: (q, k, v) → attention's output, all [B, T, heads, H].
          sequence: the logical name of the sequence axis of x_BTD.

        Returns: (the stream after the block, the sums of the feed-forward by name).
        """
        x_BTD = checkpoint_name(x_BTD, "block_input")
        return self.fed_forward(self.mixed(x_BTD, rotation, key, attend, sequence), key, sequence)


@functools.cache
def block_type(mixer: str, feed_forward: str) -> type[Block]:
    """The class of blocks with these halves."""
    return type("Block", (Block, MIXERS[mixer], FEED_FORWARDS[feed_forward]), {})


def stacked_blocks(c: ModelConfig, w: Weights) -> Block | nnx.List:
    """The blocks of a model: a list of segments, each a list of the blocks of its period.

    One segment with a period of one block is that block alone, without lists around it.
    """
    segments = [[block_type(*halves)(c, w, segment.repeats) for halves in segment.period] for segment in c.segments]
    if len(segments) == 1 and len(segments[0]) == 1:
        return segments[0][0]
    return nnx.List([nnx.List(period) for period in segments])


def periods(blocks: Block | nnx.List) -> list[tuple[Block, ...]]:
    """The stacked blocks of each segment's period."""
    return [(blocks,)] if isinstance(blocks, Block) else [tuple(period) for period in blocks]


def unstacked(blocks: Block | nnx.List, segments: tuple[Segment, ...]) -> list[Block]:
    """The blocks in the order in which a token passes through them, each with weights of its own."""
    single = []
    for period, segment in zip(periods(blocks), segments, strict=True):
        rows = [one_by_one(block, segment.repeats) for block in period]
        single += [block for repeat in zip(*rows, strict=True) for block in repeat]
    return single


@functools.partial(jax.jit, static_argnums=1)
def one_by_one(block: Block, repeats: int) -> list[Block]:
    """The blocks of a stack."""
    return [jax.tree.map(lambda leaf, layer=layer: leaf[layer], block) for layer in range(repeats)]
