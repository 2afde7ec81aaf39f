import json
import re

import pytest
from support.command import tree

from gptjax.checkpoints import retention
from gptjax.runtime import files


def test_ls(gptjax_main, copied):
    code, out, error = gptjax_main("checkpoint", "ls", f"--workdir={copied}")
    lines = out.splitlines()
    assert (code, error, len(lines)) == (0, "", 3) and lines[0].split() == ["step", "age", "MB", "files"]
    assert [line.split()[0] for line in lines[1:]] == ["2", "4"] and all("whole" in line for line in lines[1:])
    next((copied / "checkpoints/step_00000004/state/d").iterdir()).unlink()
    config = json.loads((copied / "config.json").read_text()) | {"log_every": 77}
    (copied / "config.json").write_text(json.dumps(config))
    first, last = json.loads(gptjax_main("checkpoint", "ls", f"--workdir={copied}", "--json")[1])
    assert first["damage"] == "" and "is missing" in last["damage"] and first["differs"] == ["log_every (1, 77)"]
    stored = [path.stat().st_size for path in (copied / "checkpoints/step_00000002/state").rglob("*") if path.is_file()]
    assert (first["bytes"], first["files"]) == (sum(stored), len(stored)) and abs(
        first["saved_at"] - last["saved_at"]
    ) < 600


def test_verify(gptjax_main, copied):
    assert gptjax_main("checkpoint", "verify", f"--workdir={copied}") == (0, "step 2: verified\nstep 4: verified\n", "")
    path = next((copied / "checkpoints/step_00000004/state/d").iterdir())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    code, out, error = gptjax_main("checkpoint", "verify", f"--workdir={copied}")
    assert code == 1 and re.fullmatch(
        r"step 2: verified\nstep 4: state/d/\w+ is not what was written: its hash differs\n", out
    )
    assert error.startswith("gptjax: 1 of 2 checkpoints in ") and error.count("\n") == 1
    assert gptjax_main("checkpoint", "verify", f"--workdir={copied}", "--step=2")[0] == 0


def test_diff(gptjax_main, finished):
    found = json.loads(gptjax_main("checkpoint", "diff", f"--workdir={finished}", "--steps=2:4", "--json")[1])
    assert found["says"] == [] and found["arrays"]["step"] == {"norm": 2.0, "difference": 2.0}
    assert 0 < found["arrays"]["model.embedding"]["difference"] < found["arrays"]["model.embedding"]["norm"]
    same = json.loads(gptjax_main("checkpoint", "diff", f"--workdir={finished}", "--steps=4:4", "--json")[1])
    assert {row["difference"] for row in same["arrays"].values()} == {0.0}
    code, out, _ = gptjax_main("checkpoint", "diff", f"--workdir={finished}", "--steps=2:4")
    assert code == 0 and "step: norm 2, of the difference 2\n" in out


def test_prune(gptjax_main, copied):
    """The newest that verifies stays, though a damaged one is newer."""
    folder = copied / "checkpoints"
    (folder / "step_00000004/state/_METADATA").write_text("x")
    (folder / "step_00000007").mkdir()
    (folder / "step_00000001.damaged/state").mkdir(parents=True)
    (folder / "somebody's notes").touch()
    before = tree(copied)
    gone = ["step_00000007", "step_00000001.damaged", "step_00000004"]
    code, out, _ = gptjax_main("checkpoint", "prune", f"--workdir={copied}", "--keep=1", "--dry_run")
    assert code == 0 and out == "".join(f"would remove {name}\n" for name in gone) + "kept step_00000002\n"
    assert tree(copied) == before
    code, out, _ = gptjax_main("checkpoint", "prune", f"--workdir={copied}", "--keep=1")
    assert code == 0 and out == "".join(f"removed {name}\n" for name in gone) + "kept step_00000002\n"
    assert {path.name for path in folder.iterdir()} == {"step_00000002", "somebody's notes"}


@pytest.mark.parametrize("patience, kept", [(2, [2, 4]), (0, [4])])
def test_prune_spares_the_best_where_the_run_keeps_it(gptjax_main, copied, patience, kept):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"stopping": config["stopping"] | {"patience": patience}}))
    rows = ({"step": 2, "eval_loss": 1.0}, {"step": 4, "eval_loss": 2.0})
    (copied / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = gptjax_main("checkpoint", "prune", f"--workdir={copied}", "--keep=1")
    assert code == 0 and f"kept {', '.join(f'step_0000000{step}' for step in kept)}\n" in out
    assert sorted(int(path.name[-1]) for path in (copied / "checkpoints").iterdir()) == kept


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), RuntimeError("503")])
def test_prune_where_nothing_can_be_removed(refused, copied, monkeypatch, error):
    def remove(path):
        raise error

    monkeypatch.setattr(retention, "remove", remove)
    message = refused(copied, "checkpoint", "prune", f"--workdir={copied}", "--keep=1")
    assert f"step_00000002 can't be removed ({files.reason(error)}): make it writable." in message


@pytest.mark.parametrize("argv, words", [
    (["prune", "--keep=0"], "--keep=0 must be at least 1"),
    (["verify", "--step=3"], "--step=3 must be a checkpoint in "),
    (["diff", "--steps=2:3"], "--steps=2:3 must be A:B, two checkpoints in"),
    (["diff", "--steps=2"], "--steps=2 must be A:B, two checkpoints in"),
    (["ls", "--keep=1"], "--keep is not a flag of gptjax checkpoint"),
])  # fmt: skip
def test_refusals(refused, finished, argv, words):
    assert words in refused(finished, "checkpoint", argv[0], f"--workdir={finished}", *argv[1:])


def test_what_is_no_workdir_of_a_run(refused, copied):
    assert "holds no checkpoint" in refused(copied, "checkpoint", "ls", f"--workdir={copied}/nothing")
    for path in (copied / "checkpoints").glob("*/manifest.json"):
        path.unlink()
    assert "verifies, so none is removed" in refused(copied, "checkpoint", "prune", f"--workdir={copied}", "--keep=1")
