"""GPT-2 large (Radford et al. 2019): 774M parameters, 36 layers of width 1280, context 1024."""

import pathlib
import runpy


def get_config():
    config = runpy.run_path(pathlib.Path(__file__).with_name("gpt2_124m.py"))["get_config"]()
    config.grad_accum_steps = 4
    config.model.num_layers = 36
    config.model.num_heads = 20
    config.model.embed_dim = 1280
    config.optimizer.peak_learning_rate = 2.5e-4
    return config
