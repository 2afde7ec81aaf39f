"""GPT-2 XL (Radford et al. 2019): 1.56B parameters, 48 layers of width 1600, context 1024."""

import pathlib
import runpy


def get_config():
    config = runpy.run_path(pathlib.Path(__file__).with_name("gpt2_124m.py"))["get_config"]()
    config.grad_accum_steps = 8
    config.model.num_layers = 48
    config.model.num_heads = 25
    config.model.embed_dim = 1600
    config.optimizer.peak_learning_rate = 2e-4
    return config
