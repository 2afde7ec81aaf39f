"""The section `model` of the transformer: its sizes, and the choice among a few functions in each place."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from gptjax.errors import Refused
from gptjax.models import pattern, remat
from gptjax.models.interface import Parameters
from gptjax.models.remat import NAMES as ACTIVATION_NAMES

if TYPE_CHECKING:
    from flax import nnx

    from gptjax.models.transformer import Transformer

CHOICES = {
    "norm": ("layernorm", "rmsnorm"),
    "positions": ("learned", "rope"),
    "rope_scaling": ("", "linear", "llama3"),
    "router": ("softmax", "sigmoid"),
    "activation": ("gelu", "gelu_exact", "relu2", "swiglu"),
    "dtype": ("float32", "bfloat16"),
    "param_dtype": ("float32", "bfloat16"),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a transformer, and its `Architecture` (interface.py). A size of 0 is derived: see `resolved`."""

    architecture: str = "transformer"  # a name in models/build.py; only a transformer has the keys below
    num_layers: int = 6  # number of blocks
    layers: str = ""  # segments of blocks: see models/pattern.py; empty: num_layers blocks of attention and mlp
    num_heads: int = 6  # heads of the queries
    num_kv_heads: int = (
        0  # heads of keys and values; 0: num_heads; fewer is grouped-query attention (Ainslie et al. 2023)
    )
    head_dim: int = 0  # size of a head; 0: embed_dim / num_heads
    embed_dim: int = 384  # size of the hidden states between blocks
    mlp_dim: int = 0  # hidden size of the MLP; 0: 4 · embed_dim; swiglu: 8/3 · embed_dim, to a multiple of 64
    dropout: float = 0.0  # of the embedding and of what each half-block adds
    norm: str = "layernorm"  # layernorm or rmsnorm
    norm_eps: float = 1e-5  # added to the mean square under the root
    positions: str = "learned"  # learned, or rope: rotary embeddings (Su et al. 2021)
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    rope_scaling: str = ""  # linear (Chen et al. 2023): all positions / rope_factor; llama3: see layers.stretched
    rope_factor: float = 1.0  # factor by which rope_scaling stretches positions
    rope_low_turns: float = 1.0  # llama3: up to this many turns in rope_original_len a pair is slowed
    rope_high_turns: float = 4.0  # llama3: from this many turns on a pair is not slowed
    rope_original_len: int = 8192  # llama3: length of the sequences before stretching
    num_experts: int = 0  # experts of a `moe` feed-forward, as in model.layers="6(attention/moe)"
    experts_per_token: int = 2  # experts that a token is sent to
    expert_dim: int = 0  # hidden size of an expert; 0: mlp_dim
    shared_experts: int = 0  # experts that every token passes through besides (DeepSeekMoE, Dai et al. 2024)
    router: str = "softmax"  # scores of the experts: softmax, or sigmoid (DeepSeek-V3, 2024)
    router_normalized: bool = True  # the weights of a token's experts add up to 1
    router_scale: float = 1.0  # factor on these weights
    router_groups: int = 1  # groups of neighbouring experts; with more than 1 only the best groups are open to a token
    router_top_groups: int = 1  # the number of groups that are open
    router_bias: float = 0.0  # step of the biases that balance the load without a loss (Wang et al. 2024); 0: no biases
    balance_loss: float = 0.0  # weight of the loss that balances the load (Fedus et al. 2022); 0.01 is usual
    router_z_loss: float = 0.0  # weight of the loss on the router's logits (Zoph et al. 2022); 0.001 is usual
    activation: str = "gelu"  # gelu (tanh approximation), gelu_exact, relu2 or swiglu
    biases: bool = True  # matrices and layernorm have biases
    tied_embeddings: bool = True  # the embedding is the unembedding as well
    qk_norm: bool = False  # RMS norm of queries and keys (Henry et al. 2020; Dehghani et al. 2023)
    sliding_window: int = 0  # positions that a query sees, with the query's own (Beltagy et al. 2020); 0: all before
    logits_softcap: float = 0.0  # c · tanh(logits / c) (Gemma 2, 2024); 0 is off
    mup_base_width: int = 0  # embed_dim at which the learning rate was tuned: see `widened`; 0 is off
    mup_base_head_dim: int = 0  # head_dim there; 0: the same, because wider models have more heads, not larger heads
    remat: str = "none"  # which activations the backward pass finds in memory: models/remat.py
    scan_unroll: int = 1  # layers per loop step; num_layers unrolls all: more to compile, faster on CPU
    dtype: str = "float32"  # of activations and matrix products; softmax, norms and loss are float32
    param_dtype: str = "float32"  # of the stored weights; updates are computed in float32, then rounded

    activation_names: ClassVar[tuple[str, ...]] = ACTIVATION_NAMES
    # The config key to blame when a weight's dimension does not divide over the mesh. The first is named that does not;
    # num_kv_heads may only follow num_heads.
    axis_keys: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "embed": "model.embed_dim",
            "heads": "model.num_heads",
            "kv_heads": "model.num_kv_heads",
            "mlp": "model.mlp_dim",
            "vocab": "padded vocabulary",
        }
    )

    # The maximal-update parametrization (Yang et al. 2022, "Tensor Programs V", table 8) makes the learning rate that
    # is best at one width best at all. The update of a matrix between hidden units is divided by `widened`, and so are
    # the logits; scores are q · k / head_dim up to a constant. The initial scales, 1 / √inputs and a constant for both
    # embeddings, are the same without this parametrization. At the base width nothing differs.

    @property
    def widened(self) -> float:
        """The width in multiples of the base width."""
        return self.embed_dim / self.mup_base_width if self.mup_base_width else 1.0

    @property
    def query_scale(self) -> float:
        """The factor on attention's 1 / √head_dim: √(base head_dim / head_dim)."""
        return (self.mup_base_head_dim / self.head_dim) ** 0.5 if self.mup_base_head_dim else 1.0

    @property
    def segments(self) -> tuple[pattern.Segment, ...]:
        """The blocks of the model."""
        return pattern.parse(self.layers, self.num_layers)

    @property
    def num_routed(self) -> int:
        """The number of blocks with experts."""
        return sum(
            segment.repeats * sum(feed_forward == "moe" for _, feed_forward in segment.period)
            for segment in self.segments
        )

    @property
    def matrices(self) -> int:
        """The number of matrices of an MLP or of an expert."""
        return 3 if self.activation == "swiglu" else 2

    def build(self, vocab_size: int, seq_len: int, rngs: "nnx.Rngs") -> "Transformer":
        """A new model with random weights."""
        from gptjax.models.transformer import Transformer  # which imports this file

        return Transformer(self, vocab_size, seq_len, rngs)

    def num_parameters(self, vocab_size: int, seq_len: int) -> Parameters:
        """Counts the weights of a resolved config in closed form."""
        D, N, K, H, F = self.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim, self.mlp_dim
        norm = D * (2 if self.norm == "layernorm" and self.biases else 1)
        attention = 2 * D * N * H + 2 * D * K * H + (2 * H if self.qk_norm else 0)
        mlp = D * F * self.matrices
        biases = (N + 2 * K) * H + D + F + D if self.biases else 0
        embedding = padded_vocab(vocab_size) * D * (1 if self.tied_embeddings else 2)
        positions = seq_len * D if self.positions == "learned" else 0
        routed, expert = self.num_routed, D * self.expert_dim * self.matrices
        others = embedding + positions + self.num_layers * (attention + 2 * norm) + norm
        others += (self.num_layers - routed) * (mlp + biases)
        others += routed * (self.num_experts * (D + bool(self.router_bias)) + self.shared_experts * expert)
        return Parameters(
            others + routed * self.num_experts * expert, others + routed * self.experts_per_token * expert
        )

    def flops_per_token(self, vocab_size: int, seq_len: int) -> int:
        """Model FLOPs of training one token: forward and backward, nothing recomputed counted twice.

        A weight of a matrix product counts 6; the unembedding is included and the look-up is not (Kaplan et al. 2020,
        section 2.1). Causal attention looks at half of the seq_len² scores and sums, and only those are counted
        (Chowdhery et al. 2022, appendix B, counts them all). Of experts those count that a token passes through.
        """
        D, N, K, H, F = self.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim, self.mlp_dim
        routed, active = self.num_routed, self.experts_per_token + self.shared_experts
        weights = self.num_layers * (2 * D * N * H + 2 * D * K * H) + (self.num_layers - routed) * D * F * self.matrices
        weights += routed * D * (self.num_experts + active * self.expert_dim * self.matrices)
        unembedding = padded_vocab(vocab_size) * D
        scores = self.num_layers * 2 * N * H * seq_len // 2
        return 6 * (weights + unembedding + scores)

    def expected_collectives(self, mesh, rows: int, seq_len: int) -> dict[tuple[str, str], int]:
        """(operation, mesh axis) → bytes that the activations of `rows` sequences on a device send in one step.

        A block gathers the sequence over `tensor` before attention and before the MLP, and scatters the sums of their
        products after them; backward the other way (Korthikanti et al. 2022, section 4.2.2). If not everything is kept,
        the inputs are gathered once more for the gradients of weights, and full rematerialization scatters once more
        after attention. Before the first block and after the last there is one more of each.
        """
        from gptjax.parallel.sharding import mesh_axes  # not at the top: configs are parsed before JAX is imported

        (axis,) = mesh_axes("act_stream")
        stream_bytes = rows * seq_len * self.embed_dim * {"float32": 4, "bfloat16": 2}[self.dtype]
        gathers, scatters = {"none": (4, 4), "dots": (6, 4), "full": (6, 5)}[remat.parse(self.remat)[0]]
        return {
            ("all-gather", axis): (gathers * self.num_layers + 2) * stream_bytes,
            ("reduce-scatter", axis): (scatters * self.num_layers + 2) * stream_bytes,
        }

    def resolved(self) -> "ModelConfig":
        """The same with every size of 0 derived. Raises: Refused, when the sizes do not fit together."""
        for key, words in CHOICES.items():
            if getattr(self, key) not in words:
                raise Refused(f'model.{key}="{getattr(self, key)}" is unknown: choose one of {", ".join(words)}.')
        for key in ("num_layers", "num_heads", "embed_dim", "scan_unroll"):
            if getattr(self, key) < 1:
                raise Refused(f"model.{key}={getattr(self, key)} must be at least 1.")
        sizes = (
            "num_kv_heads",
            "head_dim",
            "mlp_dim",
            "expert_dim",
            "shared_experts",
            "sliding_window",
            "mup_base_width",
            "mup_base_head_dim",
        )
        for key in (*sizes, "logits_softcap"):
            if getattr(self, key) < 0:
                raise Refused(f"model.{key}={getattr(self, key)} must not be negative.")
        if self.mup_base_head_dim and not self.mup_base_width:
            raise Refused(
                f"model.mup_base_head_dim={self.mup_base_head_dim} needs model.mup_base_width too: give the embed_dim "
                "of that model."
            )
        remat.parse(self.remat)
        pattern.parse(self.layers, self.num_layers)
        self.check_experts()
        if self.rope_theta <= 0:
            raise Refused(f"model.rope_theta={self.rope_theta} must be more than 0: 10000 is usual.")
        if self.norm_eps <= 0:
            raise Refused(f"model.norm_eps={self.norm_eps} must be more than 0: 1e-5 is usual.")
        if self.rope_scaling and self.rope_factor < 1:
            raise Refused(f"model.rope_factor={self.rope_factor} must be at least 1, which changes nothing.")
        if self.rope_original_len < 1 or not 0 < self.rope_low_turns < self.rope_high_turns:
            raise Refused(
                f"model.rope_low_turns={self.rope_low_turns} must be more than 0 and less than model.rope_high_turns="
                f"{self.rope_high_turns}, and model.rope_original_len={self.rope_original_len} at least 1."
            )
        if not 0 <= self.dropout < 1:
            raise Refused(f"model.dropout={self.dropout} must be at least 0 and below 1.")
        if not self.head_dim and self.embed_dim % self.num_heads:
            raise Refused(
                f"model.embed_dim={self.embed_dim} is not divisible by model.num_heads={self.num_heads}: "
                "change one of them, or give model.head_dim."
            )
        swiglu_dim = -(-self.embed_dim * 8 // 3 // 64) * 64
        mlp_dim = self.mlp_dim or (swiglu_dim if self.activation == "swiglu" else 4 * self.embed_dim)
        config = dataclasses.replace(
            self,
            num_kv_heads=self.num_kv_heads or self.num_heads,
            head_dim=self.head_dim or self.embed_dim // self.num_heads,
            mlp_dim=mlp_dim,
            expert_dim=self.expert_dim or (mlp_dim if self.num_experts else 0),
            layers="" if self.segments == pattern.parse("", self.num_layers) else self.layers,
        )
        if config.num_heads % config.num_kv_heads:
            raise Refused(
                f"model.num_heads={config.num_heads} is not divisible by model.num_kv_heads="
                f"{config.num_kv_heads}: every key/value head serves the same number of query heads."
            )
        if config.positions == "rope" and config.head_dim % 2:
            raise Refused(f"model.head_dim={config.head_dim} is odd, but rope turns pairs: make it even.")
        return config

    def check_experts(self) -> None:
        """Raises: Refused, when the settings of the experts do not fit together."""
        E, k = self.num_experts, self.experts_per_token
        if E < 0 or bool(E) != bool(self.num_routed):
            raise Refused(
                f'model.num_experts={E} and model.layers="{self.layers}" with {self.num_routed} blocks of moe do not '
                f'belong together: write model.layers="{self.num_layers}(attention/moe)" for a model of experts, and '
                "model.num_experts=0 for a model without."
            )
        if not E:
            return
        if not 1 <= k <= E:
            raise Refused(f"model.experts_per_token={k} must lie between 1 and model.num_experts={E}.")
        if self.biases:
            raise Refused("model.biases=true adds biases, which experts do not have: set model.biases=false.")
        groups, top = self.router_groups, self.router_top_groups
        if groups < 1 or E % groups or not 1 <= top <= groups or top * (E // max(groups, 1)) < k:
            raise Refused(
                f"model.router_groups={groups} must divide model.num_experts={E}, and the {top} groups of "
                f"model.router_top_groups must be among them and hold model.experts_per_token={k} experts."
            )
        for key in ("router_bias", "balance_loss", "router_z_loss"):
            if getattr(self, key) < 0:
                raise Refused(f"model.{key}={getattr(self, key)} must not be negative.")
        if self.router_scale <= 0:
            raise Refused(f"model.router_scale={self.router_scale} must be more than 0.")


def padded_vocab(vocab_size: int) -> int:
    """The vocabulary as stored: the next multiple of 128, the lanes of a TPU's matrix unit."""
    return -(-vocab_size // 128) * 128
