"""Compiles each config of a real run for the machines in the config's docstring, and checks memory and MFU ceiling.

Needs libtpu. By default one config is compiled; `pytest --all_pods -m tpu_aot` compiles all, in about 15 minutes.
"""

import importlib.util
import pathlib

import pytest

from gptjax.parallel import hardware
from gptjax.planning import plan, topology
from gptjax.training.config import files

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
# Limits on GiB per chip (at most) and the MFU ceiling (at least); the version of the compiler moves both a little.
PODS = {
    ("gpt2_124m", "v5e:2x4", 1): (10.0, 0.39),
    ("gpt2_355m", "v5e:2x4", 1): (13.0, 0.45),
    ("gpt2_774m", "v5e:4x4", 1): (12.3, 0.50),
    ("gpt2_1558m", "v5e:4x4", 1): (11.6, 0.47),
    ("llama_1b", "v5e:4x4", 1): (11.2, 0.52),
    ("llama_8b", "v5e:16x16", 1): (9.5, 0.65),
    ("llama_8b", "v6e:16x16", 1): (10.0, 0.43),
    ("llama_70b", "v5p:8x8x8", 1): (38.3, 0.74),
    ("llama_405b", "v5p:8x8x16", 2): (61.0, 0.73),
}


@pytest.mark.slow
@pytest.mark.tpu_aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("name, machine, slices", PODS)
def test_it_fits_and_keeps_its_figures(name, machine, slices, request, monkeypatch):
    if (name, machine, slices) != next(iter(PODS)) and not request.config.getoption("all_pods"):
        pytest.skip("only with --all_pods")
    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS")  # see conftest.py
    config = files.load(str(CONFIGS / f"{name}.py"), {})
    made = plan.plan(config, topology.parse(machine, slices))
    most, least = PODS[name, machine, slices]
    assert made["source"] == "compiled" and made["fits"] and not made["warnings"]
    assert made["hbm_bytes"] / hardware.GIB < most and least < made["mfu_ceiling"] < 1
    memory = made["memory"]
    assert memory["arguments"] == pytest.approx(
        sum(memory[part] for part in ("parameters", "optimizer", "batch")), rel=0.1
    )
    assert made["hbm_bytes"] > memory["parameters"] + memory["optimizer"]
    gathers = [row for row in made["collectives"] if row["operation"].startswith("all-gather")]
    assert gathers and gathers[0]["expected_bytes"] > 0
    assert sum(row["bytes"] for row in gathers) == pytest.approx(
        sum(row["expected_bytes"] for row in gathers[:1]), rel=0.01
    )
    assert made["largest_buffers"] and made["versions"]["libtpu"]
