import pathlib
import subprocess
import sys

import gptjax
from gptjax.training.config import reference
from gptjax.training.config.schema import default
from gptjax.training.optim import config as optimizer
from gptjax.training.optim.optimizers import OPTIMIZERS
from gptjax.training.optim.schedules import SCHEDULES

ROOT = pathlib.Path(gptjax.__file__).parents[1]


def test_every_key_has_a_meaning():
    keys = reference.keys()
    assert [key.name for key in keys if not key.meaning] == []
    assert len(keys) == len({key.name for key in keys}) > 100


def test_keys_are_those_of_a_config_file():
    flat = {f"{name}.{key}": each for name, section in default().items() if hasattr(section, "items")
            for key, each in section.items()}  # fmt: skip
    flat |= {name: each for name, each in default().items() if not hasattr(each, "items")}
    assert {key.name: (key.kind, key.default) for key in reference.keys()} == {
        name: (type(each).__name__, repr(each)) for name, each in flat.items()
    }


def test_the_page_is_current():
    """Otherwise: python -m gptjax.training.config.reference > docs/config.md"""
    assert (ROOT / "docs" / "config.md").read_text() == reference.page()


def test_comments_and_docstrings_are_read():
    source = (
        "class A:\n    one: str = 'a # b'  # the first\n    two: int = (\n        2  # the second\n    )\n"
        "    none: int = 0\n"
    )
    assert reference._from_comments(source) == {"one": "the first", "two": "the second"}
    text = "Title.\n\na, b: one\n    more\nc: two\n\nText."
    assert reference._from_docstring(text) == {"a": "one more", "b": "one more", "c": "two"}


def test_config_prints_all_keys_or_those_with_a_word(gptjax_main, refused, tmp_path):
    code, out, error = gptjax_main("config")
    assert (code, error) == (0, "") and all(
        f"{key.name}={key.default}  ({key.kind})" in out for key in reference.keys()
    )
    assert gptjax_main("config", "model.num_layers")[1] == "model.num_layers=6  (int)\n    number of blocks\n"
    assert gptjax_main("config", "--config.model.num_layers")[0] == 2  # a flag, which config does not have
    assert gptjax_main("config", "softcap")[1].startswith("model.logits_softcap=0.0  (float)\n")
    assert "model.num_kv_heads=0" in gptjax_main("config", "ainslie")[1]  # no key has it, but a meaning
    message = refused(tmp_path, "config", "num_layerz")
    assert message == 'gptjax: No key of a config has the word num_layerz. Did you mean "num_layers"?\n'


def test_a_wrong_key_is_refused_before_jax_is_imported(tmp_path):
    code = (
        f"import sys; sys.argv = ['gptjax', 'train', '--config={ROOT}/configs/debug.py', '--workdir={tmp_path}/x', "
        "'--config.model.num_layerz=3']\nfrom gptjax.cli import main\ntry: main.main()\n"
        "except SystemExit as end: assert end.code == 2\n"
        "heavy = {'jax', 'flax', 'optax', 'orbax', 'tensorboardX', 'datatrove'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'Did you mean "model.num_layers"?' in done.stderr


def test_names_are_those_that_can_be_made():
    assert optimizer.NAMES == tuple(OPTIMIZERS) and optimizer.SCHEDULE_NAMES == tuple(SCHEDULES)


def test_exit_codes_of_a_process_of_its_own():
    def code(*argv):
        return subprocess.run([sys.executable, "-m", "gptjax", *argv], capture_output=True).returncode

    assert (code("--version"), code("trian"), code("status", "--workdir=/nowhere")) == (0, 2, 2)
