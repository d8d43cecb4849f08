"""Which words does a policy credit? `python -m nanopref.experiments.credit`"""

from dataclasses import dataclass

from nanopref.experiments import runs
from nanopref.experiments.runs import ExperimentFlags, Variant
from nanopref.running import flags
from nanopref.running.flags import flag


@dataclass
class Config(ExperimentFlags):
    """How well the credit of each token agrees, word by word, with what the true reward pays.

    Example: python -m nanopref.experiments.credit --seeds 1
    """

    out: str = "out/credit"
    prompts: int = 1280
    iterations: int = flag(24, "rounds of PPO", least=1)


def variants(config: Config) -> dict[str, Variant]:
    """Every run after the reward model's."""
    few = ["--eval-prompts", "256"]
    found = {f"dpo {beta:g}": Variant([*few, "--loss", "dpo", "--beta", f"{beta:g}"]) for beta in (0.15, 0.5)}
    for name, reward in (("ppo", "SEED/rm"), ("ppo-true", "true")):
        words = [*few, "--reward", reward, "--iterations", str(config.iterations), "--beta", "0.1"]
        found[name] = Variant(words, kind="", script="train_ppo.py")
    return found


def main(config: Config) -> None:
    flags.check(config)
    runs.results(config, {"rm": Variant([], script="train_rm.py")})
    runs.results(config, variants(config))


if __name__ == "__main__":
    flags.main(main, Config)
