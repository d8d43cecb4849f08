"""GPT-2, with its weights in Hugging Face's layout.

Radford et al. 2019: pre-LN blocks, learned positions, tanh-GELU, unembedding tied to the embedding. Parameter names are
those of `transformers`' GPT2LMHeadModel below `transformer.`; only the Linear weights are stored transposed there
(Conv1D), so saving and loading is a renaming. Weights travel as safetensors; a pickle is never opened.

Padding goes to the right of the real tokens: under causal attention nothing real can look at it.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanopref.run import UserError, write_atomic
from nanopref.tokenizer import Tokenizer


@dataclass
class GPTConfig:
    vocab_size: int = 50257
    block_size: int = 1024  # longest sequence, prompt and response together
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0


PRESETS = {  # name: layers, heads, width
    "tiny": (4, 4, 128),
    "small": (6, 6, 384),
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


class KVCache:
    """Keys and values of every layer for a batch, allocated once: 2 tensors [L, B, H, T, D/H].

    `lengths` [B] counts the tokens of each row that are in the cache. Rows may differ, so a batch of prompts of
    different lengths needs no left padding: each row writes at its own position and sees only what is below it.

    `seen`: how many columns a step looks at, where the caller knows how many suffice and that no row outgrows them.
    Such a step does the same work each time and waits for nothing, as a CUDA graph needs it. 0: as many as the longest
    row has, which is asked for.
    """

    seen = 0

    def __init__(self, config: GPTConfig, batch: int, length: int, *, device=None, dtype=torch.float32):
        shape = (config.n_layer, batch, config.n_head, length, config.n_embd // config.n_head)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, device=device, dtype=torch.long)

    def keep(self, rows: Tensor) -> None:
        """Drop every row but these (indices [B'], or True for each [B])."""
        self.keys, self.values, self.lengths = self.keys[:, rows], self.values[:, rows], self.lengths[rows]


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cached: tuple[Tensor, Tensor, Tensor, Tensor] | None = None) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, D // self.n_head).permute(2, 0, 3, 1, 4)
        if cached is None:
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        else:
            keys, values, positions, mask = cached
            index = positions[:, None, :, None].expand_as(k)
            keys.scatter_(2, index, k.to(keys.dtype))
            values.scatter_(2, index, v.to(values.dtype))
            seen = mask.shape[-1]  # columns that no row has reached yet are left out
            y = F.scaled_dot_product_attention(q.to(keys.dtype), keys[:, :, :seen], values[:, :, :seen], attn_mask=mask)
        y = y.transpose(1, 2).reshape(B, T, D)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cached=None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cached)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"the width {config.n_embd} is no multiple of the number of heads {config.n_head}")
        self.config = config
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
    def device(self) -> torch.device:
        return self.wte.weight.device

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens [B, T] -> the last hidden states [B, T, D], after the final LayerNorm.

        With a cache, `tokens` continue each row where its cache ends, and `cache.lengths` grows by T. A caller that
        padded a row on the right sets its length back to the real one: the padding's entries are overwritten later
        and never seen. Raises ValueError where a row would outgrow the context or the cache (not with `cache.seen`).
        """
        T = tokens.shape[1]
        if cache is None:
            if T > self.config.block_size:
                raise ValueError(f"{T} tokens are more than the context of {self.config.block_size}")
            positions, cached = torch.arange(T, device=tokens.device), None
        else:
            positions = cache.lengths[:, None] + torch.arange(T, device=tokens.device)
            seen = cache.seen or int(positions.max()) + 1
            if not cache.seen and seen > min(cache.keys.shape[3], self.config.block_size):
                raise ValueError(f"{seen} tokens are more than the cache or the context holds")
            unseen = torch.arange(seen, device=tokens.device) > positions[:, None, :, None]
            mask = torch.zeros(unseen.shape, device=tokens.device, dtype=cache.keys.dtype)
            cached = positions, mask.masked_fill_(unseen, -torch.inf)  # added to the scores of every layer
            cache.lengths += T
        x = F.dropout(self.wte(tokens) + self.wpe(positions), self.config.dropout, self.training)
        for i, block in enumerate(self.h):
            x = block(x, cached and (cache.keys[i], cache.values[i], *cached))
        return self.ln_f(x)

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens [B, T] -> logits [B, T, V]."""
        return F.linear(self.hidden(tokens, cache), self.unembedding)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors as `transformers` reads them; each file appears whole."""
        _save(folder, self, {}, {"architectures": ["GPT2LMHeadModel"]})

    @classmethod
    def from_pretrained(cls, name: str | Path, *, dropout: float = 0.0) -> "GPT":
        """Load a Hugging Face GPT-2 folder, one of our run folders, or a hub name ("gpt2", "org/model").

        Raises UserError, in one sentence, for a folder or a name that is not there and for files that do not fit.
        """
        folder = find_model(name)
        model, head = _read_model(folder, dropout)
        if head is not None:
            raise UserError(f"{folder}: a reward model or a critic, which writes no text; name a policy")
        return model


class ScalarGPT(nn.Module):
    """A GPT that says a number of each token (or one from each of several heads): a reward model, or a critic.

    The head is a linear map of the last hidden state without a bias, as in GPT2ForSequenceClassification of
    `transformers`, which opens the saved folder. What one token says is of the text up to it.
    """

    def __init__(self, transformer: GPT, heads: int = 1):
        super().__init__()
        self.transformer = transformer
        self.score = nn.Linear(transformer.config.n_embd, heads, bias=False)
        # of unit variance at first: the last LayerNorm makes D numbers of variance 1 (Stiennon et al. 2020, appendix B)
        nn.init.normal_(self.score.weight, std=(transformer.config.n_embd + 1) ** -0.5)

    @property
    def config(self) -> GPTConfig:
        return self.transformer.config

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] -> [B, T, heads]."""
        return self.score(self.transformer.hidden(tokens))

    @torch.no_grad()
    def rescale(self, shift: Tensor, scale: Tensor) -> None:
        """From now on say (what was said - shift) / scale, for shift and scale [heads].

        The head has no bias, so the shift goes into the last LayerNorm's: to say c more, add Wᵀ(WWᵀ)⁻¹c there.
        """
        W = self.score.weight.double()
        self.transformer.ln_f.bias -= (torch.linalg.pinv(W) @ shift.double()).float()
        self.score.weight /= scale[:, None]

    def save_pretrained(self, folder: str | Path, **settings) -> None:
        """Write config.json, with `settings` in it, and model.safetensors as `transformers` reads them."""
        labels = {str(i): f"LABEL_{i}" for i in range(len(self.score.weight))}
        settings |= {"architectures": ["GPT2ForSequenceClassification"], "id2label": labels}
        settings |= {"label2id": {label: int(i) for i, label in labels.items()}}
        _save(folder, self.transformer, {"score.weight": self.score.weight.detach().cpu()}, settings)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, dropout: float = 0.0) -> "ScalarGPT":
        """Load a folder or a hub name with a scalar head. Raises UserError as GPT.from_pretrained does."""
        folder = find_model(name)
        transformer, head = _read_model(folder, dropout)
        if head is None:
            raise UserError(f"{folder}: has no scalar head, so it is no reward model; train_rm.py makes one")
        model = cls(transformer, len(head))
        model.score.weight = nn.Parameter(head)
        return model


