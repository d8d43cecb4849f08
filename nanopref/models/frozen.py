"""Models that are held and do not learn, in as little memory as what they say allows."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from nanopref.models.language import LM
from nanopref.models.scalar import ScalarModel
from nanopref.running import parallel, sharding

Model = TypeVar("Model", LM, ScalarModel)


def frozen(model: Model, device: torch.device | str | None = None) -> Model:
    """The same model, on this device if one is named, which from now on neither learns nor drops out: a reference, a
    judge.

    Where its products are bfloat16 their matrices are held in it: autocast rounds them so at every step, hence what the
    model says stays the same to the last bit. Embeddings (and an unembedding tied to one) are looked up and not
    multiplied; they, norms and a scalar head stay as they are. It can then be asked under `parallel.autocast` alone.
    """
    return placed(model.eval().requires_grad_(False), device or model.device)


def placed(model: Model, device: torch.device | str) -> Model:
    """The same model on a device, or shared out over processes, see `sharding.put`: what learns is float32, what is
    frozen as `frozen` has it."""
    rounds = parallel.precision(model, device) == torch.bfloat16

    def prepare(part: nn.Module) -> None:
        for layer in part.modules():
            for name, p in layer.named_parameters(recurse=False):
                held = rounds and not p.requires_grad and name == "weight" and p.dim() == 2
                dtype = torch.bfloat16 if held and not isinstance(layer, nn.Embedding) else torch.float32
                if p.dtype != dtype or not p.is_contiguous():
                    setattr(layer, name, nn.Parameter(p.detach().to(dtype).contiguous(), requires_grad=p.requires_grad))

    return sharding.put(model, device, prepare)


@contextmanager
def rounded(model: LM) -> Iterator[None]:
    """Under autocast a model's matrices are held as it rounds them: once, and not anew for each token of an answer."""
    kind, layers = model.device.type, []
    dtype = torch.get_autocast_dtype(kind)
    if torch.is_autocast_enabled(kind):
        layers = [layer for block in model.blocks for layer in block.modules() if isinstance(layer, nn.Linear)]
        layers = [layer for layer in layers if layer.weight.dtype != dtype]
    kept = [layer.weight for layer in layers]
    try:
        for layer in layers:
            # another parameter, since autograd forgets the hooks of one whose data change their type: DDP's are of them
            layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=layer.weight.requires_grad)
        yield
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            layer.weight = weight


def thawed(model: Model) -> Model:
    """A copy that learns, all of it, in float32."""
    return copy.deepcopy(model, {id(p): nn.Parameter(p.detach().float().clone()) for p in model.parameters()})


def twin(model: Model) -> Model:
    """A copy of what learns in a model, on the same memory for what is frozen in it."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})
