import ast
import dataclasses
import json
import pathlib
import re

import jax
import pytest
from support.runs import mesh_of

import gptjax
from gptjax.data.sources.documents import DataConfig
from gptjax.errors import Refused
from gptjax.models import build
from gptjax.models.config import ModelConfig
from gptjax.parallel.mesh import MeshConfig
from gptjax.runtime.files import flatten
from gptjax.tokenizers.tokenizer import expected_vocab_size
from gptjax.training.config import schema
from gptjax.training.config.files import load, override
from gptjax.training.config.resume import FREE_KEYS, as_begun, differences
from gptjax.training.config.schema import Config, default, parse

ROOT = pathlib.Path(gptjax.__file__).parent
DIAL = ROOT.parent / "configs" / "dial.py"
CONFIGS = sorted(set((ROOT.parent / "configs").glob("*.py")) - {DIAL})


def write(folder, body, head="from gptjax.config import default\n\n\ndef get_config():\n    config = default()\n"):
    path = folder / "mine.py"
    path.write_text(head + "".join(f"    {line}\n" for line in (*body.splitlines(), "return config")))
    return str(path)


def test_defaults_are_locked():
    config = default()
    for section in (config, config.model, config.data):
        with pytest.raises((AttributeError, KeyError)):
            section.depth = 3
    assert parse(config) == parse({})


@pytest.mark.parametrize("body, words", [
    ("config.num_stps = 3", 'unknown key "num_stps". Did you mean "num_steps"?'),
    ("config.model.num_layer = 3", 'unknown key "num_layer". Did you mean "model.num_layers"?'),
    ("config.num_layers = 3", 'unknown key "num_layers". Did you mean "model.num_layers"?'),
    ("config['batchsize'] = 3", 'unknown key "batchsize". Did you mean "batch_size"?'),
    ("config.modle.num_layers = 3", 'unknown key "modle". Did you mean "model"?'),
    ("config.optimizer.zzz = 3", 'unknown key "zzz".'),
    ("config.num_steps = 1.5", "num_steps=1.5 must be of type int."),
    ("config.model.biases = 1", "biases=1 must be of type bool."),
    ("config.optimizer.name = 3", "name=3 must be of type str."),
    ("config.optimizer.beta1 = 'high'", "beta1=high must be of type float."),
    ("config.model = 3", "model=3 must be of type ConfigDict."),
    ("config.seed = True", "seed=True must be of type int."),
    ("config.data.path = None", "data.path=None must be of type str."),
    ("config.unlock(); config.model.depth = 3", 'unknown key "model.depth".'),
    ("config = None", "returns a NoneType: return gptjax.config.default()"),
    ("import os; os.nothing", "AttributeError: module 'os' has no attribute 'nothing'."),
    ("1 / 0", "ZeroDivisionError: division by zero."),
    ("raise RuntimeError('no')", "RuntimeError: no."),
    ("import nothing_like_it", "ModuleNotFoundError: No module named 'nothing_like_it'."),
    ("config.num_steps = (", "SyntaxError: "),
    ("config.num_steps = 10**5000", "num_steps must have at most 63 bits; found 16610."),
    ("exit()", "SystemExit: None."),
])  # fmt: skip
def test_bad_file(tmp_path, body, words):
    with pytest.raises(Refused) as refusal:
        load(write(tmp_path, body), {})
    assert words in str(refusal.value) and "\n" not in str(refusal.value) and len(str(refusal.value)) < 300


def test_file_without_get_config(tmp_path):
    path = write(tmp_path, "", head="def config():\n    config = 3\n")
    with pytest.raises(Refused, match=r"mine.py has no get_config\(\): define one"):
        load(path, {})