def _save(folder: str | Path, model: GPT, head: dict[str, Tensor], settings: dict) -> None:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        f"transformer.{name}": (p.t() if _is_conv1d(name) else p).contiguous().cpu()
        for name, p in model.state_dict().items()
    }
    c = model.config
    settings = {
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
        "bos_token_id": c.vocab_size - 1,
        "eos_token_id": c.vocab_size - 1,
        **settings,
    }
    write_atomic(folder / "model.safetensors", lambda path: save_file(state | head, path, metadata={"format": "pt"}))
    write_atomic(folder / "config.json", json.dumps(settings, indent=2) + "\n")


def find_model(name: str | Path) -> Path:
    """The folder that holds the model: `name`/model of a run, `name` itself, or a snapshot from the hub."""
    for folder in (Path(name) / "model", Path(name)):
        if (folder / "config.json").is_file():
            return folder
    looks_local = Path(name).exists() or str(name).startswith((".", "/", "~", "out/")) or str(name).count("/") > 1
    if looks_local:
        raise UserError(f"{name}: no model folder there (it should hold config.json and model.safetensors)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"{name}: no such folder; to load it from the Hugging Face hub, pip install 'nanopref[hub]'"
        ) from None
    try:
        files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
        return Path(snapshot_download(str(name), allow_patterns=files))
    except Exception as error:  # the hub's own errors are many, and all mean the same here
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{name}: neither a folder nor a model that the hub could give: {reason}") from None


def _is_conv1d(name: str) -> bool:
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def _read_config(path: Path, dropout: float) -> GPTConfig:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        sizes = [settings[k] for k in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")]
    except KeyError:
        hint = "is it a run that has no model yet? --resume continues it"
        raise UserError(f"{path}: not a GPT-2 configuration ({hint})") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a GPT-2 configuration ({type(error).__name__}: {error})") from None
    if not all(type(n) is int and n > 0 for n in sizes):
        raise UserError(f"{path}: sizes must be whole numbers above 0, found {sizes}")
    if max(sizes) > 2**31 or sizes[4] % sizes[3]:
        raise UserError(f"{path}: no GPT-2 has these sizes: {sizes}")
    expected = {  # what this GPT computes; a checkpoint that says otherwise would run and be wrong
        "model_type": ("gpt2",),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5,),
        "n_inner": (None, 4 * sizes[4]),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "tie_word_embeddings": (True,),
    }
    for key, allowed in expected.items():
        if settings.get(key, allowed[0]) not in allowed:
            raise UserError(f"{path}: {key} is {settings[key]!r}, but this GPT-2 has {allowed[0]!r}")
    return GPTConfig(*sizes, dropout=dropout)


