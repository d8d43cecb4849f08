"""PPO and its relatives against the task's own reward: `python -m nanopref.experiments.relatives`

TRPO bounds the KL of each round and not the ratio; REINFORCE has a running mean for a baseline and RLOO the other
answers to the prompt; with replay a round learns from the answers of the round before too, here with half the rounds.
"""

from dataclasses import dataclass
from pathlib import Path

from nanopref.experiments import runs
from nanopref.experiments.runs import ExperimentFlags, Variant
from nanopref.running import flags
from nanopref.running.flags import flag


@dataclass
class Config(ExperimentFlags):
    """Train with PPO and its relatives on the built-in task, with the true reward.

    Example: python -m nanopref.experiments.relatives --seeds 1
    """

    out: str = "out/relatives"
    seeds: int = 2
    iterations: int = flag(32, "rounds of answering and learning", least=2)


def make(config: Config) -> dict[str, list[Path]]:
    half = str(config.iterations // 2)
    words = {
        "ppo": [],
        "trpo": ["--update", "trpo"],
        "rloo": ["--advantage", "rloo"],
        "reinforce": ["--advantage", "reinforce"],
        "ppo-half-the-rounds": ["--iterations", half],
        "replay-half-the-rounds": ["--replay", "2", "--iterations", half],
    }
    common = ["--reward", "true", "--iterations", str(config.iterations)]
    variants = {name: Variant([*common, *more], kind="", script="train_ppo.py") for name, more in words.items()}
    return runs.results(config, variants)


main = runs.comparison(make)


if __name__ == "__main__":
    flags.main(main, Config)
