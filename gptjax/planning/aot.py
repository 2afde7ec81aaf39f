"""Compiles a config's train step for devices that are not at hand: `python -m gptjax.planning.aot FOLDER`.

`gptjax plan` starts this module in a process of its own, because a compiler may abort the whole process.
FOLDER/request.json holds the resolved configs, the topology, the slices and the source ("compiled" or "analytic").
FOLDER/results.json is the answer: for each config the result of `analyze`, or {"refused": sentence}.
"""

import json
import pathlib
import sys
import time
from importlib import metadata

import jax
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies

from gptjax import __version__
from gptjax.errors import Refused
from gptjax.parallel.mesh import make_mesh, settle, sizes
from gptjax.parallel.xla import analysis, communication, hlo
from gptjax.planning import estimate, topology
from gptjax.planning.topology import Topology
from gptjax.tokenizers import tokenizer
from gptjax.training.config import schema
from gptjax.training.config.schema import Config
from gptjax.training.step import abstract_state, compile_step

NUM_BUFFERS = 10
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")


def analyze(config: Config, topology: Topology, source: str, folder: pathlib.Path) -> dict:
    """Analyzes a config's step on a topology: the estimate, and the compiler's figures if source is "compiled".

    Bytes are per device. For a curriculum, this is the phase with the most tokens per step.

    Args:
      config: the config of a run.
      topology: the machines.
      source: "compiled" or "analytic".
      folder: the folder of the compiler's dump.

    Raises: Refused.
    """
    tokenizer.check(config.tokenizer)
    if config.lora.rank:
        raise Refused(
            f"lora.rank={config.lora.rank} must be 0 for a plan, which then shows more memory than LoRA needs."
        )
    config = config.largest
    if not topology.is_tpu:
        # JAX asks for the version of cuDNN, which neither tracing nor compiling needs.
        fused_attention_stablehlo.check_cudnn_version = _cudnn_version
    mesh = estimate.abstract_mesh(config, topology)
    if source == "compiled":
        mesh = make_mesh(config.mesh, described(topology))
    given = estimate.shapes(config, getattr(mesh, "abstract_mesh", mesh))
    vocab_size = tokenizer.expected_vocab_size(config.tokenizer)
    tokens = config.batch_size * config.seq_len
    kept = estimate.kept(config, given)
    state = {
        "parameters": estimate.shard_bytes(given.state.model),
        "optimizer": estimate.shard_bytes(given.state.opt_state),
        "average": estimate.shard_bytes(given.state.ema),
        "batch": estimate.shard_bytes(given.batch),
    }
    result = {
        "source": source,
        "mesh": sizes(given.mesh),
        "parameters": config.model.num_parameters(vocab_size, config.seq_len).total,
        "tokens_per_step": tokens,
        "flops_per_step": config.model.flops_per_token(vocab_size, config.seq_len) * tokens,
        "hardware_flops_per_step": estimate.step_flops(config, given),
        "memory": state
        | {"gradients": estimate.shard_bytes(given.state.model, itemsize=4), "kept_activations": kept.device},
        "expected_collectives": [
            {"operation": operation, "axes": axes, "bytes": size}
            for (operation, axes), size in estimate.collectives(config, given).items()
        ],
        "versions": {"gptjax": __version__, "python": sys.version.split()[0]} | versions(),
    }
    if source == "compiled":
        return result | compile_for(config, topology, mesh, folder)
    chunk = estimate.chunk_bytes(config, given)
    result["memory"]["logits"] = chunk
    return result | {
        "hbm_bytes": sum(result["memory"].values()),
        "host_bytes": kept.host + estimate.shard_bytes(given.state.opt_state, "pinned_host"),
        "compile_seconds": None,
    }


def _cudnn_version() -> int:
    return 91_000


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def described(topology: Topology) -> list:
    """Returns the devices of a topology as described by the compiler's plugin. Raises: Refused."""
    try:
        return list(topologies.get_topology_desc(**topology.descriptor).devices)
    except Exception as error:  # the plugin may raise anything
        if "lockfile" in str(error):
            raise Refused(
                "Another process on this machine uses libtpu, which serves one process; wait until that process ends."
            ) from error
        raise Refused(
            f"The compiler does not know {topology.name} × {topology.slices} ({str(error).splitlines()[0][:200]})."
        ) from error


def compile_for(config: Config, topology: Topology, mesh: jax.sharding.Mesh, folder: pathlib.Path) -> dict:
    """Compiles the step and returns memory, collectives and cycles, or the bytes of a step that does not fit."""
    vocab_size = tokenizer.expected_vocab_size(config.tokenizer)
    started = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            state = abstract_state(config, vocab_size, mesh)
            step = compile_step(config, vocab_size, state, mesh)
    except jax.errors.JaxRuntimeError as error:
        needed = analysis.out_of_memory(str(error))
        if needed is None:
            raise
        seconds = time.perf_counter() - started
        buffers = largest_buffers(folder, text_of(folder, "after_optimizations_before_buffer_assignment"))
        return {"refused_bytes": needed, "hbm_bytes": needed[0], "compile_seconds": seconds, "largest_buffers": buffers}
    seconds = time.perf_counter() - started
    memory = analysis.memory(step)
    # `as_text` fails for some TPU programs and has no cycles, so the text of a TPU program comes from the dump.
    text = text_of(folder, "after_codegen") if topology.is_tpu else step.as_text()
    program = hlo.parse(text)
    axes = communication.numbering(mesh, topology.slices)
    cards = topology.shape[0] if not topology.is_tpu else mesh.size
    places = [device.id // cards for device in mesh.devices.flat]
    return {
        "hbm_bytes": memory.peak,
        "host_bytes": memory.host,
        "compiled_memory": memory._asdict(),
        "compile_seconds": seconds,
        "collectives": [row._asdict() for row in communication.collectives(program, axes, places, topology.slices)],
        "largest_buffers": largest_buffers(folder, text),
        "cycles": analysis.cycles(program) if topology.is_tpu else None,
        "kernels": [kernel._asdict() for kernel in analysis.kernels(program, config.model.sliding_window)],
    }


def text_of(folder: pathlib.Path, stage: str) -> str:
    """Reads the dumped text of the step at a stage of the compiler. Raises: FileNotFoundError."""
    found = sorted((folder / "dump").glob(f"*train_step*.{stage}.txt"))
    if not found:
        raise FileNotFoundError(f"the compiler dumped no *.{stage}.txt of the train step")
    return found[-1].read_text("utf-8")


def largest_buffers(folder: pathlib.Path, text: str) -> list[dict]:
    assignment = sorted((folder / "dump").glob("*train_step*buffer-assignment.txt"))
    if not assignment:
        return []
    buffers = analysis.largest_buffers(assignment[-1].read_text("utf-8"), hlo.parse(text), NUM_BUFFERS)
    return [buffer._asdict() for buffer in buffers]


def main(folder: pathlib.Path) -> None:
    request = json.loads((folder / "request.json").read_text("utf-8"))
    settle()
    where = topology.parse(request["topology"], request["slices"])
    results = []
    for config in request["configs"]:
        try:
            results.append(analyze(schema.parse(config), where, request["source"], folder))
        except Refused as refusal:
            results.append({"refused": str(refusal)})
    (folder / "results.json").write_text(json.dumps(results), "utf-8")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