def _read_model(folder: Path, dropout: float) -> tuple[GPT, Tensor | None]:
    """The GPT in a folder and, where there is one, its scalar head [heads, D]."""
    config = _read_config(folder / "config.json", dropout)
    with torch.device("meta"):
        model = GPT(config)
    weights, head = _read_weights(folder, model)
    model.load_state_dict(weights, assign=True)
    return model, head


def _read_weights(folder: Path, model: GPT) -> tuple[dict[str, Tensor], Tensor | None]:
    path = folder / "model.safetensors"
    if not path.is_file():
        pickles = [p.name for p in folder.glob("*.bin")] + [p.name for p in folder.glob("*.pt")]
        hint = f"; {pickles[0]} is a pickle and is never loaded: convert it to safetensors" if pickles else ""
        raise UserError(f"{path}: no such file{hint}")
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file (a pickle, or cut off?): {error}") from None
    found = {name.removeprefix("transformer."): x for name, x in found.items()}
    # old checkpoints carry their causal masks, and some a copy of the tied unembedding
    found = {k: x for k, x in found.items() if not k.endswith((".attn.bias", ".attn.masked_bias"))}
    head = found.pop("lm_head.weight", None)
    if head is not None and "wte.weight" in found and not torch.equal(head, found["wte.weight"]):
        raise UserError(f"{path}: lm_head.weight is not tied to the embedding, as GPT-2's is")
    score = found.pop("score.weight", None)
    if score is not None and (score.dim() != 2 or score.shape[1] != model.config.n_embd):
        raise UserError(f"{path}: score.weight is {list(score.shape)}, not [heads, {model.config.n_embd}]")
    wanted = model.state_dict()
    if missing := sorted(wanted.keys() - found.keys()):
        raise UserError(f"{path}: {len(missing)} tensors are missing, the first is {missing[0]}")
    if extra := sorted(found.keys() - wanted.keys()):
        raise UserError(f"{path}: {len(extra)} tensors do not belong to a GPT-2, the first is {extra[0]}")
    for name, x in found.items():
        x = x.t() if _is_conv1d(name) and x.dim() == 2 else x
        if x.shape != wanted[name].shape:
            raise UserError(f"{path}: {name} is {list(x.shape)}, config.json makes it {list(wanted[name].shape)}")
        if not x.is_floating_point():
            raise UserError(f"{path}: {name} holds {x.dtype}, not floating-point numbers")
        found[name] = x.float().contiguous()
    named = found if score is None else found | {"score.weight": score}
    if broken := [name for name, x in named.items() if not x.isfinite().all()]:
        raise UserError(f"{path}: {broken[0]} holds numbers that are not finite, as after a run that diverged")
    return found, score if score is None else score.float()


def preset(name: str, *, vocab_size: int, block_size: int, dropout: float = 0.0) -> GPTConfig:
    """The configuration of a size by its name."""
    if name not in PRESETS:
        raise UserError(f"there is no model preset {name!r}; choose one of {', '.join(PRESETS)}")
    n_layer, n_head, n_embd = PRESETS[name]
    return GPTConfig(vocab_size, block_size, n_layer, n_head, n_embd, dropout)


def load_pretrained(name: str | Path, *, dropout: float = 0.0, kind: type = GPT) -> tuple[GPT, Tokenizer]:
    """A model (`kind` is GPT or ScalarGPT) and the tokenizer beside it, or GPT-2's own where that is what fits.

    Raises UserError where either is missing or broken, or where one does not fit the other.
    """
    folder = find_model(name)
    model = kind.from_pretrained(folder, dropout=dropout)
    if not (folder / "tokenizer.json").exists() and model.config.vocab_size != GPTConfig.vocab_size:
        raise UserError(
            f"{folder}: no tokenizer.json there, and a vocabulary of {model.config.vocab_size} is not GPT-2's"
        )
    try:
        tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").exists() else Tokenizer.gpt2()
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens and the model {model.config.vocab_size}; "
            "they do not belong together"
        )
    return model, tokenizer


def save_pretrained(model: GPT | ScalarGPT, tokenizer: Tokenizer, folder: str | Path, **settings) -> None:
    """Write the model and its tokenizer; config.json, which makes it a model folder, comes last.

    `transformers` reads a score at the last token that is no padding: a scalar head's padding is the zero byte, which
    no text holds.
    """
    tokenizer.save(folder)
    if isinstance(model, ScalarGPT):
        settings["pad_token_id"] = tokenizer.ranks[b"\0"]
    model.save_pretrained(folder, **settings)
