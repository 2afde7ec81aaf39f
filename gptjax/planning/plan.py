"""`gptjax plan`: plans a config on machines that are not at hand. Times are bounds, never predictions."""

import dataclasses
import fcntl
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

from gptjax.errors import Refused
from gptjax.parallel.hardware import GIB
from gptjax.planning.topology import Topology
from gptjax.training.config.schema import Config

TIMEOUT = 3600  # seconds for one compile


def plan(config: Config, topology: Topology) -> dict:
    """Returns the plan of a config as printed by `--json`. Raises: Refused."""
    (row,) = analyses([config], topology, "compiled" if has_compiler(topology) else "analytic")
    if "refused" in row:
        raise Refused(row["refused"])
    return judged(config, topology, row)


def has_compiler(topology: Topology) -> bool:
    """Tells whether the compiler's package is installed, without an import: importing libtpu looks for TPUs."""
    names = ("libtpu",) if topology.is_tpu else ("jax_cuda12_plugin", "jax_cuda13_plugin")
    return any(importlib.util.find_spec(name) for name in names)


def how(topology: Topology) -> str:
    """Returns the install command for the compiler's own figures."""
    version = importlib.metadata.version("jax")
    cuda = f"--no-deps jax-cuda12-plugin=={version} jax-cuda12-pjrt=={version}"
    return f"For the compiler's own figures: pip install {'libtpu' if topology.is_tpu else cuda}"


def analyses(configs: list[Config], topology: Topology, source: str) -> list[dict]:
    """Runs `aot.analyze` on each config in a separate process; one such process at a time on this machine.

    Raises: Refused, if that process fails.
    """
    with tempfile.TemporaryDirectory(prefix="gptjax_plan_") as name:
        folder = pathlib.Path(name)
        request = {"configs": [dataclasses.asdict(config) for config in configs], "source": source}
        request |= {"topology": topology.name, "slices": topology.slices}
        (folder / "request.json").write_text(json.dumps(request), "utf-8")
        with open(
            pathlib.Path(tempfile.gettempdir()) / f"gptjax_plan_{os.getuid()}.lock", "w", encoding="utf-8"
        ) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # libtpu serves one process at a time
            try:
                ended = subprocess.run(
                    [sys.executable, "-m", "gptjax.planning.aot", name],
                    env=environment(folder),
                    capture_output=True,
                    encoding="utf-8",
                    errors="replace",
                    timeout=TIMEOUT,
                )
            except subprocess.TimeoutExpired as error:
                raise Refused(
                    f"Compiling for {topology.name} took more than {TIMEOUT} s and was stopped; try fewer chips or "
                    "layers."
                ) from error
        if ended.returncode:
            raise Refused(f"The compiler failed on {topology.name} × {topology.slices}: {reason(ended)}")
        return json.loads((folder / "results.json").read_text("utf-8"))


def environment(folder: pathlib.Path) -> dict[str, str]:
    """Returns the environment of the compiling process: no search for devices, no cache, and a compiler's dump."""
    dump = f"--xla_dump_to={folder / 'dump'} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=train_step"
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # a hit would dump nothing
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {dump}".strip(),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }


def reason(ended: subprocess.CompletedProcess) -> str:
    """Returns one line about a process that failed."""
    lines = [line.strip() for line in ended.stderr.splitlines() if line.strip()]
    if ended.returncode < 0:
        fatal = next((line for line in reversed(lines) if line.startswith("F")), "no message")
        return f"aborted with {signal.Signals(-ended.returncode).name} ({fatal[:300]}); choose another shape."
    return f"{lines[-1][:400] if lines else 'no message'}."


def judged(config: Config, topology: Topology, row: dict) -> dict:
    """Makes the plan from an analysis: capacity, bounds, verdict."""
    figures, devices = topology.figures, topology.num_devices
    capacity = figures.hbm_bytes
    fits = "refused_bytes" not in row and row["hbm_bytes"] <= capacity
    floor, warnings = compute_floor(config, topology, row)
    peak = figures.peak_flops * devices
    within = between = bound = None
    if row.get("collectives") is not None:
        links = {where: 0 for where in (False, True)}
        for collective in row["collectives"]:
            links[collective["between"]] += collective["link_bytes"]
        within = links[False] / figures.ici_bytes
        between = links[True] / figures.dcn_bytes if figures.dcn_bytes else None
    if floor is not None:
        bound = max(floor, within or 0, between or 0)
    days = bound and bound * config.num_steps / 86_400
    result = {
        "fits": fits,
        "source": row["source"],
        "how": how(topology) if row["source"] == "analytic" else None,
        "topology": topology.name,
        "slices": topology.slices,
        "devices": devices,
        "mesh": row["mesh"],
        "parameters": row["parameters"],
        "hbm_bytes": row["hbm_bytes"],
        "hbm_capacity_bytes": capacity,
        "host_bytes": row.get("host_bytes"),
        "memory": row["memory"] | row.get("compiled_memory", {}),
        "tokens_per_step": row["tokens_per_step"],
        "flops_per_step": row["flops_per_step"],
        "hardware_flops_per_step": row["hardware_flops_per_step"],
        "floor_step_seconds": floor,
        "mfu_ceiling": row["flops_per_step"] / (peak * floor) if floor and config.model.dtype == "bfloat16" else None,
        "interconnect_step_seconds": {"within": within, "between": between},
        "bound_step_seconds": bound,
        "bound_tokens_per_second": bound and row["tokens_per_step"] / bound,
        # The other steps of a curriculum take less than the planned step.
        "bound_days": days if len(config.phases) == 1 else None,
        "bound_chip_hours": days and 24 * days * topology.num_chips if len(config.phases) == 1 else None,
        "collectives": with_expected(row),
        "kernels": row.get("kernels"),
        "largest_buffers": row.get("largest_buffers", []),
        "compile_seconds": row["compile_seconds"],
        "versions": row["versions"],
        "flags": flags(config),
        "warnings": warnings,
    }
    return result | {"verdict": verdict(config, topology, result)}


