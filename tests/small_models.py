"""What the tests of models share: small ones in which every weight counts."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nanopref.models.gpt2 import GPT, GPTConfig
from nanopref.running.flags import UserError

SMALL = GPTConfig(vocab_size=260, block_size=12, n_layer=2, n_head=2, n_embd=8)


def randomise(model: nn.Module, std: float = 0.2) -> nn.Module:
    """Weights that leave nothing at 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.normal_(std=std, generator=generator)
    return model.eval()


def scripted(script: list[int], block_size: int, vocab_size: int = 260) -> GPT:
    """A model whose most likely token at position i is script[i], whatever came before."""
    model = GPT(GPTConfig(vocab_size, block_size, n_layer=1, n_head=1, n_embd=64)).eval()
    for p in model.h.parameters():
        p.data.zero_()
    directions = torch.randn(vocab_size, 64, generator=torch.Generator().manual_seed(0))
    model.wte.weight.data = F.normalize(directions - directions.mean(-1, keepdim=True))
    for i, token in enumerate(script):
        model.wpe.weight.data[i] = 100 * model.wte.weight[token]
    return model


def random_tokens(vocab_size: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def message_of(call, *arguments) -> str:
    """What a call that must be refused says, in one line."""
    with pytest.raises(UserError) as refusal:
        call(*arguments)
    message = str(refusal.value)
    assert "\n" not in message and message.strip()
    return message