def test_missing_file_names_a_near_one(tmp_path):
    write(tmp_path, "")
    with pytest.raises(Refused, match='mien.py does not exist. Did you mean "mine.py"?'):
        load(str(tmp_path / "mien.py"), {})
    with pytest.raises(Refused, match="nowhere/mine.py does not exist"):
        load(str(tmp_path / "nowhere" / "mine.py"), {})
    with pytest.raises(Refused, match="does not exist"):
        load(str(tmp_path), {})


@pytest.mark.parametrize("key, text, value", [
    ("num_steps", "7", 7),
    ("mesh.fsdp", "-1", -1),
    ("optimizer.peak_learning_rate", "1e-4", 1e-4),
    ("optimizer.peak_learning_rate", "1", 1.0),
    ("model.biases", "false", False),
    ("model.biases", "False", False),
    ("model.qk_norm", "true", True),
    ("data.path", "true", "true"),
    ("data.path", "7", "7"),
    ("data.path", "", ""),
])  # fmt: skip
def test_override(key, text, value):
    config = default()
    override(config, key, text)
    found = flatten(config)[key]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("key, text, words", [
    ("num_stps", "3", '--config.num_stps is unknown. Did you mean "num_steps"?'),
    ("num_layers", "3", 'unknown. Did you mean "model.num_layers"?'),
    ("modle.num_layers", "3", 'unknown. Did you mean "model.num_layers"?'),
    ("model.remats", "full", 'unknown. Did you mean "model.remat"?'),
    ("model", "3", "--config.model is unknown. It is a section: set model."),
    ("", "3", "--config. is unknown."),
    ("num_steps", "3.0", "--config.num_steps=3.0 must be of type int: the default is 1000."),
    ("num_steps", "many", "--config.num_steps=many must be of type int"),
    ("num_steps", "true", "--config.num_steps=true must be of type int"),
    ("num_steps", "", "--config.num_steps= must be of type int"),
    ("num_steps", "{[]: 1}", "must be of type int"),
    ("num_steps", "9" * 5000, "must be of type int"),
    ("num_steps", "(" * 5000, "must be of type int"),
    ("model.biases", "-" * 5000 + "1", "must be of type bool"),
    ("optimizer.beta1", "1e999", "must be of type float"),
    ("optimizer.beta1", "true", "--config.optimizer.beta1=true must be of type float"),
    ("optimizer.beta1", "nan", "--config.optimizer.beta1=nan must be of type float"),
    ("model.biases", "1", "--config.model.biases=1 must be of type bool: the default is True."),
    ("model.biases", "yes", "--config.model.biases=yes must be of type bool"),
])  # fmt: skip
def test_bad_override(key, text, words):
    with pytest.raises(Refused) as refusal:
        override(default(), key, text)
    assert words in str(refusal.value)


@pytest.mark.parametrize("changes, words", [
    (dict(num_steps=0), "num_steps=0 must be at least 1"),
    (dict(batch_size=0), "batch_size=0 must be at least 1"),
    (dict(seq_len=-4), "seq_len=-4 must be at least 1"),
    (dict(grad_accum_steps=0), "grad_accum_steps=0 must be at least 1"),
    (dict(log_every=0), "log_every=0 must be at least 1"),
    (dict(eval_every=0), "eval_every=0 must be at least 1"),
    (dict(checkpoint_every=0), "checkpoint_every=0 must be at least 1"),
    (dict(seed=2**32), f"seed={2**32} must be below 4294967296"),
    (dict(seed=-1), "seed=-1 must not be negative"),
    (dict(eval_batches=-1), "eval_batches=-1 must not be negative"),
    (dict(num_samples=-1), "num_samples=-1 must not be negative"),
    (dict(batch_size=10, grad_accum_steps=4), "batch_size=10 is not divisible by grad_accum_steps=4"),
    (dict(seq_len=10, loss=dict(num_chunks=4)), "seq_len=10 is not divisible by loss.num_chunks=4"),
    (dict(loss=dict(z_loss=-1.0)), "loss.z_loss=-1.0 must not be negative"),
    (dict(checkpoint=dict(keep=0)), "checkpoint.keep=0 must be at least 1"),
    (dict(checkpoint=dict(keep_every=-1)), "checkpoint.keep_every=-1 must not be negative"),
    (dict(model=dict(norm="none")), 'model.norm="none" is unknown'),
    (dict(modl={}), 'unknown key "modl". Did you mean "model"?'),
    (dict(model=3), "model=3 must be a section of keys"),
    ([], "config=[] must be a section of keys"),
    (dict(num_steps=2**31), "num_steps=2147483648 must be at most 2147483647, the largest step"),
    (dict(model=dict(embed_dim=2**64)), "model.embed_dim must have at most 63 bits; found 65"),
    (dict(optimizer=dict(beta1=10**400)), "optimizer.beta1 must have at most 63 bits; found 1329"),
    (dict(data=dict(path="a\0b")), "data.path='a\\x00b' must be UTF-8 text without NUL"),
    (dict(sample_prompt="\ud800"), "sample_prompt='\\ud800' must be UTF-8 text"),
    (dict(num_steps="9" * 5000), "must be of type int"),
])  # fmt: skip
def test_refused_across_sections(changes, words):
    with pytest.raises(Refused) as refusal:
        parse(changes)
    assert words in str(refusal.value)


