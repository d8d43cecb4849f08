"""How good rewards are after m comparisons: `python -m nanopref.experiments.comparisons`

Random pairs of n alternatives are judged as Bradley and Terry have it. The maximum of the likelihood should be off by
the bound of Cramér and Rao, √(mean diagonal of the inverse information), which falls as 1/√m; the spectral estimator
falls as fast (Negahban, Oh and Shah 2017). And 1.96 of the standard errors should hold the truth in 95 of 100 cases.
"""

import importlib.util
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanopref.experiments import figures, runs
from nanopref.feedback.bradley_terry import maximum_likelihood, rank_centrality
from nanopref.feedback.voting import annotate, bradley_terry_probability
from nanopref.running import flags
from nanopref.running.flags import flag, require
from nanopref.running.parallel import say

ESTIMATORS = ("maximum likelihood", "rank centrality", "Cramér-Rao bound")


@dataclass
class Config(runs.FigureFlags):
    """Errors of rewards over the number of comparisons, beside the least that they can be; and the time it takes.

    Example: python -m nanopref.experiments.comparisons --alternatives 30 --timed 100 1000 10000
    """

    out: str = "out/comparisons"
    seeds: int = flag(20, "how many sets of comparisons, each of rewards of its own", least=1)
    alternatives: int = flag(100, "how many, with rewards drawn evenly from -2 to 2", least=2)
    fewest: int = flag(50, "comparisons of each alternative at the left end", least=1)
    doublings: int = flag(8, "of their number, to the right end", least=1)
    timed: tuple[int, ...] = flag(
        (100, 1000), "alternatives, with 100 times as many comparisons, to time; beside choix where that is installed, "
        "which for 10000 takes minutes", least=2,
    )  # fmt: skip


def measure(config: Config) -> dict:
    Path(config.out).mkdir(parents=True, exist_ok=True)
    n, z = config.alternatives, 1.96
    sizes = [config.fewest * n // 2 * 2**k for k in range(config.doublings + 1)]
    errors, held = np.zeros((3, len(sizes))), np.zeros(len(sizes))
    for seed in range(config.seeds):
        rng = np.random.default_rng(seed)
        truth = rng.uniform(-2, 2, size=n)
        truth -= truth.mean()
        for k, m in enumerate(sizes):
            winners, losers = compared(truth, m, rng)
            try:
                rewards, deviations = maximum_likelihood(winners, losers, n)
            except ValueError as error:
                require(False, f"--fewest {config.fewest}: with seed {seed} {error}; or ask for more")
            squares = (rewards - truth) ** 2, (rank_centrality(winners, losers, n) - truth) ** 2, bound(truth, m)
            errors[:, k] += [np.mean(x) / config.seeds for x in squares]
            held[k] += np.mean(np.abs(rewards - truth) <= z * deviations) / config.seeds
    errors = np.sqrt(errors)
    found = {"comparisons": sizes, "held": held.tolist(), "measured": n * config.seeds}
    return found | {"seconds": [timed(n) for n in config.timed]} | dict(zip(ESTIMATORS, errors.tolist(), strict=True))


def show(found: dict) -> tuple[str, list]:
    sizes, errors = found["comparisons"], [found[name] for name in ESTIMATORS]
    slopes = [np.polyfit(np.log(sizes), np.log(row), 1)[0] for row in errors]

    def draw_errors(axis) -> None:
        for name, row, slope, style in zip(ESTIMATORS, errors, slopes, ("o-", "s-", "k:"), strict=True):
            axis.loglog(sizes, row, style, markersize=4, label=f"{name}, slope {slope:.3f}")
        figures.plain_log_ticks(axis.yaxis)
        axis.set(title="error of a reward", xlabel="comparisons m", ylabel="root of the mean square")
        axis.legend(frameon=False)

    def draw_held(axis) -> None:
        chance = 1.96 * np.sqrt(0.95 * 0.05 / found["measured"])
        axis.axhspan(0.95 - chance, 0.95 + chance, color="grey", alpha=0.2, label="95% and what chance adds to it")
        axis.semilogx(sizes, found["held"], "o-", markersize=4, label="maximum likelihood")
        axis.legend(frameon=False)
        axis.set(title="truth within 1.96 standard errors", xlabel="comparisons m", ylabel="share", ylim=(0.9, 1))

    lines = [["comparisons", *ESTIMATORS, "within 1.96 standard errors"]]
    lines += [[f"{m:,}", *(f"{row[k]:.4f}" for row in errors), f"{found['held'][k]:.1%}"] for k, m in enumerate(sizes)]
    table = runs.markdown([*lines, ["slope, log-log", *(f"{slope:.3f}" for slope in slopes), ""]])
    if seconds := found["seconds"]:
        table += "\n" + runs.markdown([list(seconds[0]), *(list(map(str, row.values())) for row in seconds)])
    return table, [draw_errors, draw_held]


main = runs.experiment(measure, show)


def compared(truth: np.ndarray, m: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Winners [m] and losers [m] of random pairs."""
    i = rng.integers(len(truth), size=m)
    j = (i + rng.integers(1, len(truth), size=m)) % len(truth)
    first = annotate(truth[i], truth[j], rng=rng)
    return np.where(first, i, j), np.where(first, j, i)


def bound(truth: np.ndarray, m: int) -> np.ndarray:
    """The least variances [n] on Σ r = 0, from the information that m random pairs are expected to hold."""
    n = len(truth)
    p = bradley_terry_probability(*np.broadcast_arrays(truth[:, None], truth), noise=1.0)
    weights = p * (1 - p) * m / (n * (n - 1) / 2) * (1 - np.eye(n))
    return np.diag(np.linalg.pinv(np.diag(weights.sum(1)) - weights, hermitian=True))


def timed(n: int) -> dict[str, str]:
    """Median seconds for 100 n comparisons: the rewards alone, with standard errors, and the rewards by choix."""
    rng = np.random.default_rng(0)
    winners, losers = compared(rng.uniform(-2, 2, size=n), 100 * n, rng)
    ways = {
        "rewards, s": lambda: maximum_likelihood(winners, losers, n, errors=False)[0],
        "with standard errors, s": lambda: maximum_likelihood(winners, losers, n)[0],
    }
    if importlib.util.find_spec("choix"):
        import choix

        pairs = list(zip(winners.tolist(), losers.tolist(), strict=True))
        ways["choix.ilsr_pairwise, rewards, s"] = lambda: choix.ilsr_pairwise(n, pairs)
    found, seconds = {}, {}
    for name, way in ways.items():
        times = []
        while len(times) < 3 and sum(times) < 10:
            begin = time.perf_counter()
            found[name] = way()
            times.append(time.perf_counter() - begin)
        seconds[name] = statistics.median(times)
        say(f"{n:,} alternatives, {name.removesuffix(', s')}: {seconds[name]:.3f} s")
    row = {"alternatives": f"{n:,}"} | {name: f"{value:.3f}" for name, value in seconds.items()}
    if len(ways) == 3:
        ours, with_errors, choix_s = seconds.values()
        row |= {"times as fast": f"{choix_s / ours:.0f}; with errors {choix_s / with_errors:.1f}"}
        row |= {
            "largest difference": f"{np.abs(found['rewards, s'] - found['choix.ilsr_pairwise, rewards, s']).max():.0e}"
        }
    return row


if __name__ == "__main__":
    flags.main(main, Config)
