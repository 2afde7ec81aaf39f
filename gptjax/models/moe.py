"""The feed-forward `moe`: a router sends each token to a few of many experts (Shazeer et al. 2017).

Letters as in transformer.py and experts.py; F width of an expert, E experts, k chosen by a token.

Each device routes its own tokens and holds its part of every expert: `fsdp` and `tensor` cut the experts as they cut
an `Mlp`. The router computes in float32 and, unlike the experts, on the device's own part of the sequence.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from gptjax.models import experts
from gptjax.models.config import ModelConfig
from gptjax.models.layers import ACTIVATIONS, Int8, Norm, Weights, dropout, product
from gptjax.parallel.collectives import gather, gather_sequence, manual, reduce_sequence, summed
from gptjax.parallel.sharding import BATCH_AXES, spec

ROUTER_STD = 0.02


class Routing(NamedTuple):
    """The experts that tokens chose."""

    experts_BTk: jax.Array  # int32
    weights_BTk: jax.Array  # float32


class Moe:
    """The feed-forward `moe`."""

    def add_feed_forward(self, c: ModelConfig, w: Weights, L: int, residual: float) -> None:
        """Makes the weights. residual: the initial scale of a term of the residual stream."""
        D, E, F, S = c.embed_dim, c.num_experts, c.expert_dim, c.shared_experts * c.expert_dim
        gated, axes = c.activation == "swiglu", "layers experts embed mlp"
        self.norm_mlp = Norm(c.norm, c.norm_eps, w, (L, D), "layers norm", c.biases)
        # The router declares no inputs: Muon, LoRA and int8 pass it by, since its outputs are choices, not features.
        self.router = w.matrix((L, D, E), "layers embed router", "", ROUTER_STD)
        self.router_bias = w.zeros((L, E), "layers router") if c.router_bias else None
        self.expert_gate = w.matrix((L, E, D, F), axes, "embed", D**-0.5) if gated else None
        self.expert_up = w.matrix((L, E, D, F), axes, "embed", D**-0.5)
        self.expert_down = w.matrix((L, E, F, D), "layers experts mlp embed", "mlp", residual * F**-0.5)
        shared, axes = bool(S), "layers embed mlp"
        self.shared_gate = w.matrix((L, D, S), axes, "embed", D**-0.5) if gated and shared else None
        self.shared_up = w.matrix((L, D, S), axes, "embed", D**-0.5) if shared else None
        self.shared_down = w.matrix((L, S, D), "layers mlp embed", "mlp", residual * S**-0.5) if shared else None

    def fed_forward(self, x_BTD, key, sequence: str):
        """x plus moe(norm(x)), and the sums of the router; arguments as of `Block.__call__`."""
        local = manual(functools.partial(Moe.local, sequence=sequence), f"act_batch {sequence} act_embed", "")
        with jax.named_scope("moe"):
            m_BTD, sums = local(self, x_BTD)
            return x_BTD + dropout(checkpoint_name(m_BTD, "mlp_out"), self.config.dropout, key, 1), sums

    def local(self, x_BTD, sequence: str):
        """Inside `manual`: the experts' part of the stream and the router's sums over the tokens of all devices."""
        c = self.config
        h_BTD = self.norm_mlp(x_BTD)
        routing, sums = self.route(h_BTD, (*BATCH_AXES, *filter(None, spec(sequence))))
        h_BTD, routing = gather_sequence(h_BTD, sequence), Routing(*(gather_sequence(x, sequence) for x in routing))
        B, T, D = h_BTD.shape
        h_TD = h_BTD.reshape(B * T, D)
        weights_Tk, experts_Tk = routing.weights_BTk.reshape(B * T, -1), routing.experts_BTk.reshape(B * T, -1)
        platform = jax.sharding.get_abstract_mesh().abstract_device.platform
        slots = experts.make_slots(experts_Tk, c.num_experts, experts.block_size(experts_Tk.size, platform))
        m_SD = self.expert(experts.filled(h_TD, slots), slots)
        m_BTD = experts.collected(m_SD, weights_Tk, slots).reshape(B, T, D)
        if self.shared_up is not None:
            m_BTD += self.shared(h_BTD)
        dropped = experts_Tk.size - (slots.assignments_S < experts_Tk.size).sum(dtype=jnp.int32)
        sums["dropped_tokens"] = summed(dropped, *BATCH_AXES, *filter(None, spec(sequence)))
        return reduce_sequence(m_BTD, sequence), sums

    def route(self, h_BTD, axes: tuple[str, ...]):
        """Inside `manual`: the routing of this device's positions, and sums over those of all devices.

        The k experts with the largest scores are chosen, scores being a softmax over all experts (Fedus et al. 2022,
        section 2.1) or a sigmoid of each (DeepSeek-V3, 2024, section 2.1.2). With `router_bias` the choice, not the
        weight, is by score + bias. With `router_groups` only experts of the best `router_top_groups` groups can be
        chosen, a group being as good as the sum of its two largest (same section).

        Args:
          axes: the mesh axes that cut the positions.

        Returns:
          The routing, and sums over tokens, the mean over layers taken elsewhere:
            balance_loss   E · Σ_e (share of the assignments to e) · (share of the scores of e), which is 1 at balance
                           (Fedus et al. 2022, equation 4); the share of the assignments is over the whole batch
            router_z_loss  log² of the softmax's denominator (Zoph et al. 2022, equation 5)
            expert_tokens  int32 [E], assignments to each expert
        """
        c = self.config
        logits_BTE = jnp.einsum("BTD,DE->BTE", h_BTD.astype(jnp.float32), gather(self.router, jnp.float32))
        softmax_BTE = jax.nn.softmax(logits_BTE)
        scores_BTE = softmax_BTE if c.router == "softmax" else jax.nn.sigmoid(logits_BTE)
        ranked_BTE = jax.lax.stop_gradient(scores_BTE)
        if self.router_bias is not None:
            ranked_BTE += jax.lax.stop_gradient(self.router_bias[...].astype(jnp.float32))
        if c.router_groups > 1:
            ranked_BTE = in_best_groups(ranked_BTE, c.router_groups, c.router_top_groups)
        _, experts_BTk = jax.lax.top_k(ranked_BTE, c.experts_per_token)
        weights_BTk = jnp.take_along_axis(scores_BTE, experts_BTk, axis=-1)
        if c.router_normalized:
            weights_BTk /= weights_BTk.sum(-1, keepdims=True) + 1e-20
        chosen_E = jnp.zeros(c.num_experts, jnp.int32).at[experts_BTk].add(1)
        shares_BTE = scores_BTE / scores_BTE.sum(-1, keepdims=True)
        shares_E, z, chosen_E = summed(
            (shares_BTE.sum((0, 1)), jnp.square(jax.nn.logsumexp(logits_BTE, -1)).sum(), chosen_E), *axes
        )
        balance = c.num_experts * (chosen_E / chosen_E.sum() * shares_E).sum()
        sums = {"balance_loss": balance, "router_z_loss": z, "expert_tokens": chosen_E}
        return Routing(experts_BTk, weights_BTk * c.router_scale), sums

    def expert(self, x_SD, slots: experts.Slots):
        """Inside `manual`: each slot through this device's part of its expert."""
        u_SF = checkpoint_name(grouped(x_SD, self.expert_up, slots), "mlp_up")
        activation = ACTIVATIONS[self.config.activation]
        if self.expert_gate is None:
            u_SF = activation(u_SF)
        else:
            u_SF = activation(checkpoint_name(grouped(x_SD, self.expert_gate, slots), "mlp_gate")) * u_SF
        return grouped(u_SF, self.expert_down, slots)

    def shared(self, h_BTD):
        """Inside `manual`: this device's part of the experts that every token passes through (DeepSeekMoE, 2024)."""
        u_BTF = product("BTD,DF->BTF", h_BTD, self.shared_up)
        activation = ACTIVATIONS[self.config.activation]
        if self.shared_gate is None:
            u_BTF = activation(u_BTF)
        else:
            u_BTF = activation(product("BTD,DF->BTF", h_BTD, self.shared_gate)) * u_BTF
        return product("BTF,FD->BTD", u_BTF, self.shared_down)


