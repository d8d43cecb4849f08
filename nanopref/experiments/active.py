"""Which pairs are worth asking about? `python -m nanopref.experiments.active`

A first reward model with several heads learns from a few pairs. Then as many pairs are labelled as by chance, or those
of four answers on whose order its heads differ most (Gleave & Irving 2022), and a new reward model learns from them
alone; or nobody is asked, and the best of four by the first model is better than the worst (Pace et al. 2024). All are
judged on the same new answers.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanopref import models
from nanopref.data.formats import read_rows
from nanopref.evaluation.metrics import rank_correlation
from nanopref.experiments import runs
from nanopref.experiments.runs import ExperimentFlags, Variant
from nanopref.feedback import rewards
from nanopref.running import flags
from nanopref.running.flags import flag
from nanopref.running.parallel import start


@dataclass
class Config(ExperimentFlags):
    """Reward models on pairs picked at random, by an ensemble's doubt, or made up by an earlier reward model.

    Example: python -m nanopref.experiments.active --sizes 640 1280
    """

    out: str = "out/active"
    seeds: int = 2
    prompts: int = 2560
    sizes: tuple[int, ...] = flag((1280, 2560), "pairs of the other reward models; --prompts: of the first", least=20)
    epochs: int = flag(4, "passes over the pairs", least=1)
    heads: int = flag(4, "of the first reward model", least=2)
    answers: int = flag(4, "to each prompt, of which two are picked", least=3)


WAYS = ("random", "doubt", "synthetic")


def measure(config: Config) -> dict[str, list[dict]]:
    """{"WAY SIZE", or "first": [rank correlation and number of pairs, one a seed]}"""
    common = ["--epochs", str(config.epochs)]
    people = [*common, "--noise", str(config.noise), "--annotators", str(config.annotators)]
    script = {"kind": "", "script": "train_rm.py"}
    # on prompts of its own: of pairs that it knows it has less doubt
    first = {"first": Variant([*people, "--seed", "1000", "--heads", str(config.heads)], **script)}
    folders = runs.results(config, first)
    several = ["--answers", str(config.answers)]
    ways = {
        "random": people,
        "doubt": [*people, *several, "--select", "doubt", "--chooser", "SEED/first"],
        "synthetic": [*common, *several, "--select", "best-worst", "--reward", "SEED/first"],
    }
    variants = {
        f"{way} {size}": Variant([*ways[way], "--prompts", str(size)], **script)
        for size in config.sizes
        for way in WAYS
    }
    folders |= runs.results(config, variants)
    return {
        name: [
            {"quality": quality(path), "pairs": sum(1 for _ in read_rows(path / "feedback.jsonl"))} for path in paths
        ]
        for name, paths in folders.items()
    }


def show(found: dict[str, list[dict]]) -> tuple[str, list]:
    sizes = [int(name.split()[1]) for name in found if name.startswith("random")]

    def mean(name: str) -> float:
        return float(np.mean([run["quality"] for run in found[name]]))

    def draw(axis) -> None:
        for way in WAYS:
            axis.plot(sizes, [mean(f"{way} {size}") for size in sizes], marker="o", label=way)
        pairs = np.mean([run["pairs"] for run in found["first"]])
        axis.axhline(mean("first"), color="grey", linestyle=":", label=f"first, {pairs:.0f} pairs")
        axis.set(title="which pairs to ask about", xlabel="pairs", ylabel="rank correlation with the true reward")
        axis.set_xscale("log")
        axis.minorticks_off()
        axis.set_xticks(sizes, sizes)
        axis.legend(frameon=False)

    lines = [["rank correlation with the true reward (pairs)", *(f"{size} pairs" for size in sizes)]]
    for way in WAYS:
        cells = (found[f"{way} {size}"] for size in sizes)
        lines.append([way, *(", ".join(f"{run['quality']:.3f} ({run['pairs']:,})" for run in cell) for cell in cells)])
    return runs.markdown(lines), [draw]


def quality(folder: Path) -> float:
    """Rank correlation of a reward model's scores with the true reward, on new answers of the SFT model."""
    seed, (policy, tokenizer) = runs.seed_of(folder), models.load(folder.parent / "sft")
    policy.to(start("auto", seed))
    answers = runs.answers(folder.parent / "sft", seed, 1024)
    scores = rewards.model_reward(rewards.load_model(folder, policy, tokenizer))(answers)
    return rank_correlation(rewards.true_reward(answers).numpy(), scores.numpy())


main = runs.experiment(measure, show)

if __name__ == "__main__":
    flags.main(main, Config)
