"""GPT-2 medium (Radford et al. 2019): 355M parameters, 24 layers of width 1024, context 1024."""

import pathlib
import runpy


def get_config():
    config = runpy.run_path(pathlib.Path(__file__).with_name("gpt2_124m.py"))["get_config"]()
    config.grad_accum_steps = 4
    config.model.num_layers = 24
    config.model.num_heads = 16
    config.model.embed_dim = 1024
    config.optimizer.peak_learning_rate = 3e-4
    return config
