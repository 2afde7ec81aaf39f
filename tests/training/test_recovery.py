"""Bad numbers: what the compiled step, the rules, and whole runs make of them."""

import contextlib
import dataclasses
import json
import math
import random
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
from etils import epath
from support import poisoned
from support.command import environment, long_run, losses, rows
from support.runs import GPT2, LLAMA, data_of, mesh_of, run, small, tiny

from gptjax.checkpoints import manifest, record
from gptjax.checkpoints.manager import CheckpointConfig, Checkpoints
from gptjax.checkpoints.record import Recovery
from gptjax.data.stream import stream
from gptjax.errors import Failed, Preempted, Refused
from gptjax.parallel.trees import named_leaves
from gptjax.runtime import heartbeat, preemption
from gptjax.training import loop
from gptjax.training import step as update
from gptjax.training.monitoring.config import check_recovery
from gptjax.training.monitoring.rollback import GoBack, RecoveryConfig, Watch, skipping
from gptjax.training.monitoring.skipped_batches import batch_index
from gptjax.training.optim.config import OptimizerConfig

# The compiled step


def unchanged(state):
    """The bytes of everything but the counts, by name."""
    leaves = named_leaves(jax.device_get(state))
    return {name: leaf.tobytes() for name, leaf in leaves.items() if name not in ("step", "skipped")}


def stepped(config, state, batch, mesh):
    with jax.set_mesh(mesh):
        return update.train_step(state, batch, config=config, vocab_size=257)


ADAMW = dict(peak_learning_rate=3e-3, warmup_steps=4)


@pytest.mark.parametrize("shape, optimizer, changes", [
    pytest.param((2, 2, 2), {"ema_decay": 0.9}, {"grad_accum_steps": 2}, marks=pytest.mark.slow),
    pytest.param((1, 8, 1), {"name": "muon", "clip_norm": 0.0}, {}, marks=pytest.mark.slow),
    ((1, 2, 1), {"name": "lion", "offload": True, "state_dtype": "bfloat16"}, {}),
], ids=str)  # fmt: skip
def test_a_batch_that_is_not_finite_changes_nothing(store, shape, optimizer, changes):
    config, mesh = tiny(LLAMA, optimizer=OptimizerConfig(**(ADAMW | optimizer)), **changes), mesh_of(*shape)
    state, _ = run(config, store, mesh, 2)
    before, places = unchanged(state), [leaf.sharding for leaf in jax.tree.leaves(state)]
    with jax.set_mesh(mesh):
        batch = next(loop.train_batches(config, data_of(config, store), mesh, 2))
        bad = batch._replace(weights=batch.weights * np.float32("nan"))
    state, metrics = stepped(config, state, bad, mesh)
    assert unchanged(state) == before and [leaf.sharding for leaf in jax.tree.leaves(state)] == places
    assert (int(state.step), int(state.skipped), int(metrics["skipped"])) == (3, 1, 1)
    assert math.isnan(metrics["loss"])
    rate = metrics["learning_rate"]
    state, metrics = stepped(config, state, batch, mesh)
    assert metrics["learning_rate"] == rate  # the optimizer has not seen the bad one
    assert all(before[name] != leaf for name, leaf in unchanged(state).items() if name.startswith("model."))
    assert (int(state.step), int(state.skipped)) == (4, 1) and math.isfinite(metrics["loss"])


def test_a_gradient_that_is_not_finite_changes_nothing_though_the_loss_is(store):
    config, mesh = tiny(LLAMA), mesh_of(1, 1, 1)
    state, _ = run(config, store, mesh, 1)
    state.model.norm.gain[...] *= 1e25  # float32 holds a gradient of this size, but not its square
    state.model.output().table[...] *= 1e-25
    before = unchanged(state)
    with jax.set_mesh(mesh):
        batch = next(loop.train_batches(config, data_of(config, store), mesh, 1))
    state, metrics = stepped(config, state, batch, mesh)
    assert math.isfinite(metrics["loss"]) and math.isinf(metrics["grad_norm"])
    assert unchanged(state) == before and int(state.skipped) == 1


