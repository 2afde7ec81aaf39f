import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from support.command import DEBUG, environment, losses, training

import gptjax
from gptjax.cli import distributed, main
from gptjax.cli.commands import evaluate
from gptjax.errors import Failed

# Help and exit codes


def test_help_lists_the_verbs_and_the_exit_codes(gptjax_main):
    code, out, _ = gptjax_main("--help")
    assert code == 0 and "Exit codes" in out
    for verb in ("train", "eval", "generate", "serve"):
        assert f"\n    {verb} " in out


@pytest.mark.parametrize("verb, flags", [
    ("status", ["--workdir", "--json"]),
    ("train", ["--config", "--workdir", "--profile_steps", "--coordinator", "--num_processes", "--process_id"]),
    ("eval", ["--workdir", "--step"]),
    ("generate", ["--workdir", "--step", "--prompt", "--max_tokens", "--temperature", "--top_k", "--top_p", "--min_p",
                  "--repetition_penalty", "--stop", "--prompts_file", "--seed", "--num_samples", "--weights"]),
    ("serve", ["--workdir", "--step", "--host", "--port", "--rows", "--weights"]),
])  # fmt: skip
def test_help_of_a_verb(gptjax_main, verb, flags):
    code, out, _ = gptjax_main(verb, "--help")
    assert code == 0 and all(flag + " " in out for flag in flags)


@pytest.mark.parametrize("steps", ["3", "2:2", "3:1", "-1:2", "a:b", "1:5", ":3"])
def test_a_range_to_profile_that_is_none(refused, corpus, tmp_path, steps):
    error = refused(tmp_path, *training(corpus, tmp_path / "run", f"--profile_steps={steps}"))
    assert f"--profile_steps={steps} must be A:B with A < B ≤ num_steps=4, for example" in error


def test_a_refusal_is_one_line_that_can_be_printed(refused, tmp_path):
    error = refused(tmp_path, "eval", "--workdir=x", "--a\n\x1b[2J" + "9" * 5000)
    assert "--a\\n\\x1b[2J999" in error and " … " in error and len(error) < 2100


@pytest.mark.parametrize("verb", ["train", "eval", "generate"])
def test_some_of_the_flags_of_several_processes(refused, tmp_path, verb):
    config = [f"--config={DEBUG}"] * (verb == "train")
    error = refused(tmp_path, verb, *config, f"--workdir={tmp_path / 'run'}", "--coordinator=localhost:8476")
    assert "--coordinator=localhost:8476 without --num_processes and --process_id: give --coordinator=" in error


def test_compiled_programs_stay_in_the_workdir_or_where_jax_was_told(tmp_path):
    cache_folder = jax.config.jax_compilation_cache_dir
    args = main.parse(["eval", f"--workdir={tmp_path}"])
    distributed.join(args, {})
    assert cache_folder and jax.config.jax_compilation_cache_dir == cache_folder
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        distributed.join(args, {})
        assert jax.config.jax_compilation_cache_dir == f"{tmp_path}/compiled"
    finally:
        jax.config.update("jax_compilation_cache_dir", cache_folder)


def test_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "gptjax", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"gptjax {gptjax.__version__}\n", "")


