"""What the best of n answers is worth, and how far it lies from the policy, from one pool of N answers to a prompt.

To draw n answers and keep the one with the highest score is the simplest way to follow a reward model. The estimates,
for every n from the same pool, are those of Nakano et al. 2021 (WebGPT), Gao et al. 2022 (Scaling Laws for Reward Model
Overoptimization) and Hilton and Gao 2022 (Measuring Goodhart's Law).
"""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from nanopref.data.tokenizer import Tokenizer
from nanopref.feedback.rewards import Reward
from nanopref.models.language import LM
from nanopref.models.sampling import respond


def subset_weights(N: int, n: int) -> np.ndarray:
    """P(the i-th smallest of N is the largest of n drawn without replacement) [N]: C(i-1, n-1) / C(N, n).

    From the largest down, which is it with probability n/N; each next has (i-n) / (i-1) of the one above it.
    """
    if not 1 <= n <= N:
        raise ValueError(f"n must lie between 1 and the {N} answers of the pool: {n}")
    i = np.arange(N, 1, -1)
    return np.cumprod([n / N, *np.maximum(i - n, 0) / (i - 1)])[::-1]


def _pools(scores) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or not scores.shape[1] or np.isnan(scores).any():
        raise ValueError(f"scores must be numbers [prompts, answers], not {scores.shape} or NaN")
    return scores


def best_of(scores, values, n: int) -> np.ndarray:
    """E[value of the highest-scored of n answers] [P], for scores and values [P, N] of a pool for each prompt.

    The mean over all subsets of n, which is unbiased; between equal scores chance decides, so they share their weight.
    """
    scores, values = _pools(scores), np.asarray(values, dtype=np.float64)
    if values.shape != scores.shape:
        raise ValueError(f"scores and values must have the same shape, not {scores.shape} and {values.shape}")
    weights, found = subset_weights(scores.shape[1], n), []
    for score, value in zip(scores, values, strict=True):
        order = np.argsort(score)
        _, place, count = np.unique(score, return_inverse=True, return_counts=True)
        shared = np.bincount(place[order], weights) / count
        found.append(shared[place] @ value)
    return np.array(found)


def kl_bound(n: int) -> float:
    """log n - (n-1)/n nats: the KL of best-of-n from its policy where no two answers have the same score, and a bound
    on it where some have (Beirami et al. 2024)."""
    return math.log(n) - (n - 1) / n


def kl(scores, n: int) -> np.ndarray:
    """KL of best-of-n from the policy [P] in nats, each pool of scores [P, N] taken as all that the policy can say.

    n answers are drawn from the pool with replacement, and between equal scores chance decides: a score v that a share
    q of the pool has is the highest with p = F(v)^n - F(v-)^n, and KL = Σ p log(p/q). It tells how far the selection
    reaches and nothing of the policy's probabilities. It cannot exceed log N, so let N be several times n; then it
    comes, without ties, to `kl_bound` from below.
    """
    scores = _pools(scores)
    if n < 1:
        raise ValueError(f"n must be at least 1: {n}")
    found = []
    for row in scores:
        count = np.unique(row, return_counts=True)[1]
        below = np.concatenate([[0.0], np.cumsum(count) / len(row)])
        p = np.diff(below**n)
        seen = p > 0  # a power may be too small for a float
        found.append(np.sum(p[seen] * np.log(p[seen] * len(row) / count[seen])))
    return np.array(found)


def measure(
    policy: LM, tokenizer: Tokenizer, prompts: Sequence[str], score: Reward, others: dict[str, Reward], n: int,
    **sampling,
) -> list[dict[str, float]]:  # fmt: skip
    """Best-of-1, 2, 4 … of n answers to each prompt, by `score`: what that is worth, by itself and by the others, its
    KL and the bound on it. One row for each; `sampling` is as for `respond`."""
    answers = respond(policy, tokenizer, [x for x in prompts for _ in range(n)], stream="best of n", **sampling)
    values = {name: by_prompt(reward(answers), n) for name, reward in {"score": score, **others}.items()}
    return curve(values | {"tokens": np.array([len(answer.tokens) for answer in answers]).reshape(-1, n)}, n)


def by_prompt(scores: Tensor, n: int) -> np.ndarray:
    """[prompts · n] -> [prompts, n] in float64."""
    return scores.double().numpy().reshape(-1, n)


def curve(values: dict[str, np.ndarray], largest: int) -> list[dict[str, float]]:
    """Best-of-1, 2, 4 … `largest` by values["score"], of pools [prompts, N]: each value, the KL and the bound on it."""
    scores = values["score"]
    return [
        {"n": k, **{name: float(best_of(scores, value, k).mean()) for name, value in values.items()}}
        | {"kl": float(kl(scores, k).mean()), "bound": kl_bound(k)}
        for k in (2**i for i in range(largest.bit_length()))
    ]
