"""What is the best use of a person's time? `python -m nanopref.experiments.labels`

As many judgements for each kind of feedback: a pair takes one, a label one, ratings of four answers four, a ranking of
four five comparisons (by merging, at most); and as many steps. And do DPO and KTO need SFT before them (Ethayarajh et
al. 2024, section 4.3)? Both also start from a model that has had an eighth of it, and learn from the same answers.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from nanopref.experiments import figures, runs
from nanopref.experiments.figures import with_error
from nanopref.experiments.runs import ExperimentFlags, Variant
from nanopref.running import flags
from nanopref.running.flags import flag, require

COST = {"pairs": 1, "labels": 1, "ratings": 4, "rankings": 5}  # judgements that a row takes
LOSSES = {"dpo": "pairs", "ipo": "pairs", "kto": "labels", "binary": "labels", "plackett-luce": "rankings",
          "infonca": "ratings", "regression": "ratings"}  # fmt: skip
STARTS = {"sft": "after SFT", "base": "after an eighth"}
FIGURES = {"true_reward": ("true reward", 2), "kl": ("KL to where it began, nats", 1),
           "tokens": ("tokens an answer", 0), "ended": ("share of answers that end", 2)}  # fmt: skip


@dataclass
class Config(ExperimentFlags):
    """Pairs, labels, ratings and rankings of equal effort; DPO and KTO with and without SFT.

    Example: python -m nanopref.experiments.labels --seeds 1
    """

    out: str = "out/labels"
    prompts: int = 1440
    judgements: int = flag(1280, "for each kind of feedback", least=20)
    steps: int = flag(60, "of SFT, for the model that has hardly had any", least=1)


def first(rows: list[dict], rng: Random, n: int) -> list[dict]:
    require(len(rows) >= n, f"--prompts: {n:,} rows are wanted, and their answers made but {len(rows):,}; ask for more")
    return rows[:n]


def measure(config: Config) -> dict:
    """{"effort": {loss: {kind: figures}}, "start": {loss: {start: figures}}}, one a seed each."""
    effort = {}
    for loss, kind in LOSSES.items():
        batch = max(1, 32 // COST[kind])  # so that all take as many steps
        words = [*runs.FEW, "--loss", loss, "--batch-size", str(batch)]
        effort[f"{loss} {kind}"] = Variant(words, kind, partial(first, n=config.judgements // COST[kind]))
    found = runs.by_setting(runs.results(config, effort))
    for seed in range(config.seeds):
        folder = Path(config.out).absolute() / f"seed-{seed}"
        runs.launch({folder / "base": ["-m", "nanopref.sft", "--seed", str(seed), "--steps", str(config.steps)]}, 1)
    starts = {}
    for name in ("dpo pairs", "kto labels"):
        variant = effort[name]
        starts[f"{name.split()[0]} base"] = variant._replace(words=[*variant.words, "--init", "SEED/base"])
    few = runs.by_setting(runs.results(config, starts))
    return {"effort": found, "start": {x: {"sft": found[x][LOSSES[x]], **few[x]} for x in few}}


def show(found: dict) -> tuple[str, list]:
    lines, starts = [["at equal effort", "learns from", figures.GAIN, "KL, nats", "win rate"]], []
    for loss, kinds in found["effort"].items():
        label = figures.look(loss).label
        for kind, seeds in kinds.items():
            gain, kl, wins = ([run[name] for run in seeds] for name in ("gain", "kl", "win_rate"))
            lines.append([label, kind, with_error(gain, sign="+"), with_error(kl, 1), with_error(wins)])
    places = [(loss, start) for loss in found["start"] for start in STARTS]
    others = [["where it starts", *(f"{figures.look(loss).label}, {STARTS[start]}" for loss, start in places)]]
    for name, (says, digits) in FIGURES.items():
        cells = [[run[name] for run in found["start"][loss][start]] for loss, start in places]
        others.append([says, *(with_error(cell, digits) for cell in cells)])
        if name == "true_reward":
            labels = (f"{figures.look(loss).label},\n{STARTS[start]}" for loss, start in places)
            starts = [(loss, label, cell) for (loss, _), label, cell in zip(places, labels, cells, strict=True)]
    panels = [
        figures.panel(found["effort"], x="kl", title="as many judgements each", xlabel="KL, nats", ylabel=figures.GAIN),
        figures.bars(starts, title="with and without SFT before", ylabel="true reward"),
    ]
    return runs.markdown(lines) + "\n" + runs.markdown(others), panels


main = runs.experiment(measure, show)

if __name__ == "__main__":
    flags.main(main, Config)
