"""The seam for architectures: what training, decoding and planning may ask of a model, and of its config.

Letters: B batch, R rows of a prefill, T position, D width of the hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:  # configs are parsed before JAX is imported
    import jax
    from flax import nnx

PyTree = Any


class Inputs(NamedTuple):
    """The texts that a model reads, int32 [B, T] each."""

    tokens_BT: jax.Array
    positions_BT: jax.Array  # within the document
    segments_BT: jax.Array  # document number
    media: Mapping[str, jax.Array] = {}  # by kind; a token with a reserved id marks each place in the text


class Hidden(NamedTuple):
    """The last hidden states of a model."""

    x_BTD: jax.Array  # after the last norm, in the compute dtype, cut as `act_stream`
    # Auxiliary sums over all positions by their name in the log: float32 scalars are logged by position, int32 counts
    # as they are. Empty for dense models.
    sums: Mapping[str, jax.Array] = {}
    objective: jax.Array | None = None  # the sums weighted by the config, to be minimized; None for dense models


class Output(NamedTuple):
    """Everything that a loss or a sampler needs to make logits of hidden states."""

    table: nnx.Param  # [V, D] as stored, its vocabulary padded; an `Int8` in a quantized model
    softcap: float = 0.0  # c · tanh(logits / c); 0 is off


class Parameters(NamedTuple):
    """How many weights a model has, the padding of its vocabulary included."""

    total: int
    active: int  # weights that one token passes through


class LanguageModel(Protocol):
    """A model, which is an `nnx.Module`. Each weight declares its axes, inputs and stacked axes: see layers.weight."""

    def hidden(self, inputs: Inputs, key: jax.Array | None) -> Hidden:
        """Reads whole rows. key: for dropout, or None for no dropout."""
        ...

    def output(self) -> Output: ...

    def after_update(self, sums: Mapping[str, jax.Array]) -> LanguageModel:
        """The model after an update, with changes that no gradient makes. sums: of `hidden` over the whole update."""
        ...

    def for_decoding(self) -> LanguageModel:
        """The same model, laid out for `prefill` and `decode`; the given model stays as it is."""
        ...

    def empty_state(self, rows: int, slots: int) -> PyTree:
        """The state of rows before any token, with room for `slots` tokens. The first axis of each leaf is the row."""
        ...

    def prefill(self, tokens_RT: jax.Array, lengths_R: jax.Array) -> tuple[jax.Array, PyTree]:
        """Reads prompts from their beginning.

        Returns:
          (hidden states of each row's last token [R, D], a state). A leaf of the state may be shorter than in
          `empty_state` along any axis but the first: then it holds the beginning of that axis.
        """
        ...

    def decode(self, tokens_B: jax.Array, positions_B: jax.Array, state: PyTree) -> tuple[jax.Array, PyTree]:
        """Reads one more token a row. Returns (hidden states [B, D], the next state)."""
        ...


class Architecture(Protocol):
    """The frozen dataclass that is the section `config.model`."""

    activation_names: tuple[str, ...]  # the activations that model.remat may name
    axis_keys: Mapping[str, str]  # logical axis → the config key to blame when it does not divide over the mesh

    def resolved(self) -> Architecture:
        """The same with every derived size filled in. Raises: Refused."""
        ...

    def build(self, vocab_size: int, seq_len: int, rngs: nnx.Rngs) -> LanguageModel: ...

    def num_parameters(self, vocab_size: int, seq_len: int) -> Parameters: ...

    def flops_per_token(self, vocab_size: int, seq_len: int) -> int:
        """Model FLOPs of training one token, nothing recomputed counted twice."""
        ...

    def expected_collectives(self, mesh, rows: int, seq_len: int) -> dict[tuple[str, str], int]:
        """(operation, mesh axis) → bytes that the activations of `rows` sequences on a device send in one step.

        Weights are not counted here: they say themselves how they are cut.
        """
        ...
