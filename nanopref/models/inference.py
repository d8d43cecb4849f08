"""What a model says of many answers, without gradient: a batch at a time, with dropout off."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

from kernels.reference import logits
from nanopref.data.groups import Batch, Encoded, micro_batches
from nanopref.data.packing import PAYS
from nanopref.models.language import LM
from nanopref.models.scalar import ScalarModel
from nanopref.running.folder import Run
from nanopref.running.parallel import autocast, gathered, progress, world_size
from nanopref.running.sharding import gather_again


def response_logprobs(
    model: LM,
    encoded: Encoded,
    description: str = "log-probs",
    batch_size: int = 64,
    temperature: float = 1.0,
) -> Tensor:
    """log π(y|x) of each row [N], on the CPU."""
    return _by_batches(
        model, encoded, description, batch_size,
        lambda batch: model(batch.inputs, batch.targets, batch.mask, temperature, packed=batch.packed).sum(-1),
    )  # fmt: skip


def token_logprobs(
    model: LM, encoded: Encoded, description: str = "log-probs", batch_size: int = 64, temperature: float = 1.0
) -> Tensor:
    """log π of each token that counts [N, T], 0 elsewhere, on the CPU; columns as in a batch of all rows."""
    columns = int(encoded.row_lengths.max()) - 1

    def say(batch: Batch) -> Tensor:
        logprobs = model(batch.inputs, batch.targets, batch.mask, temperature, packed=batch.packed)
        return F.pad(logprobs, (0, columns - logprobs.shape[1]))

    return _by_batches(model, encoded, description, batch_size, say)


def token_scores(model: ScalarModel, encoded: Encoded, description: str = "scores", batch_size: int = 64) -> Tensor:
    """The mean of what the heads say at each token, of the text up to it [N, T + 1], on the CPU; what stands behind a
    row's last token means nothing."""
    columns = int(encoded.row_lengths.max())

    def say(batch: Batch) -> Tensor:
        scores = model(batch.tokens, packed=batch.packed).mean(-1)
        return F.pad(scores, (0, columns - scores.shape[1]))

    return _by_batches(model, encoded, description, batch_size, say)


def reference_logprobs(run: Run, model: LM | None, *parts: Encoded, batch_size: int = 64) -> tuple[Tensor, ...]:
    """log π_ref(y|x) of each row of each part; kept in a file of the run, so that a resumed one needs no reference
    model. 0 without a model."""

    def make() -> list[bytes]:
        each = (response_logprobs(model, part, "log π_ref", batch_size) if model else None for part in parts)
        each = [torch.zeros(len(p.row_lengths)) if x is None else x for x, p in zip(each, parts, strict=True)]
        return [save({"logprobs": torch.cat(each)})]

    run.pin("rows", *parts)
    (path,) = run.keep(make, "reference.safetensors")
    return load_file(path)["logprobs"].split([len(part.row_lengths) for part in parts])


def response_scores(model: ScalarModel, encoded: Encoded, description: str = "scores", batch_size: int = 64) -> Tensor:
    """What each head says of each row at its last token [N, heads], on the CPU."""
    return _by_batches(
        model, encoded, description, batch_size, lambda batch: model(batch.tokens, batch.last, batch.packed)
    )


def choice_logits(
    model: LM, encoded: Encoded, choices: list[int], description: str = "choices", batch_size: int = 64
) -> Tensor:
    """The logits of some tokens behind each row [N, choices], on the CPU: log-probs, but for a number a row."""

    def say(batch: Batch) -> Tensor:
        hidden = model.hidden(batch.tokens)[torch.arange(len(batch.last), device=model.device), batch.last]
        return logits(hidden, model.unembedding[choices])

    return _by_batches(model, encoded, description, batch_size, say).view(-1, len(choices))


@torch.no_grad()
def _by_batches(
    model: nn.Module, encoded: Encoded, description: str, batch_size: int, say: Callable[[Batch], Tensor]
) -> Tensor:
    """`say` of all rows. Those alike in length share a batch, so that little of it is padding, whatever their groups,
    unless these share much. Each process does its share."""
    results, order = [], []
    parts = encoded if encoded.repeated > 1 - PAYS else encoded.single_rows()
    size = max(1, batch_size * len(parts) // max(1, len(encoded.row_lengths)))
    with evaluating(model), progress(description, len(encoded.row_lengths)) as bar:
        for groups in micro_batches(range(len(parts)), parts.lengths(), size, share=True):
            rows = parts.rows(groups)
            with autocast(model):
                results.append(say(parts.collate(groups).to(model.device)).float().cpu())
            order += rows
            bar.update(len(rows) * world_size())
    if not len(parts):
        return torch.empty(0)
    found = gathered(lambda: (torch.cat(results), order))
    return torch.cat([x for x, _ in found])[torch.tensor([row for _, rows in found for row in rows]).argsort()]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout is off inside. After that no process holds more than its share of the model."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        gather_again(model)
