"""Gold and proxy reward (Gao et al. 2022): `python -m nanopref.experiments.overoptimisation`

Reward models learn from 500 to 32,000 pairs, best-of-n and PPO follow them, and the truth, which is known here, follows
for a while. Over d = √KL Gao et al. fit the gain in true reward as d (α - β d) for best-of-n and as d (α - β log d) for
RL; where that peaks is how far a reward model can be trusted. Direct alignment has the same course over passes
(Rafailov et al. 2024, Scaling Laws for Reward Model Overoptimization in Direct Alignment Algorithms).
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanopref.experiments import figures, runs
from nanopref.experiments.figures import mean_error, with_error
from nanopref.experiments.labels import first
from nanopref.experiments.runs import ExperimentFlags, Variant
from nanopref.running import flags
from nanopref.running.flags import flag
from nanopref.running.folder import read_metrics

SHAPES = {"best-of-n": lambda d: d, "ppo": np.log}  # gain = d (α - β shape(d))


@dataclass
class Config(ExperimentFlags):
    """What reward models believe and what is so, as best-of-n, PPO and DPO go further from the reference.

    Example: python -m nanopref.experiments.overoptimisation --pairs 500 2000 --seeds 1
    """

    out: str = "out/overoptimisation"
    pairs: tuple[int, ...] = flag((500, 2000, 8000, 32000), "of each reward model", least=20)
    prompts: int = 33000
    n: int = flag(128, "largest n; the pool has four times as many answers to each prompt", least=2)
    pool_prompts: int = flag(48, "prompts of the pool", least=1)
    iterations: int = flag(32, "rounds of PPO", least=1)
    beta: float = flag(0.01, "PPO's price of a nat: small, so that it goes too far", least=0)
    epochs: tuple[int, ...] = flag((1, 2, 4, 8), "passes of DPO over the pairs", least=1)
    dpo_pairs: tuple[int, ...] = flag((500, 2000), "pairs of DPO", least=20)


def measure(config: Config) -> dict:
    """{method: {pairs: [{kl, score, gain: lists along the way}, one a seed]}}; the reference has score and gain 0."""
    rms, ppo, dpo = {}, {}, {}
    for n in config.pairs:
        # more pairs a step where there are many, more passes where there are few
        passes, batch = max(1, min(6, 4000 // n)), 64 if n >= 8000 else 16
        words = ["--epochs", str(passes), "--batch-size", str(batch)]
        rms[f"rm {n}"] = Variant(words, change=partial(first, n=n), script="train_rm.py")
        words = [*runs.FEW, "--reward", f"SEED/rm {n}", "--beta", f"{config.beta:g}"]
        words += ["--iterations", str(config.iterations)]
        ppo[f"ppo {n}"] = Variant(words, kind="", script="train_ppo.py")
    for n in config.dpo_pairs:
        for passes in config.epochs:
            words = [*runs.FEW, "--epochs", str(passes), "--beta", "0.1"]
            dpo[f"dpo-{n} {passes}"] = Variant(words, change=partial(first, n=n))
    found = {"best-of-n": runs.by_setting(runs.results(config, rms), partial(pool, config))["rm"]}
    found |= runs.by_setting(runs.results(config, ppo), rounds)
    return found | {"dpo": runs.by_setting(runs.results(config, dpo))}


def pool(config: Config, rm: Path) -> dict:
    """KL, score and gain of best-of-1, 2, 4 … n by a reward model."""
    rows = runs.best_of_n(rm, config.n, config.pool_prompts)
    return {name: [row[name] for row in rows] for name in ("kl", "score", "gain")}


def rounds(run: Path) -> dict:
    """The same of each round of PPO."""
    rows = read_metrics(run)
    mean, scale = runs.reference_reward(run.parent / "sft", runs.seed_of(run))
    gains = [(row["true_reward"] - mean) / scale for row in rows]
    return {"kl": [row["kl"] for row in rows], "score": [row["score"] for row in rows], "gain": gains}


def fit(method: str, run: dict) -> tuple[float, float, float]:
    """α, β and where d (α - β shape(d)) is highest: ∞ if it never falls, 0 if it never rises. Least squares."""
    d, gain = np.sqrt(np.clip(run["kl"], 0, None)), np.array(run["gain"])
    gain, d = gain[d > 0.05], d[d > 0.05]
    alpha, minus_beta = np.linalg.lstsq(np.stack([d, d * SHAPES[method](d)], axis=1), gain, rcond=None)[0]
    if minus_beta >= 0:
        return float(alpha), float(-minus_beta), float("inf")
    peak = alpha / -minus_beta / 2 if method == "best-of-n" else np.exp(alpha / -minus_beta - 1)
    return float(alpha), float(-minus_beta), max(0.0, float(peak))


class Point(NamedTuple):
    d: float  # √KL
    score: float
    gain: float


def smoothed(method: str, run: dict) -> list[Point]:
    """What a run passed through, PPO in means over five rounds, since the few responses of one say little."""
    window = min(5, len(run["kl"])) if method == "ppo" else 1
    rows = (np.sqrt(np.clip(run["kl"], 0, None)), run["score"], run["gain"])
    means = (np.convolve(row, np.full(window, 1 / window), "valid").tolist() for row in rows)
    return [Point(*values) for values in zip(*means, strict=True)]


def show(found: dict) -> tuple[str, list]:
    head = ["", "pairs", "α", "β", "the fit's peak at √KL", "highest gain, std", "at √KL", "score there"]
    panels, lines = [], [[*head, "last gain, std", "at √KL", "score there"]]
    for method in ("best-of-n", "ppo"):
        for pairs, seeds in found[method].items():
            alphas, betas, peaks = zip(*(fit(method, run) for run in seeds), strict=True) if seeds else ((), (), ())
            ways = [smoothed(method, run) for run in seeds]
            within = all(peak <= way[-1].d for peak, way in zip(peaks, ways, strict=True))
            cells = [with_error(alphas), with_error(betas), with_error(peaks, 1) if within else "beyond"]
            for points in ([max(way, key=lambda point: point.gain) for way in ways], [way[-1] for way in ways]):
                d, score, gain = zip(*points, strict=True) if points else ((), (), ())
                cells += [with_error(gain), with_error(d, 1), with_error(score)]
            lines.append([figures.look(method).label, f"{int(pairs):,}", *cells])
        panels.append(partial(draw, found=found[method], method=method))
    table = runs.markdown(lines)
    dpo = {f"{int(name.removeprefix('dpo-')):,} pairs": rows for name, rows in found["dpo"].items()}
    for y, digits, says in (("gain", 2, figures.GAIN), ("kl", 1, "KL, nats"), ("accuracy", 2, "held out right")):
        table += "\n" + runs.markdown(figures.table(dpo, head=f"DPO: {says}, by passes", y=y, digits=digits))
    words = {"title": "DPO over passes", "xlabel": "passes over the pairs", "ylabel": figures.GAIN, "scale": "log"}
    return table, [*panels, figures.panel(dpo, **words)]


def draw(axis, found: dict, method: str) -> None:
    """Score (dashed) and true reward (with its fits, dotted) over √KL, by the number of pairs of the reward model."""
    for number, (pairs, seeds) in enumerate(found.items()):
        shape = figures.look(f"{int(pairs):,} pairs", number)
        if not seeds:
            continue
        steps = min(len(run["kl"]) for run in seeds)
        kl, score, gain = (np.array([run[name][:steps] for run in seeds]) for name in ("kl", "score", "gain"))
        d, mean = np.sqrt(np.clip(kl.mean(0), 0, None)), gain.mean(0)
        axis.plot(d, score.mean(0), color=shape.color, linewidth=0.7, linestyle="--")
        axis.plot(d, mean, color=shape.color, label=shape.label, marker=shape.marker, markevery=max(1, steps // 8))
        error = np.nan_to_num([mean_error(column)[1] for column in gain.T])
        axis.fill_between(d, mean - error, mean + error, color=shape.color, alpha=0.15, linewidth=0)
        x = np.linspace(0.05, d.max(), 50)
        fits = [x * (alpha - beta * SHAPES[method](x)) for alpha, beta, _ in (fit(method, run) for run in seeds)]
        axis.plot(x, np.mean(fits, axis=0), color=shape.color, linewidth=0.9, linestyle=":")
    axis.set(title=f"{figures.look(method).label} (dashed: the score; dotted: fits)", xlabel="√KL, √nats")
    axis.set_ylabel("gain, std of the reference")
    axis.legend(frameon=False, fontsize=8)


main = runs.experiment(measure, show)

if __name__ == "__main__":
    flags.main(main, Config)
