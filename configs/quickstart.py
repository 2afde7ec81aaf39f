"""quickstart"""

from gptjax.config import default


def get_config():
    config = default()
    config.num_steps = 400
    config.batch_size = 16
    config.seq_len = 256
    config.eval_every = 200
    config.checkpoint_every = 200
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.embed_dim = 256
    config.model.norm = "rmsnorm"
    config.model.positions = "rope"
    config.model.biases = False
    config.model.qk_norm = True
    config.model.scan_unroll = 4
    config.optimizer.peak_learning_rate = 5e-3
    config.optimizer.name = "muon"
    config.optimizer.warmup_steps = 20
    config.optimizer.schedule = "wsd"
    config.optimizer.final_fraction = 0.0
    return config
