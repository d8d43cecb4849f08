"""Adapters of low rank (Hu et al. 2021): Wx becomes Wx + α/r·BAx, W stays frozen, A [r, in] and B [out, r] learn.

B begins at 0, so nothing is changed at first; A at random, as in PEFT, whose format `save` writes. α = 32 is TRL's
default, and with the 1/r a good learning rate is about the same at every rank, some ten times that of all weights
(Schulman et al. 2025, "LoRA without regret", who put adapters on all matrices of the blocks, as is done here).
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from nanopref.models.language import LM
from nanopref.running.files import write_atomic
from nanopref.running.parallel import full, generator, rank

ALPHA = 32


class Adapted(nn.Module):
    """A linear map with an adapter beside it."""

    def __init__(self, base: nn.Linear, rank: int, random: torch.Generator):
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        most, device = base.in_features**-0.5, base.weight.device
        A = torch.empty(rank, base.in_features).uniform_(-most, most, generator=random)
        self.lora_A = nn.Parameter(A.to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y + F.linear(ALPHA / len(self.lora_A) * F.linear(x, self.lora_A), self.lora_B)

    def merged(self) -> Tensor:
        """W + α/r·BA, float32, whole."""
        A, B = full(self.lora_A.detach()), full(self.lora_B.detach())
        return full(self.weight.detach()).float() + ALPHA / len(A) * (B @ A)


def adapt(model: LM, rank: int, seed: int) -> None:
    """Freeze a model, and put an adapter on every linear map of its blocks."""
    model.requires_grad_(False)
    random = generator(seed, "adapters")
    for module in list(model.blocks.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(module, name, Adapted(layer, rank, random))


def adapters(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """Those of a model, by the names of their maps."""
    for name, layer in model.named_modules():
        if isinstance(layer, Adapted):
            yield name, layer


def bare(model: LM) -> LM:
    """What the model was before it had adapters, on the same memory."""
    family = next(cls for cls in type(model).__mro__ if not hasattr(cls, "set_requires_gradient_sync"))  # without DDP's
    with torch.device("meta"):
        found = family(model.config).requires_grad_(False)
    trunk = {name: x for name, x in model.state_dict(keep_vars=True).items() if ".lora_" not in name}
    found.load_state_dict(trunk, assign=True)
    found.context, found.name = model.context, model.name
    return found


def merged(model: LM) -> Iterator[tuple[str, int, Callable[[], Tensor]]]:
    """Of each weight of a model the name, how many numbers it has, and what gives it: whole, float32, with its map's
    adapter added, as if there were none. A weight that is sharded must be asked for by all processes together."""
    adapted = {f"{name}.weight": layer.merged for name, layer in adapters(model)}
    for name, x in model.state_dict().items():
        if ".lora_" not in name:
            yield name, x.numel(), adapted.get(name, lambda x=x: full(x).float())


def save(model: LM, score: Tensor | None, folder: Path, prefix: str, conv1d: bool) -> None:
    """Write the adapters as PEFT does, and the scalar head's weight, if there is one, which has learnt beside them; all
    processes together, as of `merged`. `prefix` stands before the model's names in Hugging Face's format; `conv1d`:
    there the weights of linear maps are stored transposed."""
    there = dict(adapters(model))
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if score is None else "SEQ_CLS",
        "modules_to_save": None if score is None else ["score"],
        "base_model_name_or_path": model.name,
        "r": len(next(iter(there.values())).lora_A),
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "target_modules": sorted({name.rpartition(".")[2] for name in there}),
        "fan_in_fan_out": conv1d,
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {} if score is None else {"base_model.model.score.weight": full(score.detach()).cpu()}
    for name, layer in there.items():
        tensors[f"base_model.model.{prefix}{name}.lora_A.weight"] = full(layer.lora_A.detach()).cpu()
        tensors[f"base_model.model.{prefix}{name}.lora_B.weight"] = full(layer.lora_B.detach()).cpu()
    if rank() > 0:
        return
    folder.mkdir(exist_ok=True)
    write_atomic(folder / "adapter_model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    write_atomic(folder / "adapter_config.json", json.dumps(settings, indent=2) + "\n")
