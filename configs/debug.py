"""The whole way in seconds, for tests and for a first look: a byte-level GPT-2 of 0.1M parameters.

    gptjax train --config=configs/debug.py --workdir=runs/debug

Hardware: any. Time: about 15 s on 2 CPU cores. Held-out loss after 60 steps: about 3.2 nats a byte.
"""

from gptjax.config import default


def get_config():
    config = default()
    config.num_steps = 60
    config.batch_size = 8
    config.seq_len = 64
    config.log_every = 1
    config.eval_every = 30
    config.eval_batches = 4
    config.checkpoint_every = 20
    config.model.num_layers = 2
    config.model.num_heads = 4
    config.model.embed_dim = 64
    config.optimizer.peak_learning_rate = 5e-3
    config.optimizer.warmup_steps = 10
    config.tokenizer.kind = "byte"
    return config
