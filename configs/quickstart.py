"""A small GPT on the source code of Python's standard library, in minutes on a laptop.

    gptjax train --config=configs/quickstart.py --workdir=runs/quickstart

Hardware: 2 CPU cores. Time: under five minutes, compilation included. Held-out loss: 2.66 nats a token, 1.27 bits
a byte, where gzip -9 needs 1.91 and xz -9 needs 1.70. The samples look like Python.

The recipe won a small search (benchmarks/NOTES.md, Quickstart): Muon, small batches, and a small model
that sees more tokens rather than a large one that sees few.
"""

from gptjax.config import default


def get_config():
    config = default()
    config.num_steps = 1200
    config.batch_size = 8
    config.seq_len = 256
    config.sample_prompt = "    def __init__(self"
    config.eval_every = 200
    config.checkpoint_every = 200
    config.model.num_layers = 4
    config.model.num_heads = 2
    config.model.embed_dim = 128
    config.model.norm = "rmsnorm"
    config.model.positions = "rope"
    config.model.activation = "relu2"
    config.model.biases = False
    config.model.qk_norm = True
    config.model.scan_unroll = 4
    config.optimizer.name = "muon"
    config.optimizer.peak_learning_rate = 1e-2
    config.optimizer.schedule = "wsd"
    config.optimizer.warmup_steps = 30
    config.optimizer.decay_fraction = 0.4
    config.optimizer.final_fraction = 0.0
    return config
