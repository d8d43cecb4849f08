"""What the user sees at the end of a run: a table, samples, report.json and a picture."""

import itertools
import shlex
import shutil
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from nanopref.data.dialogues import Dialogue
from nanopref.evaluation.metrics import rank_correlation
from nanopref.running.files import write_atomic
from nanopref.running.folder import Run
from nanopref.running.parallel import rank, say

matplotlib.use("agg")  # a picture needs no screen
import matplotlib.pyplot as plt

Panel = Callable[[Any], None]  # draws on axes of its own

DPO_CURVES = {  # what train_dpo.py shows: {title of a panel: {logged figure: legend}}
    "loss": {"loss": "training", "held_out_loss": "held out"},
    "ranked right": {"accuracy": "training", "held_out_accuracy": "held out"},
    "implicit reward": {"chosen_reward": "chosen", "rejected_reward": "rejected"},
}
PPO_CURVES = {  # and train_ppo.py
    "reward": {"score": "score", "true_reward_std": "true reward, in reference std"},
    "KL to the reference, nats a response": {"kl": "k1", "kl_k3": "k3"},
    "entropy, nats a token": {"entropy": "π_θ"},
    "share clipped": {"clip_fraction": "policy", "value_clip_fraction": "value"},
    "value loss": {"value_loss": "value"},
    "explained variance of the returns": {"explained_variance": "critic"},
    "response length": {"response_length": "tokens"},
    "responses without end-of-text": {"unended": "share"},
    "KL within a round, nats a token": {"approx_kl": "π_old, π_θ"},
    "β": {"beta": "β"},
    "tokens a second": {"rollout_tokens_per_second": "rollout", "learning_tokens_per_second": "learning"},
}


def conclude(
    run: Run,
    result: dict[str, Any],
    answers: Sequence[dict[str, Any]],
    titles: dict[str, dict[str, str]],
    *,
    xlabel: str = "step",
) -> None:
    """The end of a run that moved a policy: report.json, report.png, three prompts with both answers, and the table.

    `answers` has a row a prompt, from `compare`; `titles` is {title of a panel: {name of a logged figure: legend}}.
    """
    metrics, true = run.metrics(), result.get("true_reward")
    for row in metrics:
        if true and "true_reward" in row:
            # in the unit of the score: what a reward model believes and what is so part where the policy games it
            row["true_reward_std"] = (row["true_reward"] - true["reference"]) / (true["reference_std"] or 1.0)
    panels = [curves(metrics, names, title, xlabel) for title, names in titles.items()]
    if len(rounds := result.get("rounds", [])) > 1:
        names = {name: name.removeprefix("score ") for name in rounds[0] if "score" in name or name == "true_reward"}
        by_round = [{"step": row["round"], **row} for row in rounds]
        panels.append(curves(by_round, names, "answers that are sampled, before each round", "round"))
    if by := result.get("win_rate_by"):
        rewards = {name: [row[f"{name}_{by}"] for row in answers] for name in ("reference", "policy")}
        by = by.replace("_", " ")
        panels.append(histograms(rewards, f"{by}, before and after", by))
    plot(panels, run.folder / "report.png")
    run.report({**result, "samples": answers[:3]})
    print_samples(answers[:3])
    say(f"\n{comparison_table(result)}\n\n{seconds_line(run.seconds)}")
    say(f"metrics, report.json and report.png are in {run.folder}; {model_line(run)}; try it:")
    asked = answers[0]["prompt"] if not run.config.data else "your prompt"
    how = "--chat" if isinstance(answers[0]["prompt"], Dialogue) else f"--prompt {shlex.quote(asked)}"
    say(f"  python -m nanopref.generate --model {shlex.quote(str(run.folder))} {how}")


def model_line(run: Run) -> str:
    """Which folder holds the model."""
    return f"`transformers` opens the model in {run.folder / 'model'}"


def table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...]) -> str:
    """Columns as wide as they need to be: the first to the left, the others to the right."""
    cells = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    ]
    return "\n".join([lines[0], "─" * len(lines[0]), *lines[1:]])


def comparison_table(report: dict[str, Any]) -> str:
    """Before (the reference) and after (the policy), for the terminal."""
    length, ended = report["response_length"], report["ended"]
    rows, by = [], report.get("win_rate_by", "")
    for name in sorted({"score", "true_reward"} & report.keys(), key=lambda name: name != by):
        reward, judge = report[name], name.replace("_", " ")
        gain, std = reward["policy"] - reward["reference"], reward["reference_std"]
        note = f"{gain / std:+.2f} std" if std > 0 else ""  # a reference that says nothing has no spread
        rows.append((judge, f"{reward['reference']:.2f}", f"{reward['policy']:.2f}", note))
        for part, found in report["scores"].items() if name == "score" else ():
            rows.append((f"  {part.removeprefix('score ')}", f"{found['reference']:.2f}", f"{found['policy']:.2f}", ""))
        low, high = reward["win_rate_95"]
        rows.append((f"win rate by {judge}", "", f"{reward['win_rate']:.1%}", f"95%: {low:.1%} to {high:.1%}"))
    rows += [
        ("KL to the reference, nats", "0", f"{report['kl']:.2f}", f"± {report['kl_standard_error']:.2f}"),
        ("response length, tokens", f"{length['reference']:.1f}", f"{length['policy']:.1f}", ""),
        ("responses that end", f"{ended['reference']:.1%}", f"{ended['policy']:.1%}", ""),
    ]
    if report["prompts_cut"]:
        rows.append(("prompts cut on the left", "", f"{report['prompts_cut']}", f"of {report['prompts']}"))
    if held_out := report.get("held_out"):
        best = f"{held_out['best_accuracy']:.1%} at best" if "best_accuracy" in held_out else ""
        if "accuracy" in held_out:
            rows.append(("held-out answers ranked right", "", f"{held_out['accuracy']:.1%}", best))
        rows.append(("held-out loss", "", f"{held_out['loss']:.3f}", ""))
    return table(rows, ("", "before", "after", ""))


