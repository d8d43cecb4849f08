"""Simulated people, who turn numbers into noisy votes.

They answer by the model of Bradley and Terry (Biometrika 39, 1952): P(a preferred over b) = σ((r_a - r_b) / noise),
with the noise in units of reward; without any, the annotator is never wrong. Each of k annotators votes on their own
and the majority decides, so k is odd.
"""

import math

import numpy as np


def _check_annotators(annotators: int) -> None:
    if annotators < 1 or annotators % 2 == 0:
        raise ValueError(
            f"the number of annotators must be odd and at least 1, so that a majority exists: {annotators}"
        )


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
    return 0.5 * (1 + np.tanh(logit / 2))  # σ, in the form that cannot overflow


def majority_probability(p, k: int) -> np.ndarray:
    """The probability that more than half of k independent votes say yes, when each does with probability p."""
    _check_annotators(k)
    p = np.asarray(p, dtype=np.float64)
    return sum(math.comb(k, yes) * p**yes * (1 - p) ** (k - yes) for yes in range(k // 2 + 1, k + 1))


def annotate(reward_a, reward_b, *, noise: float = 1.0, annotators: int = 1, rng: np.random.Generator) -> np.ndarray:
    """Labels [N], True where the majority of the annotators prefers a, for true rewards [N] and [N]."""
    _check_annotators(annotators)
    p = bradley_terry_probability(reward_a, reward_b, noise=noise)
    return 2 * rng.binomial(annotators, p) > annotators


def rank(rewards, *, noise: float = 1.0, annotators: int = 1, rng: np.random.Generator) -> np.ndarray:
    """Rankings [G, K], the numbers of the answers with the best first, for rewards [G, K].

    Each annotator ranks as Plackett and Luce have it, the best chosen of all, the next of the rest …, which is to sort
    by reward plus Gumbel noise (Yellott 1977); for K = 2 that is Bradley and Terry's. The mean place of an answer
    decides (Borda), and between equals the first annotator.
    """
    _check_annotators(annotators)
    heard = np.asarray(rewards, dtype=np.float64) + noise * rng.gumbel(size=(annotators, *np.shape(rewards)))
    places = heard.argsort(-1).argsort(-1)  # the worst has place 0
    return np.argsort(-(places.sum(0) + places[0] / places.shape[-1]), axis=-1, kind="stable")


def rate(rewards, *, noise: float = 1.0, annotators: int = 1, rng: np.random.Generator) -> np.ndarray:
    """Ratings like the rewards: the mean of what the annotators give, each off by normal noise."""
    _check_annotators(annotators)
    rewards = np.asarray(rewards, dtype=np.float64)
    return rewards + rng.normal(scale=noise, size=(annotators, *rewards.shape)).mean(0)


def best_accuracy(reward_a, reward_b, *, noise: float = 1.0, annotators: int = 1) -> float:
    """The share of such labels that one who knows the true reward gets right, on average; no model can expect more."""
    p = majority_probability(bradley_terry_probability(reward_a, reward_b, noise=noise), annotators)
    return float(np.maximum(p, 1 - p).mean())
