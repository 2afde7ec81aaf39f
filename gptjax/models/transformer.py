"""A decoder-only transformer: GPT-2 (Radford et al. 2019) and Llama (Touvron et al. 2023) from the same words.

Letters in tensors: B batch, T position, S cached position, D embed_dim, N num_heads, K num_kv_heads, H head_dim,
F mlp_dim, V padded vocabulary, L num_layers.

All blocks are one `Block` whose weights carry the layers as their leading axis; `jax.lax.scan` runs over it, so the
program that XLA compiles does not grow with the depth.

Between blocks the residual stream is cut over `tensor` along its sequence; a half-block gathers it, works on its part of
the heads or of the MLP, and reduce-scatters what it adds.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from gptjax.errors import Refused
from gptjax.models import remat
from gptjax.models.attention import attention, cached_attention
from gptjax.models.layers import Norm, bias, dropout, rope, rotate, rows, soft_capped, weight
from gptjax.sharding import gather, gather_sequence, manual, reduce_sequence, spec

ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "swiglu": jax.nn.silu,
}
CHOICES = {
    "norm": ("layernorm", "rmsnorm"),
    "positions": ("learned", "rope"),
    "activation": tuple(ACTIVATIONS),
    "dtype": ("float32", "bfloat16"),
    "param_dtype": ("float32", "bfloat16"),
}
EMBEDDING_STD = 0.02  # GPT-2 (Radford et al. 2019); Llama keeps it


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of the model. A size of 0 is worked out: see `resolved`."""

    num_layers: int = 6
    num_heads: int = 6
    num_kv_heads: int = 0  # 0: num_heads; fewer is grouped-query attention (Ainslie et al. 2023)
    head_dim: int = 0  # 0: embed_dim / num_heads
    embed_dim: int = 384
    mlp_dim: int = 0  # 0: 4 · embed_dim, or 8/3 of it (to a multiple of 64) for swiglu, which has a third matrix
    dropout: float = 0.0  # of the embedding and of what each half-block adds
    norm: str = "layernorm"
    positions: str = "learned"
    rope_theta: float = 10_000.0
    activation: str = "gelu"
    biases: bool = True
    tied_embeddings: bool = True
    qk_norm: bool = False  # RMS norm of queries and keys (Henry et al. 2020; Dehghani et al. 2023)
    sliding_window: int = 0  # positions that a query sees, its own included (Beltagy et al. 2020); 0 is all before it
    logits_softcap: float = 0.0  # c · tanh(logits / c) (Gemma 2, 2024); 0 is off
    remat: str = "none"  # what the backward pass finds in memory: models/remat.py
    isolate_products: bool = False  # lets XLA fuse nothing into matrix products: see `Block.alone`
    scan_unroll: int = 1  # layers a loop step; num_layers unrolls all: more to compile, faster on CPU
    dtype: str = "float32"  # of activations and matrix products; softmax, norms and loss are float32
    param_dtype: str = "float32"  # of the stored weights; updates are computed in float32, and rounded to it

    def resolved(self) -> "ModelConfig":
        """The same with every 0 worked out. Raises: Refused, when the sizes do not fit together."""
        for key, words in CHOICES.items():
            if getattr(self, key) not in words:
                raise Refused(f'model.{key}="{getattr(self, key)}" is unknown: choose one of {", ".join(words)}.')
        for key in ("num_layers", "num_heads", "embed_dim", "scan_unroll"):
            if getattr(self, key) < 1:
                raise Refused(f"model.{key}={getattr(self, key)} must be at least 1.")
        for key in ("num_kv_heads", "head_dim", "mlp_dim", "sliding_window", "logits_softcap"):
            if getattr(self, key) < 0:
                raise Refused(f"model.{key}={getattr(self, key)} must not be negative.")
        remat.parse(self.remat)
        if self.rope_theta <= 0:
            raise Refused(f"model.rope_theta={self.rope_theta} must be more than 0: 10000 is usual.")
        if not 0 <= self.dropout < 1:
            raise Refused(f"model.dropout={self.dropout} must be at least 0 and below 1.")
        if not self.head_dim and self.embed_dim % self.num_heads:
            raise Refused(
                f"model.embed_dim={self.embed_dim} is not divisible by model.num_heads={self.num_heads}: "
                "change one of them, or give model.head_dim."
            )
        swiglu_dim = -(-self.embed_dim * 8 // 3 // 64) * 64
        config = dataclasses.replace(
            self,
            num_kv_heads=self.num_kv_heads or self.num_heads,
            head_dim=self.head_dim or self.embed_dim // self.num_heads,
            mlp_dim=self.mlp_dim or (swiglu_dim if self.activation == "swiglu" else 4 * self.embed_dim),
        )
        if config.num_heads % config.num_kv_heads:
            raise Refused(
                f"model.num_heads={config.num_heads} is not divisible by model.num_kv_heads="
                f"{config.num_kv_heads}: every key/value head serves the same number of query heads."
            )
        if config.positions == "rope" and config.head_dim % 2:
            raise Refused(f"model.head_dim={config.head_dim} is odd, but rope turns pairs: make it even.")
        return config


# The config key to blame when a weight's dimension does not divide over the mesh; the first that does not is named, and
# num_kv_heads may only follow num_heads.
AXIS_KEYS = {
    "embed": "model.embed_dim",
    "heads": "model.num_heads",
    "kv_heads": "model.num_kv_heads",
    "mlp": "model.mlp_dim",
    "vocab": "padded vocabulary",
}


def padded_vocab(vocab_size: int) -> int:
    """The vocabulary as stored: the next multiple of 128, the lanes of a TPU's matrix unit."""
    return -(-vocab_size // 128) * 128


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) (pre-norm, Xiong et al. 2020)."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        L, D, N, K, H, F = c.num_layers, c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim, c.mlp_dim
        w = functools.partial(weight, rngs, c.param_dtype)
        b = functools.partial(bias, c.param_dtype)
        norm = functools.partial(Norm, c.norm, c.param_dtype, (L, D), "layers norm", c.biases)
        head_norm = functools.partial(Norm, "rmsnorm", c.param_dtype, (L, H), "layers norm", False)
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

    def alone(self, x):
        """Under `isolate_products` a barrier, so that no product or gradient of one is fused with its neighbours.

        On TPU v5p at width 8192 fused products take 5 to 70 % more cycles by the compiler's own estimate; on narrow
        models, and where memory is slow beside the matrix units, what is saved by fusing counts for more
        (benchmarks/NOTES.md, Products).
        """
        return jax.lax.optimization_barrier(x) if self.config.isolate_products else x

    def project(self, equation: str, x, weight: nnx.Param, bias: nnx.Param | None = None):
        """A matrix product in the compute dtype, and its bias."""
        y = self.alone(jnp.einsum(equation, x, gather(weight, x.dtype)))
        return y if bias is None else y + bias[...].astype(y.dtype)

    def heads(self, x_BTD, rotation, sequence):
        """Queries, keys and values of every position."""
        h_BTD = self.alone(gather_sequence(self.norm_attention(x_BTD), sequence))
        q_BTNH = self.project("BTD,DNH->BTNH", h_BTD, self.query, self.query_bias)
        k_BTKH = self.project("BTD,DKH->BTKH", h_BTD, self.key, self.key_bias)
        v_BTKH = self.project("BTD,DKH->BTKH", h_BTD, self.value, self.value_bias)
        if self.config.qk_norm:
            q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
        if rotation is not None:
            q_BTNH, k_BTKH = rotate(q_BTNH, rotation), rotate(k_BTKH, rotation)
        return q_BTNH, k_BTKH, v_BTKH

    def mix(self, a_BTNH, sequence):
        """What attention adds to the stream."""
        a_BTD = reduce_sequence(self.project("BTNH,NHD->BTD", self.alone(a_BTNH), self.output), sequence)
        return a_BTD if self.output_bias is None else a_BTD + self.output_bias[...].astype(a_BTD.dtype)

    def widen(self, x_BTD, sequence):
        h_BTD = self.alone(gather_sequence(self.norm_mlp(x_BTD), sequence))
        u_BTF = checkpoint_name(self.project("BTD,DF->BTF", h_BTD, self.up, self.up_bias), "mlp_up")
        activation = ACTIVATIONS[self.config.activation]
        if self.gate is None:
            return activation(u_BTF)
        return activation(checkpoint_name(self.project("BTD,DF->BTF", h_BTD, self.gate), "mlp_gate")) * u_BTF

    def narrow(self, u_BTF, sequence):
        """What the MLP adds to the stream."""
        m_BTD = reduce_sequence(self.project("BTF,FD->BTD", self.alone(u_BTF), self.down), sequence)
        return m_BTD if self.down_bias is None else m_BTD + self.down_bias[...].astype(m_BTD.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the positions decoded so far, [L, B, S, K, H]; `length` of the S slots are filled.

    A shorter prompt is padded on its left: the row's own tokens begin at slot `start_B`.
    """

    keys_LBSKH: jax.Array
    values_LBSKH: jax.Array
    start_B: jax.Array
    length: jax.Array


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
        self.norm = Norm(c.norm, c.param_dtype, (D,), "norm", c.biases)
        self.head = None if c.tied_embeddings else w((V, D), "vocab embed", EMBEDDING_STD)

    @property
    def unembedding(self) -> nnx.Param:
        """[V, D], as stored."""
        return self.embedding if self.head is None else self.head

    def embed(self, tokens_BT, positions_BT, sequence: str):
        """The residual stream before the first block, its sequence cut as `sequence` says."""

        def local(self, tokens_BT, positions_BT):
            x_BTD = rows(gather(self.embedding, self.config.dtype), tokens_BT)
            if self.positions is not None:
                x_BTD += rows(gather(self.positions, self.config.dtype), positions_BT)
            return reduce_sequence(x_BTD, sequence)

        with jax.named_scope("embed"):
            return manual(local, f"act_batch {sequence} act_embed")(self, tokens_BT, positions_BT)

    def __call__(self, tokens_BT, positions_BT, segments_BT, dropout_key):
        """Hidden states after the last norm, [B, T, D] in the compute dtype, their sequence cut as `act_stream`.

        Args:
          tokens_BT, positions_BT (within the document), segments_BT (document number): int32.
          dropout_key: a key, or None for no dropout.
        """
        c = self.config
        key = dropout_key if c.dropout else None
        rotation = rope(positions_BT, c.head_dim, c.rope_theta) if c.positions == "rope" else None
        x_BTD = dropout(self.embed(tokens_BT, positions_BT, "act_stream"), c.dropout, key, c.num_layers)

        def layer(x_BTD, block_and_index):
            block, index = block_and_index
            attend = functools.partial(attention, segments_BT=segments_BT, window=c.sliding_window)
            layer_key = None if key is None else jax.random.fold_in(key, index)
            return block(x_BTD, rotation, layer_key, attend, "act_stream"), None

        # Within a loop nothing can be merged with its recomputation; unrolled whole, there is no loop, and a barrier has
        # to keep them apart.
        apart = c.remat != "none" and c.scan_unroll >= c.num_layers
        layer = jax.checkpoint(layer, policy=remat.policy(c.remat), prevent_cse=apart)
        layers = (self.blocks, jnp.arange(c.num_layers))
        x_BTD, _ = jax.lax.scan(layer, x_BTD, layers, unroll=c.scan_unroll)
        return self.norm(x_BTD)

    def empty_cache(self, start_B: jax.Array, slots: int) -> Cache:
        """A cache for as many rows as `start_B` has and `slots` positions."""
        c = self.config
        shape = (c.num_layers, start_B.shape[0], slots, c.num_kv_heads, c.head_dim)
        axes = spec("layers", "act_batch", "act_seq", "act_kv_heads", "act_head_dim")
        zeros = jnp.zeros(shape, c.dtype, out_sharding=axes)
        return Cache(zeros, zeros, start_B, jnp.zeros((), jnp.int32))

    def decode(self, tokens_BT, cache: Cache):
        """The same for T more tokens after those in the cache.

        Returns: hidden states [B, T, D], and the cache with the T tokens in it.
        """
        c = self.config
        T, S = tokens_BT.shape[1], cache.keys_LBSKH.shape[2]
        slots_T = cache.length + jnp.arange(T)
        positions_BT = jnp.maximum(slots_T - cache.start_B[:, None], 0)
        rotation = rope(positions_BT, c.head_dim, c.rope_theta) if c.positions == "rope" else None
        slots_S = jnp.arange(S)
        mask_BTS = (slots_S <= slots_T[:, None]) & (slots_S >= cache.start_B[:, None, None])
        if c.sliding_window:
            mask_BTS &= slots_S > slots_T[:, None] - c.sliding_window

        def layer(carry, block_and_index):
            x_BTD, keys, values = carry
            block, index = block_and_index

            def attend(q_BTNH, k_BTKH, v_BTKH):
                nonlocal keys, values
                keys = jax.lax.dynamic_update_slice(keys, k_BTKH[None], (index, 0, cache.length, 0, 0))
                values = jax.lax.dynamic_update_slice(values, v_BTKH[None], (index, 0, cache.length, 0, 0))
                return cached_attention(q_BTNH, keys[index], values[index], mask_BTS)

            return (block(x_BTD, rotation, None, attend, "act_seq"), keys, values), None

        carry = (self.embed(tokens_BT, positions_BT, "act_seq"), cache.keys_LBSKH, cache.values_LBSKH)
        (x_BTD, keys, values), _ = jax.lax.scan(layer, carry, (self.blocks, jnp.arange(c.num_layers)))
        return self.norm(x_BTD), Cache(keys, values, cache.start_B, cache.length + T)

    def logits(self, x_BD):
        """Scores of the next token from last hidden states: float32 [B, V], padding included."""

        def local(weight, x_BD):
            table_VD = gather(weight, self.config.dtype)
            return jnp.einsum("BD,VD->BV", x_BD, table_VD, preferred_element_type=jnp.float32)

        logits_BV = manual(local, "act_batch act_vocab")(self.unembedding, x_BD)
        return soft_capped(logits_BV, self.config.logits_softcap)
