"""Rematerialization: which activations of a block the backward pass finds in memory (Chen et al. 2016).

`model.remat` is a base (`none`, `dots`, `full`), then exceptions by tensor, as in
`dots,mlp_up=recompute,mlp_gate=recompute` or `full,block_input=offload,query=offload`:

  none  keeps everything but the gathered weights; the fastest base, if memory suffices
  dots  keeps the tensors named below, which are the results of matrix products and of attention
  full  keeps only the input of each block, and computes the rest again
"""

from gptjax.errors import Refused, nearest

# The activations of a block, in the order of computation. If all are kept, no matrix product is done twice.
NAMES = (
    "block_input",
    "query",  # as attention takes them: normalized and turned
    "key",
    "value",
    "context",  # attention's output, and the log of the partition function if the kernel keeps that
    "attention_out",
    "mlp_gate",
    "mlp_up",
    "mlp_out",
)
ACTIONS = ("save", "recompute", "offload")
BASES = {
    "none": {},
    "dots": dict.fromkeys(NAMES[1:8], "save"),
    "full": {},
}


def parse(text: str) -> tuple[str, dict[str, str]]:
    """(base, {name: action}) of a setting. Raises: Refused."""
    base, *exceptions = [word.strip() for word in text.split(",")]
    if base not in BASES:
        raise Refused(f'model.remat="{text}" begins with "{base}": begin with one of {", ".join(BASES)}.')
    actions = dict(BASES[base])
    for exception in exceptions:
        name, _, action = exception.partition("=")
        if name not in NAMES:
            raise Refused(f'model.remat="{text}" names no activation "{name}".{nearest(name, NAMES)}')
        if action not in ACTIONS:
            raise Refused(f'model.remat="{text}" asks for "{action}" of {name}: choose one of {", ".join(ACTIONS)}.')
        actions[name] = action
    if base == "none" and exceptions:
        raise Refused(f'model.remat="{text}": none saves everything, so give exceptions to dots or to full.')
    return base, actions


def not_gathered_weights(primitive, *_, **params) -> bool:
    """Saves all but gathered weights, which would stay whole for each layer. Gathers over `tensor` are activations."""
    import jax  # not at the top: configs are parsed before JAX is imported

    return primitive is not jax.lax.all_gather_p or "tensor" in params["axis_name"]


def policy(text: str):
    """The policy of `jax.checkpoint` for a setting."""
    import jax

    base, actions = parse(text)
    if base == "none":
        return not_gathered_weights
    names = {action: [name for name in NAMES if actions.get(name) == action] for action in ACTIONS}
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=names["save"],
        names_which_can_be_offloaded=names["offload"],
        offload_src="device",
        offload_dst="pinned_host",
    )
