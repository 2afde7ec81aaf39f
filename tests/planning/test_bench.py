import json

import pytest
from support.command import DEBUG


@pytest.mark.slow
def test_bench(gptjax_main):
    argv = ["bench", f"--config={DEBUG}", "--steps=3", "--config.mesh.tensor=2", "--config.grad_accum_steps=2"]
    argv.append("--config.curriculum.batch_size=0: 8; 5: 16")
    code, out, _ = gptjax_main(*argv, "--json")
    made = json.loads(out)
    assert code == 0 and (made["devices"], made["steps"], made["mesh"]["tensor"]) == (8, 3, 2)
    assert made["tokens_per_second"] == pytest.approx(16 * 64 / made["step_seconds"])
    assert 0 < made["optimizer_seconds"] < made["step_seconds"]
    assert 0 < made["forward_seconds"] < made["step_seconds"]
    assert 4 < made["loss"] < 6  # ln 257 = 5.5, and the model learns the repeated batch
    assert made["mfu"] is None and made["hbm_bytes"] > 100_000
    code, out, _ = gptjax_main(*argv)
    assert code == 0 and "tokens/s" in out and "MFU unknown" in out


def test_bench_of_no_steps(gptjax_main):
    code, _, error = gptjax_main("bench", f"--config={DEBUG}", "--steps=0")
    assert code == 2 and "--steps=0" in error


def test_bench_of_an_unknown_tokenizer(gptjax_main):
    code, _, error = gptjax_main("bench", f"--config={DEBUG}", "--config.tokenizer.kind=sentencepeice")
    assert code == 2 and 'Did you mean "sentencepiece"?' in error
