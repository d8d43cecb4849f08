"""DPO without its weight: what becomes of the text? `python -m nanopref.experiments.degeneration`

The gradient of DPO weighs each pair by σ(-h), by how far the policy is from telling which answer is better (Rafailov et
al. 2023, section 4). With that taken away a loss is left that is linear in the margin, -h, whose slope never ends; the
paper's appendix shows what unlikelihood, its cousin without a reference, makes of text.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanopref.experiments import figures, runs
from nanopref.experiments.figures import with_error
from nanopref.experiments.runs import ExperimentFlags, Variant
from nanopref.models.sampling import Answer
from nanopref.running import flags
from nanopref.running.flags import flag
from nanopref.running.folder import read_metrics

METHODS = {
    "dpo": ["--loss", "dpo"],
    "dpo without its weight": ["--loss", "unlikelihood", "--likelihood", "0", "--reference", "model"],
    "unlikelihood": ["--loss", "unlikelihood"],
}
FIGURES = {"gain": ("gain in true reward, std", 2), "kl": ("KL, nats", 1), "tokens": ("tokens an answer", 0),
           "ended": ("answers that end", 2), "repeated": ("runs of four words that were there", 3)}  # fmt: skip


@dataclass
class Config(ExperimentFlags):
    """Follow rewards, and look at text, with and without the weight that DPO gives each pair.

    Example: python -m nanopref.experiments.degeneration --epochs 4
    """

    out: str = "out/degeneration"
    prompts: int = 1280
    epochs: int = flag(2, "passes over the pairs", least=1)


def repeated(answers: list[Answer]) -> float:
    """The share of runs of four words that the same answer has had already."""
    again = total = 0
    for answer in answers:
        words = answer.text.lower().split()
        seen = Counter(zip(*(words[i:] for i in range(4)), strict=False))
        total += seen.total()
        again += seen.total() - len(seen)
    return again / max(1, total)


def read(run: Path) -> dict:
    said = runs.answers(run, runs.seed_of(run), 256)
    curves = {name: [row[name] for row in read_metrics(run)] for name in ("chosen_reward", "rejected_reward")}
    beta = runs.flags_of(run)["beta"]
    nats = {name: [(x - curve[0]) / beta for x in curve] for name, curve in curves.items()}  # without π_ref too
    return runs.read_report(run) | nats | {"repeated": repeated(said), "text": said[0].text}


def measure(config: Config) -> dict:
    common = [*runs.FEW, "--epochs", str(config.epochs)]
    folders = runs.results(config, {name: Variant([*common, *words]) for name, words in METHODS.items()})
    return {name: [read(run) for run in made] for name, made in folders.items()}


def show(found: dict) -> tuple[str, list]:
    lines = [["", *(says for says, _ in FIGURES.values())]]
    for method, seeds in found.items():
        cells = (with_error([run[name] for run in seeds], digits) for name, (_, digits) in FIGURES.items())
        lines.append([figures.look(method).label, *cells])

    def rewards(axis) -> None:
        for number, (method, seeds) in enumerate(found.items()):
            shape, steps = figures.look(method, number), min((len(run["chosen_reward"]) for run in seeds), default=0)
            for name, width in (("chosen_reward", 1.6), ("rejected_reward", 0.8)) if seeds else ():
                mean = np.mean([run[name][:steps] for run in seeds], axis=0)
                label = f"{shape.label}: {name.removesuffix('_reward')}"
                axis.plot(mean, color=shape.color, linestyle=shape.line, linewidth=width, label=label)
        axis.set(title="log π of the pairs (thin: the rejected)", xlabel="step", ylabel="nats an answer, since step 0")
        axis.legend(frameon=False, fontsize=7)

    ends = [
        (method, figures.look(method).label.replace(" without", "\nwithout"), [run["gain"] for run in seeds])
        for method, seeds in found.items()
    ]
    gains = figures.bars(ends, title="what came of it", ylabel=figures.GAIN)
    said = ((figures.look(method).label, seeds[0]["text"].strip()) for method, seeds in found.items() if seeds)
    texts = "".join(f"\n{label}: {text}\n" for label, text in said)
    return runs.markdown(lines) + texts, [rewards, gains]


main = runs.experiment(measure, show)

if __name__ == "__main__":
    flags.main(main, Config)
