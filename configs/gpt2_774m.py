"""GPT-2 large (Radford et al. 2019): 774M parameters, 36 layers of width 1280, context 1024.

    gptjax train --config=configs/gpt2_774m.py --workdir=runs/gpt2_774m \
        --config.data.source=text --config.data.path='/data/openwebtext/*.txt'

Hardware: 16 chips of TPU v5e; the batch of 0.5M tokens is that of the GPT-2 reproductions, and 20,000 updates are
10.5B tokens. Without --config.data it trains on Python's standard library, which only shows that the machine works.
Plan (compiled, not run): v5e:4x4 11.7 of 15.75 GiB a chip, MFU at most 51 %. No loss or speed is claimed.
"""

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
