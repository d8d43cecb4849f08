"""Figures of merit: who wins how often, how sure a model may be, what goes with what."""

import math
from collections.abc import Sequence

import numpy as np

from nanopref.learning.objectives import is_right


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's; 0 where one of the two is constant."""
    return float(np.corrcoef(x, y)[0, 1]) if np.std(x) and np.std(y) else 0.0


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's: the correlation of the ranks, equal values sharing theirs; 0 where one of the two is constant."""

    return correlation(ranks(x), ranks(y))


def ranks(values: Sequence[float]) -> np.ndarray:
    """From 1 for the smallest; equal values share theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """How often one of the first is above one of the second, ties half: the area under the ROC curve (Mann and Whitney
    1947); 1/2 where there is nothing to tell apart."""
    n, m = len(positive), len(negative)
    above = ranks(np.concatenate([positive, negative]))[:n].sum() - n * (n + 1) / 2
    return float(above / (n * m)) if n and m else 0.5


def calibration(gap: np.ndarray, bins: int = 10) -> list[dict[str, float]]:
    """Pairs by how sure a model is, |gap| apart, which of two is better: what it says, σ(|gap|), and how often it is
    right. Bins of equally many pairs, the least sure first; `gap` [N] is positive where the model is right."""
    ordered = np.array(sorted(gap, key=abs), dtype=np.float64)
    return [
        {
            "says": float(np.mean(0.5 * (1 + np.tanh(np.abs(part) / 2)))),
            "right": float(np.mean(is_right(part))),
            "pairs": len(part),
        }
        for part in np.array_split(ordered, min(bins, len(ordered)))
    ]


def win_rate(policy: Sequence[float], reference: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Share of prompts on which the policy's reward is higher, a tie counting half, and Wilson's 95% interval."""
    policy, reference = np.asarray(policy, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    rate = float(np.mean(is_right(policy - reference)))
    return rate, wilson(rate, len(policy))


def wilson(rate: float, n: int) -> tuple[float, float]:
    """Wilson's 95% interval for a share of n."""
    z = 1.959964
    centre, half = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    return max(low, 0.0), min(high, 1.0)  # rounding may end beyond: 0 of 7 gives -4e-17
