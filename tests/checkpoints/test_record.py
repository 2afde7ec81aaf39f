"""The layout of a manifest's record on disk, which later versions must still read."""

import pytest

from gptjax.checkpoints import record
from gptjax.checkpoints.record import Progress, Recovery, RunRecord
from gptjax.data.stream.curriculum import Phase
from gptjax.errors import Refused

LEDGER = [{"step": 4, "first_batch": 4, "num_batches": 2, "reason": "a spike"}]
RECORDED = {
    "config": {"seed": 3, "seq_len": 32},
    "tokenizer_hash": "abc",
    "text_hashes": {"": "def"},
    "tokenizer": {"tokenizer.json": "eyJraW5kIjogImJ5dGUifQ=="},
    "recovery": {"ledger": LEDGER, "losses": [2.5, None]},
    "phases": [{"first": 0, "seq_len": 32, "batch_size": 8, "shares": {"": 10_000}}],
}
RECORD = RunRecord(
    {"seed": 3, "seq_len": 32},
    "abc",
    {"": "def"},
    {"tokenizer.json": b'{"kind": "byte"}'},
    Progress(Recovery(LEDGER, [2.5, None]), [Phase(0, 32, 8, {"": 10_000})]),
)


def test_a_recorded_manifest_is_read_and_written_with_the_same_keys():
    manifest = (
        {"format": 1, "step": 6, "cursor": 6, "saved_at": 1, "versions": {}} | RECORDED | {"arrays": {}, "files": {}}
    )
    assert record.read(manifest, 6, "here") == RECORD
    assert RECORD.to_json() == RECORDED and list(RECORD.to_json()) == list(RECORDED)


def test_a_converted_model_has_no_progress():
    converted = {key: RECORDED[key] for key in ("config", "tokenizer_hash", "text_hashes", "tokenizer")}
    assert record.read(converted, 0, "here").progress is None
    assert record.read(converted, 0, "here").to_json() == converted


@pytest.mark.parametrize("change, words", [
    ({"tokenizer_hash": 3}, "tokenizer_hash is 3, not of type str"),
    ({"text_hashes": {"": 3}}, "is 3, not of type str"),
    ({"tokenizer": {"tokenizer.json": "%"}}, "holds an unreadable tokenizer"),
    ({"tokenizer": 3}, "holds an unreadable tokenizer"),
    ({"config": {}}, "seq_len is missing, not of type int"),
])  # fmt: skip
def test_a_record_that_no_run_wrote_is_refused(change, words):
    with pytest.raises(Refused) as refusal:
        record.read(RECORDED | change, 6, "here")
    assert words in str(refusal.value)
