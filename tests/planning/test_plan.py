"""Plans: figures read from a compiler's text, estimates from shapes alone, and the command.

Tests marked `tpu_aot` ask the real TPU compiler, and are skipped unless libtpu is installed.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import runs as training
from support.command import DEBUG

import gptjax
from gptjax.errors import Refused
from gptjax.parallel.mesh import MeshConfig
from gptjax.parallel.xla import analysis, communication, flops, hlo
from gptjax.planning import estimate, plan, search, topology
from gptjax.training.config import files, schema
from gptjax.training.step import abstract_state, compile_step

KEYS = (
    "fits source parameters hbm_bytes hbm_capacity_bytes host_bytes flops_per_step floor_step_seconds mfu_ceiling "
    "collectives largest_buffers compile_seconds versions"
)
tpu_aot = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]

# A loop of 4 turns whose first turn was peeled off. The loop has an exposed gather, a reduce-scatter as a fusion of
# all-reduce and slice, a gather hidden in a chain of two fusions, and a gather as an all-reduce of padded parts.
LOOP = """HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%scatter (p: bf16[8,64]) -> bf16[8,16] {
  %p = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %reduced = bf16[8,64]{1,0} all-reduce(%p), channel_id=1, replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  %id = u32[] partition-id()
  ROOT %part = bf16[8,16]{1,0} dynamic-slice(%reduced, %id, %id), dynamic_slice_sizes={8,16}
}

%chain.1 (p.1: bf16[32]) -> bf16[128] {
  %p.1 = bf16[32]{0} parameter(0)
  ROOT %g.1 = bf16[128]{0} all-gather(%p.1), channel_id=7, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, backend_config={"async_collective_fusion_config":{}}
}

%chain.2 (p.2: bf16[32]) -> bf16[128] {
  %p.2 = bf16[32]{0} parameter(0)
  ROOT %g.2 = bf16[128]{0} all-gather(%p.2), channel_id=7, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, backend_config={"async_collective_fusion_config":{}}
}

%other.core (p.3: bf16[16]) -> bf16[64] {
  %p.3 = bf16[16]{0} parameter(0)
  ROOT %g.3 = bf16[64]{0} all-gather(%p.3), channel_id=1, replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
}, execution_thread="sparsecore"

%offloaded (p.4: bf16[16]) -> bf16[64] {
  %p.4 = bf16[16]{0} parameter(0)
  ROOT %called = bf16[64]{0} call(%p.4), to_apply=%other.core, backend_config={"estimated_cycles":"1"}
}, execution_thread="sparsecore"

