"""Optax optimizers, and the masks that tell weights from gains and biases."""

import jax
import optax

from gptjax.parallel.trees import is_param
from gptjax.training.optim.config import OptimizerConfig
from gptjax.training.optim.factored import clip_by_layer_rms, scale_by_factored_rms
from gptjax.training.optim.schedules import learning_rate


def decays(model) -> object:
    """True for the weights that decay pulls to zero: all but norms and biases."""
    return jax.tree.map(lambda param: param.decay, model, is_leaf=is_param)


def muon_dimensions(model) -> object:
    """The input and output axes of each stacked matrix; None where Nadam serves.

    Nadam (Dozat 2016) serves embeddings, gains, biases, and adapters, which declare no inputs. Jordan et al. 2024 have
    Adam there; optax gives its half for them Nesterov's momentum too, which is better here (benchmarks/NOTES.md, Muon).
    """

    def dimensions(param):
        if not (param.stacked and param.inputs):
            return None
        inputs = tuple(param.axes.index(name) for name in param.inputs)
        stacked = [param.axes.index(name) for name in param.stacked]
        outputs = tuple(axis for axis in range(param.ndim) if axis not in inputs and axis not in stacked)
        return optax.contrib.MuonDimensionNumbers(reduction_axis=inputs, output_axis=outputs)

    return jax.tree.map(dimensions, model, is_leaf=is_param)


def narrowed(inner: optax.GradientTransformation, power: float) -> optax.GradientTransformation:
    """Divides the updates of a matrix by a power of `widened` (Yang et al. 2022, as in models/config.py).

    Adam's and Lion's updates have entries of one size at any width. If all point one way, a sum over n inputs grows as
    n, so the power is 1 (table 8). Muon's singular values are all alike, √n at entries of one size, so the power is 1/2
    (Yang, Simon and Bernstein 2023, "A spectral condition for feature learning", section 3). Weight decay comes after
    this division and takes the same share of a weight a step at any width.
    """

    def smaller(param):
        ratio = param.widened**power
        return param if ratio == 1 else jax.tree.map(lambda update: update / ratio, param)

    def update(gradient, state, params):
        updates, state = inner.update(gradient, state, params)
        return jax.tree.map(smaller, updates, is_leaf=is_param), state

    return optax.GradientTransformation(inner.init, update)


def adamw(rate: optax.Schedule, c: OptimizerConfig) -> optax.GradientTransformation:
    return optax.chain(
        narrowed(optax.scale_by_adam(b1=c.beta1, b2=c.beta2, eps=c.eps), 1),
        optax.add_decayed_weights(c.weight_decay, decays),
        optax.scale_by_learning_rate(rate),
    )


def lion(rate: optax.Schedule, c: OptimizerConfig) -> optax.GradientTransformation:
    return optax.chain(
        narrowed(optax.scale_by_lion(b1=c.beta1, b2=c.beta2), 1),
        optax.add_decayed_weights(c.weight_decay, decays),
        optax.scale_by_learning_rate(rate),
    )


def adafactor(rate: optax.Schedule, c: OptimizerConfig) -> optax.GradientTransformation:
    if c.version == 1:
        update = optax.adafactor(None, multiply_by_parameter_scale=False, momentum=c.beta1)
    else:
        update = optax.chain(
            scale_by_factored_rms(), clip_by_layer_rms(), optax.ema(c.beta1, debias=False), optax.scale(-1)
        )
    # Inside optax the decay of Adafactor is not multiplied by the rate; here it is, as for the other optimizers.
    return optax.chain(
        update,
        optax.add_decayed_weights(-c.weight_decay, decays),
        optax.scale_by_schedule(rate),
    )


def muon(rate: optax.Schedule, c: OptimizerConfig) -> optax.GradientTransformation:
    # The root mean square of the update is made equal to AdamW's (Liu et al. 2025, section 2.2), so that one learning
    # rate and one decay serve both halves.
    update = optax.contrib.muon(
        1.0,
        beta=c.beta1,
        adam_b1=c.beta1,
        adam_b2=c.beta2,
        muon_weight_dimension_numbers=muon_dimensions,
        consistent_rms=0.2,
    )
    # Inside optax the decay of Adam's half has no mask, so the decay is added here.
    return optax.chain(
        narrowed(update, 0.5), optax.add_decayed_weights(-c.weight_decay, decays), optax.scale_by_schedule(rate)
    )


OPTIMIZERS = {"adamw": adamw, "lion": lion, "adafactor": adafactor, "muon": muon}


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Clipping by global norm (Pascanu et al. 2013), then the named optimizer."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, OPTIMIZERS[config.name](learning_rate(config, num_steps), config))


def stored(opt_state: optax.OptState, config: OptimizerConfig) -> optax.OptState:
    """The optimizer's state between updates: in `state_dtype`, and in host memory with `offload`.

    The smallest step of bfloat16 is 1/256 of a value, so a second moment with beta2 above 0.99 does not change in it.
    """

    def store(leaf):
        if leaf.ndim == 0:
            return leaf
        if jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating):
            leaf = leaf.astype(config.state_dtype)
        return jax.device_put(leaf, jax.memory.Space.Host) if config.offload else leaf

    return jax.tree.map(store, opt_state)


def loaded(opt_state: optax.OptState, config: OptimizerConfig) -> optax.OptState:
    """The stored state as an update uses it: in float32, in the device's memory."""

    def load(leaf):
        if leaf.ndim and config.offload:
            leaf = jax.device_put(leaf, jax.memory.Space.Device)
        return leaf.astype("float32") if leaf.dtype == jax.numpy.bfloat16 else leaf

    return jax.tree.map(load, opt_state)
