"""The lines that a run prints: its compiled step as expected and as measured, and at the end samples."""

import statistics

import jax
from etils import epath

from gptjax.checkpoints.manifest import VERSIONS
from gptjax.data.stream.mixture import Corpus
from gptjax.data.stream.packing import report as report_of
from gptjax.data.stream.packing import report_line
from gptjax.data.stream.stream import Stream
from gptjax.evaluation.heldout import Evaluation
from gptjax.inference import generate
from gptjax.models.interface import LanguageModel
from gptjax.parallel.mesh import sizes
from gptjax.parallel.xla import analysis, communication
from gptjax.runtime import distributed, files, profiling
from gptjax.training.config.schema import Config
from gptjax.training.monitoring.work import Work

LEAST_COMPRESSED = 4096  # bytes; below, the headers of gzip and xz are a part of the result


def model_and_mesh(config: Config, vocab_size: int, mesh: jax.sharding.Mesh) -> dict:
    """Prints the model and its mesh; returns both and the versions, for the row of the start."""
    parameters = config.model.num_parameters(vocab_size, config.seq_len).total
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    devices = f"{mesh.size} × {mesh.devices.flat[0].device_kind}{processes}"
    axes = ", ".join(f"{axis} {size}" for axis, size in sizes(mesh).items())
    print(f"{parameters / 1e6:.2f}M parameters on {devices}, mesh {axes}", flush=True)
    versions = ", ".join(f"{name} {version}" for name, version in VERSIONS.items())
    return {"parameters": parameters, "devices": devices, "mesh": axes, "versions": versions}


def extent(config: Config, corpus: Corpus, data: Stream, vocab_size: int) -> None:
    """Prints how much a run reads and computes, from its beginning to num_steps."""
    steps = config.num_steps
    tokens, flops = Work(config.model, vocab_size, data.phases, [], None).done(steps)
    there = sum(store.split("train").tokens for store in corpus.stores.values())
    print(
        f"{tokens // steps:,} tokens a step, {tokens:,} in {steps:,} steps: {tokens / there:.2f} epochs of the corpus, "
        f"{flops:.2e} FLOPs",
        flush=True,
    )
    if config.optimizer.warmup_steps > steps:
        print(
            f"optimizer.warmup_steps={config.optimizer.warmup_steps} is more than num_steps={steps}: the learning rate "
            "rises until the end",
            flush=True,
        )


def packing(config: Config, data: Stream) -> None:
    """Prints the cost of a packing that looked at all documents; `gptjax data show` prints the cost of any packing."""
    if config.packing.method == "concat" or not distributed.first():
        return
    for name, store in data.corpus.stores.items():
        found = report_of(data.packed[name], store.split("train"), config.seq_len)
        print(f"packing {report_line(config.packing.method, found)}{name and f' ({name})'}", flush=True)


def compilation(
    steps: dict[tuple[int, int], jax.stages.Compiled],
    mesh: jax.sharding.Mesh,
    compile_seconds: float,
    compilation_cache: str,
) -> dict:
    """Prints the compiler's figures for the largest of the steps, and returns them for the row of the start.

    Returns: compiled_bytes, a device's memory at the peak of a step; compiled_link_bytes, the bytes that a device sends
    in a step, None if XLA does not say.
    """
    peaks = {shape: analysis.memory(step).peak for shape, step in steps.items()}
    shape = max(peaks, key=peaks.get)
    step, needed = steps[shape], peaks[shape]
    try:
        sent = sum(collective.link_bytes for collective in communication.of_step(step, mesh))
    except communication.Unreadable:
        sent = None
    shapes = ", ".join(f"{rows} × {length}" for rows, length in steps)
    several = f"for batches of {shapes}; at most " if len(steps) > 1 else ""
    print(
        f"compiled the train step in {compile_seconds:.1f} s (compilation cache: {compilation_cache}): {several}"
        f"{needed / 1e6:,.1f} MB a device" + (f", which sends {sent / 1e6:,.1f} MB a step" if sent else ""),
        flush=True,
    )
    return {"compiled_bytes": needed, "compiled_link_bytes": sent}


def held_against(step: jax.stages.Compiled, floor_seconds: float | None, step_seconds: list[float]) -> None:
    """Prints the expected memory and time of a step beside the measured ones; time is FLOPs over the peak."""
    measured = profiling.measured_bytes()
    print(
        f"memory of a device: {analysis.memory(step).peak / 1e6:,.1f} MB as compiled · "
        f"{'its peak unknown' if measured is None else f'{measured / 1e6:,.1f} MB at its peak'}"
    )
    if step_seconds:
        floor = "unknown peak" if floor_seconds is None else f"at least {1e3 * floor_seconds:,.1f} ms at the peak"
        print(f"time of a step: {floor} · {1e3 * statistics.median(step_seconds):,.1f} ms, the median of those logged")


def report(
    config: Config, folder: epath.Path, corpus: Corpus, model: LanguageModel, evaluation: Evaluation | None
) -> None:
    """Prints bits per byte of the model, gzip and xz on the held-out text, and writes and prints samples."""
    manifests = [store.manifest for store in corpus.stores.values()]
    names = "compressed_heldout_bytes", "gzip_bytes", "xz_bytes"
    compressed, *small = (sum(manifest[name] for manifest in manifests) for name in names)
    gzip, xz = (8 * size / max(compressed, 1) for size in small)
    if evaluation:
        sizes = f"model: {evaluation.tokens:,} tokens; gzip and xz: {compressed:,} bytes"
        compared = f"gzip -9 {gzip:.3f} · xz -9 {xz:.3f} ({sizes})"
        if compressed < LEAST_COMPRESSED:
            compared = f"{compressed:,} bytes are too few to compare with gzip and xz"
        print(f"held-out text, bits a byte: this model {evaluation.bits_per_byte:.3f} · {compared}")
        for name, source in evaluation.sources.items():
            print(
                f"  {name}: loss {source.loss:.4f} nats a token, {source.bits_per_byte:.3f} bits a byte, "
                f"{source.tokens:,} tokens"
            )
    texts = generate.samples(
        model,
        corpus.tokenizer,
        config.sample_prompt,
        seq_len=config.seq_len,
        count=config.num_samples,
        seed=config.seed,
    )
    with distributed.together():  # the others end when process 0 has written
        if distributed.first():
            files.write_whole(folder / "samples.txt", ("\n\n".join(texts) + "\n").encode())
    for text in texts:
        print(f"{'—' * 30} sample\n{text}", flush=True)
