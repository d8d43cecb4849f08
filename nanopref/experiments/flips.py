"""Labels that are wrong: does robust DPO hold where DPO does not? `python -m nanopref.experiments.flips`

A share ε of the pairs is turned round. Chowdhury et al. 2024 correct the loss for a known ε, so that on average it is
that of the labels as they were.
"""

from dataclasses import dataclass
from functools import partial
from random import Random

from nanopref.experiments import runs
from nanopref.experiments.runs import ExperimentFlags, Variant
from nanopref.running import flags
from nanopref.running.flags import flag


@dataclass
class Config(ExperimentFlags):
    """Turn a share of the pairs round, and train DPO and robust DPO, which knows of it.

    Example: python -m nanopref.experiments.flips --share 0.3
    """

    out: str = "out/flips"
    seeds: int = 5
    share: float = flag(0.2, "of pairs that are turned round", least=0, below=0.5)


def flipped(rows: list[dict], rng: Random, share: float) -> list[dict]:
    """The rows with the chosen and the rejected answer of a share of them exchanged."""
    turned = set(rng.sample(range(len(rows)), round(share * len(rows))))
    return [
        row | {"chosen": row["rejected"], "rejected": row["chosen"]} if i in turned else row
        for i, row in enumerate(rows)
    ]


def main(config: Config) -> None:
    flags.check(config)
    known, change = ["--label-smoothing", str(config.share)], partial(flipped, share=config.share)
    variants = {
        "dpo": Variant(["--loss", "dpo"], change=change),
        "robust": Variant(["--loss", "robust", *known], change=change),
    }
    runs.conclude(config, runs.results(config, variants))


if __name__ == "__main__":
    flags.main(main, Config)
