"""GPT-2: its architecture, its configuration and the names of its weights in Hugging Face's format.

Radford et al. 2019: pre-LN blocks, learned positions, tanh-GELU, unembedding tied to the embedding. Parameter names are
those of `transformers`' GPT2LMHeadModel below `transformer.`; only the Linear weights are stored transposed there
(Conv1D), so saving and loading is a renaming.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from nanopref.models import dropout
from nanopref.models.language import LARGEST, LM, Seen, attend
from nanopref.running.flags import require


@dataclass
class GPTConfig:
    vocab_size: int = 50257
    block_size: int = 1024  # longest sequence, prompt and response together
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    from_scratch: bool = field(
        default=False, compare=False
    )  # made here, which takes larger steps than a pretrained one

    @property
    def n_kv_head(self) -> int:
        return self.n_head

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


PRESETS = {  # name: layers, heads, width
    "nano": (2, 2, 48),
    "tiny": (4, 4, 128),
    "mini": (5, 6, 240),
    "small": (6, 6, 384),
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


def preset(name: str, *, vocab_size: int, block_size: int, dropout: float = 0.0) -> GPTConfig:
    """The configuration of a size by its name."""
    return GPTConfig(vocab_size, block_size, *PRESETS[name], dropout, from_scratch=True)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, seen: Seen) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, D // self.n_head).permute(2, 0, 3, 1, 4)
        y = attend(q, k, v, seen, self.dropout)
        return dropout.drop(self.c_proj(y), self.dropout, seen.streams, dropout.ATTENDED)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor, seen: Seen) -> Tensor:
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return dropout.drop(x, self.dropout, seen.streams, dropout.MLP)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, seen: Seen) -> Tensor:
        x = x + self.attn(self.ln_1(x), seen)
        return x + self.mlp(self.ln_2(x), seen)


class GPT(LM):
    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"the width {config.n_embd} is no multiple of the number of heads {config.n_head}")
        self.config, self.context = config, config.block_size
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "ln_" not in name:
                # GPT-2 §2.3: the residual stream's variance should not grow with depth
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)

    @property
    def unembedding(self) -> Tensor:
        """The matrix [V, D] that turns hidden states into logits; tied to the embedding."""
        return self.wte.weight

    @property
    def blocks(self) -> nn.ModuleList:
        return self.h

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.wte(tokens) + self.wpe(positions)

    def final_norm(self, x: Tensor) -> Tensor:
        return self.ln_f(x)


# ---- Hugging Face's format -------------------------------------------------------------------------------------------

Model = GPT
PREFIX = "transformer."
EMBEDDING = "wte.weight"


def to_settings(c: GPTConfig, scalar: bool = False) -> dict[str, Any]:
    """What config.json says of a model, or of one with a scalar head."""
    return {
        "architectures": ["GPT2ForSequenceClassification" if scalar else "GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": c.vocab_size,
        "n_positions": c.block_size,
        "n_ctx": c.block_size,
        "n_layer": c.n_layer,
        "n_head": c.n_head,
        "n_embd": c.n_embd,
        "attn_pdrop": c.dropout,
        "embd_pdrop": c.dropout,
        "resid_pdrop": c.dropout,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "nanopref_from_scratch": c.from_scratch,
    }


def from_settings(settings: dict[str, Any], where: str, dropout: float) -> GPTConfig:
    """The configuration that a config.json describes. KeyError without sizes; UserError, beginning with `where`, for
    what this GPT-2 cannot be: a checkpoint that says otherwise would run and be wrong."""
    sizes = [settings[k] for k in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")]
    whole = all(type(n) is int and n > 0 for n in sizes)
    require(whole, f"{where}: sizes must be whole numbers above 0, found {sizes}")
    require(max(sizes) <= LARGEST and sizes[4] % sizes[3] == 0, f"{where}: no GPT-2 has these sizes: {sizes}")
    expected = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5,),
        "n_inner": (None, 4 * sizes[4]),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "tie_word_embeddings": (True,),
    }
    for key, allowed in expected.items():
        fits = settings.get(key, allowed[0]) in allowed
        require(fits, f"{where}: {key} is {settings.get(key)!r}, but this GPT-2 has {allowed[0]!r}")
    return GPTConfig(*sizes, dropout=dropout, from_scratch=settings.get("nanopref_from_scratch") is True)


def to_tensor(name: str, x: Tensor) -> tuple[str, Tensor]:
    """A weight of a model by its name and in its layout there."""
    return PREFIX + name, (x.t() if _is_conv1d(name) else x).contiguous()


def from_tensors(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's own names and layout."""
    found = {name.removeprefix(PREFIX): x for name, x in found.items()}
    # old checkpoints carry their causal masks
    found = {k: x for k, x in found.items() if not k.endswith((".attn.bias", ".attn.masked_bias"))}
    return {name: x.t() if _is_conv1d(name) and x.dim() == 2 else x for name, x in found.items()}


def _is_conv1d(name: str) -> bool:
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
