"""What the rows of a group begin with, stored and computed once: half of all tokens where dialogues were compared."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PAYS = 0.8  # of the padded rows' area: packed rows above that are not worth their mask


class Packed(NamedTuple):
    """Rows [B, T] by groups: the tokens that a group's rows share stand once, then come those of each row.

    Attention sees a tree: a row's own tokens look at what is shared and at one another, but not at another row's.
    """

    tokens: Tensor  # [G, S]
    positions: Tensor  # [G, S]: of each token in its row
    branches: Tensor  # [G, S]: whose a token is, of its group's rows from 1 on; 0: all rows'
    places: Tensor  # [B, T]: where in tokens.flatten() the tokens of the rows stand

    def mask(self) -> Tensor:
        """[G, 1, S, S], True where a token (the third dimension) looks at another."""
        own, S = self.branches, self.tokens.shape[1]
        before = torch.ones(S, S, dtype=torch.bool, device=own.device).tril()
        return (before & ((own[:, None, :] == 0) | (own[:, None, :] == own[:, :, None])))[:, None]

    def to(self, device: torch.device) -> "Packed":
        return Packed(*(x.to(device, non_blocking=True) for x in self))


def pack(tokens: Tensor, lengths: Sequence[int], sizes: Sequence[int]) -> Packed | None:
    """Rows [B, T], padded on the right behind `lengths` [B], of groups with so many rows each [G]; None where that
    saves too little."""
    B, T = tokens.shape
    if len(sizes) == B:  # groups of one
        return None
    ends = torch.tensor(list(sizes)).cumsum(0).tolist()
    groups = [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    shared = [_common(tokens[rows.start : rows.stop], min(lengths[i] for i in rows)) for rows in groups]
    widths = [n + sum(lengths[i] - n for i in rows) for rows, n in zip(groups, shared, strict=True)]
    S = max(widths)
    if len(groups) * S > PAYS * B * T:
        return None
    packed = torch.zeros(3, len(groups), S, dtype=torch.long)
    places = torch.zeros(B, T, dtype=torch.long)
    for g, (rows, n) in enumerate(zip(groups, shared, strict=True)):
        end = n
        packed[0, g, :n], packed[1, g, :n] = tokens[rows.start, :n], torch.arange(n)
        for branch, i in enumerate(rows, 1):
            own = lengths[i] - n
            packed[0, g, end : end + own] = tokens[i, n : lengths[i]]
            packed[1, g, end : end + own] = torch.arange(n, lengths[i])
            packed[2, g, end : end + own] = branch
            places[i, :n] = g * S + torch.arange(n)
            places[i, n : lengths[i]] = g * S + end + torch.arange(own)
            end += own
    return Packed(*packed, places)


def _common(rows: Tensor, most: int) -> int:
    """How many tokens all rows [K, T] begin with, at most so many."""
    return int((rows[:, :most] == rows[:1, :most]).all(0).cumprod(0).sum())
