"""Small token stores, written directly."""

import numpy as np
from etils import epath

from gptjax.data.store import store as stores
from gptjax.tokenizers.tokenizer import TokenizerConfig
from gptjax.tokenizers.tokenizer import train as train_tokenizer


def write_store(folder, tokens, letters="abcdefgh", kind="byte"):
    """A store of random letters, so that windows are told apart."""
    folder = epath.Path(folder)
    made = train_tokenizer(TokenizerConfig(kind=kind), [], folder / "tokenizer")
    rng, splits = np.random.default_rng(len(letters) + tokens), {}
    for name in stores.SPLITS:
        writer = stores.SplitWriter(folder / name, np.uint16)
        while writer.tokens < tokens:
            length = min(int(rng.integers(2, 40)), tokens - writer.tokens)
            text = rng.choice(np.frombuffer(letters.encode(), np.uint8), length - 1).astype(np.int32)
            writer.append(f"{folder.name}/{writer.documents}.txt", 0, np.append(made.end_of_text, text), length - 1)
        splits[name] = writer.close()
    manifest = {"settings": {}, "tokenizer_hash": made.hash, "vocab_size": 257, "text_hash": f"{tokens:064}"}
    sizes = dict.fromkeys(("compressed_heldout_bytes", "gzip_bytes", "xz_bytes"), 100)
    stores.write_manifest(folder, manifest | {"splits": splits} | sizes)
    return folder
