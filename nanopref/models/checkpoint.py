"""Find, load and save: run folders, Hugging Face folders and names on the hub. A pickle is never opened."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanopref.data import chat
from nanopref.data.tokenizer import Tokenizer
from nanopref.data.tokenizer_files import MALFORMED
from nanopref.models import gpt2, llama, lora
from nanopref.models.frozen import frozen, placed, twin
from nanopref.models.language import LM
from nanopref.models.scalar import ScalarModel
from nanopref.running import parallel, sharding
from nanopref.running.files import named, prepared, write_atomic
from nanopref.running.flags import ModelFlags, UserError, require
from nanopref.running.parallel import rank
from nanopref.running.terminal import line

# by the model_type of their config.json
FAMILIES: dict[str, ModuleType] = {"gpt2": gpt2, "llama": llama, "qwen2": llama, "qwen3": llama}
PRESETS = {name: family for family in (gpt2, llama) for name in family.PRESETS}
DOWNLOADED = ["*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json"]
DOWNLOADED += ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]


def new(name: str, **sizes) -> LM:
    """A model of a preset's shape that has learnt nothing; `sizes` are vocab_size, block_size and dropout."""
    require(name in PRESETS, f"there is no model preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name].Model(PRESETS[name].preset(name, **sizes))


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
        return Path(snapshot_download(str(name), allow_patterns=DOWNLOADED))
    except Exception as error:  # the hub's own errors are many, and all mean the same here
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{name}: neither a folder nor a model that the hub could give: {reason}") from None


def load(name: str | Path, *, dropout: float = 0.0, context: int | None = None) -> tuple[LM, Tokenizer]:
    """The policy in a folder (or of that name on the hub), and the tokenizer beside it, or GPT-2's own where that fits.
    It reads `context` tokens at most, or as many as it can.

    Raises UserError, in one sentence, where either is missing or broken, or where one does not fit the other.
    """
    folder = find(name)
    model, head = _read(folder, dropout)
    require(head is None, f"{folder}: a reward model or a critic, which writes no text; name a policy")
    model.name = str(folder if Path(name).exists() else name)
    require((context or 0) <= model.context, f"--block-size {context} is more than the context of {name}")
    model.context = context or model.context
    return model, _tokenizer(folder, model)


LONGEST = 1024  # tokens, where --block-size says nothing: what a model could read may not fit the memory


def load_init(
    config: ModelFlags, device: torch.device | str = "cpu", name: str | Path = ""
) -> tuple[LM | None, Tokenizer | None, str]:
    """`load` of what `name`, or else --init, names, on the device and as the flags want it, or None; and "pretrained",
    which asks for small steps, if it was not made here."""
    if not (name := name or config.init):
        return None, None, ""
    model, tokenizer = load(name, dropout=getattr(config, "dropout", 0.0), context=config.block_size)
    model.context = min(model.context, config.block_size or LONGEST)
    set_up(model, config)
    return placed(model, device), tokenizer, "" if model.config.from_scratch else "pretrained"


def set_up(model: LM, config: ModelFlags) -> None:
    """Adapters where it should have some and has none, how activations are held, and compiling: as the flags say."""
    if config.lora and not any(lora.adapters(model)):
        lora.adapt(model, config.lora, config.seed)
    model.checkpoint_activations = config.checkpoint_activations
    if config.compile:
        for block in model.blocks:
            block.compile(dynamic=True)


def reference(policy: LM, start: str | Path = "") -> LM:
    """π_ref, frozen: what the policy began as. A policy with adapters lends it its trunk; else it is read again from
    `start`, or copied from a policy that has learnt nothing yet."""
    if any(lora.adapters(policy)) and not sharding.sharded(policy):
        return frozen(lora.bare(policy), policy.device)
    if start or sharding.spread(policy):
        return frozen(load(start or policy.name, context=policy.context)[0], policy.device)
    return frozen(twin(policy))


def load_scalar(name: str | Path) -> tuple[ScalarModel, Tokenizer]:
    """The same of a model with a scalar head, which a reward model or a critic is."""
    folder = find(name)
    transformer, head = _read(folder, 0.0)
    require(head is not None, f"{folder}: has no scalar head, so it is no reward model; train_rm.py makes one")
    weight, bias = head
    model = ScalarModel(transformer, len(weight))
    model.name = str(folder)
    model.score.weight = nn.Parameter(weight)
    model.bias = model.bias if bias is None else bias
    return model, _tokenizer(folder, transformer)


SHARD = 4 * 10**9  # bytes of weights that a file holds at most, if it holds more than one
INDEX = "model.safetensors.index.json"
OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def save(model: LM | ScalarModel, tokenizer: Tokenizer, folder: str | Path, **settings) -> None:
    """Write model and tokenizer as `transformers` reads them, with `settings` in config.json; each file appears whole.
    Adapters are added to the weights, and are written alone too, in PEFT's format, to folder/adapter. All processes
    must call this together where weights are sharded among them; the first writes, and holds one file's at a time.

    config.json, which makes it a model folder, comes last. Unless one file of weights replaces one, it is taken away
    before the first file of weights is put in its place: at no moment are files of two models read as one.
    """
    folder = Path(folder)
    scalar = isinstance(model, ScalarModel)
    body = model.transformer if scalar else model
    family = family_of(body.config)
    first = tokenizer.added.get(tokenizer.variables.get("bos_token", ""))
    ends = sorted(chat.ends(tokenizer), key=lambda token: (token != tokenizer.end_of_text, token))
    ids = {"bos_token_id": first, "eos_token_id": ends if len(ends) > 1 else ends[0]}
    settings = family.to_settings(body.config, scalar) | ids | settings
    if scalar:
        labels = {str(i): f"LABEL_{i}" for i in range(model.heads)}
        settings |= {"id2label": labels, "label2id": {label: int(i) for i, label in labels.items()}}
        # `transformers` reads a score at the last token that is no padding, which no text holds
        settings["pad_token_id"] = tokenizer.padding
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        index, files = _prepare(folder, _weights(model, family), bool(sharding.sharded(model)), stack)
        if rank() == 0:
            if len(files) > 1 or (folder / INDEX).exists():
                (folder / "config.json").unlink(missing_ok=True)
            tokenizer.save(folder)
            _put(folder, index, files)
    if any(lora.adapters(body)):
        lora.save(body, model.score.weight if scalar else None, folder / "adapter", family.PREFIX, family is gpt2)
    if rank() == 0:
        write_atomic(folder / "config.json", json.dumps(settings, indent=2) + "\n")


def _weights(model: LM | ScalarModel, family: ModuleType) -> Iterator[tuple[int, Callable[[], tuple[str, Tensor]]]]:
    """Of each tensor that is saved how many numbers it has, and what gives its name there and all of it."""
    scalar = isinstance(model, ScalarModel)
    for name, n, give in lora.merged(model.transformer if scalar else model):
        if not (scalar and name == UNEMBEDDING):  # which says nothing there
            yield n, lambda name=name, give=give: family.to_tensor(name, give())
    if scalar:
        yield model.score.weight.numel(), lambda: ("score.weight", parallel.full(model.score.weight.detach()))
        if model.bias.any():  # `transformers` says that it leaves it out: all scores differ by it there
            yield model.bias.numel(), lambda: ("score.bias", model.bias)


def _prepare(
    folder: Path, weights: Iterable, gathers: bool, stack: ExitStack
) -> tuple[dict[str, Any], dict[Path, Path]]:
    """Write the weights under other names, which the stack takes away again. Returns the index of the files, and what
    they are called now, by what they will be; in other processes than the first, which have to be there only where
    something `gathers`, nothing."""
    shards, room = [[]], SHARD
    for n, give in weights:
        if shards[-1] and 4 * n > room:
            shards, room = [*shards, []], SHARD
        shards[-1].append(give)
        room -= 4 * n
    tensors: dict[str, Tensor] = {}
    files, places, total = {}, {}, 0
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        for give in shard:
            if rank() == 0 or gathers:  # as many times as the first
                key, x = give()
            if rank() == 0:
                tensors[key], places[key], total = x.cpu(), name, total + x.nbytes
        if rank() == 0:
            write = partial(save_file, tensors, metadata={"format": "pt"})
            files[folder / name] = stack.enter_context(prepared(folder / name, write))
        tensors.clear()  # which what is prepared would keep
    return {"metadata": {"total_size": total}, "weight_map": places}, files


def _put(folder: Path, index: dict[str, Any], files: dict[Path, Path]) -> None:
    """Put the files of weights where they belong, and take away those of a model that was here before."""
    for path, there in files.items():
        with named(path):
            there.replace(path)
    if len(files) > 1:
        write_atomic(folder / INDEX, json.dumps(index, indent=2) + "\n")
    else:
        (folder / INDEX).unlink(missing_ok=True)
    for path in list(folder.iterdir()):
        if OURS.fullmatch(path.name) and path not in files:
            path.unlink()


def family_of(config: Any) -> ModuleType:
    """The file of a configuration's family."""
    return gpt2 if isinstance(config, gpt2.GPTConfig) else llama


def configuration(folder: Path, dropout: float = 0.0) -> Any:
    """What the config.json in a folder says. UserError where it is none, or of a model that cannot be loaded."""
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        kind = settings.get("model_type", "gpt2")
        require(kind in FAMILIES, f"{path}: model_type is {kind!r}, but only {', '.join(FAMILIES)} can be loaded")
        return FAMILIES[kind].from_settings(settings, str(path), dropout)
    except KeyError as error:
        hint = "is it a run without a whole model? remove its report.json, and --resume makes it"
        raise UserError(f"{path}: not a model's configuration, it lacks {line(error, 500)} ({hint})") from None
    except (OSError, ValueError, *MALFORMED) as error:
        reason = line(f"{type(error).__name__}: {error}", 500)
        raise UserError(f"{path}: not a model's configuration ({reason})") from None
    except UserError as error:  # which may quote a setting of any length
        raise UserError(f"{path}{line(str(error).removeprefix(str(path)), 500)}") from None


def _read(folder: Path, dropout: float) -> tuple[LM, tuple[Tensor, Tensor | None] | None]:
    """The transformer in a folder and, where there is one, its scalar head [heads, D] and that one's bias [heads]."""
    config = configuration(folder, dropout)
    family = family_of(config)
    weights, head = _fitted(folder / "model.safetensors", _tensors(folder), family, config)
    with torch.device("meta"):
        model = family.Model(config)
    if head is not None:  # in place of the unembedding
        model.lm_head = None
    model.load_state_dict(weights, assign=True)
    return model, head


def _tensors(folder: Path) -> dict[str, Tensor]:
    """What the folder's file of weights holds, or its shards, still on the disk: of a tensor no number is read before
    it is asked for. UserError where a file is missing or damaged."""
    path = folder / "model.safetensors"
    paths, there = [path], {p for p in folder.glob("*.safetensors") if p.is_file()}
    if not path.is_file() and (folder / INDEX).is_file():
        try:
            names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
            paths = [folder / Path(name).name for name in sorted(names)]  # beside it, whatever the index says
        except (OSError, ValueError, *MALFORMED) as error:
            reason = line(f"{type(error).__name__}: {error}", 500)
            raise UserError(f"{folder / INDEX}: no index of shards ({reason})") from None
    found: dict[str, Tensor] = {}
    for path in paths:
        if path not in there:
            pickles = [p.name for p in folder.glob("*.bin")] + [p.name for p in folder.glob("*.pt")]
            hint = f"; {pickles[0]} is a pickle and is never loaded: convert it to safetensors" if pickles else ""
            raise UserError(f"{folder}/{line(path.name, 500)}: no such file{hint}")
        try:
            found |= load_file(path)
        except (OSError, SafetensorError, ValueError, RuntimeError, *MALFORMED) as error:
            reason = line(error, 500)
            raise UserError(f"{path}: not a safetensors file (a pickle, or cut off?): {reason}") from None
    return found


def _shapes(family: ModuleType, config: Any, scalar: bool) -> Iterator[tuple[str, torch.Size]]:
    """Names and shapes of the weights that a configuration asks for, one by one: it may ask for a million layers."""
    with torch.device("meta"):
        one = family.Model(replace(config, n_layer=1)).state_dict()
    for name, x in one.items():
        before, in_layers, behind = name.partition(".0.")
        if not (scalar and name == UNEMBEDDING):
            for i in range(config.n_layer if in_layers else 1):
                yield (f"{before}.{i}.{behind}" if in_layers else name), x.shape


UNEMBEDDING = "lm_head.weight"
KINDS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _fitted(path: Path, found: dict[str, Tensor], family: ModuleType, config: Any) -> tuple[dict[str, Tensor], Any]:
    """The weights under the model's names, and its scalar head: float32. UserError where they do not fit: first names
    and shapes, then the numbers, so that nothing grows with what a file claims to be."""
    score, bias = found.pop("score.weight", None), found.pop("score.bias", None)
    found = family.from_tensors(found)
    if score is not None:  # a head in place of the unembedding, which says nothing there
        found.pop(UNEMBEDDING, None)
    wanted = dict(islice(_shapes(family, config, score is not None), len(found) + 1))
    missing = [name for name in wanted if name not in found]
    require(not missing, f"{path}: {''.join(missing[:1])} is missing; {len(found)} tensors of the model are there")
    if written_twice := UNEMBEDDING in found and UNEMBEDDING not in wanted:  # as some do with a tied unembedding
        wanted[UNEMBEDDING] = wanted[family.EMBEDDING]
    extra = [name for name in found if name not in wanted]
    first = line("".join(extra[:1]), 500)
    require(not extra, f"{path}: {len(extra)} tensors do not belong to the model, the first is {first}")
    if score is not None:
        fits = score.dim() == 2 and len(score) > 0 and score.shape[1] == config.n_embd
        require(fits, f"{path}: score.weight is {list(score.shape)}, not [heads, {config.n_embd}]")
        found["score.weight"], wanted["score.weight"] = score, score.shape
    if bias is not None:
        found["score.bias"], wanted["score.bias"] = bias, score.shape[:1] if score is not None else ()
    for name, x in found.items():
        fits = x.shape == wanted[name]
        require(fits, f"{path}: {name} is {list(x.shape)}, config.json makes it {list(wanted[name])}")
        require(x.dtype in KINDS, f"{path}: {name} holds {x.dtype}, not floating-point numbers of 16 bits or more")
    for name, x in found.items():
        finite = bool(x.isfinite().all())
        require(finite, f"{path}: {name} holds numbers that are not finite, as after a run that diverged")
        # to be shared out it stays as it is on the disk, until a process takes its share
        found[name] = x if parallel.shards() and name != "score.weight" else x.float().contiguous()
    if written_twice:
        tied = torch.equal(found.pop(UNEMBEDDING), found[family.EMBEDDING])
        require(tied, f"{path}: {UNEMBEDDING} is not tied to the embedding, as config.json says")
    score, bias = found.pop("score.weight", None), found.pop("score.bias", None)
    return found, None if score is None else (score, bias)


def _tokenizer(folder: Path, model: LM) -> Tokenizer:
    there, size = (folder / "tokenizer.json").exists(), model.config.vocab_size
    is_gpt2s = isinstance(model, gpt2.GPT) and size == gpt2.GPTConfig.vocab_size
    require(there or is_gpt2s, f"{folder}: no tokenizer.json there, and a vocabulary of {size} is not GPT-2's")
    try:
        tokenizer = Tokenizer.load(folder) if there else Tokenizer.gpt2()
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None
    fits = tokenizer.vocab_size <= size  # some models have rows that no token uses
    require(fits, f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens and the model only {size}; they do not "
            "belong together")  # fmt: skip
    try:
        chat.check(tokenizer)
    except UserError as error:
        raise UserError(f"{folder}: {line(error, 500)}") from None
    return tokenizer