@pytest.mark.slow
def test_it_is_as_if_the_bad_batch_had_not_been(store, monkeypatch):
    """Also for the schedule and the average of the weights."""
    config = tiny(dataclasses.replace(GPT2, dropout=0.0), optimizer=OptimizerConfig(**ADAMW, ema_decay=0.99))
    mesh = mesh_of(1, 1, 1)
    expected, _ = run(config, store, mesh, 3)
    state, _ = run(config, store, mesh, 1)
    with monkeypatch.context() as patch:
        poisoned.poison([1], poisoned.not_finite, patch.setattr)
        state, _ = run(config, store, mesh, 1, state=state, start=1)
    state, _ = run(config, store, mesh, 2, state=state, start=1)
    assert (int(state.step), int(state.skipped)) == (4, 1) and unchanged(state) == unchanged(expected)


# The rules


def watch(tmp_path, config, saved=Recovery(), start=0):
    def documents(batch):
        return [{"name": f"{batch}.txt", "offset": 7}]

    return Watch(
        config, epath.Path(tmp_path), documents, start, Recovery(**json.loads(json.dumps(dataclasses.asdict(saved))))
    )


def verdicts(watching, numbers, start=0):
    """The step and kind of the first exception, with the watch's words until then."""
    words = []
    for step, number in enumerate(numbers, start + 1):
        try:
            words.append(watching.see(step, number, 1.0))
        except (GoBack, Failed) as trouble:
            return step, trouble, words
    return None, None, words


NAN = math.nan
RULE = RecoveryConfig(nonfinite_steps=3, spike_steps=4, spike_window=20, spike_deviations=8.0, spike_floor=0.5)


def noisy(number, level=3.0, seed=0):
    rng = random.Random(seed)
    return [rng.gauss(level, 0.05) for _ in range(number)]


@pytest.mark.parametrize("numbers, bad", [
    ([3.0, NAN, NAN, 3.0, NAN, NAN, 3.0], None),
    ([3.0, NAN, math.inf, NAN], (2, 4)),
    (noisy(60), None),
    (noisy(30) + [9.0] * 3 + noisy(30), None),  # mends itself
    (noisy(30) + [9.0] * 4, (31, 34)),
    (noisy(30) + [9.0, NAN, NAN, 9.0], (31, 34)),
    (noisy(30) + [9.0, 3.0] * 8, None),
    (noisy(23) + [9.0] * 3, None),
    (noisy(10) + [9.0] * 4, None),  # the window is not full
    (noisy(30) + noisy(30, level=3.45), None),  # below the floor
    ([5.5 - 0.08 * step for step in range(50)], None),
], ids=str)  # fmt: skip
def test_when_a_run_goes_back(tmp_path, numbers, bad):
    step, trouble, told = verdicts(watch(tmp_path, RULE), numbers)
    assert (trouble and (trouble.first, trouble.last)) == bad and (bad is None or step == bad[1])
    assert bad is None or trouble.since == (bad[0] - 4 if 9.0 in numbers else bad[0])
    assert sum(map(bool, told)) == sum(not math.isfinite(number) for number in numbers[: len(told)])


def test_no_spike_in_what_training_looks_like(tmp_path):
    """By the defaults: a falling loss with heavy tails, and a rough warmup."""
    for seed in range(8):
        rng = random.Random(seed)
        falling = [2 + 8 / (1 + step / 100) + 0.2 * rng.gauss(0, 1) ** 3 for step in range(2000)]
        assert verdicts(watch(tmp_path, RecoveryConfig()), falling)[1] is None


def test_a_resumed_watch_decides_alike(tmp_path):
    """Wherever it is cut, of numbers that no rule knows of before."""
    for seed in range(10):
        rng = random.Random(seed)
        numbers = [rng.choice((NAN, 9.0, 9.0, 9.0)) if rng.random() < 0.4 else rng.gauss(3, 0.05) for _ in range(80)]
        expected = verdicts(watch(tmp_path, RULE), numbers)
        end = expected[0] or len(numbers)
        for cut in range(1, end):
            first = watch(tmp_path, RULE)
            assert verdicts(first, numbers[:cut])[1] is None
            step, trouble, _ = verdicts(watch(tmp_path, RULE, first.saved(), cut), numbers[cut:], cut)
            assert (step, str(trouble)) == (expected[0], str(expected[1])), (seed, cut)


