"""Hugging Face models converted in and out, compared with `transformers` on the same weights."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file
from support import hf_models
from support.command import training, tree
from support.hf_models import LENGTH

from gptjax.checkpoints import chunked
from gptjax.errors import Refused
from gptjax.inference.decoder import Decoder, Prompt
from gptjax.inference.generate import Request, Sampling, generate
from gptjax.inference.model import Run
from gptjax.interop.huggingface import config, convert, safetensors
from gptjax.interop.huggingface import tokenizer as hf_tokenizer
from gptjax.interop.huggingface import weights as hf_weights
from gptjax.models.interface import Inputs
from gptjax.models.loss import next_token_logits
from gptjax.parallel import sharding
from gptjax.tokenizers.tokenizer import ByteTokenizer
from gptjax.training import loading
from gptjax.training.config import files, schema

NAMES = list(hf_models.recorded())


def saved(name: str, folder: pathlib.Path, dtype="float32", **more):
    """Saves a model by `transformers`, with weights that all make a difference."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(hf_models.models()[name], attn_implementation="eager").eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder, **more)
    return model


def tensors(folder: pathlib.Path) -> dict:
    """Reads all safetensors of a folder."""
    from safetensors.torch import load_file as load  # NumPy has no bfloat16

    return {name: value for path in folder.glob("*.safetensors") for name, value in load(path).items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def logits(model, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(ids)).logits.float().numpy()


def our_logits(run: Run, ids: np.ndarray) -> np.ndarray:
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)

    @jax.jit
    def scores(model, *arrays):
        rows = (jax.sharding.reshard(array, sharding.spec("act_batch", "act_seq")) for array in arrays)
        return next_token_logits(model.hidden(Inputs(*rows), None).x_BTD[:, -1], model.output())

    with jax.set_mesh(run.mesh):
        return np.asarray(scores(run.model, ids, positions, np.zeros_like(ids)))[:, : run.tokenizer.vocab_size]


@pytest.mark.parametrize("name", NAMES)
def test_the_logits_are_those_that_were_recorded_from_transformers(name, tmp_path):
    """Without PyTorch; tests/support/hf_models.py recorded them, and `test_parity` is the live comparison."""
    hf_models.write(name, tmp_path / "theirs")
    convert.from_hf(str(tmp_path / "theirs"), str(tmp_path / "ours"))
    run, model = loading.load(epath.Path(tmp_path / "ours"), -1), hf_models.recorded()[name]
    assert run.tokenizer.vocab_size == model["config"]["vocab_size"]
    found = our_logits(run, hf_models.ids(run.tokenizer.vocab_size))[:2]
    assert found.shape == np.shape(model["logits"]) and np.std(model["logits"]) > 0.1
    assert np.abs(found - np.array(model["logits"])).max() <= 1e-4


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
def test_parity(name, tmp_path):
    """Logits and 64 greedy tokens are equal; converting in, out and in again gives the same bytes."""
    import torch
    from transformers import AutoModelForCausalLM

    theirs = saved(name, tmp_path / "theirs")
    convert.from_hf(str(tmp_path / "theirs"), str(tmp_path / "ours"))
    run = loading.load(epath.Path(tmp_path / "ours"), -1)
    assert (run.step, run.tokenizer.vocab_size) == (0, theirs.config.vocab_size)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, theirs.config.vocab_size, (8, LENGTH), np.int32)
    assert np.abs(our_logits(run, ids) - logits(theirs, ids)[:, -1]).max() <= 1e-4
    prompt = rng.integers(0, 256, 31).tolist()
    with jax.set_mesh(run.mesh):
        made = generate(
            run.model, [prompt], run.tokenizer, Request(LENGTH, max_tokens=64, sampling=Sampling(temperature=0), seed=0)
        )[0]
    start = torch.tensor([[run.tokenizer.end_of_text, *prompt]])
    expected = theirs.generate(start, max_new_tokens=64, do_sample=False, pad_token_id=0)[0, 32:].tolist()
    assert len(made) == 64 and made == expected

    convert.to_hf(epath.Path(tmp_path / "ours"), str(tmp_path / "back"), -1, shard_bytes=100_000)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    assert same(tensors(tmp_path / "back"), tensors(tmp_path / "theirs"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(loaded) is type(theirs) and loaded.dtype == torch.float32
    assert np.array_equal(logits(loaded, ids), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "theirs"), ids))
    convert.from_hf(str(tmp_path / "back"), str(tmp_path / "again"))
    states = [tree(tmp_path / each / "checkpoints" / "step_00000000" / "state") for each in ("ours", "again")]
    assert [*states[0].values()] == [*states[1].values()]


