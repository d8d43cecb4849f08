"""Reward against KL (Rafailov et al. 2023, figure 2, left): `python -m nanopref.experiments.frontier`

How much true reward does each method buy, and for how many nats from the reference? All learn from the same pairs in
one pass, over a range of β; DPO also in three, which PPO's reward model has; preferred-FT has 1 to 4 passes instead of
a β, best-of-n its n. Online DPO has as many pairs judged, of its own answers, in four rounds; PPO with the true reward
sees the truth.
"""

from dataclasses import dataclass

import numpy as np

from nanopref.experiments import figures, runs
from nanopref.experiments.figures import with_error
from nanopref.experiments.runs import ExperimentFlags, Variant
from nanopref.running import flags
from nanopref.running.flags import flag

ON_PAIRS = {  # --beta of those that learn from the pairs themselves; what is about the same differs by loss
    "dpo": (0.05, 0.15, 0.5, 1.5, 5.0),
    "ipo": (0.02, 0.05, 0.15, 0.5),
    "slic": (0.3, 1.0, 3.0, 10.0),
    "kto": (0.05, 0.15, 0.5, 1.5, 5.0),
    "discopop": (0.05, 0.15, 0.5, 1.5),
    "unlikelihood": (0.02, 0.1, 0.5),
}
PPO = (0.03, 0.1, 0.3, 1.0)
ONLINE = (0.15, 0.5, 1.5)
EPOCHS = (1, 2, 4)  # of preferred-FT, which has no β


@dataclass
class Config(ExperimentFlags):
    """The true reward of eleven methods over their KL to the reference, at several β and seeds.

    Example: python -m nanopref.experiments.frontier --seeds 1
    """

    out: str = "out/frontier"
    prompts: int = 1280
    iterations: int = flag(24, "rounds of PPO", least=1)
    n: int = flag(64, "largest n of best-of-n", least=2)
    pool_prompts: int = flag(64, "prompts of its pool, which has four times as many answers to each", least=1)


def variants(config: Config) -> dict[str, Variant]:
    """Every run after the reward model's; its name is a method and its setting."""
    found = {}
    for loss, betas in ON_PAIRS.items():
        # KTO learns from the pairs too: the better answer is good, the worse bad
        words = [*runs.FEW, "--loss", loss]
        found |= {f"{loss} {beta:g}": Variant([*words, "--beta", f"{beta:g}"]) for beta in betas}
    for beta in ON_PAIRS["dpo"]:
        found[f"dpo-passes {beta:g}"] = Variant([*runs.FEW, *runs.PASSES, "--beta", f"{beta:g}"])
    for epochs in EPOCHS:
        found[f"preferred {epochs}"] = Variant([*runs.FEW, "--loss", "preferred", "--epochs", str(epochs)])
    people = ["--noise", str(config.noise), "--annotators", str(config.annotators), "--rounds", "4"]
    for beta in ONLINE:
        found[f"online-dpo {beta:g}"] = Variant([*runs.FEW, *people, "--beta", f"{beta:g}"], kind="")
    for method, reward in (("ppo", "SEED/rm"), ("ppo-true", "true")):
        for beta in PPO:
            words = [*runs.FEW, "--reward", reward, "--iterations", str(config.iterations), "--beta", f"{beta:g}"]
            found[f"{method} {beta:g}"] = Variant(words, kind="", script="train_ppo.py")
    return found


def measure(config: Config) -> dict:
    """{method: {setting: [figures of a run, one a seed]}}"""
    (rms,) = runs.results(config, {"rm": Variant(runs.FEW_PAIRS, script="train_rm.py")}).values()
    found = runs.by_setting(runs.results(config, variants(config)))
    for rm in rms:
        for row in runs.best_of_n(rm, config.n, config.pool_prompts)[1:]:  # the best of one is the reference
            found.setdefault("best-of-n", {}).setdefault(str(row["n"]), []).append(row | {"seed": runs.seed_of(rm)})
    return found


def show(found: dict) -> tuple[str, list]:
    offline = {method: rows for method, rows in found.items() if method in (*ON_PAIRS, "dpo-passes", "preferred")}
    others = {method: rows for method, rows in found.items() if method not in offline or method.startswith("dpo")}
    words = {"x": "kl", "scale": "log", "xlabel": "KL to the reference, nats a response", "ylabel": figures.GAIN}
    titles = {"from the pairs alone": offline, "beside them: by a reward, or in rounds": others}
    panels = [figures.panel(rows, title=title, **words) for title, rows in titles.items()]
    header = ["", "β, passes or n", "gain in true reward, std", "KL, nats"]
    lines = []
    for method, settings in found.items():
        for setting, seeds in settings.items():
            gain, kl = ([run[name] for run in seeds] for name in ("gain", "kl"))
            lines.append([figures.look(method).label, setting, with_error(gain, sign="+"), with_error(kl, 1)])
    return runs.markdown([header, *lines]) + "\n" + runs.markdown(at_equal_kl(found, (1, 2, 4, 8))), panels


def at_equal_kl(found: dict[str, dict[str, list[dict]]], nats: tuple[int, ...]) -> list[list[str]]:
    """Lines of a table: the gain of each method at so many nats, a dash where its runs do not reach."""
    lines = [["gain at", *(f"{kl} nats" for kl in nats)]]
    for method, settings in found.items():
        cells = (with_error(gain_at(settings, kl), sign="+") or "–" for kl in nats)
        lines.append([figures.look(method).label, *cells])
    return lines


def gain_at(settings: dict[str, list[dict]], kl: float) -> list[float]:
    """The gain of a method at a KL, between its settings on either side (linear in √KL, as in Gao et al. 2022): one a
    seed, of those that have such settings."""
    found = []
    for seed in sorted({run["seed"] for seeds in settings.values() for run in seeds}):
        of_seed = (run for seeds in settings.values() for run in seeds if run["seed"] == seed)
        points = sorted((max(0.0, run["kl"]), run["gain"]) for run in of_seed)
        x, y = np.array(points).T
        if x[0] <= kl <= x[-1]:
            found.append(float(np.interp(np.sqrt(kl), np.sqrt(x), y)))
    return found


main = runs.experiment(measure, show)

if __name__ == "__main__":
    flags.main(main, Config)
