"""gptjax: pretrain GPT-style language models with JAX."""

import os

__version__ = "0.1.0"

# Listings of a bucket that gcsfs keeps would not show what TensorStore and other processes wrote since.
os.environ.setdefault("FSSPEC_GS", '{"use_listings_cache": false}')