def test_policies(tmp_path):
    stop = watch(tmp_path, dataclasses.replace(RULE, on_nonfinite="stop", nonfinite_steps=2))
    step, trouble, _ = verdicts(stop, [3.0, NAN, NAN])
    assert step == 3 and isinstance(trouble, Failed) and "from step 2 to 3 the loss was nan" in str(trouble)
    assert "recovery.on_nonfinite=skip" in str(trouble) and "batch 2 has tokens of 2.txt from 7" in str(trouble)
    off = watch(tmp_path, dataclasses.replace(RULE, on_nonfinite="off", on_spike="off"))
    assert verdicts(off, noisy(40) + [NAN] * 9 + [9.0] * 9)[1] is None and not off.in_doubt
    stop = watch(tmp_path, dataclasses.replace(RULE, on_spike="stop"))
    assert isinstance(verdicts(stop, noisy(30) + [9.0] * 4)[1], Failed)


def test_doubt_is_from_the_first_bad_step_on(tmp_path):
    watching, doubts = watch(tmp_path, RULE), []
    for step, loss in enumerate([*noisy(30), 9.0, 9.0, 3.0, NAN, 3.0], 1):
        watching.see(step, loss, 1.0)
        doubts.append(watching.in_doubt)
    assert doubts == [False] * 30 + [True, True, False, True, False]


def test_bad_settings_are_refused():
    for changes, words in (
        (dict(on_spike="skp"), 'recovery.on_spike="skp" is unknown: choose one of skip, stop, off'),
        (dict(nonfinite_steps=0), "recovery.nonfinite_steps=0 must be at least 1"),
        (dict(sdc_check_every=-1), "recovery.sdc_check_every=-1 must not be negative"),
    ):
        with pytest.raises(Refused, match=words):
            check_recovery(RecoveryConfig(**changes))


def gone_back(first, last, ledger=(), since=0):
    return GoBack(since or first, first, last, "why", "where", list(ledger))


def test_the_ledger():
    one = skipping(gone_back(24, 26), [10, 20, 30], 3)
    assert one == [{"step": 20, "first_batch": 20, "num_batches": 6, "reason": "why"}]
    assert [batch_index(one, step) for step in (19, 20, 21)] == [19, 26, 27]
    again = skipping(gone_back(21, 23, one), [10, 20], 3)
    assert again[0] == one[0] and again[1] | {"reason": ""} == dict(step=20, first_batch=26, num_batches=3, reason="")
    assert batch_index(again, 20) == 29
    # Of a way that lead past 20, from before it: what was skipped at 20 was never read, and is not to be.
    earlier = skipping(gone_back(15, 32, again), [10], 3)
    assert [row["step"] for row in earlier] == [10] and batch_index(earlier, 10) == batch_index(again, 31) + 1
    assert skipping(gone_back(3, 5), [], 3)[-1]["step"] == 0
    # What brought the trouble about may be older than the newest checkpoint before it.
    assert [skipping(gone_back(24, 26, since=19), saved, 3)[-1]["step"] for saved in ([10, 20], [20])] == [10, 20]


def test_it_does_not_go_back_for_ever():
    ledger = []
    for _ in range(2):
        ledger = skipping(gone_back(24, 26, ledger), [20], 2)
    with pytest.raises(Failed, match="because why, although it rolled back to step 20 recovery.max_returns=2 times"):
        skipping(gone_back(24, 26, ledger), [20], 2)
    with pytest.raises(Failed, match="the oldest checkpoint is that of step 24"):
        skipping(gone_back(24, 26), [24, 25], 2)


def test_rows_of_batches_that_were_skipped_stay(tmp_path):
    """Going back to 4 from 8, then a restart at 6: what was seen at 7 and 8 on the other way is still true."""
    kept = [{"step": step, "batch": step - 1} for step in (3, 7, 8)]
    lines = [json.dumps(row) + "\n" for row in [*kept, {"step": 7, "batch": 10}]]
    (tmp_path / "skipped.jsonl").write_text("".join(lines) + '{"step": 8, "ba')
    ledger = [{"step": 4, "first_batch": 4, "num_batches": 4, "reason": "why"}]
    watch(tmp_path, RULE, Recovery(ledger), 6)
    assert skipped_rows(tmp_path) == kept


