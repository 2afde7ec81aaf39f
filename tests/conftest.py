"""Eight CPU devices in this process, compiled programs kept between runs, and one small corpus for all."""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"  # with libtpu installed, JAX would look for TPUs, here and in what the tests start

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
CACHE = pathlib.Path(__file__).parent.parent / ".jax_cache"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

from gptjax.data.prepare import DataConfig, prepare  # noqa: E402
from gptjax.tokenizer import TokenizerConfig  # noqa: E402


def corpus_text() -> str:
    """Lines that a small model can learn something of: arithmetic spelled out."""
    return "".join(f"{a} plus {b} is {a + b}.\n" for a in range(120) for b in range(40))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> pathlib.Path:
    """A glob's worth of text files."""
    folder = tmp_path_factory.mktemp("corpus")
    text = corpus_text()
    size = len(text) // 20
    for part in range(20):
        (folder / f"{part:02}.txt").write_text(text[part * size : (part + 1) * size])
    return folder / "*.txt"


@pytest.fixture(scope="session")
def store(corpus, tmp_path_factory):
    """The corpus as a token store of bytes: 257 ids."""
    data = DataConfig(source="text", path=str(corpus), heldout_fraction=0.1)
    return prepare(data, TokenizerConfig(kind="byte"), tmp_path_factory.mktemp("stores") / "store")


def pytest_addoption(parser):
    parser.addoption(
        "--all_pods", action="store_true", help="compile every config for its pod (tests/test_pod_configs.py)"
    )
