"""The train step: its state, the update, and the compilation for a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from gptjax.data.batch import Batch
from gptjax.models.interface import LanguageModel
from gptjax.models.lora import Adapters, merged
from gptjax.models.objective import batch_sums
from gptjax.parallel import batches
from gptjax.parallel.trees import placed
from gptjax.parallel.xla import options
from gptjax.training.config.schema import Config
from gptjax.training.optim.optimizers import loaded, make_optimizer, stored
from gptjax.training.optim.schedules import learning_rate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state that an update reads and changes; each array is sharded on the mesh by its logical axes."""

    step: jax.Array  # batches taken: the cursor of the data, and the name of the checkpoint
    skipped: jax.Array  # batches that changed nothing, because a number was not finite
    model: LanguageModel | Adapters  # the trained weights
    opt_state: optax.OptState
    ema: LanguageModel | Adapters | tuple  # a moving average of the model, or () where it is off
    base: LanguageModel | tuple = ()  # the frozen weights under adapters (lora.py), else ()


def init_state(config: Config, vocab_size: int) -> TrainState:
    """A new state. Jitted under a mesh, the state is created sharded, with the same numbers on any mesh."""
    return new_state(config, config.model.build(vocab_size, config.seq_len, nnx.Rngs(config.seed)))


def new_state(config: Config, model: LanguageModel) -> TrainState:
    """The state before the first update of a model, placed as the model is."""
    base = ()
    if config.lora.rank:
        base, model = model, Adapters(model, config.lora, config.seed)
    in_float32 = jax.tree.map(lambda weight: weight.astype(jnp.float32), model)
    opt_state = stored(make_optimizer(config.optimizer, config.num_steps).init(in_float32), config.optimizer)
    ema = jax.tree.map(jnp.copy, in_float32) if config.optimizer.ema_decay else ()  # too slow a walk for bfloat16
    return TrainState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), model, opt_state, ema, base)


@functools.partial(jax.jit, static_argnames=("config", "vocab_size"), donate_argnames="state")
def train_step(state: TrainState, batch: Batch, *, config: Config, vocab_size: int):
    """One update. Returns the next state and its metrics: loss (nats a token), grad_norm, learning_rate, skipped.

    The sums of the model (interface.py) are metrics too, float32 sums by position.

    If the loss or the gradient's norm is not finite, the next state equals this state except for the two counts.

    Args:
      batch: arrays of [grad_accum_steps, rows, seq_len].
    """
    dropout_key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    tokens = jnp.maximum(batch.weights.sum(), 1)  # a small batch of short rows may be nothing but the end of a store

    def objective(model, micro, index):
        key = jax.random.fold_in(dropout_key, index)
        sums = batch_sums(whole(state, model), micro, key, vocab_size=vocab_size, loss=config.loss)
        # Over the tokens of the whole update, so that micro-batches add up to it whatever their padding.
        return sums.objective / tokens, (sums.nll / tokens, dict(sums.auxiliary))

    def accumulate(carry, micro_and_index):
        (_, (nll, auxiliary)), gradient = jax.value_and_grad(objective, has_aux=True)(state.model, *micro_and_index)
        # Else XLA tries to sum over devices after the loop, on whole gradients, and on some TPU programs fails in it.
        gradient = jax.lax.optimization_barrier(gradient)
        return jax.tree.map(jnp.add, carry, (nll, gradient)), auxiliary

    zeros = (jnp.zeros(()), jax.tree.map(lambda weight: jnp.zeros_like(weight, jnp.float32), state.model))
    steps = config.grad_accum_steps
    # A scan of one step is unrolled, and XLA drops the addition to zero.
    with jax.named_scope("forward_backward"):
        (loss, gradient), sums = jax.lax.scan(accumulate, zeros, (batch, jnp.arange(steps)), unroll=steps == 1)
    sums = {name: each.sum(0) for name, each in sums.items()}
    norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    with jax.named_scope("optimizer"):
        updates, opt_state = optimize(gradient, finite, state, config)
        model = optax.apply_updates(state.model, updates)
        if sums and state.base == ():
            model = model.after_update(sums)
        model = chosen(finite, model, state.model)
        ema = moved_average(state, model, finite, config)
    rate = learning_rate(config.optimizer, config.num_steps)(state.step - state.skipped)  # optax counts no skipped ones
    skipped = state.skipped + jnp.logical_not(finite)
    step_metrics = {"loss": loss, "learning_rate": rate, "grad_norm": norm, "skipped": skipped}
    positions = batch.inputs.size
    step_metrics |= {name: x / positions if jnp.issubdtype(x.dtype, jnp.floating) else x for name, x in sums.items()}
    return TrainState(state.step + 1, skipped, model, opt_state, ema, state.base), step_metrics


def chosen(finite: jax.Array, new, old):
    """The `new` tree where `finite`, else the `old` one: no copy, as XLA chooses in the loop that computes `new`."""
    return jax.tree.map(functools.partial(jax.lax.select, finite), new, old)


def optimize(gradient, finite: jax.Array, state: TrainState, config: Config):
    """Optax's update. Its code knows no shardings, so XLA chooses them inside; what comes out is placed as before."""
    update = make_optimizer(config.optimizer, config.num_steps).update
    before = loaded(state.opt_state, config.optimizer)
    places = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding, (gradient, before))
    updates, after = jax.sharding.auto_axes(update, out_sharding=places)(gradient, before, state.model)
    return updates, stored(chosen(finite, after, before), config.optimizer)


def moved_average(state: TrainState, model: LanguageModel | Adapters, finite: jax.Array, config: Config):
    """The moving average of the weights after this update; early averages forget faster, so that the start fades."""
    if state.ema == ():
        return ()
    updates = state.step - state.skipped
    decay = jnp.minimum(config.optimizer.ema_decay, (1 + updates) / (10 + updates))
    return chosen(finite, optax.incremental_update(model, state.ema, 1 - decay), state.ema)


def abstract_state(config: Config, vocab_size: int, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a state on a mesh, real or of an absent topology."""
    state = placed(jax.eval_shape(functools.partial(init_state, config, vocab_size)), mesh)
    if not config.optimizer.offload:
        return state
    return dataclasses.replace(state, opt_state=jax.tree.map(_hosted, state.opt_state))


def _hosted(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return leaf.update(sharding=leaf.sharding.with_memory_kind("pinned_host")) if leaf.ndim else leaf


def abstract_batch(config: Config, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> Batch:
    """Shapes, dtypes and shardings of a step's batch."""
    shape = config.grad_accum_steps, config.micro_batch_size, config.seq_len
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batches.batch_sharding(mesh))
    return Batch(tokens, tokens, tokens, tokens, tokens.update(dtype=jnp.float32))


def compile_step(config: Config, vocab_size: int, state: TrainState, mesh: jax.sharding.Mesh):
    """Compiles the train step for a state, real or abstract, on a mesh, real or of an absent topology.

    Raises: Refused, if the compiler rejects its options.
    """
    lowered = train_step.lower(state, abstract_batch(config, mesh), config=config, vocab_size=vocab_size)
    return options.compile(lowered, config.compiler_options, mesh.devices.flat[0].platform)


def weights(state: TrainState) -> LanguageModel:
    """The weights to evaluate and sample from: the moving average if it is on."""
    return whole(state, state.model if state.ema == () else state.ema)


def whole(state: TrainState, model: LanguageModel | Adapters) -> LanguageModel:
    """The trained weights as a whole model."""
    return model if state.base == () else merged(state.base, model)
