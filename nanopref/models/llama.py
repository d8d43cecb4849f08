"""Llama and its kin: architecture, configuration and the names of the weights in Hugging Face's format.

Touvron et al. 2023; Grattafiori et al. 2024: pre-norm blocks with RMSNorm (Zhang & Sennrich 2019), rotary positions
(Su et al. 2021), SwiGLU (Shazeer 2020), keys and values for groups of heads (Ainslie et al. 2023). Qwen2 has biases on
queries, keys and values, Qwen3 a norm of each head's queries and keys. Parameter names are those of `transformers`'
LlamaForCausalLM below `model.`.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanopref.models import dropout
from nanopref.models.language import LARGEST, LM, Seen, attend
from nanopref.running.flags import require


@dataclass
class LlamaConfig:
    vocab_size: int = 32000
    block_size: int = 2048  # longest sequence, prompt and response together
    n_layer: int = 16
    n_head: int = 32
    n_kv_head: int = 8
    n_embd: int = 2048
    n_inner: int = 8192
    head_dim: int = 64
    dropout: float = 0.0
    from_scratch: bool = field(default=False, compare=False)  # made here, which takes larger steps
    family: str = "llama"  # or qwen2, qwen3
    tied: bool = True  # whether the embedding is the unembedding
    bias: bool = False  # of queries, keys, values; but Qwen2's, of the output too
    mlp_bias: bool = False
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: tuple[float, float, float, int] | None = None  # Llama 3's: factor, low, high, original context
    rope_factor: float = 1.0  # positions are divided by it


PRESETS = {  # name: layers, heads, heads of keys and values, width, inner width
    "llama-tiny": (4, 4, 2, 128, 352),
    "llama-small": (6, 6, 2, 384, 1216),
    "llama-135m": (30, 9, 3, 576, 1536),
}


def preset(name: str, *, vocab_size: int, block_size: int, dropout: float = 0.0) -> LlamaConfig:
    """The configuration of a size by its name."""
    sizes = PRESETS[name]
    return LlamaConfig(vocab_size, block_size, *sizes, sizes[3] // sizes[1], dropout, from_scratch=True)


class Attention(nn.Module):
    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.head_dim, self.dropout = c.head_dim, c.dropout
        self.q_proj = nn.Linear(c.n_embd, c.n_head * c.head_dim, bias=c.bias)
        self.k_proj = nn.Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.bias)
        self.v_proj = nn.Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.bias)
        self.o_proj = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=c.bias and c.family != "qwen2")
        normed = c.family == "qwen3"
        self.q_norm = nn.RMSNorm(c.head_dim, c.norm_eps) if normed else nn.Identity()
        self.k_norm = nn.RMSNorm(c.head_dim, c.norm_eps) if normed else nn.Identity()

    def forward(self, x: Tensor, seen: Seen, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # [B, T, heads, width]
        q, k = rotated(self.q_norm(q), cos, sin).to(v.dtype), rotated(self.k_norm(k), cos, sin).to(v.dtype)
        y = attend(*(z.transpose(1, 2) for z in (q, k, v)), seen, self.dropout)
        return dropout.drop(self.o_proj(y), self.dropout, seen.streams, dropout.ATTENDED)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, heads, width]: its first and second half as the two parts of width/2 complex numbers, each turned by an
    angle whose cosine and sine are [B or 1, T, 1, width/2] (Su et al. 2021, section 3.4.2)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class MLP(nn.Module):
    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.dropout = c.dropout
        self.gate_proj = nn.Linear(c.n_embd, c.n_inner, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.n_embd, c.n_inner, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.n_inner, c.n_embd, bias=c.mlp_bias)

    def forward(self, x: Tensor, seen: Seen) -> Tensor:
        x = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return dropout.drop(x, self.dropout, seen.streams, dropout.MLP)


class Block(nn.Module):
    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.n_embd, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.n_embd, c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, seen: Seen, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), seen, cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x), seen)


class Llama(LM):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config, self.context = config, config.block_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = None if config.tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "norm" not in name:
                # as GPT-2 here: the residual stream's variance should not grow with depth
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)

    @property
    def unembedding(self) -> Tensor:
        """The matrix [V, D] that turns hidden states into logits; tied to the embedding or not."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def blocks(self) -> nn.ModuleList:
        return self.layers

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.embed_tokens(tokens)

    def positional(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the angles by which queries and keys are turned, [B or 1, T, 1, width/2], float32."""
        angles = positions[..., None].float() * frequencies(self.config, positions.device)
        angles = angles.view(-1, positions.shape[-1], 1, angles.shape[-1])
        return angles.cos(), angles.sin()

    def final_norm(self, x: Tensor) -> Tensor:
        return self.norm(x)


def frequencies(c: LlamaConfig, device: torch.device | None = None) -> Tensor:
    """By how much a position turns each pair of numbers of a head [width/2], float32.

    Llama 3's scaling, which stretches the context: waves longer than original/low are slowed down by the factor, those
    shorter than original/high left as they are, and between them it is interpolated.
    """
    exponents = torch.arange(0, c.head_dim, 2, device=device).float() / c.head_dim
    plain = 1.0 / (c.rope_theta**exponents)
    if c.rope_scaling is None:
        return plain / c.rope_factor
    factor, low, high, original = c.rope_scaling
    turns = original * plain / (2 * math.pi)  # within the original context
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return share * plain + (1 - share) * plain / factor


# ---- Hugging Face's format -------------------------------------------------------------------------------------------

Model = Llama
PREFIX = "model."
EMBEDDING = "embed_tokens.weight"
NAMES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def to_settings(c: LlamaConfig, scalar: bool = False) -> dict[str, Any]:
    """What config.json says of a model, or of one with a scalar head."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rope_scaling:
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        rope |= {"rope_type": "llama3"} | dict(zip(names, c.rope_scaling, strict=True))
    elif c.rope_factor != 1:
        rope |= {"rope_type": "linear", "factor": c.rope_factor}
    return {
        "architectures": [NAMES[c.family] + ("ForSequenceClassification" if scalar else "ForCausalLM")],
        "model_type": c.family,
        "hidden_act": "silu",
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.block_size,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head,
        "hidden_size": c.n_embd,
        "intermediate_size": c.n_inner,
        "head_dim": c.head_dim,
        "attention_bias": c.bias,
        "mlp_bias": c.mlp_bias,
        "attention_dropout": c.dropout,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied,
        "use_sliding_window": False,
        # by the names of transformers 5, and by those of 4
        "rope_parameters": rope,
        "rope_theta": c.rope_theta,
        "rope_scaling": None
        if rope["rope_type"] == "default"
        else {k: v for k, v in rope.items() if k != "rope_theta"},
        "nanopref_from_scratch": c.from_scratch,
    }


def from_settings(settings: dict[str, Any], where: str, dropout: float) -> LlamaConfig:
    """The configuration that a config.json describes. KeyError without sizes; UserError, beginning with `where`, for
    what these models cannot be: a checkpoint that says otherwise would run and be wrong."""
    family = settings["model_type"]
    names = ("vocab_size", "max_position_embeddings", "num_hidden_layers", "num_attention_heads")
    sizes = [settings[name] for name in names]
    heads, width = sizes[-1], settings["hidden_size"]
    sizes += [_or(settings.get("num_key_value_heads"), heads), width, settings["intermediate_size"]]
    whole = all(type(n) is int and 0 < n <= LARGEST for n in sizes)
    require(whole, f"{where}: sizes must be whole numbers above 0 and at most {LARGEST}, found {sizes}")
    head_dim = _or(settings.get("head_dim"), 128 if family == "qwen3" else width // heads)
    fits = type(head_dim) is int and head_dim > 0 and head_dim % 2 == 0 and heads % sizes[4] == 0
    fits = fits and heads * head_dim <= LARGEST
    require(fits, f"{where}: no {NAMES[family]} has {heads} heads of width {head_dim}, {sizes[4]} of keys and values")
    layers = settings.get("layer_types")
    windows = _switch(settings, "use_sliding_window", where) or not set(layers or ()) <= {"full_attention"}
    windows = windows or (family == "llama" and settings.get("sliding_window"))
    require(not windows, f"{where}: attention in sliding windows is not supported")
    require(not settings.get("quantization_config"), f"{where}: quantised weights are not supported")
    act = settings.get("hidden_act", "silu")
    require(act in ("silu", "swish"), f"{where}: hidden_act is {act!r}, but {NAMES[family]} has 'silu'")
    scaling, factor, theta = _rope(settings, where)
    eps = _number({"rms_norm_eps": 1e-6} | settings, "rms_norm_eps", where)
    tied, bias, mlp_bias = (_switch(settings, k, where) for k in ("tie_word_embeddings", "attention_bias", "mlp_bias"))
    scratch = settings.get("nanopref_from_scratch") is True
    return LlamaConfig(
        *sizes, head_dim, dropout, scratch, family, tied, bias or family == "qwen2", mlp_bias, eps, theta, scaling,
        factor,
    )  # fmt: skip


BOUNDS = {  # of the numbers that are no sizes: outside them float32 has no finite angles and norms
    "rms_norm_eps": (1e-12, 0.1),
    "rope_theta": (1, 1e15),
    "factor": (1e-6, 1e6),
    "low_freq_factor": (1e-6, 1e6),
    "high_freq_factor": (1e-6, 1e6),
    "original_max_position_embeddings": (1, LARGEST),
}


def _number(settings: dict[str, Any], name: str, where: str) -> float:
    value, (least, most) = settings[name], BOUNDS[name]
    fits = type(value) in (int, float) and least <= value <= most
    require(fits, f"{where}: {name} is {value!r}, not a number from {least:g} to {most:g}")
    return float(value)


def _switch(settings: dict[str, Any], name: str, where: str) -> bool:
    value = _or(settings.get(name), False)
    require(isinstance(value, bool), f"{where}: {name} is {value!r}, neither true nor false")
    return value


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _rope(settings: dict[str, Any], where: str) -> tuple[tuple[float, float, float, int] | None, float, float]:
    """Llama 3's scaling or None, the factor of positions, and θ."""
    found = _or(settings.get("rope_parameters"), {}) | _or(settings.get("rope_scaling"), {})
    theta = _number({"rope_theta": 10000.0} | found | settings, "rope_theta", where)
    scaling, factor = None, 1.0
    kind = found.get("rope_type", found.get("type", "default"))
    require(found.get("partial_rotary_factor", 1.0) == 1.0, f"{where}: heads that turn in part are not supported")
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        factor_, low, high, original = (_number(found, name, where) for name in names)
        require(low < high, f"{where}: low_freq_factor {low:g} is not below high_freq_factor {high:g}")
        scaling = (factor_, low, high, int(original))
    elif kind == "linear":
        factor = _number(found, "factor", where)
    else:
        require(kind == "default", f"{where}: rotary positions of type {kind!r} are not supported")
    return scaling, factor, theta


def to_tensor(name: str, x: Tensor) -> tuple[str, Tensor]:
    """A weight of a model by its name and in its layout there."""
    return name if name.startswith("lm_head.") else PREFIX + name, x.contiguous()


def from_tensors(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's own names and layout."""
    found = {name.removeprefix(PREFIX): x for name, x in found.items()}
    return {k: x for k, x in found.items() if not k.endswith("rotary_emb.inv_freq")}  # as old checkpoints have them
