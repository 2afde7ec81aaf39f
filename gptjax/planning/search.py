"""`gptjax plan --search`: finds the mesh, rematerialization and accumulation that fit with the lowest time bound."""

import dataclasses
import itertools
import pathlib

from gptjax.errors import Refused
from gptjax.parallel.mesh import MeshConfig
from gptjax.planning.plan import analyses, has_compiler, judged
from gptjax.planning.topology import Topology
from gptjax.runtime.files import flatten
from gptjax.training.config import files
from gptjax.training.config.schema import Config

REMAT = ("none", "dots", "full")
REPLICAS = (1, 2, 4, 8)
TENSOR = (1, 2, 4, 8)
ACCUMULATION = (1, 2, 4, 8)
MAX_COMPILES = 12
# The estimate adds up parts that need not exist at once, and so may exceed the compiler's figure by this factor.
SLACK = 1.25


def candidates(config: Config, topology: Topology) -> list[Config]:
    """Returns the configs to try; `fsdp` takes the devices that replicas and tensor parallelism leave."""
    inside, found = topology.num_devices // topology.slices, []
    policies = dict.fromkeys((*REMAT, config.model.remat))
    for data, tensor, steps, remat in itertools.product(REPLICAS, TENSOR, ACCUMULATION, policies):
        if inside % (data * tensor) == 0 and config.batch_size % steps == 0:
            mesh = MeshConfig(data=data, fsdp=inside // (data * tensor), tensor=tensor)
            model = dataclasses.replace(config.model, remat=remat)
            found.append(dataclasses.replace(config, mesh=mesh, grad_accum_steps=steps, model=model))
    return found


def search(config: Config, topology: Topology, tell) -> tuple[Config, dict]:
    """Returns the best candidate with the plan of that candidate. Raises: Refused, if nothing fits.

    The analytic estimate rules out candidates that are far too large, and orders the others. An estimated time is below
    the compiler's bound. Compiling ends once no estimate is below the best bound, or after MAX_COMPILES.

    Args:
      config: the config to search from.
      topology: the machines.
      tell: a function that takes a line about each step.
    """
    tried = candidates(config, topology)
    rows = [
        (candidate, judged(candidate, topology, row))
        for candidate, row in zip(tried, analyses(tried, topology, "analytic"), strict=True)
        if "refused" not in row
    ]
    limit = topology.figures.hbm_bytes * (SLACK if has_compiler(topology) else 1)
    fitting = sorted(
        ((c, plan) for c, plan in rows if plan["hbm_bytes"] <= limit), key=lambda pair: cost(pair[1], topology)
    )
    tell(f"{len(tried)} candidates: {len(rows)} divide, {len(fitting)} may fit by the estimate")
    if not fitting:
        raise Refused(nothing_fits(config, topology, [plan for _, plan in rows]))
    if not has_compiler(topology):
        return fitting[0]
    best, plans = None, []
    for number, (candidate, estimate) in enumerate(fitting):
        if number == MAX_COMPILES:
            tell(f"stopped after {MAX_COMPILES} compiles: {len(fitting) - number} were not compiled")
            break
        if best is not None and cost(estimate, topology) >= cost(best[1], topology):
            tell(f"{len(fitting) - number} others can't be faster")
            break
        try:
            (row,) = analyses([candidate], topology, "compiled")
        except Refused as refusal:  # a failure of the compiler on one candidate does not end the search
            row = {"refused": str(refusal)}
        if "refused" in row:
            tell(f"{shown(candidate)}: {row['refused']}")
            continue
        plan = judged(candidate, topology, row)
        plans.append(plan)
        tell(f"{shown(candidate)}: {plan['verdict']}{time_of(plan)}")
        if plan["fits"] and (best is None or cost(plan, topology) < cost(best[1], topology)):
            best = candidate, plan
    if best is None:
        raise Refused(nothing_fits(config, topology, plans))
    return best


def cost(plan: dict, topology: Topology) -> tuple[float, float]:
    """Returns seconds that rank a plan: the bound, then the compute.

    Without a time, as on GPUs, the compute is the FLOPs at the peak.
    """
    figures = topology.figures
    compute = plan["bound_step_seconds"]
    if compute is None:
        compute = plan["hardware_flops_per_step"] / (figures.peak_flops * topology.num_devices)
    fast = slow = 0
    for row in plan["collectives"]:
        size = row["link_bytes"] or 0
        if (
            plan["source"] == "analytic"
        ):  # gathering among n devices, each sends (n - 1) / n of the array: at least half
            size = row["expected_bytes"] / 2
        if row["between"] or row["axes"] == "slices":
            slow += size
        else:
            fast += size
    return max(compute, fast / figures.ici_bytes, slow / (figures.dcn_bytes or figures.ici_bytes)), compute


def nothing_fits(config: Config, topology: Topology, plans: list[dict]) -> str:
    if not plans:
        return (
            f"No mesh of {topology.num_devices} devices divides batch_size={config.batch_size} and the model; make "
            f"batch_size a multiple of {topology.num_devices}."
        )
    least = min(plans, key=lambda plan: plan["hbm_bytes"])
    tried = f"{len(plans)} meshes, policies and accumulations"
    return f"None of {tried} fits {topology.name}; the smallest {least['verdict']}."


def shown(config: Config) -> str:
    mesh = config.mesh
    return (
        f"data {mesh.data}, fsdp {mesh.fsdp}, tensor {mesh.tensor}, remat {config.model.remat}, "
        f"grad_accum_steps {config.grad_accum_steps}"
    )


def time_of(plan: dict) -> str:
    return f"; at least {plan['bound_step_seconds'] * 1e3:,.1f} ms a step" if plan["bound_step_seconds"] else ""


def output(config_path: str, topology: Topology) -> pathlib.Path:
    """Returns the path of the winner's config, in the working directory. Raises: Refused, if the path exists."""
    shape = topology.name.replace(":", "_") + (f"_x{topology.slices}" if topology.slices > 1 else "")
    file, arguments = files.split(config_path)
    path = pathlib.Path("_".join([pathlib.Path(file).stem, *arguments, shape]) + ".py")
    if path.exists():
        raise Refused(f"{path} exists, and --search would overwrite {path.name}; move the file away.")
    return path


def write(best: Config, config_path: str, overrides: dict[str, str], plan: dict, path: pathlib.Path) -> None:
    """Writes a config file that loads the original config and sets the winner's keys."""
    keys = flatten(dataclasses.asdict(best))
    changed = [key for key in overrides if key in keys]
    changed += [f"mesh.{axis}" for axis in ("slices", "data", "fsdp", "tensor")] + ["model.remat", "grad_accum_steps"]
    name = pathlib.Path(files.split(config_path)[0]).name
    docstring = (
        f"{name} for {plan['topology']} × {plan['slices']}, by gptjax plan --search ({plan['source']}).\n\n"
        f"{plan['verdict']}.\n"
    )
    files.write(path, config_path, docstring, {key: keys[key] for key in changed})
