"""Runs that begin with the model of another one."""

import contextlib
import dataclasses
import io
import json
import re
import shutil

import jax
import numpy as np
import pytest
from etils import epath
from support.command import losses, training
from support.runs import mesh_of

from gptjax.checkpoints.manager import Checkpoints
from gptjax.data.stream.stream import Stream
from gptjax.errors import Refused
from gptjax.evaluation.heldout import eval_step
from gptjax.parallel.trees import named_leaves
from gptjax.tokenizers import tokenizer
from gptjax.training import init_from, loading, loop, step
from gptjax.training.config import files as config_file
from gptjax.training.config import resume
from gptjax.training.corpus import open_corpus, record_of

STEPS = 6
# The data, the seed, the schedule and what trains a model otherwise, but not another one, may be new.
NEW = f"--config.num_steps={STEPS}", "--config.seed=5", "--config.model.remat=full", "--config.eval_every=6"


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """A glob of files of another text."""
    folder = tmp_path_factory.mktemp("others")
    for part in range(10):
        (folder / f"{part}.txt").write_text("".join(f"{a} times {part} makes {a * part};\n" for a in range(80)))
    return folder / "*.txt"


@pytest.fixture(scope="module")
def base(finished, tmp_path_factory):
    """A workdir to begin from, which can be moved."""
    return shutil.copytree(finished, tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def transferred(base, others, tmp_path_factory):
    """(workdir, what was printed) of a run that began with the weights of `base`."""
    folder = tmp_path_factory.mktemp("runs") / "transferred"
    return folder, run(others, folder, f"--config.init_from={base}")


def loaded(corpus, *more):
    _, path, _, *rest = training(corpus, "", *NEW, *more)
    pairs = (word.removeprefix("--config.").partition("=") for word in rest)
    return config_file.load(path.removeprefix("--config="), {key: value for key, _, value in pairs})


def run(corpus, folder, *more):
    """What a run prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        loop.train(loaded(corpus, *more), epath.Path(folder))
    return printed.getvalue()


def test_the_first_loss_is_that_of_the_old_model_on_the_new_data(transferred, base, others):
    folder, printed = transferred
    assert f"beginning with the weights of step 4 of {base}\n" in printed
    old, config = loading.load(epath.Path(base), -1), loaded(others)
    corpus = open_corpus(config, epath.Path(folder))
    with jax.set_mesh(old.mesh):
        data = Stream(corpus, config.phases, config.seq_len, config.seed)
        batch = next(loop.train_batches(config, data, old.mesh, 0))
        token_bytes = jax.device_put(corpus.tokenizer.token_bytes, jax.NamedSharding(old.mesh, jax.P()))
        nll, _, tokens, _ = eval_step(old.model, batch, token_bytes, vocab_size=257, loss=config.loss)
    assert list(losses(folder)) == list(range(1, STEPS + 1))
    assert losses(folder)[1] == pytest.approx(float(nll / tokens), rel=1e-5)
    assert losses(folder)[STEPS] < losses(folder)[1] < np.log(257) - 0.3


def test_it_goes_on_bit_for_bit_without_what_it_began_from(transferred, base, others, tmp_path):
    folder = shutil.copytree(transferred[0], tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / f"step_{STEPS:08}")
    gone = base.rename(base.with_name("gone"))
    try:
        printed = run(others, folder, f"--config.init_from={base}")
    finally:
        gone.rename(base)
    assert "going on from the checkpoint of step 4" in printed and "beginning" not in printed
    assert losses(folder) == losses(transferred[0])


def test_killed_before_its_first_checkpoint_it_begins_again(transferred, base, others, tmp_path):
    left = shutil.ignore_patterns("checkpoints", "metrics.jsonl")
    folder = shutil.copytree(transferred[0], tmp_path / "run", ignore=left)
    assert "beginning with the weights of step 4" in run(others, folder, f"--config.init_from={base}")
    assert losses(folder) == losses(transferred[0])


@pytest.mark.slow
def test_on_another_mesh_it_is_the_same_run(transferred, base, others, tmp_path):
    mesh = "--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"
    run(others, tmp_path / "run", f"--config.init_from={base}", *mesh)
    assert losses(tmp_path / "run") == pytest.approx(losses(transferred[0]), rel=1e-5)


@pytest.mark.parametrize("more, words", [
    (["--config.model.embed_dim=32", "--config.model.activation=gelu_exact"],
     "has another model, model.activation (gelu there, gelu_exact here), model.embed_dim (64 there, 32 here), "
     "model.head_dim (16 there, 8 here), model.mlp_dim (256 there, 128 here): use its values"),
    (["--config.seq_len=64"], "seq_len=64 is more than the 32 positions that the model of init_from="),
    (["--config.init_step=3"], "has no checkpoint of step 3: it has 2, 4."),
    (["--config.init_step=-2"], "init_step=-2 must be a checkpoint of a workdir in init_from, or -1 for the newest"),
    (["--config.tokenizer.kind=sentencepiece"], "is of kind byte, and tokenizer.kind is sentencepiece: set it to byte"),
    ([f"--config.tokenizer.special_tokens={','.join(f'<{n}>' for n in range(128))}"],
     "makes 385 ids, and the embedding of init_from="),
    (["--config.tokenizer.path=some/tokenizer"], "but tokenizer.kind=byte takes no path"),
    (["--config.lora.rank=-1"], "lora.rank=-1 must not be negative"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_written(base, others, refused, tmp_path, more, words):
    command = training(others, tmp_path / "run", f"--config.init_from={base}", *more)
    assert words in refused(tmp_path, *command)


def test_what_is_no_model_to_begin_with(base, others, refused, tmp_path):
    missing = training(others, tmp_path / "run", f"--config.init_from={base}s")
    assert f'{base}s is not the workdir of a run. Did you mean "{base.name}"?' in refused(tmp_path, *missing)
    empty = shutil.copytree(base, tmp_path / "empty", ignore=shutil.ignore_patterns("step_*"))
    assert "holds no checkpoint" in refused(
        tmp_path / "run", *training(others, tmp_path / "run", f"--config.init_from={empty}")
    )
    assert (
        'init_step=4 must be a checkpoint of a workdir in init_from, or -1 for the newest; found init_from=""'
        in refused(tmp_path, *training(others, tmp_path / "run", "--config.init_step=4"))
    )
    alone = training(others, tmp_path / "run", "--config.lora.rank=2")
    assert "lora.rank=2 adds adapters to an existing model, and init_from is empty" in refused(tmp_path, *alone)


def test_another_tokenizer_is_refused(base, others):
    """One with fewer special tokens, or others; ones that are added are no other."""
    checkpoints = Checkpoints(epath.Path(base) / "checkpoints")
    saved = dataclasses.replace(checkpoints.record(4), **with_tokenizer('{"kind": "byte", "special_tokens": ["<b>"]}'))
    for names, fits in (("<b>", True), ("<b>,<a>", True), ("<a>,<b>", False), ("", False)):
        config = loaded(others, f"--config.init_from={base}", f"--config.tokenizer.special_tokens={names}")
        words = "was trained with tokenizer .*, and the section tokenizer has .*: use .*/tokenizer"
        with contextlib.nullcontext() if fits else pytest.raises(Refused, match=words):
            init_from._check_tokenizer(config, saved, 4)


def with_tokenizer(described):
    files = {"tokenizer.json": described.encode()}
    return {"tokenizer": files, "tokenizer_hash": tokenizer.hash_of(files)}


def test_a_shorter_sequence_takes_the_first_of_learned_positions(base, others, tmp_path):
    config = loaded(others, f"--config.init_from={base}", "--config.seq_len=16")
    mesh, old = mesh_of(2, 2, 2), loading.load(epath.Path(base), -1).model
    with jax.set_mesh(mesh):
        state = init_from.begin(config, 257, mesh)
    assert int(state.step) == 0 and state.model.positions.shape == (16, 64)
    np.testing.assert_array_equal(state.model.positions[...], old.positions[...][:16])
    np.testing.assert_array_equal(state.model.blocks.query[...], old.blocks.query[...])
    assert state.model.blocks.query[...].addressable_shards[0].data.size == old.blocks.query.size // 4


def test_an_average_of_weights_is_what_is_begun_with(base, others, tmp_path):
    folder = epath.Path(shutil.copytree(base, tmp_path / "run"))
    config = loaded(others, "--config.optimizer.ema_decay=0.9")
    corpus, mesh = open_corpus(config, folder), mesh_of(1, 1, 1)
    with jax.set_mesh(mesh), Checkpoints(folder / "checkpoints") as checkpoints:
        state = jax.jit(lambda: step.init_state(config, 257))()
        state.ema.norm.gain[...] += 1
        checkpoints.save(7, state, record_of(config, corpus))
        checkpoints.wait()
        found = init_from.begin(loaded(others, f"--config.init_from={folder}"), 257, mesh)
    assert (found.model.norm.gain[...] == 2).all()


def test_the_config_of_a_run_is_a_config_file(base, others, refused, tmp_path):
    path = base / "config.json"
    config = config_file.load(str(path), {"num_steps": "9", "init_from": str(base)})
    there = json.loads(path.read_text())
    assert (config.num_steps, config.seq_len, config.model.embed_dim) == (9, 32, 64)
    assert resume.differences(there, config) == [f'init_from ("" there, {base} here)']
    other = tmp_path / "config.json"
    other.write_text(json.dumps(there | {"sed": 1}))
    command = "train", f"--config={other}", f"--workdir={tmp_path / 'run'}"
    assert f'{other}: unknown key "sed". Did you mean "seed"?' in refused(tmp_path, *command)
    other.write_text("{")
    assert "config.json is damaged" in refused(tmp_path, *command)


@pytest.mark.slow
def test_fine_tuning_on_pairs_from_the_command_line(base, tmp_path, gptjax_main):
    """With adapters: of the whole model that is made of the run nothing but the blocks' matrices is another."""
    lines = [json.dumps({"prompt": f"{a} plus {b} is ", "response": f"{a + b}."}) for a in range(30) for b in range(9)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    more = ["data.source=jsonl", "data.prompt_field=prompt", "data.text_field=response", "data.heldout_fraction=0.1"]
    more += ["packing.method=best_fit", "optimizer.peak_learning_rate=0.02", f"init_from={base}", "lora.rank=4"]
    command = training(tmp_path / "pairs.jsonl", tmp_path / "run", *(f"--config.{each}" for each in more))
    code, out, error = gptjax_main(*command)
    assert (code, error) == (0, "") and "beginning with the weights of step 4" in out
    found = losses(tmp_path / "run")
    assert found[4] < found[1]
    models = [loading.load(epath.Path(folder), -1).model for folder in (base, tmp_path / "run")]
    old, new = map(named_leaves, models)
    changed = {name for name in old if not np.array_equal(old[name], new[name])}
    assert changed == {f"blocks.{name}" for name in ("query", "key", "value", "output", "up", "down")}
    code, out, _ = gptjax_main("eval", f"--workdir={tmp_path / 'run'}")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [json.loads(out)["loss"]] == pytest.approx([row["eval_loss"] for row in rows if "eval_loss" in row])
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    code, out, _ = gptjax_main(*command)
    assert "going on from the checkpoint of step 2" in out and losses(tmp_path / "run") == found
    code, out, _ = gptjax_main("data", "show", *command[1:], "--step=1", "--row=0")
    assert code == 0 and re.search(r"⏵⟦\d+ plus \d is ⟧\d+\.\n", out)
