"""Several policies against one another, as leaderboards show it: all answer the same prompts, a reward compares each
two of the answers to a prompt, and Bradley and Terry's model makes one number of what each won."""

import math
from collections.abc import Sequence

import numpy as np

from nanopref.evaluation import report
from nanopref.feedback.bradley_terry import maximum_likelihood

PRIOR = 0.1  # λ of rewards around 0, in log-odds: one who always wins is far ahead, and not without end
ELO = 400 / math.log(10)  # points of Elo's scale to a unit of log-odds


def ratings(scores: np.ndarray) -> np.ndarray:
    """Log-odds [K], Σ = 0, from the scores [K, P] of K policies' answers to P prompts. A tie is half a win for each, as
    Elo has it: what is compared counts twice, a tie once each way."""
    ahead, level = scores[:, None] > scores, (scores[:, None] == scores) & ~np.eye(len(scores), dtype=bool)[..., None]
    (winners, losers, _), (one, other, _) = ahead.nonzero(), level.nonzero()
    pairs = np.concatenate([winners, winners, one]), np.concatenate([losers, losers, other])
    return maximum_likelihood(*pairs, len(scores), regulariser=2 * PRIOR, errors=False)[0]


def table(names: Sequence[str], scores: np.ndarray, reference: int, draws: int = 200, seed: int = 0) -> str:
    """A line a policy, the best first, on Elo's scale with the reference at 1000, for scores [K, P].

    The intervals are those of prompts that are drawn anew, since all comparisons of a prompt share its answers.
    """
    rng = np.random.default_rng(seed)
    samples = [scores, *(scores[:, rng.integers(scores.shape[1], size=scores.shape[1])] for _ in range(draws))]
    elo = 1000 + ELO * np.array([found - found[reference] for found in map(ratings, samples)])
    low, high = np.percentile(elo[1:], [2.5, 97.5], axis=0)
    signs = np.sign(scores[:, None] - scores[None])  # [K, K, P]
    others = len(names) - 1
    won, tied = ((signs == sign).mean(2).sum(1) for sign in (1, 0))
    lines = []
    for k in np.argsort(-elo[0], kind="stable"):
        interval = f"{low[k]:.0f} to {high[k]:.0f}" if low[k] < high[k] else "–"  # who always wins is only beyond
        interval = "the reference" if k == reference else interval
        half = f"{(1 + signs[k, reference].mean()) / 2:.1%}" if k != reference else ""
        shares = f"{won[k] / others:.1%}", f"{(tied[k] - 1) / others:.1%}"
        lines.append((names[k], f"{elo[0, k]:.0f}", interval, *shares, half, f"{scores[k].mean():.2f}"))
    header = ("", "Elo", "95%", "won", "tied", "against the reference", "score")
    return report.table(lines, header)
