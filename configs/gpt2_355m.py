"""GPT-2 medium (Radford et al. 2019): 355M parameters, 24 layers of width 1024, context 1024.

    gptjax train --config=configs/gpt2_355m.py --workdir=runs/gpt2_355m \
        --config.data.source=text --config.data.path='/data/openwebtext/*.txt'

Hardware: 8 chips of TPU v5e; the batch of 0.5M tokens is that of the GPT-2 reproductions, and 20,000 updates are
10.5B tokens. Without --config.data it trains on Python's standard library, which only shows that the machine works.
Plan (compiled, not run): v5e:2x4 12.2 of 15.75 GiB a chip, MFU at most 46 %. No loss or speed is claimed.
"""

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
