"""The train step and the loop."""

import dataclasses
import functools
import statistics
import time
from contextlib import ExitStack

import jax
import jax.numpy as jnp
import optax
from etils import epath
from flax import nnx

from gptjax import collectives, compiled, generate, hosts, metrics, sharding, terminal, workdir
from gptjax.checkpoint import Checkpoints, placed
from gptjax.config import Config
from gptjax.data import stream
from gptjax.errors import Refused
from gptjax.evaluate import batch_sums, evaluate
from gptjax.models.size import flops_per_token, num_parameters
from gptjax.models.transformer import Transformer
from gptjax.optimizer import learning_rate, loaded, make_optimizer, stored


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that an update changes; it lives on the mesh, sharded as its logical axes say."""

    step: jax.Array  # completed updates
    model: Transformer
    opt_state: optax.OptState
    ema: Transformer | tuple  # a moving average of the model, or () where it is off


def init_state(config: Config, vocab_size: int) -> TrainState:
    """A new state. Jitted under a mesh it is born sharded, with the same numbers on any mesh."""
    model = Transformer(config.model, vocab_size, config.seq_len, nnx.Rngs(config.seed))
    in_float32 = jax.tree.map(lambda weight: weight.astype(jnp.float32), model)
    opt_state = stored(make_optimizer(config.optimizer, config.num_steps).init(in_float32), config.optimizer)
    ema = jax.tree.map(jnp.copy, in_float32) if config.optimizer.ema_decay else ()  # too slow a walk for bfloat16
    return TrainState(jnp.zeros((), jnp.int32), model, opt_state, ema)


@functools.partial(jax.jit, static_argnames=("config", "vocab_size"), donate_argnames="state")
def train_step(state: TrainState, batch: stream.Batch, *, config: Config, vocab_size: int):
    """One update. Returns the next state and its metrics: loss (nats a token), grad_norm, learning_rate.

    Args:
      batch: arrays of [grad_accum_steps, rows, seq_len].
    """
    dropout_key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    tokens = batch.weights.sum()

    def objective(model, micro, index):
        key = jax.random.fold_in(dropout_key, index)
        sums = batch_sums(model, micro, key, vocab_size=vocab_size, loss=config.loss)
        # Over the tokens of the whole update, so that micro-batches add up to it whatever their padding.
        return sums.objective / tokens, sums.nll / tokens

    def accumulate(carry, micro_and_index):
        (_, nll), gradient = jax.value_and_grad(objective, has_aux=True)(state.model, *micro_and_index)
        # Else XLA tries to sum over devices after the loop, on whole gradients, and on some TPU programs fails in it.
        gradient = jax.lax.optimization_barrier(gradient)
        return jax.tree.map(jnp.add, carry, (nll, gradient)), None

    zeros = (jnp.zeros(()), jax.tree.map(lambda weight: jnp.zeros_like(weight, jnp.float32), state.model))
    steps = config.grad_accum_steps
    # A scan of one step is unrolled, and XLA drops the addition to zero.
    with jax.named_scope("forward_backward"):
        (loss, gradient), _ = jax.lax.scan(accumulate, zeros, (batch, jnp.arange(steps)), unroll=steps == 1)
    with jax.named_scope("optimizer"):
        updates, opt_state = optimize(gradient, state, config)
        model = optax.apply_updates(state.model, updates)
    rate = learning_rate(config.optimizer, config.num_steps)(state.step)
    step_metrics = {"loss": loss, "learning_rate": rate, "grad_norm": optax.tree.norm(gradient)}
    return TrainState(state.step + 1, model, opt_state, moved_average(state, model, config)), step_metrics


def optimize(gradient, state: TrainState, config: Config):
    """Optax's update. Its code knows no shardings, so XLA chooses them inside; what comes out is placed as before."""
    update = make_optimizer(config.optimizer, config.num_steps).update
    opt_state = loaded(state.opt_state, config.optimizer)
    places = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding, (gradient, opt_state))
    updates, opt_state = jax.sharding.auto_axes(update, out_sharding=places)(gradient, opt_state, state.model)
    return updates, stored(opt_state, config.optimizer)


def moved_average(state: TrainState, model: Transformer, config: Config):
    """The average of the weights after this update; early on it forgets faster, so that the start does not linger."""
    decay = jnp.minimum(config.optimizer.ema_decay, (1 + state.step) / (10 + state.step))
    return () if state.ema == () else optax.incremental_update(model, state.ema, 1 - decay)


