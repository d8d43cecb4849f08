"""What is a ranking worth? `python -m nanopref.experiments.rankings`

Plackett-Luce on rankings of four answers, against DPO on pairs that are drawn from them: all six of each, which says
the same things one by one; or one, drawn at random, which is what a pair tells.
"""

from dataclasses import dataclass
from itertools import combinations
from random import Random

from nanopref.experiments import runs
from nanopref.experiments.runs import ExperimentFlags, Variant
from nanopref.running import flags


@dataclass
class Config(ExperimentFlags):
    """Train on rankings of four, and on pairs drawn from them.

    Example: python -m nanopref.experiments.rankings --groups 1280
    """

    out: str = "out/rankings"


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
    found = [(row["prompt"], *(row["responses"][k] for k in sorted(rng.sample(range(4), 2)))) for row in rows]
    return [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in found]


def main(config: Config) -> None:
    flags.check(config)
    # 48 answers of rankings or of all their pairs a step either way: six pairs hold each answer three times
    variants = {
        "plackett-luce": Variant(["--loss", "plackett-luce", "--batch-size", "12"], "rankings"),
        "dpo-on-all-pairs": Variant(["--loss", "dpo", "--batch-size", "72"], "rankings", all_pairs),
        "dpo-on-one-pair": Variant(["--loss", "dpo", "--batch-size", "12"], "rankings", one_pair),
    }
    runs.conclude(config, runs.results(config, variants))


if __name__ == "__main__":
    flags.main(main, Config)
