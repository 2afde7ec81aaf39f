"""GPT-2 small (Radford et al. 2019): 124M parameters, 12 layers of width 768, context 1024.

    gptjax train --config=configs/gpt2_124m.py --workdir=runs/gpt2_124m \
        --config.data.source=text --config.data.path='/data/openwebtext/*.txt'

Hardware: 8 chips of TPU v5e (or one host's GPUs); the batch of 0.5M tokens is that of the GPT-2 reproductions, and
20,000 updates are 10.5B tokens. Without --config.data it trains on Python's standard library, which only shows that the
machine works.
Plan (compiled, not run): v5e:2x4 9.4 of 15.75 GiB a chip, MFU at most 40 %. No loss or speed is claimed.
"""

from gptjax.config import default


def get_config():
    config = default()
    config.num_steps = 20_000
    config.batch_size = 512
    config.seq_len = 1024
    config.grad_accum_steps = 2
    config.eval_every = 500
    config.eval_batches = 20
    config.checkpoint_every = 500
    config.compiler_options = "xla_tpu_scoped_vmem_limit_kib=32768"  # larger tiles in what is fused: NOTES, Products
    config.model.num_layers = 12
    config.model.num_heads = 12
    config.model.embed_dim = 768
    config.model.dtype = "bfloat16"
    config.model.remat = "dots"
    config.loss.num_chunks = 8
    config.optimizer.peak_learning_rate = 6e-4
    config.optimizer.warmup_steps = 700
    config.tokenizer.vocab_size = 50_257
    config.data.heldout_fraction = 0.001
    config.checkpoint.keep_every = 5000
    return config
