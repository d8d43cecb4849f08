"""Keys and values of what has been read, so that a token more costs one token's work."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer for a batch, allocated once: 2 tensors [layers, B, heads, T, width].

    `lengths` [B] counts the tokens of each row that are in the cache. Rows may differ, so a batch of prompts of
    different lengths needs no left padding: each row writes at its own position and sees only what is below it.

    `seen`: how many columns a step looks at, where the caller knows how many suffice and that no row outgrows them.
    Such a step does the same work each time and waits for nothing, as a CUDA graph needs it. 0: as many as the longest
    row has, which is asked for.
    """

    seen = 0

    def __init__(self, layers: int, heads: int, width: int, batch: int, length: int, *, device=None, dtype=None):
        shape = (layers, batch, heads, length, width)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, device=device, dtype=torch.long)

    def keep(self, rows: Tensor) -> None:
        """Drop every row but these (indices [B'], or True for each [B])."""
        self.keys, self.values, self.lengths = self.keys[:, rows], self.values[:, rows], self.lengths[rows]