@pytest.mark.parametrize("line", [b"3", b"{}", b'{"step": "1"}', b"\xff", b"[" * 100_000, b'{"step": 9, "batch": [1]}'])
def test_what_is_no_row_of_skipped_batches_goes(tmp_path, line):
    """As a disk that lost power leaves it."""
    path = tmp_path / "skipped.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    watch(tmp_path, RULE, start=2)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


SKIPPED = {"step": 4, "first_batch": 4, "num_batches": 2, "reason": "why"}


@pytest.mark.parametrize("found, words", [
    (None, "(recovery is None, not of type dict)"),
    ({"ledger": {}, "losses": []}, "(ledger is {}, not of type list)"),
    ({"ledger": [3], "losses": []}, "(a row of the ledger is 3, not of type dict)"),
    ({"ledger": [{"step": 1, "first_batch": 1}], "losses": []}, "(num_batches is missing, not of type int)"),
    ({"ledger": [SKIPPED | {"num_batches": -1}], "losses": []}, "(num_batches of the ledger is -1)"),
    ({"ledger": [SKIPPED | {"first_batch": 1 << 70}], "losses": []}, "(first_batch of the ledger is"),
    ({"ledger": [SKIPPED | {"step": 10}], "losses": []}, "(step of the ledger is 10)"),
    ({"ledger": [SKIPPED, SKIPPED | {"step": 3}], "losses": []}, "(step of the ledger is 3)"),
    ({"ledger": [], "losses": [None, "1"]}, "(a loss is '1', not of type float)"),
])  # fmt: skip
def test_what_a_checkpoint_holds_otherwise_is_refused(tmp_path, found, words):
    with pytest.raises(Refused) as refusal:
        record.read_recovery({"recovery": found}, 9, tmp_path)
    assert words in str(refusal.value)
    for ledger in ([], [SKIPPED, SKIPPED]):
        record.read_recovery({"recovery": {"ledger": ledger, "losses": []}}, 9, tmp_path)


def test_the_documents_of_a_batch(store):
    """Held against the store's tokens, read one by one."""
    split = store.split("train")
    tokens = split.read(np.array([0]), split.tokens)[0]
    starts = split.document_starts()
    names = [json.loads(line) for line in (split.folder / "documents.jsonl").read_text().splitlines()]
    for step in (0, 7):
        data = data_of(tiny(batch_size=4), store)
        batch = data.batch(step, np.arange(4))
        expected = set()
        for row in batch.inputs:
            (at,) = [at for at in range(0, len(tokens) - 32, 32) if (tokens[at : at + 32] == row).all()]
            expected |= {number for number in range(len(starts)) for token in range(at, at + 33)
                         if starts[number] <= token < [*starts[1:], len(tokens)][number]}  # fmt: skip
        assert data.documents(step) == [names[number] for number in sorted(expected)]


# Whole runs: 12 steps, saved at each fourth, of which those of batches 5, 6 and 7 are not finite.

STEPS, BAD = 12, (5, 6, 7)


def run_of(corpus, **changes):
    return small(corpus, **(dict(num_steps=STEPS, checkpoint_every=4, log_every=1, num_samples=0) | changes))


def skipped_rows(folder):
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


def remembered(folder):
    with Checkpoints(folder / "checkpoints") as checkpoints:
        return dataclasses.asdict(checkpoints.record(checkpoints.choose(-1)).progress.recovery)


@pytest.fixture(scope="module")
def went_back(corpus, tmp_path_factory):
    """(workdir, what was printed) of the run that nothing else happens to."""
    folder = tmp_path_factory.mktemp("back") / "run"
    with pytest.MonkeyPatch.context() as patch, open(folder.with_name("out"), "w+", encoding="utf-8") as out:
        with contextlib.redirect_stdout(out):
            poisoned.poison(BAD, poisoned.not_finite, patch.setattr)
            loop.train(run_of(corpus), epath.Path(folder))
        out.seek(0)
        return folder, out.read()