@pytest.mark.parity
@pytest.mark.parametrize("dtype, ours", [("bfloat16", "bfloat16"), ("float16", "float32")])
def test_half_precision_is_kept_exactly(dtype, ours, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    saved("llama, 4 heads a group", tmp_path / "theirs", dtype)
    convert.from_hf(str(tmp_path / "theirs"), str(tmp_path / "ours"))
    run = loading.load(epath.Path(tmp_path / "ours"), -1)
    assert run.config.model.param_dtype == run.config.model.dtype == ours
    convert.to_hf(epath.Path(tmp_path / "ours"), str(tmp_path / "back"), -1)
    there, back = tensors(tmp_path / "theirs"), tensors(tmp_path / "back")
    assert same({name: value.float() for name, value in there.items()}, {n: v.float() for n, v in back.items()})
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back").dtype == getattr(torch, ours)


def test_older_files_are_read(tmp_path):
    """Reads RoPE in the form of `transformers` 4, GPT-2 with masks and without a prefix, and a stored tied head."""
    hf_models.write("llama 3, tied, scaled", tmp_path / "llama")
    path = tmp_path / "llama" / "config.json"
    described = json.loads(path.read_text())
    rope = described.pop("rope_parameters")
    rope["type"] = rope.pop("rope_type")
    path.write_text(json.dumps(described | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}))
    file = tmp_path / "llama" / "model.safetensors"
    loaded = load_file(file)
    save_file(loaded | {"lm_head.weight": loaded["model.embed_tokens.weight"].copy()}, file)
    convert.from_hf(str(tmp_path / "llama"), str(tmp_path / "ours"))
    model = loading.load(epath.Path(tmp_path / "ours"), -1).config.model
    assert (model.rope_scaling, model.rope_factor, model.rope_theta, model.rope_original_len) == ("llama3", 4, 1000, 32)

    hf_models.write("gpt2, tied", tmp_path / "gpt2")
    file = tmp_path / "gpt2" / "model.safetensors"
    bare = {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
    save_file(bare | {"h.0.attn.bias": np.ones((1, 1, 4, 4), bool)}, file)
    convert.from_hf(str(tmp_path / "gpt2"), str(tmp_path / "our_gpt2"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs") / "llama"
    hf_models.write("llama, 4 heads a group", folder)
    return folder


def changed(folder, **keys):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def with_tensors(folder, change):
    loaded = load_file(folder / "model.safetensors")
    change(loaded)
    save_file(loaded, folder / "model.safetensors")


def as_a_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def with_a_larger_tokenizer(folder):
    known = ByteTokenizer("", [f"<{i}>" for i in range(400 - 257)])
    (folder / "tokenizer.json").write_text(json.dumps(hf_tokenizer._bytes(known)))


NORM = "model.layers.1.post_attention_layernorm.weight"
REFUSALS = {
    "a pickle": (as_a_pickle, "pytorch_model.bin, and only safetensors are read"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "a missing tensor": (lambda folder: with_tensors(folder, lambda t: t.pop(NORM)), f"has no tensor {NORM}"),
    "an extra tensor": (
        lambda folder: with_tensors(folder, lambda t: t.update({"score.weight": np.ones(3, np.float32)})),
        "1 tensors that config.json does not ask for, such as score.weight",
    ),
    "a wrong shape": (
        lambda folder: with_tensors(folder, lambda t: t.update({NORM: np.ones(65, np.float32)})),
        f"{NORM} must have the shape (64,) by config.json; found (65,)",
    ),
    "a wrong dtype": (
        lambda folder: with_tensors(folder, lambda t: t.update({NORM: np.ones(64)})),
        f"{NORM} must be F32, F16, BF16; found F64",
    ),
    "a short file": (cut_short, "model.safetensors is damaged"),
    "another architecture": (
        lambda folder: changed(folder, model_type="gemma"),
        "model_type must be one of gpt2, llama, mistral, qwen3; found 'gemma'",
    ),
    "another class": (
        lambda folder: changed(folder, architectures=["LlamaForSequenceClassification"]),
        "architectures must be ['LlamaForCausalLM'] for llama; found ['LlamaForSequ",
    ),
    "biases": (lambda folder: changed(folder, attention_bias=True), "attention_bias=True must be False"),
    "quantization": (
        lambda folder: changed(folder, quantization_config={"bits": 4}),
        "quantization_config={'bits': 4}",
    ),
    "other rope": (
        lambda folder: changed(folder, rope_parameters={"rope_type": "yarn", "factor": 2.0}),
        "the type of RoPE must be default, linear or llama3; found 'yarn'",
    ),
    "a size of text": (lambda folder: changed(folder, hidden_size="64"), "hidden_size must be of type int; found '64'"),
    "a number of layers": (
        lambda folder: changed(folder, num_hidden_layers=10**9),
        "parameters, and the tensors in the same folder hold",
    ),
    "sizes that overflow": (
        lambda folder: changed(
            folder, num_attention_heads=(1 << 31) - 1, head_dim=(1 << 31) - 2, num_key_value_heads=1
        ),
        "parameters, and the tensors in the same folder hold",
    ),
    "a number of heads that does not divide": (
        lambda folder: changed(folder, num_key_value_heads=3),
        "model.num_kv_heads=3",
    ),
    "a larger tokenizer": (
        with_a_larger_tokenizer,
        "the tokenizer must have at most 300 ids, the rows of the embedding; found 400",
    ),
    "another tokenizer": (
        lambda folder: (folder / "vocab.json").write_text("{}"),
        "only vocab.json, which is not read",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_has_no_equal_is_refused_and_nothing_is_written(what, llama, tmp_path, refused):
    spoil, sentence = REFUSALS[what]
    folder = shutil.copytree(llama, tmp_path / "theirs")
    spoil(folder)
    assert sentence in refused(tmp_path, "convert", "from-hf", f"--source={folder}", f"--workdir={tmp_path / 'ours'}")


def at_bytes(begin, end, **changes) -> dict:
    return {"dtype": "F32", "shape": [2], "data_offsets": [begin, end]} | changes


HEADERS = {
    "no object": "[]",
    "no JSON": "{",
    "nested deep": "[" * 5000,
    "no entry": json.dumps({"a": 3}),
    "no offsets": json.dumps({"a": {"dtype": "F32", "shape": [2]}}),
    "too few bytes": json.dumps({"a": at_bytes(0, 4)}),
    "negative": json.dumps({"a": at_bytes(-8, 0)}),
    "beyond the end": json.dumps({"a": at_bytes(16, 24)}),
    "a number of bytes that overflows": json.dumps({"a": at_bytes(0, 1 << 70)}),
    "a size that overflows": json.dumps({"a": at_bytes(0, 8, shape=[1 << 62, 1 << 62])}),
    "a size of another kind": json.dumps({"a": at_bytes(0, 8, shape=[2.0])}),
    "a dtype of another kind": json.dumps({"a": at_bytes(0, 8, dtype=["F32"])}),
    "shared bytes": json.dumps({"a": at_bytes(0, 8), "b": at_bytes(4, 12)}),
}


@pytest.mark.parametrize("what", [*HEADERS, "a long header", "a short file"])
def test_a_header_that_does_not_fit_is_refused(what, tmp_path):
    text = HEADERS.get(what, "{}").encode()
    length = 1 << 60 if what == "a long header" else len(text)
    content = length.to_bytes(8, "little") + text + bytes(16)
    (tmp_path / "model.safetensors").write_bytes(content[:5] if what == "a short file" else content)
    with pytest.raises(Refused, match="is damaged"):
        safetensors.found(tmp_path)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "missing.safetensors", "config.json", 3])
def test_an_index_that_leads_elsewhere_is_refused(file, llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "theirs")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": file}}))
    with pytest.raises(Refused):
        safetensors.found(folder)


def test_a_disk_that_fails_leaves_nothing(llama, tmp_path, monkeypatch, gptjax_main):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(chunked, "write", full)
    code, _, error = gptjax_main("convert", "from-hf", f"--source={llama}", f"--workdir={tmp_path / 'ours'}")
    assert code == 1 and "No space left on device" in error and not list(tmp_path.iterdir())


def test_a_path_that_tensorstore_can_not_use_is_a_sentence(llama, converted, tmp_path, monkeypatch, gptjax_main):
    folder, original = shutil.copytree(converted, tmp_path / "spoiled"), convert.tokenizer_files

    def spoiled(*arguments):
        """Empties the files of an array, like a disk that fails after the checkpoint was verified."""
        for path in (folder / "checkpoints" / "step_00000000" / "state").glob("model.embedding/*"):
            path.write_bytes(b"") if path.name[0] != "." else None
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(convert, "tokenizer_files", spoiled)
        code, _, error = gptjax_main("convert", "to-hf", f"--workdir={folder}", f"--target={tmp_path / 'theirs'}")
    assert code == 1 and "Traceback" not in error and "theirs can't be written (" in error, error
    monkeypatch.setattr(chunked, "kvstore", lambda folder: {"driver": "file", "path": "/proc/none/"})
    code, _, error = gptjax_main("convert", "from-hf", f"--source={llama}", f"--workdir={tmp_path / 'ours'}")
    assert code == 1 and "ours can't be written (" in error
    assert [path.name for path in tmp_path.iterdir()] == ["spoiled"]


@pytest.fixture(scope="module")
def converted(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours") / "llama"
    convert.from_hf(str(llama), str(folder))
    return folder


@pytest.mark.slow
def test_a_converted_model_is_a_workdir(converted, corpus, gptjax_main, refused):
    code, out, _ = gptjax_main("checkpoint", "verify", f"--workdir={converted}")
    assert code == 0, out
    code, out, _ = gptjax_main("generate", f"--workdir={converted}", "--prompt=ab", "--max_tokens=3")
    assert code == 0 and out.startswith("ab")
    sentence = refused(converted / "checkpoints", *training(corpus, converted))
    assert "holds a converted model, which has weights alone" in sentence
    sentence = refused(converted, "convert", "from-hf", f"--source={converted}", f"--workdir={converted}")
    assert "model_type" in sentence


@pytest.mark.parity
def test_a_trained_model_goes_out(finished, tmp_path, gptjax_main):
    """`transformers` reads the converted model and tokenizer of a run without any flag."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    code, out, _ = gptjax_main("convert", "to-hf", f"--workdir={finished}", f"--target={tmp_path / 'theirs'}")
    assert code == 0 and "gpt2 of" in out and "step 4" in out
    theirs, run = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs"), loading.load(epath.Path(finished), -1)
    ids = np.random.default_rng(0).integers(0, 257, (8, 32), np.int32)
    assert np.abs(our_logits(run, ids) - logits(theirs, ids)[:, -1]).max() <= 1e-4
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    text = "def naïve(Größe): # 東京 😀\n\t  return"
    assert tokenizer(text)["input_ids"] == run.tokenizer.encode(text).tolist()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == run.tokenizer.end_of_text == theirs.generation_config.eos_token_id


@pytest.mark.parity
def test_what_lora_has_added_goes_out_with_the_weights(finished, corpus, tmp_path, gptjax_main):
    from transformers import AutoModelForCausalLM

    flags = [f"--config.init_from={finished}", "--config.lora.rank=3", "--config.optimizer.peak_learning_rate=0.03"]
    code, _, error = gptjax_main(*training(corpus, tmp_path / "run", *flags))
    assert code == 0, error
    convert.to_hf(epath.Path(tmp_path / "run"), str(tmp_path / "theirs"), -1)
    ids = np.random.default_rng(0).integers(0, 257, (8, 32), np.int32)
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "theirs"), ids)[:, -1]
    whole, base = (our_logits(loading.load(epath.Path(path), -1), ids) for path in (tmp_path / "run", finished))
    assert np.abs(found - whole).max() <= 1e-4 and np.abs(found - base).max() > 1e-2


@pytest.mark.parametrize(
    "model, key",
    [
        ({"activation": "relu2"}, "model.activation=relu2"),
        ({"logits_softcap": 15.0}, "model.logits_softcap=15.0"),
        ({"norm": "rmsnorm"}, "model.positions=learned"),
        ({"biases": False}, "model.biases=False"),
        ({"positions": "rope"}, "model.positions=rope"),
    ],
)
def test_a_model_that_nobody_else_has_is_refused(model, key):
    with pytest.raises(Refused, match=key):
        config.family_of(schema.parse({"model": model}).model)


def test_the_readme_says_what_can_go_out():
    """Quickstart and dial convert with swiglu alone; the other configs convert as they are."""
    for path in sorted((pathlib.Path(convert.__file__).parents[3] / "configs").glob("*.py")):
        own, config_path = path.stem in ("quickstart", "dial"), f"{path}:4" if path.stem == "dial" else str(path)
        if own:
            with pytest.raises(Refused, match="model.activation=relu2 must be swiglu"):
                config.family_of(files.load(config_path, {}).model)
        changes = {"model.activation": "swiglu"} if own else {}
        assert config.family_of(files.load(config_path, changes).model)


@pytest.mark.slow
def test_the_ends_that_a_model_names(llama, tmp_path):
    """An instruct model has several ends: generation stops at each; ends and chat template convert back."""

    def ask(run: Run) -> list[int]:
        greedy = Sampling(temperature=0)
        return generate(run.model, [[97]], run.tokenizer, Request(LENGTH, max_tokens=40, sampling=greedy, seed=0))[0]

    convert.from_hf(str(llama), str(tmp_path / "free"))
    run = loading.load(epath.Path(tmp_path / "free"), -1)
    with jax.set_mesh(run.mesh):
        made = ask(run)
    end = made[6]
    folder = shutil.copytree(llama, tmp_path / "theirs")
    changed(folder, eos_token_id=3)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [299, end]}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    convert.from_hf(str(folder), str(tmp_path / "ours"))
    run = loading.load(epath.Path(tmp_path / "ours"), -1)
    assert run.tokenizer.ends == (256, 299, end)
    with jax.set_mesh(run.mesh):
        assert ask(run) == made[: made.index(end)]
        decoder = Decoder(run.model.for_decoding(), run.tokenizer, 1, LENGTH)
        decoder.begin({0: Prompt([256, 97], 40, Sampling(temperature=0), 0, 0)})
        assert len(decoder.step([0], 32)[0]) == made.index(end)  # `begin` gave the first token
    convert.to_hf(epath.Path(tmp_path / "ours"), str(tmp_path / "back"), -1)
    written = [
        json.loads((tmp_path / "back" / f"{kind}_config.json").read_text()) for kind in ("generation", "tokenizer")
    ]
    assert written[0]["eos_token_id"] == [299, end, 256] and written[1]["chat_template"] == "{{ messages }}"
    (folder / "generation_config.json").write_text("{}")
    assert config.read_config(folder).ends == [3]
    changed(folder, eos_token_id=300)
    with pytest.raises(Refused, match=r"eos_token_id=\[300\] must be below the vocabulary of 300 ids"):
        config.read_config(folder)


def test_a_target_that_is_empty_is_filled(converted, disk, tmp_path):
    """A mount, as a container's volume is, can't be renamed over."""
    convert.to_hf(epath.Path(converted), str(tmp_path / "new"), -1)
    (tmp_path / "made").mkdir()
    for target in (tmp_path / "made", disk):
        convert.to_hf(epath.Path(converted), str(target), -1)
        assert {p.name: p.read_bytes() for p in target.iterdir()} == {
            p.name: p.read_bytes() for p in (tmp_path / "new").iterdir()
        }
        with pytest.raises(Refused, match="must be a new or empty folder"):
            convert.to_hf(epath.Path(converted), str(target), -1)


def test_a_target_that_exists_is_refused(converted, llama, refused):
    argv = "convert", "to-hf", f"--workdir={converted}", f"--target={llama}"
    assert f"--target={llama} must be a new or empty folder" in refused(llama, *argv)


MEASURED = """
import resource, sys
sys.path.insert(0, {root!r})
from etils import epath
from gptjax.checkpoints import chunked
from gptjax.interop.huggingface import convert
chunked.PIECE_BYTES = 4 << 20
convert.jax.config.update("jax_platforms", "cpu")
convert.from_hf({small!r}, {small!r} + ".ours")
convert.to_hf(epath.Path({small!r} + ".ours"), {small!r} + ".back", -1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
convert.from_hf({large!r}, {large!r} + ".ours")
taken = peak() - before
convert.to_hf(epath.Path({large!r} + ".ours"), {large!r} + ".back", -1)
print(taken >> 10, peak() - before >> 10)
"""


@pytest.mark.slow
def test_memory_is_that_of_pieces(llama, tmp_path):
    """Converting a model of 200 MB, with tensors of 64 MB, takes the memory of a few pieces of 4 MB."""
    large = tmp_path / "large"
    shutil.copytree(llama, large)
    changed(
        large,
        hidden_size=2048,
        num_attention_heads=16,
        num_key_value_heads=2,
        intermediate_size=8192,
        num_hidden_layers=1,
    )
    described = config.read_config(large)
    shapes = convert._shapes(schema.parse({"model": described.model}), described.vocab_size)
    parts = hf_weights.parts(False, shapes, described.vocab_size)
    wanted = {each.tensor: ("F32", each.tensor_shape) for name in parts for each in parts[name]}
    (large / "model.safetensors").unlink()
    safetensors.create(large, wanted, 1 << 40)
    assert (large / "model.safetensors").stat().st_size > 190 << 20
    code = MEASURED.format(root=str(pathlib.Path(convert.__file__).parents[3]), small=str(llama), large=str(large))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    taken, given = map(int, done.stdout.split()[-2:])
    assert taken < 40 and given < 40, (taken, given)
