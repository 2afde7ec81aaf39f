"""A Llama of 1.04B parameters, in the shape of Llama 3.2 1B (Meta 2024) but for its smaller vocabulary: 16 layers of
width 2048, 8 key/value heads.

    gptjax train --config=configs/llama_1b.py --workdir=/data/llama_1b \
        --config.data.source=text --config.data.path='/data/corpus/*.txt'

Hardware: 16 chips of TPU v5e, or 8 GPUs of 80 GB; all of them by full sharding. Its tokenizer has 32,768 pieces,
trained on the corpus. 50,000 updates are 105B tokens.
Plan (compiled, not run): v5e:4x4 10.7 of 15.75 GiB a chip, MFU at most 54 %. No loss or speed is claimed.
"""

from gptjax.config import default


def get_config():
    config = default()
    config.num_steps = 50_000
    config.batch_size = 1024
    config.seq_len = 2048
    config.grad_accum_steps = 2
    config.eval_every = 1000
    config.eval_batches = 20
    config.checkpoint_every = 1000
    config.compiler_options = "xla_tpu_scoped_vmem_limit_kib=49152"  # larger tiles in what is fused: NOTES, Products
    config.model.num_layers = 16
    config.model.num_heads = 32
    config.model.num_kv_heads = 8
    config.model.embed_dim = 2048
    config.model.mlp_dim = 8192
    config.model.norm = "rmsnorm"
    config.model.positions = "rope"
    config.model.rope_theta = 500_000.0
    config.model.activation = "swiglu"
    config.model.biases = False
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.loss.num_chunks = 8
    config.loss.z_loss = 1e-4
    config.optimizer.peak_learning_rate = 4e-4
    config.optimizer.warmup_steps = 2000
    config.tokenizer.vocab_size = 32_768
    config.data.heldout_fraction = 0.001
    config.checkpoint.keep_every = 10_000
    return config
