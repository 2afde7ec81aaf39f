import json
import shutil

import pytest
from support.command import training

from gptjax.checkpoints import retention
from gptjax.errors import Refused
from gptjax.training.monitoring import early_stopping, records
from gptjax.training.monitoring.early_stopping import StoppingConfig


@pytest.mark.parametrize("patience, min_delta, losses, expected", [
    (0, 0.0, [1, 2, 3, 4], False),
    (2, 0.0, [3, 2, 2], False),
    (2, 0.0, [3, 2, 2, 2], True),
    (2, 0.0, [3, 2, 2.5, 1.9], False),
    (2, 0.5, [3, 2.8, 2.6], True),
    (2, 0.5, [3, 2.8, 2.4], False),
    (1, 0.0, [], False),
    (2, 0.0, [2, float("nan"), 3], False),  # one that is no number is no evaluation
])  # fmt: skip
def test_patience(patience, min_delta, losses, expected):
    losses = {10 * number: loss for number, loss in enumerate(losses)}
    assert early_stopping.over(StoppingConfig(patience, min_delta), losses) is expected


def test_best():
    losses = {2: 3.0, 4: 1.0, 6: 1.0, 8: float("nan")}
    assert retention.best(losses, [2, 4, 6, 8]) == 4
    assert retention.best(losses, [2, 6, 8, 10]) == 6
    assert retention.best(losses, [8, 10]) == 0
    rows = [{"step": 2, "eval_loss": 3.0}, {"step": 4, "loss": 1.0}, {"step": 6, "eval_loss": 10**400}]
    assert records.evaluations(rows) == {2: 3.0}


def test_refused():
    with pytest.raises(Refused, match=r"stopping.patience=-1 must not be negative"):
        early_stopping.check(StoppingConfig(patience=-1))


@pytest.fixture(scope="module")
def diverging(corpus):
    """The command line of a run that gets worse from its first evaluation on."""
    return lambda workdir, *more: training(
        corpus, workdir, "--config.num_steps=6", "--config.optimizer.peak_learning_rate=0.5",
        "--config.optimizer.warmup_steps=1", "--config.eval_every=1", "--config.checkpoint_every=100",
        "--config.checkpoint.keep=1", "--config.stopping.patience=2", *more,
    )  # fmt: skip


def losses_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return records.evaluations(rows)


@pytest.mark.slow
def test_a_run_ends_early_and_keeps_its_best_checkpoint(diverging, tmp_path, gptjax_main):
    folder = tmp_path / "run"
    code, out, _ = gptjax_main(*diverging(folder))
    losses = losses_of(folder)
    assert code == 0 and list(losses) == [1, 2, 3] and min(losses, key=losses.get) == 1
    assert "step 3: the held-out loss has not improved in stopping.patience=2 evaluations; the run ends" in out
    assert f"the best held-out loss, {losses[1]:.4f} nats a token, is of step 1: --step=best" in out
    assert retention.found(folder / "checkpoints")[0] == [1, 3]

    code, out, _ = gptjax_main(*diverging(folder))
    assert code == 0 and "is complete at step 3, where the held-out loss has not improved" in out
    assert "--config.stopping.patience=4" in out

    code, out, _ = gptjax_main("eval", f"--workdir={folder}", "--step=best")
    assert code == 0 and json.loads(out)["step"] == 1 and json.loads(out)["loss"] == pytest.approx(losses[1], rel=1e-5)

    code, out, _ = gptjax_main("checkpoint", "ls", f"--workdir={folder}")
    (line,) = [line for line in out.splitlines() if "the best" in line]
    assert code == 0 and line.split()[0] == "1" and line.endswith(f"the best: held-out loss {losses[1]:.4f}")

    # As after a kill, before the last save, and before the samples: the same end.
    shutil.rmtree(folder / "checkpoints" / "step_00000003")
    code, out, _ = gptjax_main(*diverging(folder))
    assert code == 0 and "going on from the checkpoint of step 1" in out and "the run ends" in out
    assert losses_of(folder) == pytest.approx(losses) and retention.found(folder / "checkpoints")[0] == [1, 3]
    (folder / "samples.txt").unlink()
    code, out, _ = gptjax_main(*diverging(folder))
    assert code == 0 and "going on from the checkpoint of step 3" in out and "the run ends" in out
    assert losses_of(folder) == pytest.approx(losses) and (folder / "samples.txt").exists()

    # And with more patience to its end.
    code, out, _ = gptjax_main(*diverging(folder, "--config.stopping.patience=9"))
    assert code == 0 and "the run ends" not in out and list(losses_of(folder)) == [1, 2, 3, 4, 5, 6]
    assert retention.found(folder / "checkpoints")[0] == [1, 6]


def test_the_best_of_a_run_that_was_never_evaluated(copied, refused):
    (copied / "metrics.jsonl").unlink()
    message = refused(copied, "eval", f"--workdir={copied}", "--step=best")
    assert "has no held-out loss for any step with a checkpoint" in message and "give a step among 2, 4" in message
