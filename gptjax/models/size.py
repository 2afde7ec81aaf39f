"""How many parameters a configuration has and how many FLOPs it costs, in closed form."""

from gptjax.models.config import ModelConfig, padded_vocab


def num_parameters(c: ModelConfig, vocab_size: int, seq_len: int) -> int:
    """Of a resolved config, the padding of the vocabulary included."""
    D, N, K, H, F = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim, c.mlp_dim
    norm = D * (2 if c.norm == "layernorm" and c.biases else 1)
    attention = 2 * D * N * H + 2 * D * K * H + (2 * H if c.qk_norm else 0)
    mlp = D * F * (3 if c.activation == "swiglu" else 2)
    biases = (N + 2 * K) * H + D + F + D if c.biases else 0
    embedding = padded_vocab(vocab_size) * D * (1 if c.tied_embeddings else 2)
    positions = seq_len * D if c.positions == "learned" else 0
    return embedding + positions + c.num_layers * (attention + mlp + biases + 2 * norm) + norm


def flops_per_token(c: ModelConfig, vocab_size: int, seq_len: int) -> int:
    """Model FLOPs of training one token: forward and backward, nothing recomputed counted twice.

    6 a weight of every matrix product, the unembedding included and the look-up not (Kaplan et al. 2020, section 2.1),
    and causal attention's scores and sums, of which half of the seq_len² are looked at (Chowdhery et al. 2022,
    appendix B, counts them all).
    """
    D, N, K, H, F = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim, c.mlp_dim
    weights = c.num_layers * (2 * D * N * H + 2 * D * K * H + D * F * (3 if c.activation == "swiglu" else 2))
    unembedding = padded_vocab(vocab_size) * D
    scores = c.num_layers * 2 * N * H * seq_len // 2
    return 6 * (weights + unembedding + scores)
