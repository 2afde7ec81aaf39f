"""Eight CPU devices in this process, a cache of compiled programs, and one small corpus and short run for all tests."""

import gc
import os
import pathlib
import shutil
import signal
import subprocess
import sys

os.environ["JAX_PLATFORMS"] = "cpu"  # with libtpu installed, JAX would look for TPUs, here and in what the tests start

# In the background a shell has SIGINT ignored, and what the tests start would ignore it too.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Most of a test's time is XLA's; at level 0 it compiles about twice as fast, the same program otherwise.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

import jax  # noqa: E402 (JAX reads the variables above on import)
import pytest  # noqa: E402
from support.command import CACHE, corpus_text, training, tree  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

from gptjax.cli import main  # noqa: E402 (after JAX has eight devices)
from gptjax.data.preparation.prepare import DataConfig, prepare  # noqa: E402
from gptjax.tokenizers.tokenizer import TokenizerConfig  # noqa: E402


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
    data = DataConfig(source="text", path=str(corpus), heldout_fraction=0.3)
    return prepare(data, TokenizerConfig(kind="byte"), tmp_path_factory.mktemp("stores") / "store")


@pytest.fixture(autouse=True, scope="module")
def released():
    """What a file's tests compiled goes with them: each program takes regions of memory, of which Linux gives a process
    65,530, and XLA crashes where it gets no more."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def disk(tmp_path):
    """A file system of 8 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a tmpfs can't be mounted here: it takes root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def gptjax_main(monkeypatch, capfd):
    """Runs a command line in this process: (exit code, stdout, stderr)."""

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["gptjax", *map(str, argv)])
        capfd.readouterr()
        code = 0
        try:
            main.main()
        except SystemExit as end:
            code = end.code
        return code, *capfd.readouterr()

    return call


@pytest.fixture
def refused(gptjax_main):
    """Runs a command line that must be refused, with nothing written into a folder: the sentence."""

    def call(folder, *argv):
        before = tree(folder)
        code, _, error = gptjax_main(*argv)
        assert code == 2
        assert error.startswith("gptjax: ") and error.endswith((".\n", "?\n")) and error.count("\n") == 1, error
        assert "Traceback" not in error and "Errno" not in error
        assert tree(folder) == before
        return error

    return call


@pytest.fixture(scope="session")
def finished(corpus, tmp_path_factory):
    """The workdir of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gptjax", *training(corpus, folder)])
        main.main()
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of it, to be spoiled."""
    return shutil.copytree(finished, tmp_path / "copied")


# Those that take longest, so that none of them is the last to begin while the other process has nothing to do.
FIRST = (
    "notebooks processes train recovery chaos heartbeat bucket plan run sweep preemption saving mup recompute".split()
)


def pytest_collection_modifyitems(items):
    rank = {f"test_{name}": number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(FIRST)))


def pytest_addoption(parser):
    parser.addoption(
        "--all_pods", action="store_true", help="compile every config for its pod (tests/planning/test_pod_configs.py)"
    )
