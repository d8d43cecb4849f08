"""Labels of which few are good: what do KTO's weights do? `python -m nanopref.experiments.imbalance`

Of the good answers most are left out, until nine bad ones stand beside each, as in Ethayarajh et al. 2024, section 4.3.
By default the rarer label weighs as much in all as the other.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from nanopref.experiments import runs
from nanopref.experiments.runs import ExperimentFlags, Variant
from nanopref.running import flags
from nanopref.running.flags import flag


@dataclass
class Config(ExperimentFlags):
    """Train KTO on few good labels beside many bad ones, and on as many in the usual mixture.

    Example: python -m nanopref.experiments.imbalance --bad 4
    """

    out: str = "out/imbalance"
    bad: int = flag(9, "bad answers beside each good one", least=1)
    lr: float = flag(
        3e-4, "of all; at the default of train_dpo.py, 1e-3, some seeds collapse under this imbalance", above=0
    )


def few_good(rows: list[dict], rng: Random, bad: int) -> list[dict]:
    """The rows without most of the good answers."""
    good = [i for i, row in enumerate(rows) if row["label"]]
    kept = set(rng.sample(good, max(1, min(len(good), (len(rows) - len(good)) // bad))))
    return [row for i, row in enumerate(rows) if not row["label"] or i in kept]


def as_many(rows: list[dict], rng: Random, bad: int) -> list[dict]:
    """As many rows as `few_good` leaves, good and bad as they come."""
    return rng.sample(rows, len(few_good(rows, rng, bad)))


def make(config: Config) -> dict[str, list[Path]]:
    change, kto = partial(few_good, bad=config.bad), ["--loss", "kto", "--lr", str(config.lr)]
    variants = {
        "kto-balanced": Variant(kto, "labels", partial(as_many, bad=config.bad)),
        f"kto-1-to-{config.bad}": Variant(kto, "labels", change),
        f"kto-1-to-{config.bad}-unweighed": Variant(
            [*kto, "--good-weight", "1", "--bad-weight", "1"], "labels", change
        ),
    }
    return runs.results(config, variants)


main = runs.comparison(make)


if __name__ == "__main__":
    flags.main(main, Config)
