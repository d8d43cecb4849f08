"""A model that says a number of each token: a reward model, or a critic."""

from typing import Any

import torch
from torch import Tensor, nn

from nanopref.data.packing import Packed
from nanopref.models.language import LM
from nanopref.running import parallel, sharding


class ScalarModel(nn.Module):
    """A transformer with a scalar head (or several) in place of the unembedding.

    The head is a linear map of the last hidden state, as in …ForSequenceClassification of `transformers`, which opens
    the saved folder; its bias, for which there is no place there, comes from `rescale` alone. What one token says is
    of the text up to it. The head computes in float32, under autocast too: 8 bits would leave a few hundred scores.
    """

    name = ""  # the folder that it was loaded from

    def __init__(self, transformer: LM, heads: int = 1, *, writes: bool = False):
        """Unless the transformer also `writes` text, it loses an unembedding of its own."""
        super().__init__()
        self.transformer = transformer
        if not writes and getattr(transformer, "lm_head", None) is not None:
            transformer.lm_head = None
        self.score = nn.Linear(transformer.config.n_embd, heads, bias=False)
        self.register_buffer("bias", torch.zeros(heads))
        # of unit variance at first: the last norm makes D numbers of variance 1 (Stiennon et al. 2020, appendix B)
        nn.init.normal_(self.score.weight, std=(transformer.config.n_embd + 1) ** -0.5)

    @property
    def config(self) -> Any:
        return self.transformer.config

    @property
    def context(self) -> int:
        return self.transformer.context

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer.blocks

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def heads(self) -> int:
        return len(self.score.weight)

    def forward(self, tokens: Tensor, last: Tensor | None = None, packed: Packed | None = None) -> Tensor:
        """tokens [B, T] -> [B, T, heads], or with `last` [B] what the tokens there say: [B, heads]. float32."""
        hidden = self.transformer.hidden(tokens, packed=packed)
        return self.read(hidden if last is None else hidden[torch.arange(len(last), device=last.device), last])

    def read(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> [..., heads], float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.score(hidden.to(self.score.weight.dtype)) + self.bias

    @torch.no_grad()
    def rescale(self, shift: Tensor, scale: Tensor) -> None:
        """From now on say (what was said - shift) / scale, for shift and scale [heads]."""
        self.bias.sub_(shift).div_(scale)
        sharding.assign(self.score.weight, parallel.full(self.score.weight) / scale[:, None])
