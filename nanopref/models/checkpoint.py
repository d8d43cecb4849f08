"""Find, load and save: run folders, Hugging Face folders and names on the hub. A pickle is never opened."""

import json
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanopref.data.tokenizer import Tokenizer
from nanopref.models import gpt2
from nanopref.models.gpt2 import GPT, GPTConfig
from nanopref.models.scalar import ScalarModel
from nanopref.running.flags import UserError, require
from nanopref.running.folder import write_atomic

FAMILIES: dict[str, ModuleType] = {"gpt2": gpt2}  # by the model_type of their config.json


def find(name: str | Path) -> Path:
    """The folder that holds the model: `name`/model of a run, `name` itself, or a snapshot from the hub."""
    for folder in (Path(name) / "model", Path(name)):
        if (folder / "config.json").is_file():
            return folder
    looks_local = Path(name).exists() or str(name).startswith((".", "/", "~", "out/")) or str(name).count("/") > 1
    require(not looks_local, f"{name}: no model folder there (it should hold config.json and model.safetensors)")
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


def load(name: str | Path, *, dropout: float = 0.0) -> tuple[GPT, Tokenizer]:
    """The policy in a folder (or of that name on the hub), and the tokenizer beside it, or GPT-2's own where that fits.

    Raises UserError, in one sentence, where either is missing or broken, or where one does not fit the other.
    """
    folder = find(name)
    model, head = _read(folder, dropout)
    require(head is None, f"{folder}: a reward model or a critic, which writes no text; name a policy")
    return model, _tokenizer(folder, model)


def load_init(name: str) -> tuple[GPT | None, Tokenizer | None, str]:
    """`load` of what --init names, or None; and "pretrained", which asks for small steps, if it was not made here."""
    if not name:
        return None, None, ""
    model, tokenizer = load(name)
    return model, tokenizer, "" if model.config.from_scratch else "pretrained"


def load_scalar(name: str | Path) -> tuple[ScalarModel, Tokenizer]:
    """The same of a model with a scalar head, which a reward model or a critic is."""
    folder = find(name)
    transformer, head = _read(folder, 0.0)
    require(head is not None, f"{folder}: has no scalar head, so it is no reward model; train_rm.py makes one")
    model = ScalarModel(transformer, len(head))
    model.score.weight = nn.Parameter(head)
    return model, _tokenizer(folder, transformer)


def save(model: GPT | ScalarModel, tokenizer: Tokenizer, folder: str | Path, **settings) -> None:
    """Write model and tokenizer as `transformers` reads them, with `settings` in config.json; each file appears whole.

    config.json, which makes it a model folder, comes last.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    scalar = isinstance(model, ScalarModel)
    body = model.transformer if scalar else model
    family = FAMILIES["gpt2"]
    tensors = family.to_tensors(body)
    settings = family.to_settings(body.config) | {"architectures": [f"{family.ARCHITECTURE}LMHeadModel"], **settings}
    if scalar:
        tensors["score.weight"] = model.score.weight.detach().cpu()
        labels = {str(i): f"LABEL_{i}" for i in range(model.heads)}
        settings |= {"architectures": [f"{family.ARCHITECTURE}ForSequenceClassification"], "id2label": labels}
        settings |= {"label2id": {label: int(i) for i, label in labels.items()}}
        # `transformers` reads a score at the last token that is no padding: the zero byte, which no text holds
        settings["pad_token_id"] = tokenizer.ranks[b"\0"]
    write_atomic(folder / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    write_atomic(folder / "config.json", json.dumps(settings, indent=2) + "\n")


def _read(folder: Path, dropout: float) -> tuple[GPT, Tensor | None]:
    """The transformer in a folder and, where there is one, its scalar head [heads, D]."""
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        kind = settings.get("model_type", "gpt2")
        require(kind in FAMILIES, f"{path}: model_type is {kind!r}, but only {', '.join(FAMILIES)} can be loaded")
        family = FAMILIES[kind]
        config = family.from_settings(settings, str(path), dropout)
    except KeyError:
        hint = "is it a run that has no model yet? --resume continues it"
        raise UserError(f"{path}: not a GPT-2 configuration ({hint})") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a GPT-2 configuration ({type(error).__name__}: {error})") from None
    with torch.device("meta"):
        model = GPT(config)
    weights, head = _weights(folder / "model.safetensors", family, model)
    model.load_state_dict(weights, assign=True)
    return model, head


def _weights(path: Path, family: ModuleType, model: GPT) -> tuple[dict[str, Tensor], Tensor | None]:
    """The weights of a file, under the model's names, and its scalar head: float32. UserError where they do not fit."""
    if not path.is_file():
        pickles = [p.name for p in path.parent.glob("*.bin")] + [p.name for p in path.parent.glob("*.pt")]
        hint = f"; {pickles[0]} is a pickle and is never loaded: convert it to safetensors" if pickles else ""
        raise UserError(f"{path}: no such file{hint}")
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file (a pickle, or cut off?): {error}") from None
    score = found.pop("score.weight", None)
    width = model.config.n_embd
    fits = score is None or (score.dim() == 2 and score.shape[1] == width)
    require(fits, f"{path}: score.weight is {[] if score is None else list(score.shape)}, not [heads, {width}]")
    found, wanted = family.from_tensors(found, str(path)), model.state_dict()
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    require(not missing, f"{path}: {len(missing)} tensors are missing, the first is {''.join(missing[:1])}")
    require(not extra, f"{path}: {len(extra)} tensors do not belong to the model, the first is {''.join(extra[:1])}")
    named = found if score is None else found | {"score.weight": score}
    for name, x in named.items():
        shape = wanted[name].shape if name in wanted else x.shape
        require(x.shape == shape, f"{path}: {name} is {list(x.shape)}, config.json makes it {list(shape)}")
        require(x.is_floating_point(), f"{path}: {name} holds {x.dtype}, not floating-point numbers")
        finite = bool(x.isfinite().all())
        require(finite, f"{path}: {name} holds numbers that are not finite, as after a run that diverged")
        named[name] = x.float().contiguous()
    return {name: named[name] for name in wanted}, named.get("score.weight")


def _tokenizer(folder: Path, model: GPT) -> Tokenizer:
    there, size = (folder / "tokenizer.json").exists(), model.config.vocab_size
    is_gpt2s = size == GPTConfig.vocab_size
    require(there or is_gpt2s, f"{folder}: no tokenizer.json there, and a vocabulary of {size} is not GPT-2's")
    try:
        tokenizer = Tokenizer.load(folder) if there else Tokenizer.gpt2()
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None
    require(
        tokenizer.vocab_size == size,
        f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens and the model {size}; they do not belong together",
    )
    return tokenizer
