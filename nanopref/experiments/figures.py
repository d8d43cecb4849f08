"""How the figures look: a method has the same name, colour, marker and line in each, and can be told apart in grey."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Look(NamedTuple):
    label: str
    color: str
    marker: str
    line: str = "-"


LOOKS = {  # colours after Okabe and Ito, which differ in lightness too
    "dpo": Look("DPO", "#0072B2", "o"),
    "ipo": Look("IPO", "#56B4E9", "s", "--"),
    "cdpo": Look("cDPO", "#009E73", "^", "-."),
    "robust": Look("robust DPO", "#CC79A7", "D", ":"),
    "slic": Look("SLiC", "#009E73", "^", "-."),
    "kto": Look("KTO", "#CC79A7", "D", ":"),
    "discopop": Look("DiscoPOP", "#8C8C00", "v", "--"),
    "online-dpo": Look("online DPO", "#332288", "<", "-."),
    "ppo": Look("PPO, learned reward", "#D55E00", "P"),
    "ppo-true": Look("PPO, true reward", "#000000", "*", "--"),
    "rlhf": Look("RLHF", "#000000", "*"),
    "rloo": Look("RLOO", "#009E73", "^", "--"),
    "trpo": Look("TRPO", "#000000", "D", ":"),
    "best-of-n": Look("best of n", "#E69F00", "h"),
    "preferred": Look("preferred-FT", "#999999", "x", ":"),
    "unlikelihood": Look("unlikelihood", "#882255", "X", ":"),
    "sft": Look("SFT", "#666666", ".", ":"),
}
OTHERS = [Look("", "#0072B2", "o"), Look("", "#D55E00", "s", "--"), Look("", "#009E73", "^", "-."),
          Look("", "#000000", "D", ":"), Look("", "#E69F00", "v"), Look("", "#CC79A7", "P", "--")]  # fmt: skip


def look(name: str, number: int = 0) -> Look:
    """Of a method, or of the n-th of what is no method."""
    return LOOKS.get(name) or OTHERS[number % len(OTHERS)]._replace(label=name)


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds, and its standard error: NaN of a single one."""
    values = np.asarray(values, dtype=float)
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(values.mean()), float(error)


def with_error(values: Sequence[float], digits: int = 2, sign: str = "") -> str:
    """Mean ± standard error, as a table says it."""
    mean, error = mean_error(values)
    return f"{mean:{sign}.{digits}f}" + ("" if np.isnan(error) else f" ± {error:.{digits}f}")


def curve(
    axis, name: str, points: Sequence[tuple[Sequence[float] | float, Sequence[float]]], number: int = 0,
    label: str | None = None, in_order: bool = False,
) -> None:  # fmt: skip
    """A line through the means over seeds, with a band and bars of a standard error either way.

    Each point has x, a number or one a seed, and y, one a seed; with `in_order` they are joined by their mean x.
    """
    shape, found = look(name, number), []
    for x, y in points:
        if len(y):
            found.append((*mean_error(np.atleast_1d(x)), *mean_error(y)))
    found = sorted(found) if in_order else found
    if not found:
        return
    x, dx, y, dy = np.array(found).T
    dx, dy = np.nan_to_num(dx), np.nan_to_num(dy)
    drawn = {"color": shape.color, "marker": shape.marker, "linestyle": shape.line, "markersize": 5, "linewidth": 1.3}
    label = shape.label if label is None else label
    axis.errorbar(x, y, dy, dx if dx.any() else None, label=label, elinewidth=0.8, **drawn)
    if dy.any() and len(x) > 1 and (np.diff(x) > 0).all():
        axis.fill_between(x, y - dy, y + dy, color=shape.color, alpha=0.15, linewidth=0)
