"""Formats the plan of a config for a terminal."""

from gptjax.parallel.hardware import GIB

MS = 1e-3


def text(plan: dict) -> str:
    """Formats a plan from `plan.judged`."""
    lines = [f"{plan['topology']} × {plan['slices']}: {plan['devices']} devices, mesh {axes(plan['mesh'])}"]
    if plan["source"] == "analytic":
        lines.append(f"ANALYTIC ESTIMATE from shapes, nothing was compiled. {plan['how']}")
    lines += ["", f"parameters        {plan['parameters'] / 1e9:.3f} B", *memory(plan)]
    lines += ["", f"verdict: {plan['verdict']}.", *buffers(plan)]
    if plan["collectives"]:
        lines += ["", *collectives(plan)]
    lines += ["", *speed(plan)]
    lines += [f"warning: {warning}" for warning in plan["warnings"]]
    versions = ", ".join(f"{name} {version}" for name, version in plan["versions"].items())
    flags = ", ".join(f"{name}={value}" for name, value in plan["flags"].items()) or "none"
    lines += ["", f"versions: {versions}; flags: {flags}"]
    return "\n".join(lines)


def axes(mesh: dict[str, int]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in mesh.items())


def memory(plan: dict) -> list[str]:
    """Lists the parts of a device's memory."""
    m = plan["memory"]
    rows = [("parameters", m["parameters"]), ("optimizer state", m["optimizer"])]
    rows += [("moving average", m["average"])] if m["average"] else []
    rows += [("batch", m["batch"])]
    if "temporaries" in m:
        rows += [("temporaries", m["temporaries"])]
        rows += [("  gradients, at most", m["gradients"]), ("  kept activations, as traced", m["kept_activations"])]
        rows += [("program", m["code"]), ("peak", plan["hbm_bytes"])]
    else:
        rows += [("gradients", m["gradients"]), ("kept activations, as traced", m["kept_activations"])]
        rows += [("logits of a chunk", m["logits"])] if "logits" in m else []
        rows += [("together" if plan["source"] == "analytic" else "needed", plan["hbm_bytes"])]
    rows += [("capacity", plan["hbm_capacity_bytes"])]
    rows += [("host memory", plan["host_bytes"])] if plan["host_bytes"] else []
    return ["memory of a device, GiB"] + [f"  {name:<32}{size / GIB:>9.3f}" for name, size in rows]


def buffers(plan: dict) -> list[str]:
    if not plan["largest_buffers"]:
        return []
    rows = [f"  {row['bytes'] / GIB:>9.3f}  {row['shape']:<28} {row['name']}" for row in plan["largest_buffers"]]
    return ["", "largest buffers, GiB", *rows]


def collectives(plan: dict) -> list[str]:
    """Formats one row per sort of collective; sizes are of whole arrays, and expected bytes cover the whole purpose."""
    head = f"  {'':<30}{'over':<14}{'reach':<9}{'calls':>6}{'GB':>10}{'overlapped':>12}{'on links':>10}{'expected':>10}"
    rows = []
    for row in plan["collectives"]:
        expected = "–" if row["expected_bytes"] is None else f"{row['expected_bytes'] / 1e9:.3f}"
        if row["bytes"] is None:
            rows.append(f"  {row['operation']:<30}{row['axes']:<14}{'':<9}{'':>38}{expected:>10}")
            continue
        reach = "between" if row["between"] else "within"
        overlapped = row["overlapped_bytes"] / row["bytes"] if row["bytes"] else 0
        rows.append(
            f"  {row['operation']:<30}{row['axes']:<14}{reach:<9}{row['calls']:>6}{row['bytes'] / 1e9:>10.3f}"
            f"{overlapped:>12.0%}{row['link_bytes'] / 1e9:>10.3f}{expected:>10}"
        )
    return ["collectives of a device and step (within or between slices, or hosts of GPUs)", head, *rows]


def speed(plan: dict) -> list[str]:
    """Formats FLOPs and bounds on time."""
    model, hardware = plan["flops_per_step"], plan["hardware_flops_per_step"]
    lines = [f"FLOPs of a step   {model:.4g} of the model, {hardware:.4g} done ({hardware / model:.2f} ×)"]
    if plan["compile_seconds"] is not None:
        lines.append(f"compile time      {plan['compile_seconds']:.1f} s")
    if plan["bound_step_seconds"] is None:
        return [
            *lines,
            "no bound on time: "
            + ("the compiler gives no cycles, or the clock is not known" if plan["fits"] else "the step does not fit"),
        ]
    by_links = plan["interconnect_step_seconds"]
    lines += ["bounds, not predictions: no step can be faster, and a real one is slower"]
    lines += [f"  compute floor     {plan['floor_step_seconds'] / MS:,.1f} ms a step"]
    if plan["mfu_ceiling"] is not None:
        lines += [f"  MFU ceiling       {plan['mfu_ceiling']:.1%}, by that floor"]
    for reach, seconds in by_links.items():
        if seconds:
            lines += [f"  links {reach:<11} {seconds / MS:,.1f} ms a step, all links at their stated bandwidth"]
    lines += [f"  tokens/s          at most {plan['bound_tokens_per_second']:,.0f}"]
    if plan["bound_days"] is None:
        return lines
    return lines + [
        f"  the whole run     at least {plan['bound_days']:,.2f} days, {plan['bound_chip_hours']:,.0f} chip-hours",
    ]
