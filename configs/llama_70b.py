"""Llama 2 70B (Touvron et al. 2023): 69B parameters, 80 layers of width 8192, 8 key/value heads, context 4096.

    gptjax train --config=configs/llama_70b.py --workdir=gs://BUCKET/llama_70b \
        --config.data.source=text --config.data.path='gs://BUCKET/corpus/*.txt'

Hardware: 512 chips of TPU v5p. 500,000 updates of 4.2M tokens are 2.1T tokens.
Plan (compiled, not run): v5p:8x8x8 37.3 of 95.7 GiB a chip, MFU at most 77 %. No loss or speed is claimed.
"""

import pathlib
import runpy


def get_config():
    config = runpy.run_path(pathlib.Path(__file__).with_name("llama_1b.py"))["get_config"]()
    config.num_steps = 500_000
    config.batch_size = 1024
    config.seq_len = 4096
    config.grad_accum_steps = 1
    config.model.num_layers = 80
    config.model.num_heads = 64
    config.model.embed_dim = 8192
    config.model.mlp_dim = 28_672
    config.model.rope_theta = 10_000.0
    config.model.tied_embeddings = False
    config.model.remat = "full,query=save,attention_out=save"
    config.loss.num_chunks = 8
    config.optimizer.peak_learning_rate = 1.5e-4
    config.tokenizer.vocab_size = 32_000
    return config