def test_a_run_goes_back_and_past_what_was_not_finite(went_back, corpus, store):
    folder, printed = went_back
    config, mesh = run_of(corpus), mesh_of(2, 2, 2)
    state, before = run(config, store, mesh, 4)
    _, after = run(config, store, mesh, 8, state=state, start=4, ledger=[{"step": 4, "num_batches": 4}])
    assert list(losses(folder).values()) == [*before, *after] and list(losses(folder)) == list(range(1, STEPS + 1))
    (row,) = remembered(folder)["ledger"]
    assert (row["step"], row["first_batch"], row["num_batches"]) == (4, 4, 4)
    assert "from step 6 to 8 the loss was nan" in row["reason"]
    assert "going back to step 4, past batches 4 to 7, because from step 6 to 8" in printed
    assert printed.count("going on from the checkpoint of step 4") == 1 and printed.count("compiled the") == 1
    assert [row["step"] for row in rows(folder) if "compile_seconds" in row] == [0]


def test_its_documents_are_named(went_back, store):
    folder, printed = went_back
    found = skipped_rows(folder)
    assert [(row["step"], row["batch"], row["loss"]) for row in found] == [(6, 5, None), (7, 6, None), (8, 7, None)]
    for row in found:
        assert row["documents"] == data_of(tiny(), store).documents(row["batch"])
    shown = found[0]["documents"][0]
    assert f"step 6: the loss was nan and the gradient's norm nan, so its update was left out; batch 5 has tokens of "\
        f"{shown['name']} from {shown['offset']}" in printed  # fmt: skip


def test_stopped_anywhere_it_comes_to_the_same(went_back, corpus, tmp_path, monkeypatch):
    """While in doubt; after it went back, before a checkpoint knows of it; after one does."""
    whole = stream.iterate
    for last in (7, 8 + 1, 8 + 3, None):  # the last batch that is read
        with monkeypatch.context() as patch:
            poisoned.poison(BAD, poisoned.not_finite, patch.setattr)
            harmed = stream.iterate

            def until(dataset, start, stop, harmed=harmed, last=last):
                for number, batch in enumerate(harmed(dataset, start, stop), start):
                    if number - 1 == last:
                        raise KeyboardInterrupt
                    yield batch

            patch.setattr(stream, "iterate", until)
            with pytest.raises(KeyboardInterrupt) if last else contextlib.nullcontext():
                loop.train(run_of(corpus), epath.Path(tmp_path / "run"))
    assert stream.iterate is whole
    assert losses(tmp_path / "run") == losses(went_back[0])
    assert remembered(tmp_path / "run") == remembered(went_back[0])
    assert skipped_rows(tmp_path / "run") == skipped_rows(went_back[0])


@pytest.mark.slow
def test_past_a_spike(corpus, tmp_path, monkeypatch, capsys):
    """Two high losses, of which the second is of a step to be saved; the checkpoint just before may be spoilt."""
    rule = RecoveryConfig(spike_steps=2, spike_window=4, spike_deviations=1.0, spike_floor=0.2)
    poisoned.poison((10, 11), poisoned.shuffled, monkeypatch.setattr)
    loop.train(run_of(corpus, num_steps=16, checkpoint_every=2, recovery=rule), epath.Path(tmp_path / "run"))
    (row,) = remembered(tmp_path / "run")["ledger"]
    assert (row["step"], row["first_batch"], row["num_batches"]) == (8, 8, 4)  # the newest from before step 9
    assert "from step 11 to 12 the loss was above " in row["reason"]
    assert [(row["step"], row["batch"]) for row in skipped_rows(tmp_path / "run")] == [(11, 10), (12, 11)]
    printed = capsys.readouterr().out
    assert "going back to step 8, past batches 8 to 11" in printed and "; removed the later checkpoints: 10" in printed
    assert "going on from the checkpoint of step 8" in printed
    assert list(losses(tmp_path / "run")) == list(range(1, 17))


def test_with_nothing_to_go_back_to_it_begins_anew_and_not_for_ever(corpus, tmp_path, monkeypatch, capsys):
    poisoned.poison(range(2, 100), poisoned.not_finite, monkeypatch.setattr)
    with pytest.raises(Failed, match="although it rolled back to step 0 recovery.max_returns=2 times"):
        loop.train(run_of(corpus, recovery=RecoveryConfig(max_returns=2)), epath.Path(tmp_path / "run"))
    printed = capsys.readouterr().out
    assert "going back to step 0, past batches 0 to 4" in printed
    assert "going back to step 0, past batches 5 to 7" in printed


