import json
import math

import jax
import numpy as np
import pytest
from flax import nnx
from support.runs import GPT2, LLAMA, mesh_of

from gptjax.data.stream import stream
from gptjax.data.stream.mixture import Corpus
from gptjax.evaluation.heldout import evaluate
from gptjax.models.interface import Inputs
from gptjax.models.loss import LossConfig
from gptjax.models.transformer import Transformer
from gptjax.parallel import sharding
from gptjax.runtime import heartbeat, watchdog
from gptjax.runtime.watchdog import WatchdogConfig

SEQ_LEN = 32


def on_mesh(config, store, shape, batch_size=16, max_windows=0, loss=LossConfig()):
    mesh = mesh_of(*shape)
    with jax.set_mesh(mesh):
        model = jax.jit(lambda: Transformer(config.resolved(), 257, SEQ_LEN, nnx.Rngs(0)))()
        return evaluate(
            model,
            corpus=Corpus({"": store}),
            mesh=mesh,
            seq_len=SEQ_LEN,
            batch_size=batch_size,
            max_windows=max_windows,
            loss=loss,
        )


@pytest.fixture(scope="module", params=[GPT2, LLAMA], ids=["gpt2", "llama"])
def expected(request, store):
    """Returns (config, sums over the whole held-out split) by NumPy in float64 from the model's hidden states."""
    config = request.param.resolved()
    windows = -(-(store.split("heldout").tokens - 1) // SEQ_LEN)
    (batch,) = stream.heldout_batches(store, seq_len=SEQ_LEN, batch_size=windows, rows=np.arange(windows))
    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        model = jax.jit(lambda: Transformer(config, 257, SEQ_LEN, nnx.Rngs(0)))()
        placement = jax.NamedSharding(mesh, sharding.spec("act_batch", "act_seq"))
        forward = jax.jit(lambda model, *fields: (model.hidden(Inputs(*fields), None).x_BTD, model.output().table[...]))
        x, table = jax.device_get(
            forward(model, *jax.device_put((batch.inputs, batch.positions, batch.segments), placement))
        )
    logits = np.asarray(x, np.float64) @ np.asarray(table, np.float64)[:257].T
    if config.logits_softcap:
        logits = config.logits_softcap * np.tanh(logits / config.logits_softcap)
    log_z = np.log(np.exp(logits).sum(-1))
    nll = log_z - np.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
    correct = logits.argmax(-1) == batch.targets
    return request.param, [(batch.weights * part).sum() for part in (nll, correct, np.ones_like(nll))]


@pytest.mark.parametrize("shape, chunks", [((1, 1, 1), 1), ((2, 2, 2), 4)], ids=str)
def test_numbers_are_those_of_numpy(expected, store, shape, chunks):
    config, (nll, correct, tokens) = expected
    split = store.split("heldout")
    found = on_mesh(config, store, shape, loss=LossConfig(num_chunks=chunks))
    assert found.tokens == tokens == split.tokens - 1
    assert found.loss == pytest.approx(nll / tokens, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(nll / math.log(2) / split.bytes, rel=1e-5)
    assert found.accuracy == pytest.approx(correct / tokens, abs=1e-9)


def test_the_limit_of_a_step_holds_for_its_batches(store):
    """Each step counts in the phase of the evaluation, not in the surrounding phase."""
    heartbeat.begin()
    on_mesh(GPT2, store, (1, 1, 1), batch_size=16)
    with heartbeat.phase("evaluating"):
        assert 0 < watchdog.limit(heartbeat.beat(), WatchdogConfig()) == WatchdogConfig().step_seconds
    assert "starting" not in heartbeat._heart.longest


def test_bytes_are_those_of_the_files(store, corpus):
    """The store counts the bytes of the held-out files on disk; bits per byte divide by this count."""
    parts = [json.loads(line) for line in (store.folder / "heldout" / "documents.jsonl").read_text().splitlines()]
    assert {part["offset"] for part in parts} == {0}
    assert store.split("heldout").bytes == sum(len(open(part["name"], "rb").read()) for part in parts)


@pytest.mark.slow
def test_batch_size_does_not_matter(store):
    """A batch size may not divide over the mesh, or may exceed the windows: the numbers stay."""
    one, other = on_mesh(GPT2, store, (1, 1, 1), batch_size=16), on_mesh(GPT2, store, (2, 2, 2), batch_size=5)
    assert one.tokens == other.tokens
    np.testing.assert_allclose(one[:3], other[:3], rtol=1e-5)


def test_fewer_windows_are_the_first_ones_whatever_the_batch(store):
    some = on_mesh(GPT2, store, (1, 1, 1), max_windows=32)
    np.testing.assert_allclose(on_mesh(GPT2, store, (2, 2, 2), batch_size=12, max_windows=32)[:3], some[:3], rtol=1e-5)
    assert some.tokens == 2 * 16 * SEQ_LEN
    assert some.loss != on_mesh(GPT2, store, (1, 1, 1)).loss
