"""Each objective of train_dpo.py as its paper has it, of one group at a time: what the rows of the tables come to."""

from typing import NamedTuple

import torch
from torch import Tensor


class Answer(NamedTuple):
    p: Tensor  # log π_θ(y|x), summed over the tokens of y
    q: Tensor  # log π_ref(y|x)
    n: int  # tokens of y, with its end
    said: float  # a rating, or whether it is good; of answers in order how far behind the best


def logistic(x) -> Tensor:
    """-log σ(x)."""
    return -torch.log(1 / (1 + torch.exp(-x)))


def odds(y: Answer) -> Tensor:
    likelihood = torch.exp(y.p / y.n)
    return likelihood / (1 - likelihood)


def shares(x: Tensor) -> Tensor:
    return torch.exp(x) / torch.exp(x).sum()


def ratios(ys: list[Answer], c) -> Tensor:
    return torch.stack([c.beta * (y.p - y.q) for y in ys])


def dpo(w: Answer, r: Answer, m: float, c) -> Tensor:
    """How far w is ahead of r, less the margin that the file asks for."""
    return c.beta * ((w.p - w.q) - (r.p - r.q)) - c.margin * m


def discopop(x: Tensor) -> Tensor:
    m = 1 / (1 + torch.exp(-x / 0.05))
    return (1 - m) * logistic(x) + m * torch.exp(-x)