def test_where_no_checkpoint_can_be_read_it_does_not_go_back(corpus, tmp_path, monkeypatch):
    """Storage that is lost for a while is not to cost the run what it saved."""

    def lost(*_):
        raise manifest.Damaged("state can't be read (Input/output error)")

    poisoned.poison(BAD, poisoned.not_finite, monkeypatch.setattr)
    monkeypatch.setattr(manifest, "verify", lost)
    with pytest.raises(Failed, match="none of the 1 checkpoints in .* can be read, so nothing is removed"):
        loop.train(run_of(corpus), epath.Path(tmp_path / "run"))
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [4]


@pytest.mark.slow
def test_saves_of_a_run_that_is_stopped_in_doubt_remove_none(went_back, corpus, tmp_path, monkeypatch):
    """Stopped again and again, it still has what it must go back to, and comes to the same."""
    config = run_of(corpus, checkpoint=CheckpointConfig(keep=1))
    poisoned.poison(BAD, poisoned.not_finite, monkeypatch.setattr)
    for last in (6, 7):
        with monkeypatch.context() as patch:
            real = preemption.tick

            def tick(real=real, last=last):
                if heartbeat.beat().step >= last:
                    raise Preempted("told to")
                real()

            patch.setattr(preemption, "tick", tick)
            with pytest.raises(Preempted, match=f"told to: step {last} is saved"):
                loop.train(config, epath.Path(tmp_path / "run"))
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [4, 6, 7]
    loop.train(config, epath.Path(tmp_path / "run"))
    assert losses(tmp_path / "run") == losses(went_back[0])
    assert remembered(tmp_path / "run") == remembered(went_back[0])
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [12]


@pytest.mark.slow
def test_a_save_waits_while_in_doubt(corpus, tmp_path, monkeypatch, capsys):
    poisoned.poison((3,), poisoned.not_finite, monkeypatch.setattr)
    config = run_of(corpus, num_steps=8, checkpoint_every=2, checkpoint=CheckpointConfig(keep=9))
    loop.train(config, epath.Path(tmp_path / "run"))
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [2, 6, 8]
    assert "step 4 is not saved, since the run may have to go back to before it" in capsys.readouterr().out
    assert [row["skipped_updates"] for row in rows(tmp_path / "run") if "loss" in row] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert [row["loss"] is None for row in rows(tmp_path / "run") if "loss" in row] == [False] * 3 + [True] + [
        False
    ] * 4


def test_a_stop_keeps_what_was_saved(corpus, tmp_path, monkeypatch):
    poisoned.poison((5, 6), poisoned.not_finite, monkeypatch.setattr)
    config = run_of(corpus, checkpoint_every=2, recovery=RecoveryConfig(on_nonfinite="stop", nonfinite_steps=2))
    with pytest.raises(Failed, match="The run stops, because from step 6 to 7 the loss was nan"):
        loop.train(config, epath.Path(tmp_path / "run"))
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [4, 6]


@pytest.mark.slow
def test_killed_after_it_went_back(corpus, tmp_path):
    """The real command and a real kill, on one device, before a checkpoint knows of it."""

    def start(name):
        python, _, _, *arguments = long_run(corpus, tmp_path / name, "--config.num_steps=32")
        pipes = dict(stdout=(tmp_path / f"{name}.out").open("a"), stderr=subprocess.STDOUT)
        told = environment(1) | {"BATCHES": "23,24,25"}
        return subprocess.Popen([python, poisoned.__file__, *arguments], env=told, **pipes)

    assert start("whole").wait() == 0
    process, log = start("killed"), tmp_path / "killed.out"
    while process.poll() is None and not (
        "going back" in log.read_text() and '{"step": 24, ' in (tmp_path / "killed" / "metrics.jsonl").read_text()
    ):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert remembered(tmp_path / "killed")["ledger"] == []
    assert start("killed").wait() == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert log.read_text().count("going back to step 20, past batches 20 to 25") == 2
