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


def main(config: Config) -> None:
    flags.check(config)
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
        f"{way} {size}": Variant([*words, "--prompts", str(size)], **script)
        for size in config.sizes
        for way, words in ways.items()
    }
    folders |= runs.results(config, variants)
    pairs: dict[str, str] = {}
    found = {name: [quality(path, seed) for seed, path in enumerate(paths)] for name, paths in folders.items()}

    def draw(axis) -> None:
        for way in ways:
            axis.plot(config.sizes, [np.mean(found[f"{way} {size}"]) for size in config.sizes], marker="o", label=way)
        axis.axhline(np.mean(found["first"]), color="grey", linestyle=":", label=f"first, {config.prompts} pairs")
        axis.set(title="which pairs to ask about", xlabel="pairs", ylabel="rank correlation with the true reward")
        axis.set_xscale("log")
        axis.minorticks_off()
        axis.set_xticks(config.sizes, config.sizes)
        axis.legend(frameon=False)

    for name, paths in folders.items():
        pairs[name] = ", ".join(f"{sum(1 for _ in read_rows(path / 'feedback.jsonl')):,}" for path in paths)
    header = ["rank correlation with the true reward (pairs)", *(f"{size} pairs" for size in config.sizes)]
    lines = [
        [
            way,
            *(
                ", ".join(f"{x:.3f}" for x in found[f"{way} {size}"]) + f" ({pairs[f'{way} {size}']})"
                for size in config.sizes
            ),
        ]
        for way in ways
    ]
    runs.save(config, runs.markdown([header, *lines]), found, [draw])


def quality(folder: Path, seed: int) -> float:
    """Rank correlation of a reward model's scores with the true reward, on new answers of the SFT model."""
    policy, tokenizer = models.load(folder.parent / "sft")
    policy.to(start("auto", seed))
    answers = runs.answers(folder.parent / "sft", seed, 1024)
    scores = rewards.model_reward(rewards.load_model(folder, policy, tokenizer))(answers)
    return rank_correlation(rewards.true_reward(answers).numpy(), scores.numpy())


if __name__ == "__main__":
    flags.main(main, Config)
