"""Llama 3.1 8B (Dubey et al. 2024): 8.0B parameters, 32 layers of width 4096, 8 key/value heads, context 8192.

    gptjax train --config=configs/llama_8b.py --workdir=gs://BUCKET/llama_8b \
        --config.data.source=text --config.data.path='gs://BUCKET/corpus/*.txt'

Hardware: 256 chips of TPU v5e or v6e. 240,000 updates of 4.2M tokens are 1.0T tokens.
Plan (compiled, not run): v5e:16x16 9.0 of 15.75 GiB a chip, MFU at most 68 %; v6e:16x16 9.5 of 31.2 GiB, at most 45 %
by an assumed clock. No loss or speed is claimed.
"""

import pathlib
import runpy


def get_config():
    config = runpy.run_path(pathlib.Path(__file__).with_name("llama_1b.py"))["get_config"]()
    config.num_steps = 240_000
    config.batch_size = 512
    config.seq_len = 8192
    config.grad_accum_steps = 1
    config.model.num_layers = 32
    config.model.embed_dim = 4096
    config.model.mlp_dim = 14_336
    config.model.tied_embeddings = False
    config.loss.num_chunks = 8
    config.optimizer.peak_learning_rate = 3e-4
    config.optimizer.warmup_steps = 8000
    config.tokenizer.vocab_size = 128_256
    return config
