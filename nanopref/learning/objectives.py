"""Objectives on rewards [G, K]: what a policy and a reward model are fitted with.

A reward model says r(x, y) itself; a policy says it through r(x, y) = β log π_θ(y|x)/π_ref(y|x) (Rafailov et al. 2023,
eq. 5). So an objective takes `values`, what the model says of each answer (a score, or log π_θ), and `baseline`, what
is taken off (a margin that is asked for, or log π_ref), and the rewards are β (values - baseline). G groups, K answers
each, the best first; a group that has fewer is 0 where `there` is 0.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import kernels
from kernels.reference import MARGIN_LOSSES, SMOOTHED
from nanopref.data.groups import Group
from nanopref.running.flags import require


class Objective(NamedTuple):
    """losses(values, baseline, there, beta=, label_smoothing=) -> [G], in nats; and which groups it can learn from."""

    losses: Callable[..., Tensor]
    sizes: range


def margin_losses(
    values: Tensor, baseline: Tensor, there: Tensor, *, loss: str, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """A function of the margin of pairs, K = 2; see `kernels.reference.MARGIN_LOSSES`.

    On scores, `sigmoid` is Bradley-Terry: -log σ(r_w - r_l - m), Ouyang et al. 2022, eq. 1; Touvron et al. 2023, eq. 2.
    """
    pairs = *values.unbind(1), *baseline.unbind(1)
    return kernels.dpo_loss(*pairs, beta=beta, label_smoothing=label_smoothing, loss=loss)[0]


def plackett_luce(
    values: Tensor, baseline: Tensor, there: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """-Σ_k log [e^{r_k} / Σ_{j≥k} e^{r_j}]: the best is chosen of all, the next of the rest … (Rafailov et al. 2023,
    appendix A.3). K = 2 is Bradley-Terry, K = 1 says nothing."""
    rewards = (beta * (values - baseline)).masked_fill(
        ~there, -1e30
    )  # e to its power is 0, without the NaN that -∞ has for a slope
    rest = rewards.flip(1).logcumsumexp(1).flip(1)
    return torch.where(there, rest - rewards, 0.0).sum(1)


OBJECTIVES = {name: Objective(partial(margin_losses, loss=name), range(2, 3)) for name in MARGIN_LOSSES}
OBJECTIVES |= {"plackett-luce": Objective(plackett_luce, range(2, 1000))}


def check(loss: str, label_smoothing: float) -> None:
    """Raise UserError for a smoothing of labels that the objective has no use for."""
    fits = not label_smoothing or loss in SMOOTHED
    require(fits, f"--label-smoothing belongs to --loss {' or '.join(SMOOTHED)}, not to {loss}")


def check_sizes(loss: str, groups: Sequence[Group], hint: str = "") -> None:
    """Raise UserError, with a hint, for groups of which an objective cannot learn."""
    wrong = next((len(group.responses) for group in groups if len(group.responses) not in OBJECTIVES[loss].sizes), None)
    require(wrong is None, f"the objective {loss} compares two answers to a prompt, and the data hold {wrong}{hint}")


def is_right(gap):
    """1 where the better of two is ahead, 1/2 at a tie: a tensor or an array of differences -> one like it."""
    return (gap > 0) * 1.0 + (gap == 0) * 0.5


def ranked_right(rewards: Tensor, there: Tensor) -> Tensor:
    """[G, K] -> [G]: the share of a group's pairs of answers in the right order, a tie counting half."""
    better = torch.ones(rewards.shape[1:] * 2, device=rewards.device).triu(1) * there[:, :, None] * there[:, None, :]
    right = is_right(rewards[:, :, None] - rewards[:, None, :])
    return (right * better).sum((1, 2)) / better.sum((1, 2)).clamp(min=1)
