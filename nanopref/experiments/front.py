"""Two objectives that pull apart: `python -m nanopref.experiments.front`

A review is to praise the film (the true reward, r) and to be specific (s, from 0 to 1). For a weight w between the two
four methods seek w r + (1 - w) c s, with a constant c that gives both about the same spread: PPO and online DPO ask for
that sum, best-of-16 takes the answer that has most of it, and MODPO (Zhou et al. 2023) has only pairs that people
compared by r, and a margin. From w r + (1 - w) c s = β log π/π_ref follows r = β/w log π/π_ref - (1 - w)/w c s, so its
`--beta` is β/w, its `--margin` (1 - w)/w, and the `margin` of a pair the difference of c s.
"""

import random
from dataclasses import dataclass
from functools import partial

import numpy as np

from nanopref import models
from nanopref.data import reviews
from nanopref.evaluation.best_of_n import best_of
from nanopref.evaluation.compare import new_prompts
from nanopref.experiments import runs
from nanopref.experiments.runs import ExperimentFlags, Variant
from nanopref.feedback.rewards import specificity, true_reward
from nanopref.models.sampling import respond
from nanopref.running import flags
from nanopref.running.flags import flag
from nanopref.running.parallel import start


@dataclass
class Config(ExperimentFlags):
    """The front between two objectives, by PPO, online DPO, best-of-n and MODPO.

    Example: python -m nanopref.experiments.front --weights 0.25 0.5 0.75
    """

    out: str = "out/front"
    seeds: int = 1
    annotators: int = 1  # one with noise 1 compares by P(a over b) = σ(r_a - r_b), of which MODPO's margin thinks
    noise: float = 1.0
    weights: tuple[float, ...] = flag((0.1, 0.3, 0.5, 0.7, 0.9), "of the true reward", above=0, below=1)
    scale: float = flag(5.0, "c: what one of specificity is worth, in units of the true reward", above=0)
    beta: float = flag(0.3, "price of a nat of KL, for all but best-of-n", above=0)
    best_of: int = flag(16, "answers of which best-of-n takes one", least=2)


def with_margins(rows: list[dict], rng: random.Random, scale: float) -> list[dict]:
    """Pairs with the difference of the other objective as their margin."""
    differences = (reviews.specificity(row["chosen"]) - reviews.specificity(row["rejected"]) for row in rows)
    return [row | {"margin": scale * difference} for row, difference in zip(rows, differences, strict=True)]


def measure(config: Config) -> dict[str, list[list[float]]]:
    """{method: [true reward and specificity, at each weight]}"""
    variants = {}
    for w in config.weights:
        both = ["--reward", f"true*{w}", f"specificity*{(1 - w) * config.scale:g}"]
        beta = ["--beta", f"{config.beta:g}"]
        variants[f"ppo {w}"] = Variant([*both, *beta], kind="", script="train_ppo.py")
        variants[f"online-dpo {w}"] = Variant([*both, *beta, "--rounds", "4", "--noise", "1"], kind="")
        modpo = ["--beta", f"{config.beta / w:g}", "--margin", f"{(1 - w) / w:g}"]
        variants[f"modpo {w}"] = Variant(modpo, change=partial(with_margins, scale=config.scale))
    folders = runs.results(config, variants)
    points: dict[str, list[list[float]]] = {}
    for name, paths in folders.items():
        answers = [answer for path in paths for answer in runs.answers(path, runs.seed_of(path))]
        means = [reward(answers).mean().item() for reward in (true_reward, specificity)]
        points.setdefault(name.split()[0], []).append(means)
    points |= best_of_the_sum(config, [paths.parent / "sft" for paths in folders[name]])
    return points | {"weights": list(config.weights)}


def show(found: dict[str, list]) -> tuple[str, list]:
    points = {method: rows for method, rows in found.items() if method != "weights"}

    def draw(axis) -> None:
        for method, rows in points.items():
            axis.plot(*zip(*rows, strict=True), marker="o", label=method)
        axis.set(title="two objectives", xlabel="true reward", ylabel="specificity")
        axis.legend(frameon=False)

    lines = [["true reward, specificity", *(f"w = {w}" for w in found["weights"])]]
    lines += [[method, *(f"{r:.2f}, {s:.2f}" for r, s in rows)] for method, rows in points.items() if len(rows) > 1]
    return runs.markdown(lines), [draw]


main = runs.experiment(measure, show)


def best_of_the_sum(config: Config, sft: list) -> dict[str, list[list[float]]]:
    """Both objectives of the SFT models' answers, and of the best of n by the weighted sum."""
    found = []
    for seed, folder in enumerate(sft):
        policy, tokenizer = models.load(folder)
        prompts = [x for x in new_prompts("", 256, seed) for _ in range(2 * config.best_of)]
        sampling = {"max_new_tokens": 64, "batch_size": 512, "seed": seed, "stream": "front"}
        answers = respond(policy.to(start("auto", seed)), tokenizer, prompts, **sampling)
        r, s = (reward(answers).numpy().reshape(256, -1) for reward in (true_reward, specificity))
        rows = [(r.mean(), s.mean())]
        for w in config.weights:
            total = w * r + (1 - w) * config.scale * s
            rows.append([best_of(total, values, config.best_of).mean() for values in (r, s)])
        found.append(rows)
    reference, *best = np.mean(found, axis=0).tolist()
    return {f"best-of-{config.best_of}": best, "SFT": [reference]}


if __name__ == "__main__":
    flags.main(main, Config)
