"""Llama 3.1 405B (Dubey et al. 2024): 406B parameters, 126 layers of width 16384, 8 key/value heads, context 8192.

    gptjax train --config=configs/llama_405b.py --workdir=gs://BUCKET/llama_405b \
        --config.data.source=text --config.data.path='gs://BUCKET/corpus/*.txt'

Hardware: two slices of 1024 chips of TPU v5p: a replica on each, fully sharded within it. 1,000,000 updates of 16.8M
tokens are 17T tokens.
Plan (compiled, not run): v5p:8x8x16 with --slices=2 59.5 of 95.7 GiB a chip, MFU at most 76 %. No loss or speed is
claimed.
"""

import pathlib
import runpy


def get_config():
    config = runpy.run_path(pathlib.Path(__file__).with_name("llama_8b.py"))["get_config"]()
    config.num_steps = 1_000_000
    config.batch_size = 2048
    config.model.num_layers = 126
    config.model.num_heads = 128
    config.model.embed_dim = 16_384
    config.model.mlp_dim = 53_248
    config.optimizer.peak_learning_rate = 8e-5
    return config
