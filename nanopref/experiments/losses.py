"""Does every objective of train_dpo.py raise the true reward? `python -m nanopref.experiments.losses`

Each --loss with its own defaults, from the same SFT model and, where they take the same kind, the same feedback.
"""

from dataclasses import dataclass
from pathlib import Path

from nanopref.experiments import runs
from nanopref.experiments.runs import ExperimentFlags, Variant
from nanopref.learning.objectives import OBJECTIVES, kinds
from nanopref.running import flags
from nanopref.running.flags import flag


@dataclass
class Config(ExperimentFlags):
    """Run each objective with its defaults on the built-in task, and table what came of it.

    Example: python -m nanopref.experiments.losses --losses dpo ipo kto --seeds 1
    """

    out: str = "out/losses"
    losses: tuple[str, ...] = flag((), "the objectives (default: all)", among=tuple(OBJECTIVES))


def make(config: Config) -> dict[str, list[Path]]:
    chosen = config.losses or [name for name in OBJECTIVES if name != "sigmoid"]  # which is dpo
    return runs.results(config, {name: Variant(["--loss", name], kinds(OBJECTIVES)[name][0]) for name in chosen})


main = runs.comparison(make, {name: objective.formula for name, objective in OBJECTIVES.items()})


if __name__ == "__main__":
    flags.main(main, Config)
