import json
from types import SimpleNamespace

import jax
import pytest
from etils import epath
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from gptjax.errors import Failed
from gptjax.parallel.hardware import peak_flops
from gptjax.runtime import profiling
from gptjax.training.monitoring import records
from gptjax.training.monitoring.metrics import Log
from gptjax.training.monitoring.writers import Writers

UNWATCHED = SimpleNamespace(see=lambda step, loss, grad_norm: "")


def log_of(folder, bar, start, watch=UNWATCHED, log_every=10, tokens_per_step=1, flops_per_token=1, peak=None):
    def done(step):
        return step * tokens_per_step, step * tokens_per_step * flops_per_token

    writers = Writers(epath.Path(folder), start, bar)
    return Log(writers, bar, start, watch, log_every, SimpleNamespace(done=done, peak=peak))


def test_rows_past_the_checkpoint_and_a_cut_one_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in range(1, 7)]
    lines[2:2] = [json.dumps({"step": 2, "eval_loss": 0.5}) + "\n"]
    path.write_text("".join(lines) + '{"step": 7, "lo')
    with log_of(tmp_path, None, 4) as log:
        pass
    assert path.read_text() == "".join(lines[:5])
    assert set(log.losses) == {2}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


@pytest.mark.parametrize("line", [b"3", b"{}", b'{"step": "1"}', b'{"step": true}', b"\xff", b"\0" * 100,
                                  b"[" * 100_000, b'{"step": ' + b"9" * 5000 + b"}"])  # fmt: skip
def test_what_is_no_row_is_dropped(tmp_path, line):
    """As a disk that lost power leaves it."""
    path = epath.Path(tmp_path) / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2, "loss": NaN}\n{"step": 3}\n')
    assert [row["step"] for row in records.rows_until(path, 2)] == [1, 2]


def test_a_peak_is_known_or_none():
    cards = [SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")] * 8
    assert peak_flops(cards, "bfloat16") == 8 * 989e12
    assert peak_flops(cards, "float32") is None
    assert peak_flops([SimpleNamespace(device_kind="cpu")], "bfloat16") is None


def test_the_watch_sees_a_step_before_the_next_save(tmp_path):
    def see(step, loss, grad_norm):
        raise Failed(f"step {step}: {loss}, {grad_norm}")

    with pytest.raises(Failed, match="step 1: nan, 1.0"):
        with log_of(tmp_path, SimpleNamespace(), 0, SimpleNamespace(see=see)) as log:
            log.push(1, {"loss": float("nan"), "learning_rate": 1.0, "grad_norm": 1.0})
            with log.paused():
                raise AssertionError("reached the save")


def test_rows_come_one_step_late_and_pauses_do_not_count(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("gptjax.training.monitoring.metrics.time.perf_counter", lambda: clock[0])
    shown = []
    bar = SimpleNamespace(update=lambda step, text: shown.append((step, text)), print=shown.append)
    with log_of(tmp_path, bar, 0, log_every=2, tokens_per_step=100, flops_per_token=6, peak=1000.0) as log:
        for step in range(1, 5):
            clock[0] += 3.0
            log.push(step, {"loss": float(step), "learning_rate": 1.0, "grad_norm": 1.0, "skipped": 0})
            assert len(shown) == (step - 1) // 2
            if step == 2:
                with log.paused():
                    clock[0] += 1000.0
                assert len(shown) == 1
                shown.clear(), shown.append("waited for")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"], row["tokens_seen"]) for row in rows] == [(2, 2.0, 200), (4, 4.0, 400)]
    assert [row["step_seconds"] for row in rows] == [3.0, 3.0]
    assert [row["tokens_per_second"] for row in rows] == pytest.approx([100 / 3] * 2)
    assert [row["mfu"] for row in rows] == pytest.approx([0.2] * 2)
    assert shown[-1][0] == 4 and "MFU 20.0%" in shown[-1][1]


def test_steps_of_other_flops_are_not_measured_together(tmp_path, monkeypatch):
    """A curriculum of 100 FLOPs a step, and from the fifth on of 300, with a floor of three times the time."""
    clock = [0.0]
    monkeypatch.setattr("gptjax.training.monitoring.metrics.time.perf_counter", lambda: clock[0])
    bar = SimpleNamespace(update=lambda step, text: None)
    work = SimpleNamespace(done=lambda step: (step, 100 * step + 200 * max(0, step - 5)), peak=1000.0)
    writers = Writers(epath.Path(tmp_path), 0, bar)
    with Log(writers, bar, 0, UNWATCHED, 2, work) as log:
        for step in range(1, 11):
            clock[0] += 1.0 if step <= 5 else 3.0
            log.push(step, {"loss": 1.0, "learning_rate": 1.0, "grad_norm": 1.0, "skipped": 0})
    # The rows are of steps 2 and 4, of 6, in which one was of each, and of 8 and 10.
    assert len(log.step_seconds) == 2 and log.floor_seconds == pytest.approx(0.3)


def test_the_row_of_a_start(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("gptjax.training.monitoring.metrics.time.perf_counter", lambda: clock[0])
    with log_of(tmp_path, SimpleNamespace(print=lambda line: None), 40) as log:
        log.starting(90.0, {"compile_seconds": 3.0, "compilation_cache": "hit"})
        for step in (41, 42, 43):
            clock[0] += 5.0
            log.push(step, {"loss": 1.0, "learning_rate": 1.0, "grad_norm": 1.0})
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # The first step is known to be done when the second was pushed.
    assert row.pop("time") and row == {
        "step": 40,
        "compile_seconds": 3.0,
        "compilation_cache": "hit",
        "first_step_seconds": 20.0,
    }


@pytest.fixture
def cache(tmp_path):
    """An empty compilation cache, which takes programs that are quick to compile too."""
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], str(tmp_path / "cache"))
    jax.config.update(names[1], 0.0)
    reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


def test_the_compilation_cache_misses_and_hits(cache):
    program = jax.jit(lambda x: x @ x + 1)
    seen = []
    for _ in range(2):
        with profiling.compiling() as facts:
            program.lower(jax.ShapeDtypeStruct((16, 16), "float32")).compile()
        seen.append(facts["compilation_cache"])
        jax.clear_caches()
    assert seen == ["miss", "hit"] and facts["compile_seconds"] > 0
    jax.config.update("jax_compilation_cache_dir", None)
    with profiling.compiling() as facts:
        program.lower(jax.ShapeDtypeStruct((16, 16), "float32")).compile()
    assert facts["compilation_cache"] == "off"


def test_the_memory_that_was_in_use(monkeypatch):
    devices = [SimpleNamespace(memory_stats=lambda peak=peak: {"peak_bytes_in_use": peak}) for peak in (3, 7, 5)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert profiling.measured_bytes() == 7
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(memory_stats=lambda: None)])
    assert profiling.measured_bytes() is None