def test_batch_must_divide_over_the_mesh():
    config = parse(dict(batch_size=24, grad_accum_steps=4))
    schema.check_batch(config, mesh_of(2, 1, 4))
    with pytest.raises(
        Refused, match=r"6 sequences \(batch_size=24 / grad_accum_steps=4\).* 4 devices.* multiple of 16"
    ):
        schema.check_batch(config, mesh_of(2, 2, 2))


# Attributes of much else: a read of these counts only where the section is known.
AMBIGUOUS = {"path", "name", "model"}


def reads(tree, sections: dict) -> set[tuple[str, str]]:
    """Returns (section, field) for each attribute of a section that a tree reads.

    A section is an annotated name, `self` in the class of that section, or the middle of `x.section.field`.
    """
    known = {"Config", *(section.__name__ for section in sections.values())}
    found = set()

    def visit(node, kinds):
        if isinstance(node, ast.ClassDef) and node.name in known:
            kinds = kinds | {"self": node.name}
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            for each in every:
                name = ast.unparse(each.annotation).split(" |")[0].rpartition(".")[2] if each.annotation else ""
                if name in known:
                    kinds = kinds | {each.arg: name}
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            of = node.value
            if isinstance(of, ast.Name) and (kind := kinds.get(of.id, "")):
                found.add((kind, node.attr))
            elif isinstance(of, ast.Name) and of.id == "config":
                found.add(("Config", node.attr))
            elif isinstance(of, ast.Attribute) and of.attr in sections:
                found.add((sections[of.attr].__name__, node.attr))
            elif isinstance(of, ast.Attribute) and of.attr in ("config", "settings"):
                found.add(("Config", node.attr))
        for child in ast.iter_child_nodes(node):
            visit(child, kinds)

    visit(tree, {})
    return found