def abstract_state(config: Config, vocab_size: int, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and places of a state on a mesh, real or of a topology that is not at hand."""
    state = placed(jax.eval_shape(functools.partial(init_state, config, vocab_size)), mesh)
    if not config.optimizer.offload:
        return state
    hosted = lambda leaf: leaf.update(sharding=leaf.sharding.with_memory_kind("pinned_host")) if leaf.ndim else leaf
    return dataclasses.replace(state, opt_state=jax.tree.map(hosted, state.opt_state))


def abstract_batch(config: Config, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> stream.Batch:
    """Shapes, dtypes and places of a step's batch."""
    shape = config.grad_accum_steps, config.micro_batch_size, config.seq_len
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.batch_sharding(mesh))
    return stream.Batch(tokens, tokens, tokens, tokens, tokens.update(dtype=jnp.float32))


def compile_step(config: Config, vocab_size: int, state: TrainState, mesh: jax.sharding.Mesh):
    """The compiled train step for a state, real or abstract, on a mesh, real or of a topology that is not at hand."""
    batch = abstract_batch(config, mesh)
    return train_step.lower(state, batch, config=config, vocab_size=vocab_size).compile()


def train(config: Config, folder: epath.Path, profile: range = range(0)) -> None:
    """Runs a config in a workdir: from its last checkpoint, or from the beginning where there is none.

    Args:
      profile: the steps to trace, by the number of updates before each.

    Raises: Refused, before anything is computed, for a config, workdir, corpus or mesh that can't be used.
    """
    began = time.perf_counter()
    mesh = sharding.make_mesh(config.mesh, jax.devices())
    with hosts.together():
        workdir.check(config, folder, mesh)
    store = workdir.prepare(config, folder, mesh)
    vocab_size = store.tokenizer.vocab_size
    run = workdir.identity(config, store)
    measure = functools.partial(
        evaluate,
        store=store,
        mesh=mesh,
        seq_len=config.seq_len,
        batch_size=config.micro_batch_size,
        max_windows=config.eval_batches * config.batch_size,
        loss=config.loss,
    )

    with jax.set_mesh(mesh), Checkpoints(folder / "checkpoints", config.checkpoint, owner=True) as checkpoints:
        start = (checkpoints.steps() or [0])[-1]
        if start >= config.num_steps and hosts.shared((folder / "samples.txt").exists):
            print(
                f"The run in {folder} is complete at step {start} of num_steps={config.num_steps}. To go on, raise "
                f"it: --config.num_steps={2 * start}",
                flush=True,
            )
            return
        init = functools.partial(init_state, config, vocab_size)
        if start:
            saved = checkpoints.run(start)
            with hosts.together():
                workdir.check_same_run(config, saved["config"], checkpoints.folder)
                workdir.check_same_data(store, saved, checkpoints.folder)
            state = checkpoints.restore(start, abstract_state(config, vocab_size, mesh))
            print(f"going on from the checkpoint of step {start}", flush=True)
        else:
            state = jax.jit(init)()
        if hosts.first():
            workdir.write_config(config, folder)
        parameters = num_parameters(config.model, vocab_size, config.seq_len)
        processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
        print(
            f"{parameters / 1e6:.2f}M parameters on {mesh.size} × {mesh.devices.flat[0].device_kind}{processes}, mesh "
            f"{', '.join(f'{axis} {size}' for axis, size in sharding.sizes(mesh).items())}",
            flush=True,
        )
        with metrics.compiling() as compiling:
            step_fn = compile_step(config, vocab_size, state, mesh)
        needed, sent = told_by_compiler(step_fn, mesh)
        print(
            f"compiled the train step in {compiling['compile_seconds']:.1f} s (compilation cache: "
            f"{compiling['compilation_cache']}): {needed / 1e6:,.1f} MB a device"
            + (f", which sends {sent / 1e6:,.1f} MB a step" if sent else ""),
            flush=True,
        )

        tokens, flops = config.batch_size * config.seq_len, flops_per_token(config.model, vocab_size, config.seq_len)
        peak = metrics.peak_flops(mesh.devices.ravel(), config.model.dtype)
        batches = train_batches(config, store, mesh, start)
        traced = [step for step in profile if step >= start]
        with terminal.progress("training", config.num_steps, start, plain_seconds=0) as bar, ExitStack() as trace:
            log = metrics.Log(folder, bar, start, config.log_every, tokens, flops, peak)
            log.starting(began, compiling | {"compiled_bytes": needed, "compiled_link_bytes": sent})
            # What is due after a step comes before the next one, so that a run killed in between makes up for it.
            for step in range(start, config.num_steps):
                if step and step % config.eval_every == 0 and step not in log.evaluated:
                    with log.paused():
                        log.evaluation(step, measure(weights(state)))
                if step in traced[:1]:
                    with log.paused():
                        trace.enter_context(metrics.trace(folder / "profile"))
                # A hidden transfer would wait for the device at each step.
                with jax.profiler.StepTraceAnnotation("train", step_num=step + 1), jax.transfer_guard("disallow"):
                    state, step_metrics = step_fn(state, next(batches))
                log.push(step + 1, step_metrics)
                if step in traced[-1:]:
                    with log.paused():
                        trace.close()
                if step + 1 == config.num_steps or (step + 1) % config.checkpoint_every == 0:
                    with log.paused():
                        checkpoints.save(step + 1, state, run)
            end, evaluation = max(start, config.num_steps), measure(weights(state))
            if end not in log.evaluated:
                log.evaluation(end, evaluation)
            log.close()
        checkpoints.wait()
        held_against(needed, peak and tokens * flops / peak, log.step_seconds)
        report(config, folder, store, weights(state), evaluation)