def grouped(x_SI, matrices: nnx.Param | Int8, slots: experts.Slots):
    """Inside `manual`: each slot times the matrix of its expert; the scales of an `Int8` multiply the result."""
    if isinstance(matrices, Int8):
        y_SO = experts.grouped_product(x_SI, gather(matrices.values, jnp.int8).astype(x_SI.dtype), slots)
        experts_S = jnp.repeat(slots.experts_n, slots.block, total_repeat_length=x_SI.shape[0])
        return y_SO * gather(matrices.scale, x_SI.dtype)[experts_S]
    return experts.grouped_product(x_SI, gather(matrices, x_SI.dtype), slots)


def in_best_groups(ranked_BTE, groups: int, best: int):
    """The scores, with -inf for experts outside of the best groups of neighbours."""
    ranked_BTGe = ranked_BTE.reshape(*ranked_BTE.shape[:-1], groups, -1)
    of_group_BTG = jax.lax.top_k(ranked_BTGe, min(2, ranked_BTGe.shape[-1]))[0].sum(-1)
    _, kept_BTg = jax.lax.top_k(of_group_BTG, best)
    kept_BTG = (kept_BTg[..., None] == jnp.arange(groups)).any(-2)
    return jnp.where(kept_BTG[..., None], ranked_BTGe, -jnp.inf).reshape(ranked_BTE.shape)


def combined(of_layers: list[dict], c: ModelConfig) -> tuple:
    """The sums of all layers as `Hidden` has them: (sums, objective), or () for a model without routers.

    Args:
      of_layers: the sums of the feed-forwards of each stack, each with the repeats as leading axis.
    """
    routed = [sums for sums in of_layers if sums]
    if not routed:
        return ()
    sums = {name: jnp.concatenate([sums[name] for sums in routed]) for name in routed[0]}
    for name in ("balance_loss", "router_z_loss"):
        sums[name] = sums[name].mean()
    sums["dropped_tokens"] = sums["dropped_tokens"].sum()
    return sums, c.balance_loss * sums["balance_loss"] + c.router_z_loss * sums["router_z_loss"]


def move_biases(routed: list, tokens_LE, speed: float) -> None:
    """Raises the bias of experts with few tokens by `speed`, and lowers that of others (Wang et al. 2024, algorithm 1).

    Args:
      routed: stacks of blocks with a router, in the order of tokens_LE.
      tokens_LE: assignments to each expert.
    """
    first = 0
    for block in routed:
        bias_LE = block.router_bias[...]
        tokens_lE = tokens_LE[first : (first := first + bias_LE.shape[0])].astype(jnp.float32)
        few_lE = jnp.sign(tokens_lE.mean(-1, keepdims=True) - tokens_lE)
        block.router_bias[...] = (bias_LE + speed * few_lE).astype(bias_LE.dtype)