def seconds_line(seconds: dict[str, float]) -> str:
    """Where the time went."""
    parts = " · ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    return f"seconds: {parts} · together {sum(seconds.values()):.0f}"


def side_by_side(row: dict[str, Any], width: int) -> str:
    """One prompt with both answers in two columns."""
    column = (width - 3) // 2
    cells = []
    for name, title in (("reference", "before"), ("policy", "after")):
        judges = [judge for judge in ("score", "true_reward") if f"{name}_{judge}" in row]
        head = ", ".join([title, *(f"{judge.replace('_', ' ')} {row[f'{name}_{judge}']:.2f}" for judge in judges)])
        paragraphs = row[name].strip().splitlines() or ["(empty)"]
        cells.append(
            [head, *(line for p in paragraphs for line in textwrap.wrap(p, column, break_on_hyphens=False) or [""])]
        )
    prompt = textwrap.wrap(row["prompt"].strip()[-3 * width :], width)
    pairs = itertools.zip_longest(*cells, fillvalue="")
    return "\n".join([*prompt, *(f"{left.ljust(column)} │ {right}".rstrip() for left, right in pairs)])


def print_samples(rows: Sequence[dict[str, Any]]) -> None:
    """The prompts with both answers."""
    width = min(120, shutil.get_terminal_size((100, 20)).columns)
    for row in rows:
        say(f"\n{side_by_side(row, width)}")


def shows_something(panel: Panel) -> bool:
    """Not a panel that is empty, or in which every curve stays where it began, as β does that nothing changes."""
    axis = Figure().add_subplot()
    panel(axis)
    moves = any(np.ptp(line.get_ydata()) > 1e-6 * np.abs(line.get_ydata()).max() for line in axis.lines)
    return bool(moves or axis.collections or axis.patches)


def plot(panels: Sequence[Panel], path: Path) -> None:
    """Draw each panel that shows something, or else the first, on axes of its own in a PNG that appears whole: four in
    a square, more in rows of three or four, whichever leaves fewer places empty."""
    if rank() > 0:
        return
    panels = [panel for panel in panels if shows_something(panel)] or panels[:1]
    n = len(panels)
    columns = min(n, 3) if n < 4 else 2 if n == 4 else min((4, 3), key=lambda columns: -n % columns)
    rows = -(-n // columns)
    size = (5 * columns, 3.6 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes.flat, panels, strict=False):
        axis.spines[["top", "right"]].set_visible(False)
        panel(axis)
    write_atomic(path, lambda partial: figure.savefig(partial, dpi=110, format="png"))
    plt.close(figure)


def curves(metrics: Sequence[dict[str, float]], names: dict[str, str], title: str, xlabel: str = "step") -> Panel:
    """A panel with one curve for each logged name, {name: legend}, over the steps; sparse ones get markers."""

    def draw(axis) -> None:
        for name, legend in names.items():
            points = [(row["step"], row[name]) for row in metrics if name in row]
            if points:
                marker = "o" if len(points) <= 0.5 * len(metrics) or len(points) == 1 else None
                axis.plot(*zip(*points, strict=True), label=legend, marker=marker, alpha=0.9)
        axis.set(title=title, xlabel=xlabel)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if axis.lines:
            axis.legend(frameon=False)

    return draw


def histograms(values: dict[str, Sequence[float]], title: str, xlabel: str) -> Panel:
    """A panel with one histogram for each name, on common bins."""

    def draw(axis) -> None:
        bins = np.histogram_bin_edges(np.concatenate([np.asarray(v) for v in values.values()]), bins=30)
        for name, v in values.items():
            axis.hist(v, bins, alpha=0.6, label=f"{name}, mean {np.mean(v):.2f}")
        axis.set(title=title, xlabel=xlabel, ylabel="responses")
        axis.legend(frameon=False)

    return draw


def scatter(x: Sequence[float], y: Sequence[float], title: str, xlabel: str, ylabel: str) -> Panel:
    """A panel with a point for each pair of values, and their rank correlation."""

    def draw(axis) -> None:
        axis.scatter(x, y, s=6, alpha=0.35, linewidths=0)
        axis.set(title=f"{title} (ρ = {rank_correlation(x, y):.2f})", xlabel=xlabel, ylabel=ylabel)

    return draw


def reliability(bins: Sequence[dict[str, float]], title: str) -> Panel:
    """A panel with the `calibration` of a model: on the diagonal it is as often right as it says."""

    def draw(axis) -> None:
        axis.plot([0.5, 1], [0.5, 1], color="grey", linestyle=":")
        axis.plot([b["says"] for b in bins], [b["right"] for b in bins], marker="o")
        axis.set(title=title, xlabel="how sure the model is", ylabel="how often it is right")

    return draw
