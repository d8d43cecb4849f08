"""Preferences without doubt: IPO stops, DPO does not. `python -m nanopref.experiments.margins`

Where the better answer always wins, the likelihood of the labels has no maximum: DPO drives the margin
h = log π_θ(y_w)/π_ref(y_w) - log π_θ(y_l)/π_ref(y_l) on without end and β no longer holds the policy. IPO's minimum is
at h = (2p - 1)/(2β) where the better answer wins with probability p, never beyond 1/(2β) (Azar et al. 2023, section 5).
"""

from dataclasses import dataclass

import numpy as np

from nanopref.experiments import runs
from nanopref.experiments.runs import ExperimentFlags, Variant
from nanopref.running import flags
from nanopref.running.flags import flag
from nanopref.running.folder import read_metrics


@dataclass
class Config(ExperimentFlags):
    """Follow the margins of DPO and IPO over many passes, where no annotator errs.

    Example: python -m nanopref.experiments.margins --epochs 20
    """

    out: str = "out/margins"
    prompts: int = 1024
    seeds: int = 1
    noise: float = 0.0
    epochs: int = flag(6, "passes over the pairs", least=1)
    beta: float = flag(0.1, "of both", above=0)


def measure(config: Config) -> dict[str, list[dict]]:
    """Of each loss the figures of its runs, and their margins h in nats, step by step."""
    words = ["--beta", str(config.beta), "--epochs", str(config.epochs)]
    folders = runs.results(config, {name: Variant(["--loss", name, *words]) for name in ("dpo", "ipo")})
    return {
        name: [
            runs.read_report(folder)
            | {"margins": [row["margin"] / config.beta for row in read_metrics(folder)], "beta": config.beta}
            for folder in found
        ]
        for name, found in folders.items()
    }


def show(found: dict[str, list[dict]]) -> tuple[str, list]:
    curves = {name: [run["margins"] for run in seeds] for name, seeds in found.items() if seeds}
    margins = {  # seeds differ by a few pairs
        name: np.mean([curve[: min(map(len, seeds))] for curve in seeds], axis=0) for name, seeds in curves.items()
    }
    limit = 1 / (2 * next(run["beta"] for seeds in found.values() for run in seeds))

    def draw(axis) -> None:
        axis.axhline(limit, color="grey", linestyle=":", label="1/(2β)")
        for name, margin in margins.items():
            axis.plot(margin, label=name)
        axis.set(title="margin of the pairs that are trained on", xlabel="step", ylabel="h, nats")
        axis.legend(frameon=False)

    ends = np.linspace(0, 1, 6)[1:]
    lines = [[f"margin h, nats (1/(2β) = {limit:.1f}), at", *(f"{end:.0%}" for end in ends)]]
    for name, margin in margins.items():
        places = (round(end * len(margin)) for end in ends)
        lines.append([name, *(f"{margin[max(0, place - 20) : place].mean():.1f}" for place in places)])
    return runs.gains(found) + "\n" + runs.markdown(lines), [runs.over_kl(found), draw]


main = runs.experiment(measure, show)

if __name__ == "__main__":
    flags.main(main, Config)
