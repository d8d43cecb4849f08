"""Best-of-n beside PPO, at equal KL: `python -m nanopref.experiments.best_of_n`

A reward model learns from people's pairs. Best-of-n takes the answer of the SFT model that it scores highest, and PPO
learns to score high; what each gains, by the score and by the truth, over √KL as in Gao et al. 2022.
"""

import json
from dataclasses import dataclass

import numpy as np

from nanopref import models
from nanopref.evaluation.best_of_n import kl_bound, measure
from nanopref.evaluation.compare import new_prompts
from nanopref.experiments import runs
from nanopref.experiments.runs import ExperimentFlags, Variant
from nanopref.feedback import rewards
from nanopref.running import flags
from nanopref.running.files import write_atomic
from nanopref.running.flags import flag
from nanopref.running.folder import read_metrics
from nanopref.running.parallel import start


@dataclass
class Config(ExperimentFlags):
    """The reward of best-of-n and of PPO over the square root of their KL, by a reward model and in truth.

    Example: python -m nanopref.experiments.best_of_n --n 64
    """

    out: str = "out/best-of-n"
    seeds: int = 1
    n: int = flag(128, "largest n; the pool has four times as many answers to each prompt", least=2)
    pool_prompts: int = flag(64, "prompts of the pool", least=1)
    betas: tuple[float, ...] = flag((0.1,), "prices of a nat of KL, a PPO run each", least=0)


def main(config: Config) -> None:
    flags.check(config)
    (rm,) = runs.results(config, {"rm": Variant([], script="train_rm.py")}).values()
    ppo = {f"ppo, β = {beta:g}": Variant(["--reward", "SEED/rm", "--beta", f"{beta:g}"], "", script="train_ppo.py")
           for beta in config.betas}  # fmt: skip
    folders = runs.results(config, ppo)
    curves = {"best-of-n": np.mean([pool(config, folder, seed) for seed, folder in enumerate(rm)], axis=0)}
    for name, paths in folders.items():
        figures = ("kl", "score", "true_reward")
        curves[name] = np.mean([[[row[x] for x in figures] for row in read_metrics(path)] for path in paths], axis=0)

    def draw(column: int, title: str):
        def panel(axis) -> None:
            for name, curve in curves.items():
                axis.plot(np.sqrt(np.maximum(curve[:, 0], 0)), curve[:, column], marker=".", label=name)
            axis.set(title=title, xlabel="√KL, √nats")
            axis.legend(frameon=False)

        return panel

    rows = [(str(2**i), f"{kl_bound(2**i):.2f}", row) for i, row in enumerate(curves["best-of-n"])]
    rows += [(f"{name}, at its end", "", curves[name][-1]) for name in folders]
    header = ["n", "log n - (n-1)/n", "KL, nats", "score", "true reward"]
    lines = [[name, bound, *(f"{figure:.2f}" for figure in row)] for name, bound, row in rows]
    panels = [draw(1, "score of the reward model"), draw(2, "true reward")]
    runs.save(config, runs.markdown([header, *lines]), {name: c.tolist() for name, c in curves.items()}, panels)


def pool(config: Config, rm, seed: int) -> list[list[float]]:
    """KL, score and true reward of best-of-1, 2, 4 … n."""
    path = rm.parent / "pool.json"
    if not path.exists():
        policy, tokenizer = models.load(rm.parent / "sft")
        policy.to(start("auto", seed))
        score = rewards.model_reward(rewards.load_model(rm, policy, tokenizer))
        sampling = {"max_new_tokens": 64, "batch_size": 512, "seed": seed}
        prompts, others = new_prompts("", config.pool_prompts, seed), {"true_reward": rewards.true_reward}
        found = measure(policy, tokenizer, prompts, score, others, 4 * config.n, **sampling)
        write_atomic(path, json.dumps(found) + "\n")
    rows = [row for row in json.loads(path.read_text()) if row["n"] <= config.n]
    return [[row["kl"], row["score"], row["true_reward"]] for row in rows]


if __name__ == "__main__":
    flags.main(main, Config)
