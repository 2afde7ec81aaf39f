"""The tracker wandb, without a network; skipped where wandb is not installed: the extra `dev` has it."""

import functools
import json
import os
import pathlib
import struct
import subprocess
import sys

import pytest
from etils import epath

from gptjax.errors import Refused
from gptjax.training.monitoring import trackers
from gptjax.training.monitoring.writers import Writers

wandb = pytest.importorskip("wandb", reason="the extra `dev` has wandb")

from wandb.proto import wandb_internal_pb2  # noqa: E402  # after the skip

from gptjax.training.monitoring import wandb_tracker  # noqa: E402

pytestmark = pytest.mark.slow  # CI installs wandb after the default tests
BLOCK = 1 << 15


def test_wandb_without_a_key_is_refused_before_anything(tmp_path):
    code = (
        "from gptjax.training.monitoring import trackers\nfrom gptjax.errors import Refused\n"
        "try: trackers.find('wandb')\nexcept Refused as no: print(no)"
    )
    hidden = {"WANDB_API_KEY", "WANDB_MODE", "NETRC"}
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    env |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_CONFIG_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == (
        "tracker=wandb has no key: run wandb login, set WANDB_API_KEY, or set WANDB_MODE=offline."
    ), done.stderr


def test_wandb_offline_keeps_the_rows_and_goes_on_as_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    wandb.teardown()  # it reads the variables once
    for start in (0, 2):
        begin = trackers.find("wandb")
        writers = Writers(epath.Path(tmp_path), start, None, functools.partial(begin, {"seed": 7}, str(tmp_path)))
        for step in (start + 1, start + 2):
            writers.write({"step": step, "loss": 1 / step, "mfu": None})
        writers.write({"step": start + 1, "save_seconds": 0.5})
        writers.close()
        wandb.finish()
    known = (tmp_path / "wandb_id").read_text().strip()
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2 and all(file.name == f"run-{known}.wandb" for file in files)
    assert [row["step"] for file in files for row in history(file)] == [1, 2, 1, 3, 4, 3]
    assert history(files[0])[2] == {"step": 1, "save_seconds": 0.5}


def history(file: pathlib.Path) -> list[dict]:
    """The rows of an offline run, without wandb's own keys. Its file is a log of LevelDB's format, of protobufs."""
    content, at, record, rows = file.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
        _, length, kind = struct.unpack_from("<IHB", content, at)
        record, at = record + content[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last part
            row = wandb_internal_pb2.Record.FromString(record)
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.history.item}
            rows += [{key: value for key, value in items.items() if not key.startswith("_")}] if items else []
            record = b""
    return rows


def test_an_id_that_is_damaged_is_made_anew(tmp_path):
    (tmp_path / "wandb_id").write_text("../../x")
    made = wandb_tracker.run_id(epath.Path(tmp_path))
    assert len(made) == 32 and wandb_tracker.run_id(epath.Path(tmp_path)) == made
    (tmp_path / "wandb_id").write_text("x" * 1000)
    with pytest.raises(Refused, match="must have at most 100 bytes, and has more"):
        wandb_tracker.run_id(epath.Path(tmp_path))
