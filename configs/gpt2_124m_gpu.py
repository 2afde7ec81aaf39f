"""GPT-2 small on one GPU, to debug: bfloat16 and cuDNN's flash attention; 98M parameters, as the vocabulary is smaller.

    gptjax train --config=configs/gpt2_124m_gpu.py --workdir=runs/gpt2_124m_gpu

Hardware: one NVIDIA card of compute capability 8.0 or later with 24 GB or more. The same batch of 0.5M tokens as
gpt2_124m.py, accumulated over 32 micro-batches. It trains on Python's standard library, whose 12 MB make a vocabulary
of 16,384; name a corpus with --config.data as there.
Plan (compiled, not run): h100:1 14.6 of 80 GiB. No loss or speed is claimed.
"""

import pathlib
import runpy


def get_config():
    config = runpy.run_path(pathlib.Path(__file__).with_name("gpt2_124m.py"))["get_config"]()
    config.num_steps = 200
    config.grad_accum_steps = 32
    config.eval_every = 100
    config.checkpoint_every = 100
    config.model.remat = "none"
    config.optimizer.warmup_steps = 20
    config.tokenizer.vocab_size = 16_384
    config.data.heldout_fraction = 0.02
    return config
