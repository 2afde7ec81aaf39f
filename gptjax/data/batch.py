"""One batch of token rows."""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Rows of a step; each field is [rows, seq_len], weights float32 and the others int32.

    inputs: tokens.
    targets: the token that follows each input.
    positions: count from 0 at each document's start, and at the window's.
    segments: number of the document within the window, from 1; 0 is padding.
    weights: 1 where the target counts, 0 on padding and on targets inside a prompt.
    """

    inputs: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    weights: np.ndarray


def padding(rows: int, seq_len: int) -> Batch:
    """Rows of padding only, with weight 0 everywhere."""
    inputs, targets, positions, segments = (np.zeros((rows, seq_len), np.int32) for _ in range(4))
    return Batch(inputs, targets, positions, segments, np.zeros((rows, seq_len), np.float32))