def test_help_does_not_wait_for_jax():
    code = (
        "import sys; sys.argv = ['gptjax', 'train', '--help']\nfrom gptjax.cli import main\n"
        "try: main.main()\nexcept SystemExit: pass\nassert not {'jax', 'numpy', 'ml_collections'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_failure_during_the_run_is_code_1(tmp_path):
    code = (
        "import sys\nfrom gptjax.cli import main\nfrom gptjax.cli.commands import evaluate\n"
        "def fail(args): raise OSError('disk')\n"
        "evaluate.evaluate = fail\nsys.argv = ['gptjax', 'eval', '--workdir=x']\nmain.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "OSError: disk" in done.stderr


def test_a_run_that_can_not_go_on_is_code_1_and_one_sentence(monkeypatch, capsys):
    def stop(args):
        raise Failed("The run stops, because of this: do that.")

    monkeypatch.setattr(evaluate, "evaluate", stop)
    monkeypatch.setattr(sys, "argv", ["gptjax", "eval", "--workdir=x"])
    with pytest.raises(SystemExit) as end:
        main.main()
    assert (end.value.code, capsys.readouterr().err) == (1, "gptjax: The run stops, because of this: do that.\n")


@pytest.mark.parametrize("argv, words", [
    ([], "the following arguments are required: VERB: see gptjax --help."),
    (["trian"], "invalid choice: 'trian'"),
    (["train", "--workdir=x"], "the following arguments are required: --config: see gptjax train --help."),
    (["eval", "--workdir=x", "--step=last"], "argument --step: invalid step value: 'last'"),
    (["eval", "--workdri=x", "--workdir=x"],
     '--workdri is not a flag of gptjax eval: see gptjax eval --help. Did you mean "--workdir"?'),
    (["eval", "--workdir=x", "--config.num_steps=3"], "--config.num_steps is not a flag of gptjax eval"),
    (["generate", "--workdir=x", "--max_token=3"], 'Did you mean "--max_tokens"?'),
    (["generate", "--workdir=x", "--num_samples=0"], "--num_samples=0 must be at least 1."),
    (["train", f"--config={DEBUG}", "--workdir=x", "--config.num_steps"],
     "--config.num_steps has no value: write --config.num_steps=VALUE."),
    (["train", "--config=configs/debgu.py", "--workdir=x"], "--config=configs/debgu.py does not exist."),
])  # fmt: skip
def test_bad_flags(refused, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    assert words in refused(tmp_path, *argv)


def test_a_value_may_follow_its_key_as_a_word_of_its_own():
    args = main.parse(["train", "--config=x", "--workdir=y", "--config.seed", "3", "--config.data.path=a=b"])
    assert args.overrides == {"seed": "3", "data.path": "a=b"}


# Bad input: refused before anything is written


@pytest.mark.parametrize("more, words", [
    (["--config.model.num_layer=3"], ["--config.model.num_layer is unknown", 'Did you mean "model.num_layers"?']),
    (["--config.num_steps=many"], ["--config.num_steps=many must be of type int"]),
    (["--config.batch_size=12"], ["batch_size=12", "the 8 devices", "multiple of 8"]),
    (["--config.grad_accum_steps=3"], ["batch_size=8 is not divisible by grad_accum_steps=3"]),
    (["--config.mesh.tensor=8"], ["heads=4 is not divisible by mesh.tensor=8"]),
    (["--config.model.num_kv_heads=2", "--config.mesh.tensor=4"],
     ["model.num_kv_heads=2 is not divisible by mesh.tensor=4"]),
    (["--config.mesh.data=3", "--config.mesh.fsdp=1"], ["mesh.data=3", "asks for 3 devices, but there are 8"]),
    (["--config.mesh.data=3"], ["a multiple of 3 devices, but there are 8"]),
    (["--config.data.source=txt"], ['data.source="txt" must be one of', "stdlib, text", 'Did you mean "text"?']),
    (["--config.data.heldout_fraction=1.5"], ["data.heldout_fraction=1.5 must be above 0 and below 1"]),
    (["--config.tokenizer.kind=bytes"], ['tokenizer.kind="bytes" must be one of', 'Did you mean "byte"?']),
    (["--config.seq_len=90000"], ["tokens to train on", "seq_len=90000 takes 90001"]),
    (["--config.tokenizer.kind=sentencepiece", "--config.tokenizer.vocab_size=9000"],
     ["tokenizer.vocab_size is 9000", "at most"]),
    (["--config.tokenizer.kind=sentencepiece", "--config.tokenizer.vocab_size=20"],
     ["tokenizer.vocab_size is 20", "take"]),
    (["--config.tokenizer.kind=sentencepiece", "--config.tokenizer.path=/nowhere.model"],
     ["/nowhere.model does not exist"]),
])  # fmt: skip
def test_bad_values(refused, corpus, tmp_path, more, words):
    message = refused(tmp_path, *training(corpus, tmp_path / "runs" / "new", *more))
    assert all(word in message for word in words), message


def test_a_folder_that_was_there_stays(refused, corpus, tmp_path):
    """The user's own empty workdir, and a store folder beside it, are as they were."""
    (tmp_path / "mine").mkdir()
    argv = training(corpus, tmp_path / "mine", "--config.seq_len=90000", f"--config.data.store={tmp_path}/stores/one")
    refused(tmp_path / "mine", *argv)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_store_that_was_there_stays(refused, gptjax_main, corpus, finished, tmp_path):
    store = shutil.copytree(finished / "store", tmp_path / "store")
    refused(tmp_path, *training(corpus, tmp_path / "new", "--config.seq_len=90000", f"--config.data.store={store}"))


def test_unknown_key_in_the_file(refused, corpus, tmp_path):
    config = tmp_path / "mine.py"
    config.write_text(
        "from gptjax.config import default\n\ndef get_config():\n    config = default()\n"
        "    config.batchsize = 4\n    return config\n"
    )
    assert 'mine.py: unknown key "batchsize". Did you mean "batch_size"?' in refused(
        tmp_path, "train", f"--config={config}", f"--workdir={tmp_path}/new"
    )


@pytest.mark.parametrize("content, words", [
    (None, ["matches 0 files"]),
    (b"", ["0.txt is empty (0 bytes)"]),
    (b"caf\xe9 " * 100, ["0.txt is not UTF-8 at byte 3 (0xE9)"]),
    (b"one document alone", ["has 1 documents", "at least 2"]),
])  # fmt: skip
def test_bad_text(refused, tmp_path, content, words):
    texts = tmp_path / "texts"
    texts.mkdir()
    if content is not None:
        (texts / "0.txt").write_bytes(content)
    message = refused(tmp_path, *training(texts / "*.txt", tmp_path / "runs" / "new"))
    assert all(word in message for word in words), message


def test_a_workdir_that_is_a_file_or_under_one(refused, corpus, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "file can't be a folder" in refused(tmp_path, *training(corpus, tmp_path / "file"))
    assert f"because {tmp_path}/file is a file" in refused(tmp_path, *training(corpus, tmp_path / "file" / "runs"))


@pytest.mark.skipif(not pathlib.Path("/proc/self").exists(), reason="no /proc")
def test_a_workdir_that_no_one_may_write_to(refused, corpus, tmp_path):
    """/proc takes no files, from root neither."""
    message = refused(tmp_path, *training(corpus, "/proc/runs"))
    assert "--workdir=/proc/runs can't be written to (/proc: " in message


def test_a_workdir_that_this_user_may_not_write_to(refused, corpus, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    try:
        (locked / "probe").touch()
    except PermissionError:
        assert "locked: Permission denied" in refused(tmp_path, *training(corpus, locked / "new"))
    else:
        pytest.skip("root writes everywhere")


# A workdir with a run in it


@pytest.mark.parametrize("more, words", [
    ("--config.seed=7", "seed (0 there, 7 here)"),
    ("--config.model.embed_dim=32", "model.embed_dim (64 there, 32 here)"),
    ("--config.batch_size=16", "batch_size (8 there, 16 here)"),
    ("--config.optimizer.name=lion", "optimizer.name (adamw there, lion here)"),
    ("--config.data.path=elsewhere/*", "data.path"),
])  # fmt: skip
def test_workdir_of_another_run(refused, corpus, finished, more, words):
    message = refused(finished, *training(corpus, finished, more))
    assert f"{finished} belongs to a run of another config" in message and words in message


@pytest.mark.parametrize("spoil, words", [
    (lambda folder: (folder / "config.json").unlink(), "has checkpoints but no config.json"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
    (lambda folder: (folder / "config.json").write_text("3"), "config.json is damaged"),
    (lambda folder: (folder / "config.json").write_text("[" * 100_000), "config.json is damaged"),
    (lambda folder: (folder / "config.json").write_text('{"model": [1]}'), "config.json is damaged ('model' is [1])"),
    (lambda folder: (folder / "config.json").write_bytes(b" " * (1 << 20) + b"{}"),
     "config.json must have at most 1048576 bytes"),
    (lambda folder: (folder / "store/train/tokens/c/0").unlink(), "store/train/tokens/c/0 is missing"),
    (lambda folder: (folder / "store/tokenizer/tokenizer.json").write_text('{"kind": "byte"}'),
     "tokenizer.json has 16 bytes"),
], ids=["no config", "cut config", "other config", "deep config", "list in config", "large config", "no tokens",
        "other tokenizer"])  # fmt: skip
def test_spoiled_workdir(refused, corpus, copied, spoil, words):
    spoil(copied)
    assert words in refused(copied, *training(corpus, copied, "--config.num_steps=6"))


@pytest.mark.parametrize("verb", ["eval", "generate"])
def test_missing_runs_and_checkpoints(refused, finished, tmp_path, verb):
    assert "nothing/config.json does not exist" in refused(tmp_path, verb, f"--workdir={tmp_path}/nothing")
    assert 'Did you mean "finished"?' in refused(finished, verb, f"--workdir={finished.parent}/finishd")
    message = refused(finished, verb, f"--workdir={finished}", "--step=3")
    assert "has no checkpoint of step 3: it has 2, 4." in message
    (tmp_path / "new").mkdir()
    shutil.copy(finished / "config.json", tmp_path / "new")
    assert "new/checkpoints holds no checkpoint" in refused(tmp_path, verb, f"--workdir={tmp_path}/new")


@pytest.mark.parametrize("more, words", [
    (["--prompt=" + "x" * 32], "The prompt has 32 tokens, and the context of 32 takes at most 31"),
    (["--prompt=" + "x" * 20, "--max_tokens=13"],
     "The prompt has 20 tokens and --max_tokens=13 asks for more than the context of 32 holds: ask for at most 12."),
    (["--max_tokens=0"], "--max_tokens=0 must be at least 1"),
    (["--temperature=-1"], "--temperature=-1.0 is below 0"),
    (["--temperature=nan"], "--temperature=nan"),
    (["--top_k=-1"], "--top_k=-1 is below 0"),
    (["--top_p=0"], "--top_p=0.0 must be more than 0"),
    (["--min_p=2"], "--min_p=2.0 must be at least 0"),
    (["--repetition_penalty=nan"], "--repetition_penalty=nan must be more than 0"),
    (["--stop="], '--stop="" is at the beginning of any text'),
    (["--prompts_file=/nowhere"], "/nowhere is missing: give a file of UTF-8 text with a prompt a line"),
    (["--weights=int4"], "invalid choice: 'int4'"),
    (["--top_p=1.5"], "--top_p=1.5 must be more than 0 and at most 1"),
    ([f"--seed={2**32}"], f"--seed={2**32} does not fit the 32 bits"),
    (["--prompt=\udcff"], "U+DCFF"),
])  # fmt: skip
def test_generate_refuses(refused, finished, more, words):
    assert words in refused(finished, "generate", f"--workdir={finished}", *more)


@pytest.mark.parametrize("verb", ["train", "eval", "generate"])
def test_damaged_checkpoint(gptjax_main, corpus, copied, verb):
    for path in (copied / "checkpoints" / "step_00000004" / "state").rglob("*"):
        if path.parent.name == "d":  # the arrays' bytes
            path.write_bytes(path.read_bytes()[:100])
    (copied / "samples.txt").unlink()  # as after a kill: there is something left to do
    argv = {"train": training(corpus, copied), "eval": ["eval", f"--workdir={copied}"]}
    argv["generate"] = ["generate", f"--workdir={copied}", "--max_tokens=4"]
    code, out, error = gptjax_main(*argv[verb])
    assert code == 0 and error.count("\n") == 1 + (verb == "train")
    assert (
        f"passed over the checkpoint of step 4 in {copied}/checkpoints: state/" in error and "has 100 bytes of" in error
    )
    if verb == "train":
        assert "going on from the checkpoint of step 2" in out
        assert f"moved the checkpoint of step 4 aside, to {copied}/checkpoints/step_00000004.damaged\n" in error


def test_eval_prints_one_json_object(gptjax_main, finished):
    code, out, error = gptjax_main("eval", f"--workdir={finished}", "--step=2")
    row = json.loads(out)
    assert (code, error, row["step"]) == (0, "", 2)
    assert list(row) == ["step", "loss", "perplexity", "bits_per_byte", "accuracy", "tokens"]


def test_eval_of_the_last_step_is_that_of_the_run(gptjax_main, finished):
    _, out, _ = gptjax_main("eval", f"--workdir={finished}")
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    ran, row = next(row for row in rows if "eval_loss" in row), json.loads(out)
    assert row["step"] == ran["step"] == 4
    # The run reads eval_batches=4 of them, as `gptjax eval` does.
    assert row["loss"] == pytest.approx(ran["eval_loss"], rel=1e-6)
    assert row["bits_per_byte"] == pytest.approx(ran["eval_bits_per_byte"], rel=1e-6)
    assert row["accuracy"] == pytest.approx(ran["eval_accuracy"], rel=1e-6)


def test_generate_prints_the_prompt_and_what_follows(gptjax_main, finished):
    argv = ["generate", f"--workdir={finished}", "--prompt=1 plus ", "--max_tokens=10", "--seed=3", "--temperature=2"]
    code, out, error = gptjax_main(*argv)
    assert (code, error) == (0, "") and out.startswith("1 plus ")
    assert gptjax_main(*argv)[1] == out
    assert gptjax_main(*argv, "--seed=4")[1] != out
    several = gptjax_main(*argv, "--num_samples=3")[1]
    assert several.count("sample ") == 3 and several.split(" sample 1\n")[1].startswith(out.rstrip("\n"))


def test_generate_takes_several_prompts(gptjax_main, finished, tmp_path):
    """In their order, each with as many samples; and a stop string ends each."""
    (tmp_path / "prompts.txt").write_text("2 plus\n3 plus\n")
    argv = ["generate", f"--workdir={finished}", "--prompt=1 plus", f"--prompts_file={tmp_path}/prompts.txt"]
    argv += ["--num_samples=2", "--max_tokens=20", "--seed=3"]
    code, out, error = gptjax_main(*argv)
    assert (code, error) == (0, "")
    titles = [f"prompt {number}, sample {sample}\n" for number in (1, 2, 3) for sample in (1, 2)]
    texts = re.split("—{30} (prompt ., sample .\n)", out)
    assert texts[1::2] == titles
    assert [text[:6] for text in texts[2::2]] == ["1 plus"] * 2 + ["2 plus"] * 2 + ["3 plus"] * 2
    stop = texts[2][8]
    cut = re.split("—{30} prompt ., sample .\n", gptjax_main(*argv, f"--stop={stop}")[1])[1:]
    whole = [text.removesuffix("\n") for text in texts[2::2]]
    assert cut == [text[:6] + text[6:].partition(stop)[0] + "\n" for text in whole]


@pytest.mark.slow
def test_int8_weights(gptjax_main, finished):
    """Of a model this small the loss changes, and by little."""

    def loss(*more):
        return json.loads(gptjax_main("eval", f"--workdir={finished}", *more)[1])["bits_per_byte"]

    assert 0 < abs(loss("--weights=int8") / loss() - 1) < 0.01
    argv = ["generate", f"--workdir={finished}", "--prompt=1 plus ", "--max_tokens=5", "--weights=int8"]
    code, out, error = gptjax_main(*argv)
    assert (code, error) == (0, "") and out.startswith("1 plus ")


@pytest.mark.parametrize("variables, words", [
    ({"JAX_PLATFORMS": "gpu,cpu"}, "JAX_PLATFORMS=gpu,cpu must name platforms of this machine; found cpu"),
    ({"JAX_PLATFORMS": "cuda"}, "JAX_PLATFORMS=cuda must name platforms of this machine; found cpu"),
    ({"JAX_DISABLE_JIT": "1"}, "JAX_DISABLE_JIT=1 must be unset"),
])  # fmt: skip
def test_an_environment_in_which_nothing_can_run(corpus, tmp_path, variables, words):
    command = [sys.executable, "-m", "gptjax", *training(corpus, tmp_path / "run")]
    done = subprocess.run(command, env=environment(1) | variables, capture_output=True, text=True)
    *others, said = done.stderr.splitlines()  # a libtpu that finds no TPU has more to say
    assert done.returncode == 2 and words in said and not any("Traceback" in line for line in others), done
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("variables", [
    {"PYTHONOPTIMIZE": "2"},
    {"JAX_NUMPY_RANK_PROMOTION": "raise", "JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_TRANSFER_GUARD": "disallow"},
    {"JAX_THREEFRY_PARTITIONABLE": "0", "JAX_DEFAULT_PRNG_IMPL": "rbg"},
], ids=["optimized", "strict", "random"])  # fmt: skip
def test_the_environment_changes_no_loss(corpus, finished, tmp_path, variables):
    """Of two hosts, or before and after a restart, variables may differ."""
    command = [sys.executable, "-m", "gptjax", *training(corpus, tmp_path / "run")]
    done = subprocess.run(command, env=environment(1) | variables, capture_output=True, text=True)
    assert done.returncode == 0, done
    np.testing.assert_allclose([*losses(tmp_path / "run").values()], [*losses(finished).values()], rtol=1e-5)


def test_the_help_stands_without_docstrings():
    command = [sys.executable, "-OO", "-m", "gptjax", "--help"]
    assert "Exit codes" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_workers_are_the_cores_that_this_process_may_use():
    code = (
        "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "sys.argv = ['gptjax', 'data', 'prepare', '--help']\nfrom gptjax.cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "(default: 1)" in done.stdout.split("--workers")[-1]
