import json

import numpy as np
import pytest
from etils import epath
from support.command import losses, rows
from support.runs import mesh_of, tiny
from support.stores import write_store

from gptjax.data.store.store import Store
from gptjax.data.stream import curriculum
from gptjax.data.stream.curriculum import CurriculumConfig, Phase
from gptjax.data.stream.mixture import PERIOD, Corpus, MixtureConfig
from gptjax.data.stream.stream import Stream
from gptjax.errors import Refused
from gptjax.models.config import ModelConfig
from gptjax.training import loop
from gptjax.training.config import schema
from gptjax.training.monitoring import rollback, skipped_batches
from gptjax.training.optim.config import OptimizerConfig

L = 32


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("curriculum") / "one", 4001)


def stream_of(folder, lengths, sizes="4", history=(), batch=0):
    planned = curriculum.phases(MixtureConfig(), CurriculumConfig(lengths, sizes), L, 4)
    return Stream(Corpus({"": Store.open(folder)}), curriculum.going_on(list(history), planned, batch), L, 0)


def tokens_of(data, batches):
    """Reads, for each row, the tokens of the store that are inputs of the row."""
    spans = [span for batch in batches for source in data.sources(batch) for span in source.spans]
    return [range(start, start + length) for _, start, length in spans]


def test_an_epoch_of_changing_lengths_has_each_token_once(one):
    data = stream_of(one, "0: 8; 10: 16; 30: 32", "0: 4; 20: 8")
    shapes = [data.batch(batch, np.arange(data.phase(batch).batch_size)).inputs.shape for batch in (0, 9, 10, 20, 30)]
    assert shapes == [(4, 8), (4, 8), (4, 16), (8, 16), (8, 32)]
    seen = [token for part in tokens_of(data, range(30 + 6)) for token in part]
    assert len(seen) == len(set(seen)) == 320 + 640 + 1280 + 6 * 256
    order = [start for part in tokens_of(data, range(36)) for start in part]
    constant = [start for part in tokens_of(stream_of(one, "32", "1"), range(len(order) // L)) for start in part]
    assert order == constant[: len(order)]


def test_only_some_rows_are_read_as_before(one):
    data = stream_of(one, "0: 8; 10: 32", "0: 8; 10: 2")
    for batch, count in ((3, 8), (12, 2)):
        whole = data.batch(batch, np.arange(count))
        for row in range(count):
            part = data.batch(batch, np.array([row]))
            for field, row_field in zip(whole, part, strict=True):
                np.testing.assert_array_equal(field[[row]], row_field)


def test_a_longer_sequence_goes_on_at_its_next_multiple(one):
    data = stream_of(one, "0: 8; 3: 32", "0: 1; 3: 1")
    assert [each[""] for each in curriculum.starts(data.phases)] == [0, 32]
    first = tokens_of(data, range(4))
    assert {token for part in first[:3] for token in part}.isdisjoint(first[3])


def test_going_on_with_what_was_planned_changes_nothing():
    planned = [Phase(0, 8, 4, {"": PERIOD}), Phase(10, 16, 4, {"": PERIOD}), Phase(30, 32, 8, {"": PERIOD})]
    for batch in (0, 1, 9, 10, 11, 29, 30, 31, 1000):
        history = [phase for phase in planned if phase.first <= batch]
        assert curriculum.going_on(history, planned, batch) == planned
    other = [Phase(0, 32, 8, {"": PERIOD})]
    assert [phase.first for phase in curriculum.going_on(planned, other, 12)] == [0, 10, 12]
    assert [phase.first for phase in curriculum.going_on(planned, other, 10)] == [0, 10]
    assert curriculum.going_on(planned, other, 40) == planned
    with pytest.raises(Refused, match="tokens were read or skipped; at most"):
        curriculum.going_on(planned, other, 1 << 46)


@pytest.mark.parametrize("lengths, sizes, words", [
    ("0: 24", "", "curriculum.seq_len has 24, which does not divide seq_len=32"),
    ("0: 64", "", "curriculum.seq_len has 64, which does not divide seq_len=32"),
    ("0: 0", "", "curriculum.seq_len has 0: each value must be at least 1"),
    ("0: -8", "", "each value must be at least 1"),
    ("8 16", "", 'curriculum.seq_len has "8 16"; "BATCH: VALUE" must start at 0'),
    ("", "0: 4; 5: 0", "curriculum.batch_size has 0"),
    ("", "0: 4; 5: 6; 5: 8", '"5: 8"; "BATCH: VALUE" must'),
    ("", "0: 4; " + "9" * 5000 + ": 8", "must start at 0"),
    ("", "0: 6", "batch_size=6 is not divisible by grad_accum_steps=4"),
    ("0: 4", "", "seq_len=4 is not divisible by loss.num_chunks=8"),
])  # fmt: skip
def test_what_is_refused(lengths, sizes, words):
    with pytest.raises(Refused) as refusal:
        tiny(seq_len=L, batch_size=4, grad_accum_steps=4, curriculum=CurriculumConfig(lengths, sizes))
    assert words in str(refusal.value)


def test_a_batch_of_any_phase_has_to_divide_over_the_mesh():
    config = tiny(seq_len=L, batch_size=8, curriculum=CurriculumConfig(batch_size="0: 8; 5: 4"))
    schema.check_batch(config, mesh_of(4, 1, 1))
    with pytest.raises(Refused, match="A micro-batch of 4 sequences .* over the 8 devices"):
        schema.check_batch(config, mesh_of(8, 1, 1))


def test_steps_within():
    ledger = [dict(step=4, first_batch=4, num_batches=3), dict(step=6, first_batch=9, num_batches=2)]
    read = [skipped_batches.batch_index(ledger, step) for step in range(12)]
    assert read == [0, 1, 2, 3, 7, 8, 11, 12, 13, 14, 15, 16]
    for step in range(13):
        for first, stop in ((0, 5), (5, 12), (3, 100), (0, 9)):
            expected = sum(first <= batch < stop for batch in read[:step])
            assert skipped_batches.steps_within(ledger, step, first, stop) == expected, (step, first, stop)


def run_of(store, lengths, sizes, **changes):
    own = dict(num_steps=7, checkpoint_every=2, eval_every=7, log_every=1, num_samples=0, seq_len=L, batch_size=8)
    rate = OptimizerConfig(peak_learning_rate=3e-3, warmup_steps=2, schedule="constant")
    mixed = MixtureConfig(f"one={store}", "one 1")
    own |= dict(optimizer=rate, mixture=mixed, curriculum=CurriculumConfig(lengths, sizes))
    return tiny(ModelConfig(num_layers=1, num_heads=2, embed_dim=16), **(own | changes))


@pytest.mark.slow
def test_a_run_of_several_shapes(one, tmp_path, capfd):
    """Stopped and changed on the way it is, to the last bit, the run that planned it; what it says counts tokens."""
    loop.train(run_of(one, "0: 8; 3: 32", "0: 8; 5: 16; 7: 24"), epath.Path(tmp_path / "planned"))
    assert "for batches of 8 × 8, 8 × 32, 16 × 32; at most" in capfd.readouterr().out  # batch 7 is none of 7 steps'
    loop.train(run_of(one, "8", "", num_steps=3), epath.Path(tmp_path / "changed"))
    loop.train(run_of(one, "0: 8; 3: 32", "0: 8; 5: 16", num_steps=4), epath.Path(tmp_path / "changed"))
    loop.train(run_of(one, "32", "0: 8; 5: 16"), epath.Path(tmp_path / "changed"))
    assert losses(tmp_path / "changed") == losses(tmp_path / "planned")
    seen = {row["step"]: row["tokens_seen"] for row in rows(tmp_path / "planned") if "loss" in row}
    assert seen == {1: 64, 2: 128, 3: 192, 4: 448, 5: 704, 6: 1216, 7: 1728}
    saved = json.loads((tmp_path / "changed/checkpoints/step_00000007/manifest.json").read_text())["phases"]
    assert [(phase["first"], phase["batch_size"], phase["seq_len"]) for phase in saved] == [
        (0, 8, 8),
        (3, 8, 32),
        (5, 16, 32),
    ]


@pytest.mark.slow
def test_going_back_to_a_shape_from_before_this_process_began(one, tmp_path, monkeypatch):
    def run(steps):
        loop.train(run_of(one, "0: 8; 4: 32", "", num_steps=steps), epath.Path(tmp_path))

    run(4)
    troubles, go_on = [rollback.GoBack(3, 3, 3, "why", "where", [])], loop.train_steps

    def going_on(*args):
        if troubles:
            raise troubles.pop()
        return go_on(*args)

    monkeypatch.setattr(loop, "train_steps", going_on)
    run(5)
    assert {row["step"]: row["tokens_seen"] for row in rows(tmp_path) if "loss" in row} == {
        1: 64, 2: 128, 3: 192, 4: 448, 5: 704}  # fmt: skip