# Of a pair w ≻ r with margin m: what is published of the flags c that it uses, and the loss.
M = {"beta": 0.1, "margin": 0.0}
PAIRS = {
    # Rafailov et al. 2023, eq. 7
    "dpo": (M, lambda w, r, m, c: logistic(dpo(w, r, m, c))),
    "sigmoid": (M, lambda w, r, m, c: logistic(dpo(w, r, m, c))),
    # Mitchell 2023
    "cdpo": (
        M | {"label_smoothing": 0.1},
        lambda w, r, m, c: (
            (1 - c.label_smoothing) * logistic(dpo(w, r, m, c)) + c.label_smoothing * logistic(-dpo(w, r, m, c))
        ),
    ),
    # Chowdhury et al. 2024, eq. 12
    "robust": (
        M | {"label_smoothing": 0.1},
        lambda w, r, m, c: (
            ((1 - c.label_smoothing) * logistic(dpo(w, r, m, c)) - c.label_smoothing * logistic(-dpo(w, r, m, c)))
            / (1 - 2 * c.label_smoothing)
        ),
    ),
    # Azar et al. 2023, eq. 17; of means over tokens as in its authors' correspondence with TRL
    "ipo": (
        M,
        lambda w, r, m, c: ((w.p - w.q) - (r.p - r.q) - c.margin * m / c.beta - 1 / (2 * c.beta)) ** 2,
    ),
    "ipo-mean": (
        M,
        lambda w, r, m, c: ((w.p - w.q) / w.n - (r.p - r.q) / r.n - c.margin * m / c.beta - 1 / (2 * c.beta)) ** 2,
    ),
    # Zhao et al. 2023, eq. 2, the target being the chosen answer
    "slic": (
        M | {"beta": 1.0, "likelihood": 1.0},
        lambda w, r, m, c: (1 + c.margin * m - c.beta * w.p + c.beta * r.p).clamp(min=0) - c.likelihood * w.p / w.n,
    ),
    # Meng et al. 2024, eq. 6
    "simpo": (
        {"beta": 2.0, "margin": 1.0},
        lambda w, r, m, c: logistic(c.beta / w.n * w.p - c.beta / r.n * r.p - c.margin * m),
    ),
    # Xu et al. 2024, eq. 5
    "cpo": (
        M | {"likelihood": 1.0},
        lambda w, r, m, c: logistic(c.beta * w.p - c.beta * r.p - c.margin * m) - c.likelihood * w.p / w.n,
    ),
    # Hong et al. 2024, eqs. 4 to 7: L_SFT + λ L_OR with λ = 0.1, over λ
    "orpo": (
        M | {"beta": 1.0, "likelihood": 10.0},
        lambda w, r, m, c: logistic(c.beta * torch.log(odds(w) / odds(r)) - c.margin * m) - c.likelihood * w.p / w.n,
    ),
    # Pang et al. 2024, eq. 1
    "rpo": (M | {"likelihood": 1.0}, lambda w, r, m, c: logistic(dpo(w, r, m, c)) - c.likelihood * w.p / w.n),
    # Rafailov et al. 2023, section 6 and appendix
    "preferred": ({"likelihood": 1.0}, lambda w, r, m, c: -c.likelihood * w.p / w.n),
    "unlikelihood": (
        M | {"likelihood": 1.0},
        lambda w, r, m, c: c.margin * m - c.beta * w.p + c.beta * r.p - c.likelihood * w.p / w.n,
    ),
    # Tang et al. 2024, table 1
    "hinge": (M, lambda w, r, m, c: (1 - dpo(w, r, m, c)).clamp(min=0)),
    "squared-hinge": (M, lambda w, r, m, c: (1 - dpo(w, r, m, c)).clamp(min=0) ** 2),
    "exponential": (M, lambda w, r, m, c: torch.exp(-dpo(w, r, m, c))),
    # Lu et al. 2024, eq. 5
    "discopop": (M, lambda w, r, m, c: discopop(dpo(w, r, m, c))),
}
# Of the answers of a group: the same, with z₀.
B, WEIGHTS = {"beta": 0.1}, {"good_weight": 4 / 3, "bad_weight": 1.0}  # of three good and four bad
GROUPS = {
    # Rafailov et al. 2023, eq. 20
    "plackett-luce": (
        B | {"likelihood": 0.0},
        lambda ys, c, z0: (
            -sum(torch.log(shares(ratios(ys[k:], c))[0]) for k in range(len(ys))) - c.likelihood * ys[0].p / ys[0].n
        ),
    ),
    # Chen et al. 2024, table 1
    "infonca": (
        B | {"rating_temperature": 1.0},
        lambda ys, c, z0: -sum(shares(said(ys) / c.rating_temperature) * torch.log(shares(ratios(ys, c)))),
    ),
    "nca": (
        B | {"rating_temperature": 1.0},
        lambda ys, c, z0: sum(
            shares(said(ys) / c.rating_temperature) * logistic(ratios(ys, c)) + logistic(-ratios(ys, c)) / len(ys)
        ),
    ),
    "regression": (B, lambda ys, c, z0: sum((ratios(ys, c) - said(ys)) ** 2) / len(ys)),
    # Ethayarajh et al. 2024, eqs. 7 and 8
    "kto": (
        B | WEIGHTS,
        lambda ys, c, z0: (
            c.good_weight * (1 - torch.exp(-logistic(c.beta * (ys[0].p - ys[0].q - z0))))
            if ys[0].said
            else c.bad_weight * (1 - torch.exp(-logistic(c.beta * (z0 - (ys[0].p - ys[0].q)))))
        ),
    ),
    "binary": (
        B | WEIGHTS,
        lambda ys, c, z0: (
            c.good_weight * logistic(c.beta * (ys[0].p - ys[0].q))
            if ys[0].said
            else c.bad_weight * logistic(-c.beta * (ys[0].p - ys[0].q))
        ),
    ),
}
KINDS = {"plackett-luce": "rankings", "infonca": "ratings", "nca": "ratings", "regression": "ratings"}
KINDS |= {"kto": "labels", "binary": "labels"}
ALONE = {"slic", "simpo", "cpo", "orpo", "preferred", "unlikelihood"}  # without a reference
CHANGED = {"beta": 0.7, "margin": 0.4, "likelihood": 0.3, "label_smoothing": 0.2, "rating_temperature": 2.0}
CHANGED |= {"good_weight": 0.6, "bad_weight": 1.5}


def said(ys: list[Answer]) -> Tensor:
    return torch.tensor([y.said for y in ys], dtype=torch.float64)


def reward(name: str, y: Answer, c, z0: Tensor) -> Tensor:
    """What train_dpo.py reports of an answer: β times what the loss counts, without the margin."""
    if name in ALONE:
        value = {"orpo": lambda: torch.log(odds(y)), "simpo": lambda: y.p / y.n}.get(name, lambda: y.p)()
    else:
        value = (y.p - y.q) / (y.n if name == "ipo-mean" else 1) - (z0 if name == "kto" else 0)
    return getattr(c, "beta", 0.1) * value
