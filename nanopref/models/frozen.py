"""Models that are held and do not learn, in as little memory as what they say allows."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from nanopref.models.language import LM
from nanopref.models.scalar import ScalarModel
from nanopref.running import parallel

Model = TypeVar("Model", LM, ScalarModel)


def frozen(model: Model, device: torch.device | str | None = None) -> Model:
    """The same model, on this device if one is named, which from now on neither learns nor drops out: a reference, a
    judge.

    Where its products are bfloat16 their matrices are held in it: autocast rounds them so at every step, hence what the
    model says stays the same to the last bit. Embeddings (and an unembedding tied to one) are looked up and not
    multiplied; they, norms and a scalar head stay as they are. It can then be asked under `parallel.autocast` alone.
    """
    hold(model.eval(), device)
    return model.to(device) if device else model


def hold(model: LM | ScalarModel, device: torch.device | str | None = None) -> None:
    """The weights as `frozen` has them. `device`: where they will be, which need not take them in as they are now."""
    model.requires_grad_(False)
    if parallel.precision(model, device) == torch.bfloat16:
        body = model.transformer if isinstance(model, ScalarModel) else model
        for layer in body.modules():
            if isinstance(layer, nn.Linear) and layer.weight.dtype != torch.bfloat16:
                layer.weight = nn.Parameter(layer.weight.bfloat16(), requires_grad=False)


@contextmanager
def rounded(model: LM) -> Iterator[None]:
    """Under autocast a model's matrices are held as it rounds them: once, and not anew for each token of an answer."""
    kind, layers = model.device.type, []
    if torch.is_autocast_enabled(kind):
        layers = [layer for block in model.blocks for layer in block.modules() if isinstance(layer, nn.Linear)]
    kept = [layer.weight.data for layer in layers]
    try:
        for layer in layers:
            layer.weight.data = layer.weight.data.to(torch.get_autocast_dtype(kind))
        yield
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            layer.weight.data = weight


def thawed(model: Model) -> Model:
    """A copy that learns, all of it, in float32."""
    return copy.deepcopy(model, {id(p): nn.Parameter(p.detach().float().clone()) for p in model.parameters()})


def twin(model: Model) -> Model:
    """A copy of what learns in a model, on the same memory for what is frozen in it."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})
