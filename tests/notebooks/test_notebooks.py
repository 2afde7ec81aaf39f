"""Every notebook, run from top to bottom in a kernel of its own, and what is kept of its outputs."""

import pathlib
import re
import shutil

import nbformat
import pytest
from nbclient import NotebookClient
from support.command import CACHE

import gptjax

PACKAGE = pathlib.Path(gptjax.__file__).parent
ROOT = PACKAGE.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def test_all_are_there():
    found = {path.stem for path in NOTEBOOKS}
    assert found >= {"quickstart", "inside_the_model", "from_neuron_to_transformer", "plan_a_pod", "transfer"}


# The quickest is the witness of the default run. With libtpu, it asks the TPU compiler. The notebook that loads a model
# of transformers needs that package.
MARKS = {"plan_a_pod": pytest.mark.tpu_aot, "transfer": pytest.mark.parity}


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=MARKS.get(path.stem, pytest.mark.slow), id=path.stem) for path in NOTEBOOKS]
)
def test_it_runs(path, tmp_path, monkeypatch):
    for name in ("notebooks", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "runs").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "runs"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(CACHE))
    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS")  # its steps are many, unlike those of other tests
    where = {"metadata": {"path": str(tmp_path / "notebooks")}}
    NotebookClient(nbformat.read(path, as_version=4), timeout=600, startup_timeout=300, resources=where).execute()


@notebook
def test_its_outputs_are_of_one_run_without_errors(path):
    cells = code(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for output in outputs:
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
        # No path of the machine that it ran on.
        text = output.get("text", "") + "".join(
            output.get("data", {}).get(kind, "") for kind in ("text/plain", "text/html")
        )
        assert not re.search(r"(?<![\w.])/(tmp|home|root|usr|opt|work|var|Users|private)/", text), text
    assert path.stat().st_size < 600_000
