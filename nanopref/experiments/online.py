"""Who says which is better, and how often is it asked? `python -m nanopref.experiments.online`

As many prompts in each run, from the same SFT model. People (of whom a pair costs as much in each) compare answers
once, or in rounds, in which the policy as it is answers; then a reward model that was fitted to the first of these
judges instead: DPO on its pairs, in rounds, the best of 16 imitated, RSO; and at last DPO's policy judges itself.
"""

from dataclasses import dataclass
from pathlib import Path

from nanopref.experiments import runs
from nanopref.experiments.runs import ExperimentFlags, Variant
from nanopref.running import flags
from nanopref.running.flags import flag


@dataclass
class Config(ExperimentFlags):
    """Offline and online DPO, rejection sampling and self-rewarding at equal numbers of prompts.

    Example: python -m nanopref.experiments.online --seeds 1
    """

    out: str = "out/online"
    seeds: int = 2
    rounds: int = flag(4, "of what is online", least=2)


def make(config: Config) -> dict[str, list[Path]]:
    rounds = ["--rounds", str(config.rounds)]
    people = {
        "people": [],
        "people-rounds": rounds,
        "people-rounds-fresh-reference": [*rounds, "--fresh-reference"],
    }
    noise = ["--noise", str(config.noise), "--annotators", str(config.annotators)]
    variants = {name: Variant([*words, *noise], kind="") for name, words in people.items()}
    runs.results(config, variants | {"rm": Variant([], script="train_rm.py")})
    model = ["--reward", "SEED/rm"]
    pick = ["--select", "best-worst", "--chooser", "SEED/rm", *noise]
    judged = {
        "people-on-rms-best-and-worst-of-4": pick,
        "people-on-rms-best-and-worst-of-4-rounds": [*pick, *rounds],
        "rm-judges": model,
        "rm-judges-rounds": [*model, *rounds],
        "rm-best-of-16-imitated": [*model, "--loss", "preferred", "--select", "best"],
        "rm-rso": [*model, "--select", "rso"],
        "itself-after-people": ["--init", "SEED/people", "--reward", "implicit"],
    }
    variants |= {name: Variant(words, kind="") for name, words in judged.items()}
    return runs.results(config, variants)


main = runs.comparison(make)


if __name__ == "__main__":
    flags.main(main, Config)
