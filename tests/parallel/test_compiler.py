"""XLA's options: the options that reach the compiler, and the refusals of wrong options."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from support import runs as training
from support.command import DEBUG

from gptjax.errors import Refused
from gptjax.parallel.xla import options
from gptjax.training import step
from gptjax.training.config import schema


@pytest.fixture(scope="module")
def lowered():
    return jax.jit(lambda x: jnp.sin(x) + jnp.cos(x)).lower(jnp.ones(8))


def test_options_are_parsed():
    assert options.options("") == {}
    assert options.options("xla_a=1  xla_b=TWO,THREE xla_c=") == {"xla_a": "1", "xla_b": "TWO,THREE", "xla_c": ""}


@pytest.mark.parametrize("text, words", [
    ("--xla_a=1", 'must be xla_NAME=VALUE, separated by spaces; found "--xla_a=1"'),
    ("xla_b=2 xla_a", 'must be xla_NAME=VALUE, separated by spaces; found "xla_a"'),
    ("xla_a=1, a=1", 'must be xla_NAME=VALUE, separated by spaces; found "a=1"'),
    ("xla_a=1 xla_a=2", "must name an option once; found xla_a=1 and xla_a=2"),
])  # fmt: skip
def test_bad_forms_are_refused_with_the_config(text, words):
    with pytest.raises(Refused) as refusal:
        schema.parse(dict(compiler_options=text))
    assert f'compiler_options="{text}" {words}' in str(refusal.value)


def test_they_reach_the_compiler(lowered, tmp_path):
    dumped = options.compile(lowered, f"xla_dump_to={tmp_path}", "cpu")
    assert dumped(jnp.zeros(8)).sum() == 8
    assert list(tmp_path.glob("*after_optimizations*"))


def test_those_of_another_platform_are_passed_over(lowered):
    for text, platform in (
        ("xla_tpu_scoped_vmem_limit_kib=98304 xla_gpu_nothing=1", "cpu"),
        ("xla_cpu_nothing=1 xla_tpu_nothing=1", "metal"),
    ):
        assert options.compile(lowered, text, platform)(jnp.zeros(8)).sum() == 8


@pytest.mark.parametrize("text, words", [
    ("xla_cpu_nothing=1", "No such compile option: 'xla_cpu_nothing'"),
    ("xla_backend_optimization_level=no", "'no' is not a valid int32 value"),
])  # fmt: skip
def test_what_the_compiler_does_not_know(lowered, text, words):
    with pytest.raises(Refused) as refusal:
        options.compile(lowered, text, "cpu")
    assert f'compiler_options="{text}" is refused by the compiler for cpu' in str(refusal.value)
    assert words in str(refusal.value)


def test_a_train_step_is_compiled_with_them():
    config = training.tiny(compiler_options="xla_cpu_nothing=1")
    mesh = training.mesh_of(1, 1, 1)
    with jax.set_mesh(mesh), pytest.raises(Refused, match="xla_cpu_nothing"):
        step.compile_step(config, 257, step.abstract_state(config, 257, mesh), mesh)


def test_a_run_is_refused_before_anything_is_written(tmp_path):
    """Runs in a process of its own, which keeps compiled programs in the workdir like a user's process."""
    argv = [sys.executable, "-m", "gptjax", "train", f"--config={DEBUG}", f"--workdir={tmp_path / 'run'}"]
    argv += ["--config.compiler_options=xla_cpu_nothing=1"]
    ended = subprocess.run(argv, capture_output=True, text=True)
    assert ended.returncode == 2 and "No such compile option: 'xla_cpu_nothing'" in ended.stderr
    assert not (tmp_path / "run").exists()


def test_what_is_compiled_after_the_check_is_kept(tmp_path):
    program = f"""
import jax
from gptjax.parallel.xla import options
jax.config.update("jax_compilation_cache_dir", "{tmp_path}/kept")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
options.check("xla_backend_optimization_level=1", "cpu")
assert jax.jit(lambda x: x + 1)(1) == 2
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert any((tmp_path / "kept").iterdir())
