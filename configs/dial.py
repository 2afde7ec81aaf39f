"""One dial: the depth gives the width, the heads, the horizon, the batch, the learning rate and the weight decay.

    gptjax train --config=configs/dial.py:12 --workdir=runs/depth12 \
        --config.data.source=text --config.data.path='/data/corpus/*.txt'

Hardware: by the depth; `gptjax plan --config=configs/dial.py:DEPTH --topology=…` tells. No loss or speed is claimed.

- Width: 64 times the depth, in heads of 64.
- Horizon: 20 tokens a parameter (Hoffmann et al. 2022, table 3), or the tokens of a second argument, as in
  `configs/dial.py:12:5e9`: what will be used a lot is worth more of them.
- Batch: 0.58 · tokens^0.571 tokens, to the nearest power of two (Li et al. 2025, "Step Law"). As the critical batch
  size it grows with the tokens and not with the model (Zhang et al. 2024, "How does critical batch size scale").
- Learning rate: 6e-3 at width 256 (Dey et al. 2023, "Cerebras-GPT"), and the same number at all others, by the
  maximal-update parametrization. What that makes of a block's matrices is within a third of Step Law's rate for
  depths of 12 to 32.
- Weight decay: such that weights average over a fifth of the run's updates, whatever its length (Wang and Aitchison
  2024, "How to set AdamW's weight decay as you scale model and dataset size").

    depth    width   parameters    tokens    batch     steps      FLOPs
        2      128         4.6M     0.09B       16     5,600    2.7e+15
        4      256        11.5M     0.23B       32     7,040    1.7e+16
        8      512        42.0M     0.84B       64    12,800    2.3e+17
       12      768       110.1M     2.20B      128    16,800    1.6e+18
       16     1024       234.9M     4.70B      256    17,920    7.1e+18
       20     1280       435.2M     8.70B      256    33,200    2.4e+19
       24     1536       729.9M    14.60B      256    55,680    6.7e+19
       32     2048     1,677.9M    33.55B      512    64,000    3.5e+20
       40     2560     3,229.8M    64.59B     1024    61,600    1.3e+21
"""

import math

from gptjax.config import default
from gptjax.errors import Refused

SEQ_LEN, VOCABULARY, RATE = 1024, 32_768, 6e-3


def get_config(depth, tokens=""):
    config = default()
    layers = int(depth) if depth.isdecimal() and len(depth) < 4 else 0
    if not layers:
        raise Refused(f"configs/dial.py:{depth}: DEPTH is the number of layers, 1 to 999: write configs/dial.py:12.")
    width = 64 * layers
    try:
        horizon = float(tokens) if tokens else 20 * (12 * layers * width**2 + VOCABULARY * width)
        batch = max(1, 2 ** round(math.log2(0.58 * horizon**0.571 / SEQ_LEN)))
    except (ArithmeticError, TypeError, ValueError) as error:
        raise Refused(f"configs/dial.py:{depth}:{tokens}: TOKENS is a number above 0: write 5e9.") from error
    config.num_steps = max(1, round(horizon / (batch * SEQ_LEN)))
    config.batch_size = batch
    config.seq_len = SEQ_LEN
    config.eval_every = config.checkpoint_every = max(1, config.num_steps // 20)
    config.eval_batches = 8
    config.model.num_layers = config.model.num_heads = layers
    config.model.embed_dim = width
    config.model.mup_base_width = 256
    config.model.norm = "rmsnorm"
    config.model.positions = "rope"
    config.model.activation = "relu2"
    config.model.biases = False
    config.model.qk_norm = True
    config.model.dtype = "bfloat16"
    config.model.remat = "dots"
    config.loss.z_loss = 1e-4
    config.optimizer.peak_learning_rate = RATE
    config.optimizer.schedule = "linear"
    config.optimizer.final_fraction = 0.0
    config.optimizer.warmup_steps = config.num_steps // 50
    config.optimizer.weight_decay = 5 / (RATE * config.num_steps)
    config.tokenizer.vocab_size = VOCABULARY
    config.data.heldout_fraction = 0.001
    return config
