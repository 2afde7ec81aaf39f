"""Each config of a real run, compiled for the machines that its docstring names: it fits, and keeps its figures.

Needs libtpu. By default one config is compiled; `pytest --all_pods -m tpu_aot` compiles all, in about a quarter of an hour.
"""

import importlib.util
import pathlib

import pytest

from gptjax import config as configs
from gptjax import plan, topology

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
# GiB of a chip, and the ceiling on MFU, that the step may not get worse than; a compiler's version moves both a little.
PODS = {
    ("gpt2_124m", "v5e:2x4", 1): (14.0, 0.30),
}


@pytest.mark.tpu_aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("name, machine, slices", PODS)
def test_it_fits_and_keeps_its_figures(name, machine, slices, request):
    if (name, machine, slices) != next(iter(PODS)) and not request.config.getoption("all_pods"):
        pytest.skip("only with --all_pods")
    config = configs.load(str(CONFIGS / f"{name}.py"), {})
    made = plan.plan(config, topology.parse(machine, slices))
    most, least = PODS[name, machine, slices]
    assert made["source"] == "compiled" and made["fits"] and not made["warnings"]
    assert made["hbm_bytes"] / topology.GIB < most and made["mfu_ceiling"] > least
