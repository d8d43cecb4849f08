"""What do size and labels buy? `python -m nanopref.experiments.scaling`

Models of 0.1 to 11 million parameters, each after SFT of its own, learn by DPO from pairs of their own answers, and as
reward models all from the same pairs. And one size learns from more and more pairs: by DPO in as many steps, whatever
their number, and by PPO with a reward model that had those pairs, in fewer passes the more there were.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nanopref import models, sft
from nanopref.experiments import active, figures, runs
from nanopref.experiments.labels import first
from nanopref.experiments.runs import ExperimentFlags, Variant
from nanopref.running import flags
from nanopref.running.flags import flag

QUALITY = "rank correlation with the true reward"


@dataclass
class Config(ExperimentFlags):
    """True reward and the accuracy of reward models, over sizes of models and numbers of labels.

    Example: python -m nanopref.experiments.scaling --sizes nano tiny mini small --seeds 1
    """

    out: str = "out/scaling"
    prompts: int = 2880
    sizes: tuple[str, ...] = flag(("nano", "tiny", "mini"), "presets of models", among=tuple(models.PRESETS))
    pairs: tuple[int, ...] = flag((320, 640, 1280, 2560), "numbers of pairs", least=20)
    iterations: int = flag(16, "rounds of PPO", least=1)


def measure(config: Config) -> dict:
    """{"size" or "pairs": {method: {parameters or pairs: figures, one a seed}}}"""
    root, sizes = runs.claim(config), {}
    people = ["--noise", str(config.noise), "--annotators", str(config.annotators)]
    policies, rms = {}, {}
    for size in config.sizes:
        start = "sft" if size == sft.Config.preset else f"sft {size}"
        folders = {root / f"seed-{seed}" / start: seed for seed in range(config.seeds)}
        words = ["-m", "nanopref.sft", "--preset", size, "--seed"]
        runs.launch({folder: [*words, str(seed)] for folder, seed in folders.items()}, config.jobs)
        sizes[size] = [parameters(folder) for folder in folders if runs.is_done(folder)]
        init, half = ["--init", f"SEED/{start}"], config.prompts // 2
        policies[f"dpo {size}"] = Variant([*runs.FEW, *people, *init, "--prompts", str(half)], kind="")
        rms[f"rm {size}"] = Variant([*runs.FEW_PAIRS, *init], change=partial(first, n=half), script="train_rm.py")
    by_size = runs.by_setting(runs.results(config, policies))
    by_size |= runs.by_setting(runs.results(config, rms), quality)
    by_size = {
        method: {str(sizes[size][0]): seeds for size, seeds in settings.items() if sizes[size]}
        for method, settings in by_size.items()
    }

    by_pairs, rms, ppo = {}, {}, {}
    for n in config.pairs:
        change, passes = partial(first, n=n), max(1, config.pairs[-1] // n)  # as many steps for all
        by_pairs[f"dpo {n}"] = Variant([*runs.FEW, "--epochs", str(passes)], change=change)
        words = ["--batch-size", "16", "--epochs", str(min(8, 2 + passes))]
        rms[f"rm {n}"] = Variant(words, change=change, script="train_rm.py")
        words = [*runs.FEW, "--reward", f"SEED/rm {n}", "--iterations", str(config.iterations)]
        ppo[f"ppo {n}"] = Variant(words, kind="", script="train_ppo.py")
    found = runs.by_setting(runs.results(config, rms), quality)
    found |= runs.by_setting(runs.results(config, by_pairs | ppo))
    return {"size": by_size, "pairs": found}


def parameters(folder: Path) -> float:
    """Of a run's model, in millions."""
    model, _ = models.load(folder)
    return round(sum(p.numel() for p in model.parameters()) / 1e6, 2)


def quality(rm: Path) -> dict:
    """Of a reward model: rank correlation with the true reward on new answers of the usual SFT model."""
    return {"quality": active.quality(rm)}


def show(found: dict) -> tuple[str, list]:
    tables, panels = [], []
    for by, xlabel in (("size", "parameters, millions"), ("pairs", "pairs")):
        policies = {method: rows for method, rows in found[by].items() if method != "rm"}
        rms = {"reward model": found[by].get("rm", {})}
        for y, digits, says in (("gain", 2, figures.GAIN), ("true_reward", 2, "true reward"), ("kl", 1, "KL, nats")):
            tables.append(figures.table(policies, head=f"{says}, by {xlabel}", y=y, digits=digits))
        tables.append(figures.table(rms, head=f"{QUALITY}, by {xlabel}", y="quality", digits=3))
        words = {"xlabel": xlabel, "scale": "log"}
        y, says = ("true_reward", "true reward") if by == "size" else ("gain", figures.GAIN)
        panels.append(figures.panel(policies, title=f"policies, by {xlabel}", y=y, ylabel=says, **words))
        panels.append(figures.panel(rms, title="reward models", y="quality", ylabel=QUALITY, legend=False, **words))
    return "\n".join(map(runs.markdown, tables)), panels


main = runs.experiment(measure, show)

if __name__ == "__main__":
    flags.main(main, Config)
