"""Optimisers, schedules, and the order in which data are drawn."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain

import torch
from torch import Tensor, nn

from nanopref.running.parallel import generator, say
from nanopref.running.sharding import one_by_one

BUCKET = 8  # batches whose rows are sorted by length together, where batches of rows alike are wanted


def learning(model: nn.Module) -> list[nn.Parameter]:
    """The weights of a model that are not frozen."""
    return [p for p in model.parameters() if p.requires_grad]


def adamw(model: nn.Module, lr: float, weight_decay: float = 0.0, betas=(0.9, 0.95)) -> torch.optim.AdamW:
    """AdamW that decays matrices only: biases and LayerNorm gains have no reason to be small."""
    decay = [p for p in learning(model) if p.dim() >= 2]
    rest = [p for p in learning(model) if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW([{**group, "peak": lr} for group in groups], lr=lr, betas=betas, fused=True)


class Muon(torch.optim.Optimizer):
    """Momentum with all its singular values brought to about 1 (Jordan et al. 2024), each step of AdamW's usual size
    (Liu et al. 2025, section 2.2).

    As torch.optim.Muon, but in float32 and for all matrices of a shape at once: that one multiplies in bfloat16, one
    matrix after the other, which on a CPU without such units takes 750 ms a step of a small GPT instead of 11.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.8):
        super().__init__([{"params": params, "peak": lr}], {"lr": lr, "weight_decay": weight_decay, "mu": momentum})

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.param_groups
        there = [p for p in group["params"] if p.grad is not None]
        for shape in dict.fromkeys(p.shape for p in there):
            same, updates = [p for p in there if p.shape == shape], []
            for p in same:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"]
                momentum.lerp_(p.grad, 1 - group["mu"])
                updates.append(p.grad.lerp(momentum, group["mu"]))  # Nesterov's
                p.mul_(1 - group["lr"] * group["weight_decay"])
            directions = one_by_one(orthogonalised, torch.stack(updates)).unbind()
            torch._foreach_add_(same, directions, alpha=-0.2 * max(shape) ** 0.5 * group["lr"])


def orthogonalised(x: Tensor) -> Tensor:
    """x [n, a, b] = U S Vᵀ -> about U Vᵀ of each, by four steps of Newton and Schulz with Jordan's coefficients.

    Every iterate is a polynomial in the small Gram matrix times x, so that it is the small ones that are multiplied.
    """
    if x.shape[1] > x.shape[2]:
        return orthogonalised(x.mT).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = 3.4445, -4.7750, 2.0315
    gram, product = x @ x.mT, None
    for _ in range(4):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        gram = factor @ gram @ factor
    return product @ x


class Both:
    """Two optimisers as one, for two sets of parameters."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict]:
        return list(chain(*(optimizer.param_groups for optimizer in self.optimizers)))

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def muon(model: nn.Module, lr: float, weight_decay: float = 0.0, betas=(0.9, 0.95)) -> Both:
    """Muon at twice `lr` for the matrices of the blocks, and AdamW for all else."""
    matrices = {p for block in model.blocks for p in learning(block) if p.dim() == 2}
    rest = nn.ParameterList(p for p in learning(model) if p not in matrices)
    ordered = [p for p in learning(model) if p in matrices]
    return Both(Muon(ordered, 2 * lr, weight_decay), adamw(rest, lr, weight_decay, betas))


def adafactor(model: nn.Module, lr: float, weight_decay: float = 0.0, betas=(0.9, 0.95)) -> torch.optim.Adafactor:
    """Adafactor (Shazeer & Stern 2018): of a matrix's second moments a row and a column, and no first.

    Its steps are relative to a weight's size (the root of its mean square), so `lr` is divided by that: a step is then
    about as long as AdamW's usual one, whose elements are a third of `lr`.
    """
    groups = []
    for p in learning(model):
        size = 3 * max(1e-3, p.detach().square().mean().sqrt().item())
        groups.append({"params": [p], "peak": lr / size, "weight_decay": size * weight_decay if p.dim() >= 2 else 0.0})
    return torch.optim.Adafactor(groups, lr=lr)


# (model, peak lr, weight decay, betas) -> an optimiser
OPTIMIZERS = {"muon": muon, "adamw": adamw, "adafactor": adafactor}


def set_lr(optimizer: torch.optim.Optimizer | Both, step: int, steps: int, warmup: int) -> float:
    """Each group's learning rate: linear warm-up to its peak over `warmup` steps, then linearly down to 0. Returns that
    of the last group."""
    factor = (step + 1) / warmup if step < warmup else 1 - (step - warmup) / max(1, steps - warmup)
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak"]
    return group["lr"]


def batch_size(wanted: int, there: int) -> int:
    """As many rows a step as were asked for, or all there are, which is said."""
    if wanted > there:
        say(f"  batches of {there:,} and not {wanted:,}, since there are no more")
    return min(wanted, there)


def steps_of(n: int, size: int, epochs: int) -> int:
    """How many whole batches `epochs` passes over n rows make: at least one."""
    return max(1, epochs * n // size)


def batches(
    n: int, size: int, steps: int, seed: int, start: int = 0, lengths: Sequence[int] | None = None
) -> Iterator[tuple[int, list[int]]]:
    """(step, row numbers) for the steps from `start` on, each of exactly `size` rows: a batch that an epoch cannot fill
    goes on with the next. Each epoch is a permutation that depends on the seed and its number alone, so a run that
    resumes sees what it would have seen.

    With `lengths` the rows of a batch are alike in length, so that little of it is padding: the rows of each BUCKET
    batches are sorted before they are cut, and the batches shuffled.
    """
    bucket = 1 if lengths is None else BUCKET
    for block in range(start // bucket, -(-steps // bucket)):
        rows = _drawn(n, seed, block * bucket * size, bucket * size)
        if lengths is not None:
            rows.sort(key=lambda row: lengths[row])
        order = torch.randperm(bucket, generator=generator(seed, f"bucket {block}")).tolist()
        for step, i in enumerate(order, block * bucket):
            if start <= step < steps:
                yield step, rows[i * size : (i + 1) * size]


def _drawn(n: int, seed: int, begin: int, count: int) -> list[int]:
    """The rows from `begin` on of all epochs' permutations, one behind the other."""
    parts, end = [], begin + count
    for epoch in range(begin // n, (end - 1) // n + 1):
        parts.append(_permutation(n, seed, epoch)[max(0, begin - epoch * n) : end - epoch * n])
    return torch.cat(parts).tolist()


@lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed, f"epoch {epoch}"))
