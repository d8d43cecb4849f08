"""What is a ranking worth? `python -m nanopref.experiments.rankings`

Plackett-Luce on rankings of four answers, against DPO on pairs that are drawn from them: all six of each, which says
the same things one by one; or one, drawn at random, which is what a pair tells.
"""

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from random import Random

from nanopref.experiments import runs
from nanopref.experiments.runs import ExperimentFlags, Variant
from nanopref.running import flags


@dataclass
class Config(ExperimentFlags):
    """Train on rankings of four, and on pairs drawn from them.

    Example: python -m nanopref.experiments.rankings --prompts 2560
    """

    out: str = "out/rankings"
    prompts: int = 1280


def all_pairs(rows: list[dict], rng: Random) -> list[dict]:
    """Every pair that each ranking holds, in random order."""
    pairs = [
        {"prompt": row["prompt"], "chosen": better, "rejected": worse}
        for row in rows
        for better, worse in combinations(row["responses"], 2)
    ]
    return rng.sample(pairs, len(pairs))


def one_pair(rows: list[dict], rng: Random) -> list[dict]:
    """One pair of each ranking."""
    found = []
    for row in rows:
        better, worse = sorted(rng.sample(range(len(row["responses"])), 2))
        pair = {"chosen": row["responses"][better], "rejected": row["responses"][worse]}
        found.append({"prompt": row["prompt"], **pair})
    return found


def make(config: Config) -> dict[str, list[Path]]:
    # as many steps either way: a ranking of four holds six pairs
    variants = {
        "plackett-luce": Variant(["--loss", "plackett-luce", "--batch-size", "12"], "rankings"),
        "dpo-on-all-pairs": Variant(["--loss", "dpo", "--batch-size", "72"], "rankings", all_pairs),
        "dpo-on-one-pair": Variant(["--loss", "dpo", "--batch-size", "12"], "rankings", one_pair),
    }
    return runs.results(config, variants)


main = runs.comparison(make)


if __name__ == "__main__":
    flags.main(main, Config)
