"""Does every objective of train_dpo.py raise the true reward? `python -m nanopref.experiments.losses`

Each --loss with its own defaults, from the same SFT model and, where they take the same kind, the same feedback.
"""

from dataclasses import dataclass

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


def main(config: Config) -> None:
    flags.check(config)
    chosen = config.losses or [name for name in OBJECTIVES if name != "sigmoid"]  # which is dpo
    variants = {name: Variant(["--loss", name], kinds(OBJECTIVES)[name][0]) for name in chosen}
    formulas = {name: OBJECTIVES[name].formula for name in OBJECTIVES}
    runs.conclude(config, lambda: runs.results(config, variants), formulas)


if __name__ == "__main__":
    flags.main(main, Config)
