"""Hints at keys: the names of other frameworks, and misspellings."""

import sys

import pytest

from gptjax.cli import main
from gptjax.errors import Refused
from gptjax.runtime.files import flatten
from gptjax.training.config import files, resume, schema, synonyms

KEYS = flatten(schema.default())


def test_every_synonym_means_a_key_that_exists():
    assert set(synonyms.SYNONYMS) <= KEYS.keys()
    words = " ".join(synonyms.SYNONYMS.values()).split()
    assert len(words) == len(set(words)) and not set(words) & {key.rpartition(".")[2] for key in KEYS}


@pytest.mark.parametrize("word, key", [
    ("optimizer.lr", "optimizer.peak_learning_rate"),
    ("lr", "optimizer.peak_learning_rate"),
    ("block_size", "seq_len"),
    ("model.hidden_size", "model.embed_dim"),
    ("grad_clip", "optimizer.clip_norm"),
    ("per_device_train_batch_size", "batch_size"),
    ("base-num-decoder-layers", "model.num_layers"),
    ("model.num_layerz", "model.num_layers"),
    ("num_layers", "model.num_layers"),
    ("optimiser", "optimizer"),
])  # fmt: skip
def test_what_a_word_means(word, key):
    assert synonyms.meant(word, KEYS) == key
    with pytest.raises(Refused, match=f'Did you mean "{key}"'):
        files.override(schema.default(), word, "1")


@pytest.mark.parametrize("flag, means", [
    ("--num_steps=5", "--config.num_steps"),
    ("--model.num_layers=2", "--config.model.num_layers"),
    ("--lr=1e-3", "--config.optimizer.peak_learning_rate"),
    ("--max_iters=5", "--config.num_steps"),
    ("--out_dir=x", "--workdir"),
    ("--workdirr=x", "--workdir"),
    ("--profile-steps=1:2", "--profile_steps"),
])  # fmt: skip
def test_what_a_flag_means(flag, means):
    with pytest.raises(Refused, match=f'Did you mean "{means}"'):
        main.parse(["train", "--config=c.py", "--workdir=w", flag])


def test_an_attribute_of_a_config_file(tmp_path):
    path = tmp_path / "c.py"
    path.write_text(
        "from gptjax.config import default\ndef get_config():\n c = default()\n c.model.n_layer = 3\n return c"
    )
    with pytest.raises(Refused, match='unknown key "n_layer". Did you mean "model.num_layers"'):
        files.load(str(path), {})


def test_an_empty_value_is_shown():
    old = flatten(schema.default()) | {"packing.method": ""}
    nested = {"packing": {"method": ""}}
    assert old and any('packing.method ("" there' in line for line in resume.differences(nested, schema.Config()))


def test_a_config_file_imports_its_neighbour_and_leaves_nothing(tmp_path):
    """Two folders have neighbours of the same name."""
    before = list(sys.path)
    for name, layers in (("a", 3), ("b", 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sizes.py").write_text(f"LAYERS = {layers}\n")
        (tmp_path / name / "c.py").write_text(
            "from sizes import LAYERS\nfrom gptjax.config import default\n"
            "def get_config():\n    config = default()\n    config.model.num_layers = LAYERS\n    return config\n"
        )
        assert files.load(str(tmp_path / name / "c.py"), {}).model.num_layers == layers
    assert sys.path == before and "sizes" not in sys.modules