%body (state: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %state = (s32[]{:T(128)}, bf16[8,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = bf16[8,64]{1,0} get-tuple-element(%state), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one), backend_config={"window_config":{"estimated_cycles":"10"}}
  %small = bf16[8,16]{1,0} fusion(%x), kind=kCustom, calls=%scatter, backend_config={"window_config":{"estimated_cycles":"9223372036854775807"}}
  %gathered = bf16[8,64]{1,0} all-gather(%small), channel_id=2, replica_groups=mesh['x'=4,'y'=2] {'x'}, dimensions={1}, metadata={op_name="jit(f)/jvp(mlp)/gather"}
  %f.1 = bf16[128]{0} fusion(%one), kind=kOutput, calls=%chain.1, backend_config={"window_config":{"estimated_cycles":"100"}}
  %f.2 = bf16[128]{0} fusion(%f.1), kind=kOutput, calls=%chain.2, frontend_attributes={kernel_metadata={

}}, backend_config={"window_config":{"estimated_cycles":"100"}}
  %placed = f32[64]{0} dynamic-update-slice(%one, %one, %one)
  %copied = f32[64]{0} copy(%placed)
  %whole = f32[64]{0} all-reduce(%copied), channel_id=3, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %away = ((bf16[16]), bf16[64], u32[]) async-start(%small), async_execution_thread="sparsecore", calls=%offloaded
  %busy = bf16[8,64]{1,0} fusion(%x), kind=kLoop, calls=%add
  %back = bf16[64]{0} async-done(%away)
  ROOT %out = (s32[], bf16[8,64]) tuple(%next, %gathered)
}

%cond (state.c: (s32[], bf16[8,64])) -> pred[] {
  %limit = s32[]{:T(128)} constant(4)
  %state.c = (s32[], bf16[8,64]) parameter(0)
  %i.c = s32[] get-tuple-element(%state.c), index=0
  ROOT %less = pred[] compare(%i.c, %limit), direction=LT
}

ENTRY %main (x.m: bf16[8,64]) -> bf16[8,64] {
  %x.m = bf16[8,64]{1,0} parameter(0), metadata={op_name="state.model.up.value"}
  %from = s32[]{:T(128)} constant(1)
  %from.copy = s32[] copy(%from)
  %begin = (s32[], bf16[8,64]) tuple(%from.copy, %x.m)
  %loop = (s32[], bf16[8,64]) while(%begin), condition=%cond, body=%body
  %done = bf16[8,64]{1,0} get-tuple-element(%loop), index=1
  %token = token[] after-all()
  %sent = (bf16[8,64]{1,0}, u32[], token[]) send(%done, %token), channel_id=9, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %start = bf16[8,64]{1,0} all-reduce-start(%done), channel_id=4, replica_groups={}, to_apply=%add
  %ready = bf16[8,64]{1,0} all-reduce-done(%start)
  ROOT %end = bf16[8,64]{1,0} copy(%ready), backend_config={"window_config":{"estimated_cycles":"5"}}
}
"""  # noqa: E501

ASSIGNMENT = """BufferAssignment:
allocation 0: size 1024, page 0, parameter 0, shape |bf16[8,64]| at ShapeIndex {}, maybe-live-out:
 value: <1 x.m @0> (size=1024,offset=0): bf16[8,64]{1,0}
allocation 1: size 9999, color 1, page 0, preallocated-temp:
 value: <2 small @1> (size=9999,offset=0): bf16[8,16]{1,0}
allocation 2: size 3000, page 0, preallocated-temp:
 value: <3 loop{1} @0> (size=2048,offset=0): bf16[8,64]{1,0}
 value: <4 placed @0> (size=1500,offset=1024): f32[64]{0}
 value: <5 whole @0> (size=900,offset=2048): f32[64]{0}
"""


def short(text):
    """Returns the same program in the form of jax 0.11, where the elements of a tuple have no lines."""
    elements = r"(  %([\w.]+) = .* get-tuple-element\(%([\w.]+)\), index=(\d)\n)"
    for line, name, whole, number in re.findall(elements, text):
        text = re.sub(rf"%{re.escape(name)}(?![\w.])", f"%{whole}#{number}", text.replace(line, ""))
    return text


both_ways = pytest.mark.parametrize("text", [LOOP, short(LOOP)], ids=["long", "short"])


def test_elements_of_a_tuple():
    assert hlo.elements("((bf16[16]), bf16[6,4]{1,0:T(8,128)}, /*index=2*/u32[])") == [
        "(bf16[16])", "bf16[6,4]{1,0:T(8,128)}", "u32[]",
    ]  # fmt: skip
    siblings = {"a": hlo.instruction("  %a = ((s32[2], u32[]), pred[]) parameter(0)")}
    hlo.add_element(siblings, "a#0#1")
    assert siblings["a#0#1"] == ("a#0#1", "u32[]", "get-tuple-element", ("a#0",), "index=1")


@both_ways
def test_the_schedule_counts_what_a_loop_repeats(text):
    program = hlo.parse(text)
    times = {step.name: count for _, step, count in hlo.schedule(program)}
    assert (times["loop"], times["gathered"], times["end"]) == (1, 3, 1)  # from 1 below 4
    assert "part" not in times  # within a fusion
    assert program.computations["body"]["f.2"].called("calls") == "chain.2"
    assert analysis.cycles(program) == 3 * (10 + 100 + 100) + 5


def test_a_loop_that_can_not_be_counted_is_said():
    with pytest.raises(ValueError, match="loop"):
        list(hlo.schedule(hlo.parse(LOOP.replace("direction=LT", "direction=NE"))))
    known = LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    assert {step.name: count for _, step, count in hlo.schedule(hlo.parse(known))}["gathered"] == 7


@both_ways
def test_collectives_of_a_program(text):
    rows = communication.collectives(hlo.parse(text), [("data", 1), ("fsdp", 4), ("tensor", 2)], [0] * 8, 2)
    found = {(row.operation, row.axes): row for row in rows}
    gather = found["all-gather", "fsdp"]  # exposed, in the chain of fusions, and on another core
    assert (gather.calls, gather.bytes) == (9, 3 * (1024 + 256 + 128))
    assert gather.overlapped_bytes == 3 * (256 + 128)
    assert gather.link_bytes == gather.bytes * 3 // 4
    scatter = found["reduce-scatter", "fsdp"]
    assert (scatter.calls, scatter.bytes, scatter.link_bytes) == (3, 3 * 1024, 3 * 1024 * 3 // 4)
    disguised = found["all-gather by all-reduce", "tensor"]
    assert (disguised.bytes, disguised.link_bytes) == (3 * 256, 3 * 256)  # 2 · (n - 1) / n of the bytes, n = 2
    whole = found["all-reduce", "fsdp+tensor"]
    assert (whole.calls, whole.bytes, whole.overlapped_bytes, whole.link_bytes) == (1, 1024, 0, 1024 * 2 * 7 // 8)
    outer = found["all-reduce", "slices"]
    assert outer.between and (outer.bytes, outer.link_bytes) == (1024, 1024)
    assert len(rows) == 5 and not any(row.between for row in rows if row is not outer)


@pytest.mark.parametrize(
    "groups, first",
    [
        ("replica_groups={{0,1},{2,3}}", [0, 1]),
        ("replica_groups=[2,2]<=[4]", [0, 1]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [0, 2]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [0, 2]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [0, 1, 2, 3]),
        ("replica_groups={}", [0, 1, 2, 3]),
        ("source_target_pairs={{0,2},{2,0},{1,3}}", [0, 2]),
    ],
)
def test_groups_in_each_way_they_are_written(groups, first):
    assert communication.first_group(f", channel_id=1, {groups}, dimensions={{0}}", [0] * 4) == (first, len(first))


def test_largest_buffers_have_places_of_their_own():
    buffers = analysis.largest_buffers(ASSIGNMENT, hlo.parse(LOOP), 3)
    # `placed` takes turns with the loop's state; on-chip memory does not count.
    assert [(buffer.name, buffer.bytes) for buffer in buffers] == [
        ("forward: mlp/gather", 2048),
        ("state.model.up.value", 1024),
        ("whole", 900),
    ]


def test_out_of_memory_is_read():
    said = (
        "CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries (32.17G) exceeds "
        "available HBM (15.75G)."
    )
    assert analysis.out_of_memory(said) == (int(32.17 * 2**30), int(15.75 * 2**30))
    assert analysis.out_of_memory("INTERNAL: something else") is None


@pytest.mark.parametrize("window", [0, 3, 100])
def test_attention_kernels_look_at_the_pairs_of_the_mask(window):
    T, H = 8, 4
    back = np.arange(T)[:, None] - np.arange(T)
    pairs = int(((back >= 0) & (back < (window or T))).sum())
    both = ["splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"]
    for name, others, products in ((both[0], both, 2), (both[1], both, 3), (both[2], both, 4), (both[2], both[:1], 5)):
        assert flops.kernel(name, others, (2, 3, T, H), window) == products * 2 * 2 * 3 * pairs * H
    assert flops.kernel("something_else", both, (2, 3, T, H), window) == 0


def test_executed_flops_count_loops_recomputation_and_nothing_unused():
    x, w = jnp.ones((4, 8)), jnp.ones((5, 8, 8))
    one = 2 * 4 * 8 * 8

    def loss(policy):
        layer = jax.checkpoint(lambda x, w: (jnp.tanh(jnp.tanh(x @ w) @ w), None), policy=policy)
        return lambda w: jax.lax.scan(layer, x, w)[0].sum()

    kept, again = (
        flops.executed(jax.jit(jax.grad(loss(policy))).trace(w), 0)
        for policy in (jax.checkpoint_policies.everything_saveable, jax.checkpoint_policies.nothing_saveable)
    )
    # Two products forward and four backward; if nothing is kept, the forward products are done twice.
    assert kept == 5 * 6 * one and again == 5 * 8 * one
    unused = jax.jit(lambda x, w: (x @ w[0], x @ w[1])[0])
    assert flops.executed(unused.trace(x, w), 0) == one


def planned(model=training.LLAMA, mesh=(1, 8, 1), **changes):
    return dataclasses.replace(training.tiny(model, seq_len=64, **changes), mesh=MeshConfig(*mesh))


def shapes(config):
    return estimate.shapes(config, estimate.abstract_mesh(config, topology.parse("v5e:2x4", 1)))


@pytest.mark.parametrize("mesh", [(1, 8, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)])
def test_the_estimate_agrees_with_a_compiled_program(mesh):
    """The estimate's bytes equal those of the program from this machine's compiler, to the byte."""
    config = planned(mesh=mesh)
    devices = training.mesh_of(*mesh)
    with jax.set_mesh(devices):
        step = compile_step(config, 257, abstract_state(config, 257, devices), devices)
    rows = communication.collectives(hlo.parse(step.as_text()), list(devices.shape.items()), [0] * 8, 1)
    found = {(row.operation, row.axes): row.bytes for row in rows}
    expected = estimate.collectives(config, shapes(config))
    assert set(expected) == {("all-gather", "fsdp"), ("reduce-scatter", "fsdp")} | (
        {("all-reduce", "data"), ("all-gather", "tensor"), ("reduce-scatter", "tensor")} if mesh[2] > 1 else set()
    )
    for key, size in expected.items():
        norms = key == ("all-reduce", "data")  # norms are summed over more axes
        assert found[key] == pytest.approx(size, rel=0.05) if norms else found[key] == size
    assert analysis.memory(step).arguments == pytest.approx(
        sum(estimate.shard_bytes(part) for part in shapes(config)[1:]), rel=0.01
    )


def test_what_rematerialization_keeps():
    sizes = {}
    for remat in ("none", "dots", "full"):
        config = planned(dataclasses.replace(training.LLAMA, remat=remat, num_layers=8))
        sizes[remat] = estimate.kept(config, shapes(config)).device
    one = 64 * 64 * 4  # a row's residual stream
    assert sizes["none"] > sizes["dots"] > sizes["full"] >= 8 * one
    shallow = planned(dataclasses.replace(training.LLAMA, remat="full", num_layers=4))
    kept = estimate.kept(shallow, shapes(shallow)).device
    assert sizes["full"] - kept == 4 * one  # the input of each block, and nothing else


def test_topologies():
    pod = topology.parse("v5p:16x16x16", 2)
    assert (pod.num_chips, pod.num_devices, pod.descriptor["num_slices"]) == (8192, 8192, 2)
    assert topology.parse("tpu7x:2x2x1", 1).num_devices == 8
    cards = topology.parse("h100:8x4", 1)
    assert cards.num_devices == 32 and cards.descriptor["topology"] == "1x4x8"
    assert "16x16x24" in topology.shapes("v5p") and "16x16x32" not in topology.shapes("v5p")


@pytest.mark.parametrize(
    "name, slices, words",
    [
        ("v5f:2x4", 1, "v5e"),
        ("v5e:3x3", 1, "v5e:2x4"),
        ("v5e:32x32", 1, "at most 256 chips"),
        ("v5e", 1, "v5e:16x16"),
        ("v5e:2xfour", 1, "v5e:16x16"),
        ("v5e:" + "9" * 5000, 1, "v5e:16x16"),
        ("v5e:" + "x".join(["9999"] * 99), 1, "v5e:16x16"),
        ("v5e:2x4", 0, "--slices=0"),
        ("h100:16", 1, "CARDSxHOSTS"),
        ("h100:8", 2, "h100:8x2"),
    ],
)
def test_topologies_that_can_not_be_had(name, slices, words):
    with pytest.raises(Refused, match=words):
        topology.parse(name, slices)


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(plan, "has_compiler", lambda topology: False)
    monkeypatch.setattr(search, "has_compiler", lambda topology: False)


def test_the_plan_counts_adafactors_factored_moments():
    """Beside the momentum, which is as large as the weights, and cut over the devices as they are."""
    gpt2 = dict(num_layers=12, num_heads=12, embed_dim=768)
    config = schema.parse(dict(model=gpt2, optimizer=dict(name="adafactor"), mesh=dict(fsdp=4, tensor=2)))
    found = shapes(config).state
    assert estimate.shard_bytes(found.opt_state) == pytest.approx(1.01 * estimate.shard_bytes(found.model), rel=0.01)
    moments = found.opt_state[1][0][0]
    assert moments.v_row.blocks.query.sharding.spec == jax.P(None, "fsdp")
    assert moments.v_col.blocks.query.sharding.spec == jax.P(None, "tensor", None)


def test_plan_without_a_compiler(gptjax_main, no_compiler):
    argv = ["plan", f"--config={DEBUG}", "--topology=v5e:2x4", "--config.model.dtype=bfloat16"]
    code, out, _ = gptjax_main(*argv, "--json")
    made = json.loads(out)
    config = files.load(DEBUG, {})
    model = config.model.flops_per_token(257, config.seq_len) * config.batch_size * config.seq_len
    assert code == 0 and set(KEYS.split()) <= set(made)
    assert (made["fits"], made["source"], made["compile_seconds"]) == (True, "analytic", None)
    assert made["flops_per_step"] == model <= made["hardware_flops_per_step"] < 1.2 * model
    assert made["memory"]["optimizer"] == pytest.approx(2 * made["memory"]["parameters"], abs=16)
    assert 0 < made["mfu_ceiling"] <= 1
    assert made["floor_step_seconds"] == pytest.approx(made["hardware_flops_per_step"] / (8 * 197e12))
    code, out, _ = gptjax_main(*argv)
    assert code == 0 and "ANALYTIC" in out and "pip install libtpu" in out and "bounds, not predictions" in out
    option = "xla_tpu_scoped_vmem_limit_kib=32768"
    code, out, _ = gptjax_main(*argv, f"--config.compiler_options={option}", "--json")
    assert code == 0 and json.loads(out)["flags"]["compiler_options"] == option


def test_a_plan_that_does_not_fit_is_no_failure(gptjax_main, no_compiler):
    big = ["--config.model.num_layers=64", "--config.model.embed_dim=8192", "--config.model.mlp_dim=32768"]
    code, out, _ = gptjax_main("plan", f"--config={DEBUG}", "--topology=v5e:2x4", *big)
    assert code == 0 and "does not fit" in out and "--config.model.remat=full" in out


@pytest.mark.parametrize(
    "changes, words",
    [
        (["--topology=v5e:2x4", "--config.mesh.tensor=3"], "there are 8"),
        (["--topology=v5e:2x4", "--config.batch_size=12"], "multiple of 8"),
        (["--topology=v5e:2x4", "--config.mesh.tensor=8"], "num_heads=4"),
        (["--topology=v5e:2x4", "--slices=2", "--config.mesh.slices=4"], "mesh.slices=4"),
        (["--topology=v5e:2x2x2"], "v5e:2x4"),
        (["--topology=v5e:2x4", "--config.tokenizer.kind=huggingface"], "needs tokenizer.path"),
    ],
)
def test_plans_are_refused_in_one_sentence(gptjax_main, no_compiler, changes, words):
    code, _, error = gptjax_main("plan", f"--config={DEBUG}", *changes)
    assert code == 2 and words in error and error.count("\n") == 1 and "Traceback" not in error


def test_a_compiler_that_aborts_or_hangs(monkeypatch, tmp_path):
    config, where = files.load(DEBUG, {}), topology.parse("v5e:2x4", 1)
    aborts = tmp_path / "python"
    aborts.write_text('#!/bin/sh\necho "F1121 16:00 pod.cc:7] Check failed: no such pod" >&2\nkill -ABRT $$\n')
    aborts.chmod(0o755)
    monkeypatch.setattr(plan.sys, "executable", str(aborts))
    with pytest.raises(Refused, match="SIGABRT.*no such pod"):
        plan.analyses([config], where, "compiled")
    aborts.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(plan, "TIMEOUT", 0.2)
    with pytest.raises(Refused, match="more than 0.2 s"):
        plan.analyses([config], where, "compiled")


def judged(**changes):
    """Makes a plan from made-up figures of a compiler."""
    config = dataclasses.replace(planned(), model=dataclasses.replace(planned().model, dtype="bfloat16"))
    row = {
        "source": "compiled",
        "mesh": {"data": 1, "tensor": 1},
        "parameters": 1,
        "hbm_bytes": 1 << 30,
        "host_bytes": 0,
    }
    row |= {"memory": {}, "tokens_per_step": 1 << 20, "flops_per_step": 1 << 40, "hardware_flops_per_step": 1 << 40}
    row |= {"collectives": [], "expected_collectives": [], "kernels": [], "cycles": 0, "compile_seconds": 1.0}
    return plan.judged(config, topology.parse("v5e:2x4", 1), row | {"versions": {}} | changes)


def test_a_floor_of_cycles_kernels_and_links():
    kernels = [{"name": "splash_mha_fwd", "calls": 1, "flops": int(197e12)}]
    made = judged(cycles=int(1.5e9), kernels=kernels)
    assert made["floor_step_seconds"] == pytest.approx(2.0) and not made["warnings"]
    assert made["mfu_ceiling"] == pytest.approx((1 << 40) / (2.0 * 8 * 197e12))
    links = {"operation": "all-gather", "axes": "fsdp", "calls": 1, "bytes": 1, "overlapped_bytes": 0}
    made = judged(cycles=int(1.5e9), collectives=[links | {"between": True, "link_bytes": int(3 * 3.125e9)}])
    assert (made["floor_step_seconds"], made["bound_step_seconds"]) == pytest.approx((1.0, 3.0))
    assert judged(cycles=int(1.5e9), kernels=[kernels[0] | {"flops": 0}])["warnings"]


def test_a_floor_below_the_weights_products_is_not_believed():
    made = judged(cycles=1000)
    assert made["floor_step_seconds"] is None and made["bound_step_seconds"] is None
    assert "not understood" in made["warnings"][0]


def test_search_writes_a_config_that_loads(gptjax_main, no_compiler, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, values in (("REPLICAS", (1, 2)), ("TENSOR", (1, 8)), ("ACCUMULATION", (1,)), ("REMAT", ("none", "full"))):
        monkeypatch.setattr(search, name, values)
    argv = ["plan", f"--config={DEBUG}", "--topology=v5e:2x4", "--config.num_steps=70", "--search"]
    code, out, error = gptjax_main(*argv, "--json")
    assert code == 0 and "6 candidates: 4 divide, 4 may fit" in error  # 4 heads are not cut into 8
    best, made = files.load("debug_v5e_2x4.py", {}), json.loads(out)
    assert (best.model.remat, best.mesh.data, best.num_steps, made["fits"]) == ("none", 1, 70, True)
    assert made["mesh"]["fsdp"] == best.mesh.fsdp and made["mesh"]["data"] == best.mesh.data
    code, _, error = gptjax_main(*argv)
    assert code == 2 and "debug_v5e_2x4.py exists" in error


def asked(*argv) -> dict:
    """Returns the plan that the command line prints."""
    variables = {name: value for name, value in os.environ.items() if name != "JAX_DISABLE_MOST_OPTIMIZATIONS"}
    argv = [sys.executable, "-m", "gptjax", "plan", "--json", *argv]
    made = subprocess.run(argv, capture_output=True, text=True, env=variables)
    assert made.returncode == 0, made.stderr
    return json.loads(made.stdout)


LLAMA = f"--config={pathlib.Path(gptjax.__file__).parent.parent / 'configs' / 'llama_1b.py'}"


class TestTpu:
    pytestmark = tpu_aot

    def test_what_does_not_fit(self):
        made = asked(
            LLAMA, "--topology=v5e:2x4", "--config.model.num_layers=2", "--config.batch_size=256",
            "--config.model.remat=none", "--config.grad_accum_steps=1",
        )  # fmt: skip
        assert made["fits"] is False and made["hbm_bytes"] > made["hbm_capacity_bytes"]
        assert sum(buffer["bytes"] for buffer in made["largest_buffers"]) > made["hbm_capacity_bytes"] / 2
        assert "GiB more than" in made["verdict"]

    def test_two_slices(self):
        made = asked(f"--config={DEBUG}", "--topology=v5e:2x4", "--slices=2", "--config.batch_size=16")
        between = [row for row in made["collectives"] if row["between"]]
        assert made["devices"] == 16 and [row["axes"] for row in between] == ["slices"]
        assert made["interconnect_step_seconds"]["between"] > 0