def flags(config: Config) -> dict[str, str]:
    """Returns the compiler's options from the environment and the config, for all platforms."""
    found = {name: os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    return {name: text for name, text in (found | {"compiler_options": config.compiler_options}).items() if text}


def compute_floor(config: Config, topology: Topology, row: dict) -> tuple[float | None, list[str]]:
    """Returns a lower bound in seconds on the compute of a step, and warnings.

    Compiled: the compiler's cycles, and the FLOPs of Pallas kernels at the peak. Analytic: all FLOPs at the peak. The
    bound is None on compiled plans for GPUs, and for an unknown clock.
    """
    figures = topology.figures
    if row["source"] == "analytic":
        flops = max(row["flops_per_step"], row["hardware_flops_per_step"])
        return flops / (figures.peak_flops * topology.num_devices), []
    if not row.get("cycles") or figures.clock is None:
        return None, []
    kernels = row["kernels"]
    seconds = row["cycles"] / figures.clock + sum(kernel["flops"] for kernel in kernels) / figures.peak_flops
    unknown = [kernel["name"] for kernel in kernels if not kernel["flops"]]
    warnings = [f"no FLOPs are known of the kernels {', '.join(unknown)}: they count as nothing"] if unknown else []
    # 6 FLOPs per weight and token, without attention. A loop that `hlo` misses shows here.
    least = config.model.flops_per_token(0, 0) * row["tokens_per_step"] / topology.num_devices / figures.peak_flops
    if seconds < least:
        warnings.append(
            f"the cycles add up to {seconds:.4g} s, less than the {least:.4g} s of the weights' products at the peak: "
            "the compiler's text was not understood, and no floor is given"
        )
        return None, warnings
    return seconds, warnings


def with_expected(row: dict) -> list[dict]:
    """Returns the collectives of a plan with the bytes that the estimate expects for their purpose and axes.

    Collectives that the estimate expects and the program lacks come last.
    """
    expected = {(e["operation"], e["axes"]): e["bytes"] for e in row["expected_collectives"]}
    rows = [dict(collective) for collective in row.get("collectives") or ()]
    for collective in rows:
        purpose = collective["operation"].partition(" by ")[0], collective["axes"]
        collective["expected_bytes"] = expected.get(purpose)
    found = {(each["operation"].partition(" by ")[0], each["axes"]) for each in rows}
    nothing = {"between": None, "calls": None, "bytes": None, "overlapped_bytes": None, "link_bytes": None}
    return rows + [
        {"operation": key[0], "axes": key[1]} | nothing | {"expected_bytes": size}
        for key, size in expected.items()
        if key not in found
    ]


def verdict(config: Config, topology: Topology, result: dict) -> str:
    """Says whether a step fits, by how much, and what to change if not."""
    used, capacity = result["hbm_bytes"] / GIB, result["hbm_capacity_bytes"] / GIB
    estimate = " by an estimate without the compiler's own temporaries" if result["source"] == "analytic" else ""
    if result["fits"]:
        return f"fits{estimate}: {used:.2f} of {capacity:.2f} GiB a device, {capacity - used:.2f} GiB to spare"
    ways = []
    if not config.model.remat.startswith("full"):
        ways.append("--config.model.remat=full")
    rows = config.micro_batch_size // (result["devices"] // result["mesh"]["tensor"])
    if rows > 1:
        ways.append(f"--config.grad_accum_steps={2 * config.grad_accum_steps}")
    if result["mesh"]["data"] > 1:
        ways.append("--config.mesh.data=1 --config.mesh.fsdp=-1")
    ways.append("more chips")
    return (
        f"does not fit{estimate}: {used:.2f} GiB a device, {used - capacity:.2f} GiB more than the {capacity:.2f} GiB "
        f"that there are; try {' or '.join(ways)}"
    )
