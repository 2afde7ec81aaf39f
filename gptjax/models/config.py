"""What a model is: its sizes, and which of a few functions it has in each place."""

import dataclasses

from gptjax.errors import Refused
from gptjax.models import remat

CHOICES = {
    "norm": ("layernorm", "rmsnorm"),
    "positions": ("learned", "rope"),
    "rope_scaling": ("", "linear", "llama3"),
    "activation": ("gelu", "gelu_exact", "relu2", "swiglu"),
    "dtype": ("float32", "bfloat16"),
    "param_dtype": ("float32", "bfloat16"),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of the model. A size of 0 is worked out: see `resolved`."""

    num_layers: int = 6  # number of blocks
    num_heads: int = 6  # heads of the queries
    num_kv_heads: int = 0  # heads of keys and values; 0: num_heads; fewer is grouped-query attention (Ainslie et al. 2023)
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
    rope_low_turns: float = (
        1.0  # of llama3: turns in rope_original_len up to which a pair is slowed, and from which not
    )
    rope_high_turns: float = 4.0  # llama3: from this many turns on a pair is not slowed
    rope_original_len: int = 8192  # llama3: length of the sequences before stretching
    activation: str = "gelu"  # gelu (tanh approximation), gelu_exact, relu2 or swiglu
    biases: bool = True  # matrices and layernorm have biases
    tied_embeddings: bool = True  # the embedding is the unembedding as well
    qk_norm: bool = False  # RMS norm of queries and keys (Henry et al. 2020; Dehghani et al. 2023)
    sliding_window: int = 0  # positions that a query sees, its own included (Beltagy et al. 2020); 0 is all before it
    logits_softcap: float = 0.0  # c · tanh(logits / c) (Gemma 2, 2024); 0 is off
    mup_base_width: int = 0  # embed_dim at which the learning rate was tuned, for wider ones: see `widened`; 0 is off
    mup_base_head_dim: int = 0  # head_dim there; 0: this one, wider models having more heads and not larger ones
    remat: str = "none"  # what the backward pass finds in memory: models/remat.py
    scan_unroll: int = 1  # layers a loop step; num_layers unrolls all: more to compile, faster on CPU
    dtype: str = "float32"  # of activations and matrix products; softmax, norms and loss are float32
    param_dtype: str = "float32"  # of the stored weights; updates are computed in float32, and rounded to it

    # The maximal-update parametrization (Yang et al. 2022, "Tensor Programs V", table 8), in which a learning rate that
    # is best at one width is best at all: the update of a matrix between hidden units is divided by `widened`, logits are
    # too, and scores are q · k / head_dim up to a constant. The initial scales, 1 / √inputs, and a constant for both
    # embeddings, are the same without it. At the base width nothing differs.

    @property
    def widened(self) -> float:
        """How many times as wide as the base."""
        return self.embed_dim / self.mup_base_width if self.mup_base_width else 1.0

    @property
    def query_scale(self) -> float:
        """What attention's 1 / √head_dim is multiplied by: √(base head_dim / head_dim)."""
        return (self.mup_base_head_dim / self.head_dim) ** 0.5 if self.mup_base_head_dim else 1.0

    def resolved(self) -> "ModelConfig":
        """The same with every 0 worked out. Raises: Refused, when the sizes do not fit together."""
        for key, words in CHOICES.items():
            if getattr(self, key) not in words:
                raise Refused(f'model.{key}="{getattr(self, key)}" is unknown: choose one of {", ".join(words)}.')
        for key in ("num_layers", "num_heads", "embed_dim", "scan_unroll"):
            if getattr(self, key) < 1:
                raise Refused(f"model.{key}={getattr(self, key)} must be at least 1.")
        sizes = ("num_kv_heads", "head_dim", "mlp_dim", "sliding_window", "mup_base_width", "mup_base_head_dim")
        for key in (*sizes, "logits_softcap"):
            if getattr(self, key) < 0:
                raise Refused(f"model.{key}={getattr(self, key)} must not be negative.")
        if self.mup_base_head_dim and not self.mup_base_width:
            raise Refused(
                f"model.mup_base_head_dim={self.mup_base_head_dim} without model.mup_base_width changes nothing else: "
                "give the embed_dim of that model too."
            )
        remat.parse(self.remat)
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
