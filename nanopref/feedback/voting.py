"""Simulated people, who turn numbers into noisy votes.

They answer by the model of Bradley and Terry (Biometrika 39, 1952): P(a preferred over b) = σ((r_a - r_b) / noise),
with the noise in units of reward; without any, the annotator is never wrong. Each of k annotators votes on their own
and the majority decides, so k is odd. Where each has a noise of their own, `votes` tells who said what.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from nanopref.data.votes import dawid_skene

AT_ONCE = 2**22  # numbers that are drawn


def _check_annotators(annotators: int) -> None:
    if annotators < 1 or annotators % 2 == 0:
        raise ValueError(
            f"the number of annotators must be odd and at least 1, so that a majority exists: {annotators}"
        )


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))  # the form that cannot overflow


def _of_each(noise: float | Sequence[float], annotators: int, rewards: np.ndarray) -> float | np.ndarray:
    """A noise for all as it is; or one for each annotator, in the shape that broadcasts with [annotators, *rewards]."""
    _check_annotators(annotators)
    each = np.asarray(noise, dtype=np.float64)
    if each.shape not in ((), (annotators,)):
        raise ValueError(f"noise must be a number or one for each of {annotators} annotators, not {each.shape}")
    if not ((each >= 0) & (each < math.inf)).all():
        raise ValueError(f"noise must be a finite number of at least 0: {noise}")
    return noise if each.ndim == 0 else each.reshape(-1, *[1] * np.ndim(rewards))


def bradley_terry_probability(reward_a, reward_b, *, noise: float) -> np.ndarray:
    """P(a preferred over b) [N] for rewards [N] and [N]. With noise 0 it is 0 or 1, or 1/2 where rewards are equal."""
    a, b = np.asarray(reward_a, dtype=np.float64), np.asarray(reward_b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"reward_a and reward_b must have the same shape, not {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("rewards must be finite numbers")
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be a finite number of at least 0: {noise}")
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        logit = np.where(a == b, 0.0, (a - b) / np.float64(noise))
    return _sigmoid(logit)


def majority_probability(p, k: int) -> np.ndarray:
    """The probability that more than half of k independent votes say yes, when each does with probability p."""
    _check_annotators(k)
    p = np.asarray(p, dtype=np.float64)
    q, n = np.minimum(p, 1 - p), k // 2 + 1
    # Σ C(k, yes) q^yes (1 - q)^(k - yes) from yes = n on, each term a multiple of the one before: C(k, n) has 30,000
    # digits for k = 100,001, but C(k, n) / 2^k is Γ(n + ½) / (√π Γ(n + 1))
    share = math.exp(math.lgamma(n + 0.5) - math.lgamma(n + 1)) / math.sqrt(math.pi)
    term = share / 2 * (4 * q * (1 - q)) ** n / (1 - q)
    total = term
    for yes in range(n, k):
        term = term * ((k - yes) / (yes + 1) * q / (1 - q))
        if (total + term == total).all():
            break
        total = total + term
    return np.where(p < 0.5, total, np.where(p > 0.5, 1 - total, 0.5))


def annotate(
    reward_a, reward_b, *, noise: float | Sequence[float] = 1.0, annotators: int = 1, rng: np.random.Generator
) -> np.ndarray:
    """Labels [N], True where the majority of the annotators prefers a, for true rewards [N] and [N]. The noise is one
    for all, or one for each."""
    _check_annotators(annotators)
    if np.ndim(noise):
        return 2 * votes(reward_a, reward_b, noise=noise, rng=rng).sum(0) > annotators
    p = bradley_terry_probability(reward_a, reward_b, noise=noise)
    return 2 * rng.binomial(annotators, p) > annotators


def rank(rewards, *, noise: float | Sequence[float] = 1.0, annotators: int = 1, rng: np.random.Generator) -> np.ndarray:
    """Rankings [G, K], the numbers of the answers with the best first, for rewards [G, K].

    Each annotator ranks as Plackett and Luce have it, the best chosen of all, the next of the rest …, which is to sort
    by reward plus Gumbel noise (Yellott 1977); for K = 2 that is Bradley and Terry's. The mean place of an answer
    decides (Borda), and between equals the first annotator. The noise is one for all, or one for each.
    """
    noise, total = _of_each(noise, annotators, rewards), 0.0
    rewards = np.asarray(rewards, dtype=np.float64)
    for some in _some(annotators, rewards):
        heard = rewards + _theirs(noise, some) * rng.gumbel(size=(len(some), *rewards.shape))
        places = heard.argsort(-1).argsort(-1)  # the worst has place 0
        total = total + places.sum(0) + (places[0] / places.shape[-1] if some[0] == 0 else 0)
    return np.argsort(-total, axis=-1, kind="stable")


def rate(rewards, *, noise: float | Sequence[float] = 1.0, annotators: int = 1, rng: np.random.Generator) -> np.ndarray:
    """Ratings like the rewards: the mean of what people give, each off by normal noise (one for all or for each)."""
    rewards = np.asarray(rewards, dtype=np.float64)
    noise, total = _of_each(noise, annotators, rewards), 0.0
    for some in _some(annotators, rewards):
        total = total + rng.normal(scale=_theirs(noise, some), size=(len(some), *rewards.shape)).sum(0)
    return rewards + total / annotators


def _some(annotators: int, rewards: np.ndarray) -> Iterator[range]:
    """All annotators, some at a time, so that what these hear fits into memory."""
    size = max(1, AT_ONCE // max(1, rewards.size))
    return (range(i, min(i + size, annotators)) for i in range(0, annotators, size))


def _theirs(noise: float | np.ndarray, some: range) -> float | np.ndarray:
    return noise if np.ndim(noise) == 0 else noise[some.start : some.stop]


def best_accuracy(reward_a, reward_b, *, noise: float = 1.0, annotators: int = 1) -> float:
    """The share of such labels that one who knows the true reward gets right, on average; no model can expect more."""
    p = majority_probability(bradley_terry_probability(reward_a, reward_b, noise=noise), annotators)
    return float(np.maximum(p, 1 - p).mean())


# ---- people who differ -----------------------------------------------------------------------------------------------


def votes(reward_a, reward_b, *, noise: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """Who prefers a [k, N], a row for each of k people with a noise of their own, for rewards [N] and [N]."""
    p = np.array([bradley_terry_probability(reward_a, reward_b, noise=one) for one in noise])
    return rng.random(p.shape) < p


def noise_of(accuracy: float, gaps) -> float:
    """The noise with which one is right so often, mean σ(|gap| / noise) = accuracy, for reward gaps [N]; by bisection.

    An accuracy that no noise gives, 1/2 and below or nearly 1, has the end of the range: 10^±6 times the mean gap.
    """
    gaps = np.abs(np.asarray(gaps, dtype=np.float64))
    if not 0 <= accuracy <= 1 or not 0 < gaps.mean() < math.inf:
        raise ValueError(f"an accuracy in [0, 1] and finite gaps, not all 0, are needed: {accuracy}, {gaps}")
    low, high = gaps.mean() * 1e-6, gaps.mean() * 1e6
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _sigmoid(gaps / middle).mean() > accuracy else (low, middle)
    return float(high)


def estimates(said, gaps, noise: Sequence[float]) -> list[dict[str, float]]:
    """Of each simulated person: the noise they have; how often Dawid and Skene's model takes them to be right, from the
    votes [k, N] alone; and the noise that belongs to this, for the reward gaps [N]. Nothing where all gaps are 0."""
    accuracy = dawid_skene(said)[1].mean(1) if np.any(gaps) else []
    return [
        {"noise": float(own), "accuracy": float(right), "estimated_noise": noise_of(right, gaps)}
        for own, right in zip(noise, accuracy, strict=False)
    ]
