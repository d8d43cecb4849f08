"""Labels that are wrong: which losses bear them? `python -m nanopref.experiments.noise`

Pairs on which nobody errs, of which a share is turned round. cDPO (Mitchell 2023) and robust DPO (Chowdhury et al.
2024) are told that share; DPO and IPO are not. Beside them PPO, whose reward model learns from the same pairs.
"""

from dataclasses import dataclass
from functools import partial
from random import Random

from nanopref.experiments import figures, runs
from nanopref.experiments.runs import ExperimentFlags, Variant
from nanopref.running import flags
from nanopref.running.flags import flag


@dataclass
class Config(ExperimentFlags):
    """DPO, cDPO, robust DPO, IPO and PPO on pairs of which a share is turned round.

    Example: python -m nanopref.experiments.noise --shares 0 0.3 --seeds 1
    """

    out: str = "out/noise"
    prompts: int = 1280
    noise: float = 0.0
    shares: tuple[float, ...] = flag((0.0, 0.1, 0.2, 0.3, 0.4), "of pairs that are turned round", least=0, below=0.5)
    iterations: int = flag(16, "rounds of PPO, for every second share", least=1)


def flipped(rows: list[dict], rng: Random, share: float) -> list[dict]:
    """The rows with the chosen and the rejected answer of a share of them exchanged."""
    turned = set(rng.sample(range(len(rows)), round(share * len(rows))))
    return [
        row | {"chosen": row["rejected"], "rejected": row["chosen"]} if i in turned else row
        for i, row in enumerate(rows)
    ]


def measure(config: Config) -> dict:
    variants, models, ppo = {}, {}, {}
    for i, share in enumerate(config.shares):
        change, at = partial(flipped, share=share), f"{share:g}"
        for loss in ("dpo", "ipo"):
            variants[f"{loss} {at}"] = Variant([*runs.FEW, *runs.PASSES, "--loss", loss], change=change)
        for loss in ("cdpo", "robust") if share else ():  # without a share they are DPO
            words = [*runs.FEW, *runs.PASSES, "--loss", loss, "--label-smoothing", at]
            variants[f"{loss} {at}"] = Variant(words, change=change)
        if i % 2 == 0:
            models[f"rm {at}"] = Variant(runs.FEW_PAIRS, change=change, script="train_rm.py")
            words = [*runs.FEW, "--reward", f"SEED/rm {at}", "--iterations", str(config.iterations)]
            ppo[f"ppo {at}"] = Variant(words, kind="", script="train_ppo.py")
    runs.results(config, models)
    found = runs.by_setting(runs.results(config, variants | ppo))
    for loss in ("cdpo", "robust"):
        found[loss] = {at: seeds for at, seeds in found["dpo"].items() if at == "0"} | found.get(loss, {})
    return found


def show(found: dict) -> tuple[str, list]:
    percent = {at: f"{float(at):.0%} turned round" for at in next(iter(found.values()))}
    lines = figures.table(found, head=figures.GAIN, sign="+", columns=percent)
    costs = figures.table(found, head="KL, nats", y="kl", digits=1, columns=percent)
    x = "share of pairs turned round"
    panels = [
        figures.panel(found, title="wrong labels", xlabel=x, ylabel=figures.GAIN),
        figures.panel(found, title="what was paid", xlabel=x, y="kl", ylabel="KL to the reference, nats", legend=False),
    ]
    return runs.markdown(lines) + "\n" + runs.markdown(costs), panels


main = runs.experiment(measure, show)

if __name__ == "__main__":
    flags.main(main, Config)
