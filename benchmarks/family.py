"""Models of the quickstart's kind by their width, so small that a grid of them is minutes of CPU (NOTES.md, Scaling).

    gptjax scale --config=benchmarks/family.py --workdir=runs/scale --sizes=16,24,32,48,64,96 --budgets=3e10,1e11,3e11

Bytes of the standard library, two layers; batch by the law of configs/dial.py, learning rate by the maximal-update
parametrization.
"""

from gptjax.training.config.schema import default

SEQ_LEN = 64


def get_config(width, tokens):
    config = default()
    config.seq_len = SEQ_LEN
    config.batch_size = max(1, round(0.58 * float(tokens) ** 0.571 / SEQ_LEN))
    config.num_steps = max(1, round(float(tokens) / (config.batch_size * SEQ_LEN)))
    config.eval_every = config.checkpoint_every = config.num_steps
    config.eval_batches = 4096 // config.batch_size
    config.log_every = 50
    config.model.num_layers = 2
    config.model.embed_dim = int(width)
    config.model.head_dim = 16
    config.model.num_heads = max(1, int(width) // 16)
    config.model.mup_base_width = 64
    config.model.norm = "rmsnorm"
    config.model.positions = "rope"
    config.model.activation = "relu2"
    config.model.biases = False
    config.model.qk_norm = True
    config.model.scan_unroll = 2
    config.loss.num_chunks = 1
    config.optimizer.peak_learning_rate = 1e-2
    config.optimizer.schedule = "linear"
    config.optimizer.final_fraction = 0.0
    config.optimizer.warmup_steps = config.num_steps // 20
    config.tokenizer.kind = "byte"
    return config