def test_every_field_is_read_somewhere():
    """A field that is only defined, set or documented changes nothing for whoever sets it."""
    sections = {field.name: field.type for field in dataclasses.fields(Config) if dataclasses.is_dataclass(field.type)}
    trees = [ast.parse(file.read_text()) for file in ROOT.rglob("*.py")]
    names = {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    read = set().union(*(reads(tree, sections) for tree in trees))
    unread = [
        f"{section.__name__}.{field.name}"
        for section in (Config, *sections.values())
        for field in dataclasses.fields(section)
        if section is not MeshConfig  # read as getattr(config, axis) for each of AXES
        if (section.__name__, field.name) not in read and (field.name in AMBIGUOUS or field.name not in names)
    ]
    assert not unread


def test_an_attribute_of_something_else_is_no_read_of_a_field():
    sections = {"model": ModelConfig, "data": DataConfig}
    text = "def f(config: DataConfig, file):\n    return config.path, file.name, file.model, file.heldout_fraction"
    assert reads(ast.parse(text), sections) == {("DataConfig", "path")}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_file(path):
    """It parses, its model has shapes, and it has the parameters that its name gives."""
    config = load(str(path), {})
    vocab_size = expected_vocab_size(config.tokenizer)
    with jax.set_mesh(mesh_of(1, 1, 1)):
        model = build.abstract_model(config.model, vocab_size, config.seq_len)
    count = sum(leaf.size for leaf in jax.tree.leaves(model))
    assert count == config.model.num_parameters(vocab_size, config.seq_len).total
    if named := re.search(r"_(\d+)([mb])", path.stem):
        count = config.model.num_parameters(50257, config.seq_len).total if path.stem.startswith("gpt2") else count
        millions = int(named[1]) * {"m": 1, "b": 1000}[named[2]]
        assert count / 1e6 == pytest.approx(millions, rel=0.02 if millions < 1000 else 0.25)
    assert path.stem in path.read_text().partition('"""\n\n')[0], "its docstring has its command"


@pytest.mark.parametrize(
    "row", re.findall(r"^ +(\d+) +(\d+) +([\d.,]+)M +([\d.]+)B +(\d+) +([\d,]+) +(\S+)$", DIAL.read_text(), re.M)
)
def test_dial(row):
    """Its table says what it gives, and its model has shapes."""
    depth, width, parameters, tokens, batch, steps, flops = (float(text.replace(",", "")) for text in row)
    config = load(f"{DIAL}:{depth:.0f}", {})
    vocab_size = expected_vocab_size(config.tokenizer)
    with jax.set_mesh(mesh_of(1, 1, 1)):
        model = build.abstract_model(config.model, vocab_size, config.seq_len)
    count = sum(leaf.size for leaf in jax.tree.leaves(model))
    assert (
        count
        == config.model.num_parameters(vocab_size, config.seq_len).total
        == pytest.approx(parameters * 1e6, rel=0.03)
    )
    assert (config.model.num_layers, config.model.embed_dim) == (depth, width)
    assert (config.batch_size, config.num_steps) == (batch, steps)
    seen = config.num_steps * config.batch_size * config.seq_len
    assert seen == pytest.approx(20 * count, rel=0.02) and seen == pytest.approx(tokens * 1e9, rel=0.1)
    assert seen * config.model.flops_per_token(vocab_size, config.seq_len) == pytest.approx(flops, rel=0.03)


def test_dial_with_a_horizon():
    config = load(f"{DIAL}:12:5e9", {"num_samples": "0"})
    assert config.num_samples == 0 and config.model.num_layers == 12
    assert config.num_steps * config.batch_size * config.seq_len == pytest.approx(5e9, rel=1e-3)
    assert config.optimizer.peak_learning_rate == load(f"{DIAL}:2", {}).optimizer.peak_learning_rate


@pytest.mark.parametrize("arguments, words", [
    ("", "dial.py has 0 arguments: write --config={}:DEPTH[:TOKENS]."),
    (":1:2:3", "dial.py:1:2:3 has 3 arguments: write --config={}:DEPTH[:TOKENS]."),
    (":", "configs/dial.py:: DEPTH is the number of layers"),
    (":deep", "configs/dial.py:deep: DEPTH is the number of layers"),
    (":0", "configs/dial.py:0: DEPTH is the number of layers"),
    (":-3", "configs/dial.py:-3: DEPTH is the number of layers"),
    (":12:many", "configs/dial.py:12:many: TOKENS is a number above 0"),
    (":12:-1", "configs/dial.py:12:-1: TOKENS is a number above 0"),
    (":12:0", "configs/dial.py:12:0: TOKENS is a number above 0"),
    (":12:nan", "configs/dial.py:12:nan: TOKENS is a number above 0"),
    (":12:inf", "configs/dial.py:12:inf: TOKENS is a number above 0"),
    (":12:1e300", "must have at most 63 bits; found"),
])  # fmt: skip
def test_bad_arguments(arguments, words):
    with pytest.raises(Refused) as refusal:
        load(f"{DIAL}{arguments}", {})
    assert words.format(DIAL) in str(refusal.value)


def test_arguments_of_a_file_that_takes_none(tmp_path):
    path = write(tmp_path, "")
    with pytest.raises(Refused, match=r"mine.py:12 has 1 arguments: write --config=.*mine.py\.$"):
        load(f"{path}:12", {})


def test_differences_name_what_changes_the_run():
    there = dataclasses.asdict(parse({}))
    changed = parse(dict(seed=1, model=dict(embed_dim=192), data=dict(path="x"), tokenizer=dict(vocab_size=512)))
    assert differences(there, changed) == [
        'data.path ("" there, x here)',
        "model.embed_dim (384 there, 192 here)",
        "model.head_dim (64 there, 32 here)",
        "model.mlp_dim (1536 there, 768 here)",
        "seed (0 there, 1 here)",
        "tokenizer.vocab_size (4096 there, 512 here)",
    ]
    free = dict(
        num_steps=7,
        log_every=3,
        mesh=dict(data=2),
        model=dict(dropout=0.1, remat="full"),
        optimizer=dict(peak_learning_rate=0.1, warmup_steps=2),
        data=dict(store="elsewhere"),
    )
    assert differences(there, parse(free)) == []


def test_differences_of_an_average_and_of_other_versions():
    there = dataclasses.asdict(parse({}))
    averaged = parse(dict(optimizer=dict(ema_decay=0.9)))
    assert differences(there, averaged) == ["optimizer.ema_decay (off there, on here)"]
    assert differences(dataclasses.asdict(averaged), parse(dict(optimizer=dict(ema_decay=0.99)))) == []
    there["model"]["width"] = there["model"].pop("embed_dim")
    assert differences(there, parse({})) == ["model.width (384 there, not set here)"]
    assert differences(there, parse(dict(model=dict(embed_dim=192))))[0] == "model.embed_dim (384 there, 192 here)"
    del there["model"]["width"]
    assert differences(there, parse({})) == []  # as from before there was the key, which takes its default
    assert differences(there, parse(dict(model=dict(mup_base_width=64)))) == ["model.mup_base_width (0 there, 64 here)"]


def test_a_run_keeps_the_versions_of_its_optimizer_and_order():
    there = dataclasses.asdict(parse({}))
    first = parse(dict(optimizer=dict(version=1), packing=dict(version=1)))
    assert as_begun(there, parse({})) == as_begun(there, first) == parse({})
    del there["optimizer"]["version"], there["packing"]["version"]  # a run of before
    assert as_begun(there, parse({})) == first and differences(there, parse({})) == []
    there["optimizer"]["version"] = 3
    with pytest.raises(Refused, match="optimizer.version=3 must be 1 or 2"):
        as_begun(there, parse({}))


def test_a_run_of_an_earlier_version_names_retired_keys(tmp_path):
    there = dataclasses.asdict(parse({}))
    there["model"]["isolate_products"] = True
    assert parse(there) == parse({}) and differences(there, parse({})) == []
    path = write(tmp_path, "config.model.isolate_products = True")
    with pytest.raises(Refused, match='unknown key "isolate_products"'):
        load(path, {})


def test_free_keys_exist():
    keys = flatten(default())
    sections = {key.partition(".")[0] for key in keys if "." in key}
    assert set(FREE_KEYS) <= keys.keys() | sections


def test_json_round_trip():
    config = parse(
        dict(model=dict(num_heads=4, dropout=0.1, qk_norm=True), optimizer=dict(name="muon"), mesh=dict(tensor=2))
    )
    assert parse(json.loads(schema.to_json(config))) == config
