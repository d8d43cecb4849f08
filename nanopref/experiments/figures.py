"""How the figures look: a method has the same name, colour, marker and line in each, and can be told apart in grey."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import LogLocator

from nanopref.evaluation.report import Panel

GAIN = "gain in true reward, std of the reference"  # what most figures are about


class Look(NamedTuple):
    label: str
    color: str
    marker: str
    line: str = "-"


LOOKS = {  # colours after Okabe and Ito, which differ in lightness too
    "dpo": Look("DPO", "#0072B2", "o"),
    "dpo-passes": Look("DPO, three passes", "#0072B2", "o", ":"),
    "ipo": Look("IPO", "#56B4E9", "s", "--"),
    "cdpo": Look("cDPO", "#009E73", "^", "-."),
    "robust": Look("robust DPO", "#8C8C00", "D", ":"),
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
    "binary": Look("cross-entropy", "#882255", "v", "-."),
    "plackett-luce": Look("Plackett-Luce", "#E69F00", "h", "--"),
    "infonca": Look("InfoNCA", "#332288", "<"),
    "regression": Look("regression", "#A0522D", "x", "--"),
    "exponential": Look("exponential", "#999999", "d", "-."),
    "dpo without its weight": Look("DPO without its weight", "#000000", "v", "--"),
    "sft": Look("SFT", "#666666", ".", ":"),
}
OTHERS = [Look("", "#0072B2", "o"), Look("", "#D55E00", "s", "--"), Look("", "#009E73", "^", "-."),
          Look("", "#000000", "D", ":"), Look("", "#E69F00", "v"), Look("", "#CC79A7", "P", "--"),
          Look("", "#56B4E9", "X", "-.")]  # fmt: skip


def look(name: str, number: int = 0) -> Look:
    """Of a method, or of the n-th of what is no method."""
    return LOOKS.get(name) or OTHERS[number % len(OTHERS)]._replace(label=name)


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds, and its standard error: NaN of a single one."""
    values = np.asarray(values, dtype=float)
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(values.mean()), float(error)


def with_error(values: Sequence[float], digits: int = 2, sign: str = "") -> str:
    """Mean ± standard error, as a table says it; nothing of nothing."""
    if not len(values):
        return ""
    mean, error = mean_error(values)
    return f"{mean:{sign}.{digits}f}" + ("" if np.isnan(error) else f" ± {error:.{digits}f}")


def curve(
    axis, name: str, points: Sequence[tuple[Sequence[float] | float, Sequence[float]]], number: int = 0,
    in_order: bool = False,
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
    axis.errorbar(x, y, dy, dx if dx.any() else None, label=shape.label, elinewidth=0.8, **drawn)
    if dy.any() and len(x) > 1 and (np.diff(x) > 0).all():
        axis.fill_between(x, y - dy, y + dy, color=shape.color, alpha=0.15, linewidth=0)


def plain_log_ticks(axis) -> None:
    """Ticks of a logarithmic axis at 1, 2, 5, 10 …, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def bars(found: Sequence[tuple[str, str, Sequence[float]]], *, title: str, ylabel: str) -> Panel:
    """A bar for each (method, label, values, one a seed), with a standard error either way; each seed is a point."""

    def draw(axis) -> None:
        for place, (method, _, values) in enumerate(found):
            if len(values):
                mean, error = mean_error(values)
                color = look(method, place).color
                axis.bar(place, mean, 0.7, yerr=np.nan_to_num(error), color=color, alpha=0.75, capsize=3)
                axis.scatter([place] * len(values), values, s=8, color="black", zorder=3)
        axis.axhline(0, color="grey", linewidth=0.5)
        axis.set_xticks(range(len(found)), [label for _, label, _ in found], fontsize=7)
        axis.set(title=title, ylabel=ylabel)

    return draw


# dark for below 0 and of middling lightness for above, so that the two differ in grey
DIVERGING = LinearSegmentedColormap.from_list("diverging", ["#A50F15", "#FFFFFF", "#6BAED6"])


def heat(
    axis, values: Sequence[Sequence[float]], texts: Sequence[Sequence[str]], x: Sequence[str], y: Sequence[str],
    size: float = 6,
) -> None:  # fmt: skip
    """Numbers from -1 to 1 [rows][columns] as colours, white for 0 and for NaN, each with a text in letters of a size;
    `x` are the names of the columns, `y` of the rows, of which the first is at the top."""
    values = np.asarray(values, dtype=float)
    axis.pcolormesh(values, cmap=DIVERGING, vmin=-1, vmax=1, edgecolors="white", linewidth=0.5)
    for (row, column), value in np.ndenumerate(values):
        shape = {"ha": "center", "va": "center", "fontsize": size, "color": "white" if value < -0.6 else "black"}
        axis.text(column + 0.5, row + 0.5, texts[row][column], **shape)
    axis.set_xticks(np.arange(len(x)) + 0.5, x, fontsize=7)
    axis.set_yticks(np.arange(len(y)) + 0.5, y, fontsize=7)
    axis.invert_yaxis()


def panel(
    found: dict[str, dict[str, list[dict]]], *, title: str, xlabel: str, ylabel: str, x: str = "", y: str = "gain",
    scale: str = "linear", legend: bool = True,
) -> Panel:  # fmt: skip
    """One curve a method, of {method: {setting: [figures, one a seed]}}: y over another figure, or over the setting."""

    def draw(axis) -> None:
        for number, (method, settings) in enumerate(found.items()):
            points = [
                ([run[x] for run in seeds] if x else float(setting), [run[y] for run in seeds])
                for setting, seeds in settings.items()
                if seeds
            ]
            curve(axis, method, points, number, in_order=True)
        axis.set(title=title, xlabel=xlabel, ylabel=ylabel, xscale=scale)
        if scale == "log" and not x:
            ticks = sorted({float(setting) for settings in found.values() for setting in settings})
            axis.minorticks_off()
            axis.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
        elif scale == "log":
            plain_log_ticks(axis.xaxis)
        if legend:  # beside the curves where they are many
            beside = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if len(found) > 6 else {}
            axis.legend(frameon=False, fontsize=8, **beside)

    return draw


def table(
    found: dict[str, dict[str, list[dict]]], *, head: str, y: str = "gain", digits: int = 2, sign: str = "",
    columns: dict[str, str] | None = None,
) -> list[list[str]]:  # fmt: skip
    """The same as lines of a table, a column a setting: mean ± standard error. `columns` names settings."""
    settings = list(dict.fromkeys(setting for row in found.values() for setting in row))
    lines = [[head, *((columns or {}).get(setting, setting) for setting in settings)]]
    for method, row in found.items():
        cells = ([run[y] for run in row.get(setting, ())] for setting in settings)
        lines.append([look(method).label, *(with_error(cell, digits, sign) for cell in cells)])
    return lines
