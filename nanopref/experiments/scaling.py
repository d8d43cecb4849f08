"""What do size and labels buy? `python -m nanopref.experiments.scaling`

Models of 0.1 to 11 million parameters, each after SFT of its own, learn by DPO from pairs of their own answers, and as
reward models from the same pairs. And one size learns from more and more pairs, by DPO, and by PPO with a reward model
that had those pairs.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nanopref import models
from nanopref.experiments import figures, runs
from nanopref.experiments.labels import first
from nanopref.experiments.runs import ExperimentFlags, Variant
from nanopref.running import flags
from nanopref.running.flags import flag

ACCURACY = "held-out pairs ranked right"


@dataclass
class Config(ExperimentFlags):
    """True reward and the accuracy of reward models, over sizes of models and numbers of labels.

    Example: python -m nanopref.experiments.scaling --sizes nano tiny mini small --seeds 1
    """

    out: str = "out/scaling"
    seeds: int = 2
    prompts: int = 2560
    sizes: tuple[str, ...] = flag(("nano", "tiny", "mini"), "presets of models", among=tuple(models.PRESETS))
    pairs: tuple[int, ...] = flag((320, 640, 1280, 2560), "numbers of pairs", least=20)
    iterations: int = flag(16, "rounds of PPO", least=1)


def measure(config: Config) -> dict:
    root = Path(config.out).absolute()
    people = ["--noise", str(config.noise), "--annotators", str(config.annotators), "--prompts", "1280"]
    found: dict[str, dict] = {"size": {}, "pairs": {}}
    by_size: dict[str, Variant] = {}
    for size in config.sizes:
        folders = {root / f"seed-{seed}" / f"sft {size}": seed for seed in range(config.seeds)}
        words = ["-m", "nanopref.sft", "--preset", size, "--seed"]
        runs.launch({folder: [*words, str(seed)] for folder, seed in folders.items()}, config.jobs)
        init = ["--init", f"SEED/sft {size}"]
        by_size[f"dpo {size}"] = Variant([*runs.FEW, *people, *init], kind="")
        by_size[f"rm {size}"] = Variant([*runs.FEW_PAIRS, *init], "pairs", partial(first, n=1280), "train_rm.py")
    of_rms = {name: by_size.pop(name) for name in list(by_size) if name.startswith("rm")}
    for method, settings in runs.by_setting(runs.results(config, by_size)).items():
        found["size"][method] = {str(parameters(root, size)): seeds for size, seeds in settings.items()}
    for method, settings in runs.by_setting(runs.results(config, of_rms), read_accuracy).items():
        found["size"][method] = {str(parameters(root, size)): seeds for size, seeds in settings.items()}

    by_pairs, rms, ppo = {}, {}, {}
    for n in config.pairs:
        words, change = ["--epochs", str(max(1, min(4, 2560 // n)))], partial(first, n=n)
        by_pairs[f"dpo {n}"] = Variant([*runs.FEW, *words], change=change)
        rms[f"rm {n}"] = Variant(runs.FEW_PAIRS, change=change, script="train_rm.py")
        words = [*runs.FEW, "--reward", f"SEED/rm {n}", "--iterations", str(config.iterations)]
        ppo[f"ppo {n}"] = Variant(words, kind="", script="train_ppo.py")
    found["pairs"] = runs.by_setting(runs.results(config, rms), read_accuracy)
    found["pairs"] |= runs.by_setting(runs.results(config, by_pairs | ppo))
    return found


def parameters(root: Path, size: str) -> float:
    """Of a model of this size, in millions."""
    model, _ = models.load(root / "seed-0" / f"sft {size}")
    return round(sum(p.numel() for p in model.parameters()) / 1e6, 2)


def read_accuracy(run: Path) -> dict:
    return json.loads((run / "report.json").read_text())["held_out"]


def show(found: dict) -> tuple[str, list]:
    table, panels = "", []
    for by, xlabel in (("size", "parameters, millions"), ("pairs", "pairs")):
        policies = {method: rows for method, rows in found[by].items() if method != "rm"}
        rms = {"rm": found[by]["rm"]}
        for y, digits, says in (("gain", 2, figures.GAIN), ("true_reward", 2, "true reward"), ("kl", 1, "KL, nats")):
            table += runs.markdown(figures.table(policies, head=f"{says}, by {xlabel}", y=y, digits=digits)) + "\n"
        table += runs.markdown(figures.table(rms, head=f"{ACCURACY}, by {xlabel}", y="accuracy", digits=3)) + "\n"
        words = {"xlabel": xlabel, "scale": "log"}
        y, says = ("true_reward", "true reward") if by == "size" else ("gain", figures.GAIN)
        panels.append(figures.panel(policies, title=f"policies, by {xlabel}", y=y, ylabel=says, **words))
        panels.append(figures.panel(rms, title="reward models", y="accuracy", ylabel=ACCURACY, legend=False, **words))
    return table, panels


def main(config: Config) -> None:
    flags.check(config)
    runs.present(config, lambda: measure(config), show)


if __name__ == "__main__":
    flags.main(main, Config)
