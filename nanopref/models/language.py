"""What all families of language models share: from tokens to hidden states, with or without a cache, to log-probs.

Padding goes to the right of the real tokens: under causal attention nothing real can look at it.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernels
from kernels.reference import IGNORE
from nanopref.data.packing import Packed
from nanopref.models import dropout
from nanopref.models.cache import KVCache

LARGEST = 2**24  # no size of a model is larger


class Seen(NamedTuple):
    """What a layer's attention looks at: by default each token at itself and all before it."""

    mask: Tensor | None = None  # [B or 1, 1, T, S], True or 0 where a token looks
    keys: Tensor | None = None  # the layer's cache [B, heads, S', width]
    values: Tensor | None = None
    rows: Tensor | None = None  # [B, 1] and
    positions: Tensor | None = None  # [B, T]: where the new keys and values go
    streams: Tensor | None = None  # [B, T], where there is dropout: see dropout.py


class LM(nn.Module):
    """A family adds its blocks, called with (x, seen, *positional), and what the methods below ask for.

    `config` has vocab_size, block_size, n_layer, n_head, n_kv_head, head_dim, n_embd, dropout and from_scratch.
    """

    config: Any
    blocks: nn.ModuleList
    context: int  # longest sequence that this run reads: at most config.block_size
    name = ""  # where it was loaded from: a folder, or a name on the hub
    checkpoint_activations = False  # whether a block's activations are computed again in the backward pass

    @property
    def unembedding(self) -> Tensor:
        """The matrix [V, D] that turns hidden states into logits."""
        raise NotImplementedError

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens [B, T], positions [B, T] or [T] -> what the first block reads [B, T, D]."""
        raise NotImplementedError

    def positional(self, positions: Tensor) -> tuple[Tensor, ...]:
        """What every block is told of the positions [B, T] or [T], if they are not in the embedding."""
        return ()

    def final_norm(self, x: Tensor) -> Tensor:
        """The last norm, [B, T, D]."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return self.unembedding.device

    def hidden(self, tokens: Tensor, cache: KVCache | None = None, packed: Packed | None = None) -> Tensor:
        """tokens [B, T] -> the last hidden states [B, T, D], after the final norm.

        `packed` (of these rows, or of what goes on behind them) has what they share computed once.

        With a cache, `tokens` continue each row where its cache ends, and `cache.lengths` grows by T. A caller that
        padded a row on the right sets its length back to the real one: the padding's entries are overwritten later
        and never seen. Raises ValueError where a row would outgrow the context or the cache (not with `cache.seen`).
        """
        T = tokens.shape[1]
        if cache is None:
            if T > self.config.block_size:
                raise ValueError(f"{T} tokens are more than the context of {self.config.block_size}")
            positions, seen = torch.arange(T, device=tokens.device), Seen()
            if packed is not None:
                tokens, positions, seen = packed.tokens, packed.positions, Seen(packed.mask())
            if self.training and self.config.dropout > 0:
                looks = None if packed is None else seen.mask[:, 0]
                seen = seen._replace(streams=dropout.streams(tokens, positions, looks))
        else:
            positions = cache.lengths[:, None] + torch.arange(T, device=tokens.device)
            columns = cache.seen or int(positions.max()) + 1
            if not cache.seen and columns > min(cache.keys.shape[3], self.config.block_size):
                raise ValueError(f"{columns} tokens are more than the cache or the context holds")
            unseen = torch.arange(columns, device=tokens.device) > positions[:, None, :, None]
            mask = torch.zeros(unseen.shape, device=tokens.device, dtype=cache.keys.dtype)
            mask.masked_fill_(unseen, -torch.inf)  # added to the scores of every layer
            seen = Seen(mask, rows=torch.arange(len(tokens), device=tokens.device)[:, None], positions=positions)
            cache.lengths += T
        x, told = self.embed(tokens, positions), self.positional(positions)
        x = dropout.drop(x, self.config.dropout, seen.streams)
        for i, block in enumerate(self.blocks):
            block = block if cache is None else block.forward  # compiled for whole sequences alone
            layer = seen if cache is None else seen._replace(keys=cache.keys[i], values=cache.values[i])
            if seen.streams is not None:
                layer = seen._replace(streams=dropout.fork(seen.streams, i + 1))
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, layer, *told, use_reentrant=False, preserve_rng_state=False)  # none draws
            else:
                x = block(x, layer, *told)
        x = self.final_norm(x)
        return x if packed is None else x.flatten(0, 1)[packed.places[:, :T]]

    def logprobs(
        self, hidden: Tensor, targets: Tensor, mask: Tensor, temperature: float = 1.0, entropy: bool = False
    ) -> Any:
        """hidden [B, T, D] -> log π(targets) [B, T] in float32, 0 where the mask is 0; with `entropy` entropies too."""
        counted = targets.where(mask.bool(), IGNORE).flatten()
        results = kernels.token_logprobs(
            hidden.flatten(0, 1), self.unembedding, counted, temperature=temperature, entropy=entropy
        )
        return tuple(x.view_as(targets) for x in results) if entropy else results.view_as(targets)

    def forward(
        self, tokens: Tensor, targets: Tensor, mask: Tensor, temperature: float = 1.0, entropy: bool = False,
        packed: Packed | None = None,
    ) -> Any:  # fmt: skip
        """tokens, targets, mask [B, T] -> log π(targets[:, t] | tokens[:, :t + 1]) [B, T], nats, float32, 0 where the
        mask is 0; with `entropy` the pair (log-probs, entropies). What a training step needs is this one call."""
        # of the class, since what shares out a model takes the end of its own methods for the end of the whole call
        kind = type(self)
        return kind.logprobs(self, kind.hidden(self, tokens, packed=packed), targets, mask, temperature, entropy)

    def logits(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens [B, T] -> logits [B, T, V] in float32, as the log-probs are made from."""
        return kernels.reference.logits(self.hidden(tokens, cache), self.unembedding)

    def new_cache(self, batch: int, length: int, *, dtype: torch.dtype = torch.float32) -> KVCache:
        """Room for `batch` rows of `length` tokens, for `hidden` and `logits`."""
        c = self.config
        return KVCache(c.n_layer, c.n_kv_head, c.head_dim, batch, length, device=self.device, dtype=dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Seen, p: float = 0.0) -> Tensor:
    """Attention of queries [B, H, T, width] to keys and values of as many heads, or of fewer, each for some queries
    (Ainslie et al. 2023) -> [B, T, H·width]. With a cache the new keys and values are written to it first; with streams
    a share p of the probabilities is dropped."""
    if seen.streams is not None:
        return _attend_to_some(q, k, v, seen, p).transpose(1, 2).flatten(2)
    if seen.keys is not None:
        seen.keys[seen.rows, :, seen.positions] = k.transpose(1, 2).to(seen.keys.dtype)
        seen.values[seen.rows, :, seen.positions] = v.transpose(1, 2).to(seen.values.dtype)
        k, v = (x[:, :, : seen.mask.shape[-1]] for x in (seen.keys, seen.values))  # no row has reached the others
    grouped = q.shape[1] != k.shape[1]
    how = {"attn_mask": seen.mask, "is_causal": seen.mask is None, "enable_gqa": grouped}
    return F.scaled_dot_product_attention(q.to(k.dtype), k, v, **how).transpose(1, 2).flatten(2)


def _attend_to_some(q: Tensor, k: Tensor, v: Tensor, seen: Seen, p: float) -> Tensor:
    """What SDPA does, [B, H, T, width], written out: it drops by a generator alone."""
    H, T, width = q.shape[1:]
    k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    unseen = ~torch.ones(T, T, dtype=torch.bool, device=q.device).tril() if seen.mask is None else ~seen.mask
    scores = q @ k.mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * width**-0.5
    probabilities = scores.masked_fill(unseen, -torch.inf).softmax(-1)
    return dropout.drop_pairs(probabilities, p, seen.streams).to(v.dtype) @ v
