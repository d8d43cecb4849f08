"""What is the best use of a person's time? `python -m nanopref.experiments.labels`

As many judgements for each kind of feedback: a pair takes one, a label one, ratings of four answers four, a ranking of
four five comparisons (by merging, at most). And do DPO and KTO need SFT before them (Ethayarajh et al. 2024, section
4.3)? Both also start from a model that has had an eighth of it, and learn from answers that are not its own.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from nanopref.experiments import figures, runs
from nanopref.experiments.figures import with_error
from nanopref.experiments.runs import ExperimentFlags, Variant
from nanopref.running import flags
from nanopref.running.flags import flag

COST = {"pairs": 1, "labels": 1, "ratings": 4, "rankings": 5}  # judgements that a row takes
LOSSES = {"dpo": "pairs", "ipo": "pairs", "kto": "labels", "binary": "labels", "plackett-luce": "rankings",
          "infonca": "ratings", "regression": "ratings"}  # fmt: skip
STARTS = {"sft": "after SFT", "base": "after an eighth"}
FIGURES = {"true_reward": ("true reward", 2), "kl": ("KL, nats", 1), "tokens": ("tokens an answer", 0),
           "ended": ("share of answers that end", 2)}  # fmt: skip


@dataclass
class Config(ExperimentFlags):
    """Pairs, labels, ratings and rankings of equal effort; DPO and KTO with and without SFT.

    Example: python -m nanopref.experiments.labels --seeds 1
    """

    out: str = "out/labels"
    prompts: int = 1280
    steps: int = flag(60, "of SFT, for the model that has hardly had any", least=1)


def first(rows: list[dict], rng: Random, n: int) -> list[dict]:
    return rows[:n]


def measure(config: Config) -> dict:
    effort = {}
    for loss, kind in LOSSES.items():
        batch = max(1, 32 // COST[kind])  # so that all take as many steps
        words = [*runs.FEW, "--loss", loss, "--batch-size", str(batch)]
        effort[f"{loss} {kind}"] = Variant(words, kind, partial(first, n=config.prompts // COST[kind]))
    by_kind = runs.by_setting(runs.results(config, effort))
    for seed in range(config.seeds):
        folder = Path(config.out).absolute() / f"seed-{seed}"
        runs.launch({folder / "base": ["-m", "nanopref.sft", "--seed", str(seed), "--steps", str(config.steps)]}, 1)
    starts = {
        f"{loss} {start}": Variant([*runs.FEW, "--loss", loss, "--init", f"SEED/{start}"], LOSSES[loss])
        for loss in ("dpo", "kto")
        for start in STARTS
    }
    return {"effort": by_kind, "start": runs.by_setting(runs.results(config, starts))}


def show(found: dict) -> tuple[str, list]:
    lines, effort, starts = [["at equal effort", "learns from", figures.GAIN, "KL, nats", "win rate"]], [], []
    for loss, kinds in found["effort"].items():
        label = figures.look(loss).label
        for kind, seeds in kinds.items():
            gain, kl, wins = ([run[name] for run in seeds] for name in ("gain", "kl", "win_rate"))
            lines.append([label, kind, with_error(gain, sign="+"), with_error(kl, 1), with_error(wins)])
            effort.append((loss, f"{label}\n{kind}", gain))
    places = [(loss, start) for loss in found["start"] for start in STARTS]
    others = [["where it starts", *(f"{figures.look(loss).label}, {STARTS[start]}" for loss, start in places)]]
    for name, (says, digits) in FIGURES.items():
        cells = [[run[name] for run in found["start"][loss][start]] for loss, start in places]
        others.append([says, *(with_error(cell, digits) if cell else "" for cell in cells)])
        if name == "true_reward":
            labels = (f"{figures.look(loss).label},\n{STARTS[start]}" for loss, start in places)
            starts = [(loss, label, cell) for (loss, _), label, cell in zip(places, labels, cells, strict=True)]
    panels = [
        figures.bars(effort, title="as many judgements each", ylabel=figures.GAIN),
        figures.bars(starts, title="with and without SFT before", ylabel="true reward"),
    ]
    return runs.markdown(lines) + "\n" + runs.markdown(others), panels


def main(config: Config) -> None:
    flags.check(config)
    runs.present(config, lambda: measure(config), show)


if __name__ == "__main__":
    flags.main(main, Config)
