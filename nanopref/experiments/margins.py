"""Preferences without doubt: IPO stops, DPO does not. `python -m nanopref.experiments.margins`

Where the better answer always wins, the likelihood of the labels has no maximum: DPO drives the margin
h = log π_θ(y_w)/π_ref(y_w) - log π_θ(y_l)/π_ref(y_l) on without end and β no longer holds the policy. IPO's minimum is
at h = (2p - 1)/(2β) where the better answer wins with probability p, never beyond 1/(2β) (Azar et al. 2023, section 5).
"""

from dataclasses import dataclass

import numpy as np

from nanopref.evaluation import report
from nanopref.experiments import runs
from nanopref.experiments.runs import ExperimentFlags, Variant
from nanopref.running import flags
from nanopref.running.flags import flag
from nanopref.running.folder import read_metrics
from nanopref.running.parallel import say


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


def main(config: Config) -> None:
    flags.check(config)
    words = ["--beta", str(config.beta), "--epochs", str(config.epochs)]
    folders = runs.results(config, {name: Variant(["--loss", name, *words]) for name in ("dpo", "ipo")})
    margins = {}
    for name, found in folders.items():
        curves = [[row["margin"] / config.beta for row in read_metrics(folder)] for folder in found]
        steps = min(map(len, curves))  # seeds differ by a few pairs
        margins[name] = np.mean([curve[:steps] for curve in curves], axis=0)

    def draw(axis) -> None:
        axis.axhline(1 / (2 * config.beta), color="grey", linestyle=":", label="1/(2β)")
        for name, margin in margins.items():
            axis.plot(margin, label=name)
        axis.set(title="margin of the pairs that are trained on", xlabel="step", ylabel="h, nats")
        axis.legend(frameon=False)

    runs.conclude(config, folders, panels=[draw])
    ends = np.linspace(0, 1, 6)[1:]
    rows = [
        (
            name,
            *(f"{margin[max(0, round(end * len(margin)) - 20) : round(end * len(margin))].mean():.1f}" for end in ends),
        )
        for name, margin in margins.items()
    ]
    header = (f"margin h, nats (1/(2β) = {1 / (2 * config.beta):.1f}), at", *(f"{end:.0%}" for end in ends))
    say(report.table(rows, header))


if __name__ == "__main__":
    flags.main(main, Config)
