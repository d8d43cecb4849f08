"""Dropout (Srivastava et al. 2014) whose masks are a function of the seed, of a row's tokens, and of the place.

A generator's masks would depend on what is drawn before them: on the rows beside, on the padding, on how a batch is cut
into micro-batches and shared among processes, on whether activations are computed again. Here each token has a stream,
which is a hash of the seed and of all that the token sees, so padding behind it and rows beside it say nothing; and
each number that may be dropped a hash of its stream and its place. Another step has other masks by torch.manual_seed.
"""

from typing import TypeVar

import torch
from torch import Tensor

Bits = TypeVar("Bits", int, Tensor)  # of 32 bits
BITS = 2**32 - 1
ATTENTION, ATTENDED, MLP = range(3)  # where a block drops: probabilities, and the two branches


def mix(x: Bits) -> Bits:
    """32 bits -> 32 bits, one to one, of which each turns with one chance in two where one of x turns (C. Wellons's
    lowbias32)."""
    x = (x + 0x9E3779B9) & BITS  # or 0 would stay 0
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):  # below 2³¹: int64 holds the products
        x = ((x ^ (x >> shift)) * factor) & BITS
    return x ^ (x >> 16)


def streams(tokens: Tensor, positions: Tensor, looks: Tensor | None = None) -> Tensor:
    """tokens [B, T], at positions [B, T] or [T] of their rows -> [B, T], each of the seed and of what its token sees:
    itself and all before it, or the tokens that it `looks` [B, T, T] at."""
    words, seed = mix(tokens ^ mix(positions)), torch.initial_seed()
    seen = words.cumsum(-1) if looks is None else (words[:, None] * looks).sum(-1)
    return mix((seen & BITS) ^ mix(seed & BITS ^ mix(seed >> 32 & BITS)))


def fork(streams: Tensor, number: int) -> Tensor:
    """The streams of one of the places that streams are for."""
    return mix(streams ^ mix(number))


def drop(x: Tensor, p: float, streams: Tensor | None, place: int = 0) -> Tensor:
    """x [B, T, D] with a share p of it 0 and the rest divided by 1 - p; x itself without streams."""
    if streams is None:
        return x
    features = mix(torch.arange(x.shape[-1], device=x.device))
    return _masked(x, p, fork(streams, place)[..., None] ^ features)


def drop_pairs(x: Tensor, p: float, streams: Tensor) -> Tensor:
    """The same of x [B, H, T, T], of each head, query and key."""
    heads = mix(torch.arange(x.shape[1], device=x.device))
    queries = mix(fork(streams, ATTENTION)[:, None] ^ heads[:, None])  # [B, H, T]
    return _masked(x, p, queries[..., None] ^ mix(streams)[:, None, None])


def _masked(x: Tensor, p: float, numbers: Tensor) -> Tensor:
    return x.masked_fill(mix(numbers) < round(p * 2**32), 0) * (1 / (1 - p))