def told_by_compiler(step: jax.stages.Compiled, mesh: jax.sharding.Mesh) -> tuple[int, int | None]:
    """Bytes of a device's memory at the peak of a step, and bytes that it sends in one; None where XLA does not say."""
    try:
        sent = sum(collective.link_bytes for collective in collectives.of_step(step, mesh))
    except collectives.Unreadable:
        sent = None
    return compiled.memory(step).peak, sent


def profiled(text: str, num_steps: int) -> range:
    """The steps of --profile_steps=A:B by the updates before each; of an empty text none. Raises: Refused."""
    if not text:
        return range(0)
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last) <= num_steps):
        raise Refused(
            f"--profile_steps={text} is no A:B with A below B and B at most num_steps={num_steps}: write for example "
            f"{max(num_steps - 3, 0)}:{num_steps}."
        )
    return range(int(first), int(last))


def train_batches(config: Config, store, mesh: jax.sharding.Mesh, start: int):
    """The batches of steps `start` to `num_steps`, read ahead in threads, on the mesh."""
    rows = sharding.local_rows(mesh, config.batch_size, config.grad_accum_steps)
    batches = stream.train_batches(
        store, seq_len=config.seq_len, batch_size=config.batch_size, seed=config.seed, rows=rows
    )
    for batch in stream.iterate(batches, start, config.num_steps):
        yield sharding.place(batch, rows, mesh, config.batch_size, config.grad_accum_steps)


def weights(state: TrainState) -> Transformer:
    """What is evaluated and sampled from: the moving average where it is on."""
    return state.model if state.ema == () else state.ema


def held_against(compiled_bytes: int, floor_seconds: float | None, step_seconds: list[float]) -> None:
    """Prints what was expected of a step beside what was measured: memory, and time by the FLOPs at the peak."""
    measured = metrics.measured_bytes()
    print(
        f"memory of a device: {compiled_bytes / 1e6:,.1f} MB as compiled · "
        f"{'its peak unknown' if measured is None else f'{measured / 1e6:,.1f} MB at its peak'}"
    )
    if step_seconds:
        floor = "unknown peak" if floor_seconds is None else f"at least {1e3 * floor_seconds:,.1f} ms at the peak"
        print(f"time of a step: {floor} · {1e3 * statistics.median(step_seconds):,.1f} ms, the median of those logged")


def report(config: Config, folder: epath.Path, store, model: Transformer, evaluation) -> None:
    """The end of a run: bits per byte beside what gzip and xz reach on the held-out text, and samples."""
    compressed = store.manifest["compressed_heldout_bytes"]
    gzip, xz = (8 * store.manifest[name] / compressed for name in ("gzip_bytes", "xz_bytes"))
    print(
        f"held-out text, bits a byte: this model {evaluation.bits_per_byte:.3f} · gzip -9 {gzip:.3f} · xz -9 {xz:.3f} "
        f"(model: {evaluation.tokens:,} tokens; gzip and xz: {compressed:,} bytes)"
    )
    texts = generate.samples(
        model,
        store.tokenizer,
        config.sample_prompt,
        seq_len=config.seq_len,
        count=config.num_samples,
        seed=config.seed,
    )
    with hosts.together():  # the others end when process 0 has written
        if hosts.first():
            workdir.write_whole(folder / "samples.txt", ("\n\n".join(texts) + "\n").encode())
    for text in texts:
        print(f"{'—' * 30} sample\n{text}", flush=True)
