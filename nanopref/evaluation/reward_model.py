"""How good is a reward model? What it says of held-out pairs: how often it is right, how sure it may be, what it pays
for length, and where the true reward is known, how its scores go with that."""

import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from nanopref.data.groups import Encoded, Group
from nanopref.evaluation import report
from nanopref.evaluation.metrics import calibration, rank_correlation
from nanopref.feedback.rewards import true_rewards
from nanopref.feedback.voting import best_accuracy
from nanopref.running.folder import Run
from nanopref.running.parallel import say


def conclude(
    run: Run, scores: Tensor, groups: Sequence[Group], encoded: Encoded, scale: list[float], result: dict[str, Any]
) -> None:
    """The end of a run of train_rm.py: `result` completed in report.json, report.png and the table.

    `scores` [N, heads] are those of the held-out pairs' rows, each divided by `scale`: before that σ of a pair's gap
    was a probability.
    """
    config, metrics, sampled = run.config, run.metrics(), not run.config.data
    score, length = scores.mean(1).numpy(), encoded.response_lengths.numpy()
    pairs = score.reshape(-1, 2)
    result["held_out"] = {name: metrics[-1][f"held_out_{name}"] for name in ("accuracy", "loss")} | {
        "pairs": len(pairs)
    }
    result["calibration"] = calibration((pairs[:, 0] - pairs[:, 1]) * scale[0])
    slope = float(np.cov(length, score, bias=True)[0, 1] / (length.var() or 1.0))  # of the line that fits best
    result["length"] = {"score_per_token": slope, "rank_correlation": rank_correlation(length, score)}
    result["doubt"] = scores.std(1, correction=0).mean().item()
    panels = [
        report.curves(metrics, {"loss": "training", "held_out_loss": "held out"}, "Bradley-Terry loss"),
        report.curves(metrics, {"accuracy": "training", "held_out_accuracy": "held out"}, "pairs ranked right"),
        report.reliability(result["calibration"], "is it as right as it says?"),
        report.scatter(length, score, "held-out responses: score and length", "tokens", "score"),
    ]
    note, rows = f"of {len(pairs):,}", [("held-out loss", f"{result['held_out']['loss']:.3f}", "nats a pair")]
    if sampled:
        truth = true_rewards(groups)
        best = best_accuracy(*truth.T, noise=config.noise, annotators=config.annotators)
        note += f"; {best:.1%} at best"
        result["held_out"]["best_accuracy"] = best
        result["rank_correlation"] = rank_correlation(truth.flatten(), score)
        result["length"]["true_reward_rank_correlation"] = rank_correlation(length, truth.flatten())
        rows.append(("rank correlation with the true reward", f"{result['rank_correlation']:.3f}", ""))
        panels.append(report.scatter(truth.flatten(), score, "held-out responses", "true reward", "score"))
    by_length = f"{result['length']['rank_correlation']:.3f}"
    rows.append(("rank correlation with the length", by_length, f"{slope:+.3f} a token"))
    if scores.shape[1] > 1:
        rows.append(("doubt: the heads' spread", f"{result['doubt']:.3f}", "in standard deviations of the score"))
    rows.insert(0, ("held-out pairs ranked right", f"{result['held_out']['accuracy']:.1%}", note))
    report.plot(panels, run.folder / "report.png")
    run.report(result)
    say(f"\n{report.table(rows, ('', 'held out', ''))}\n\n{report.seconds_line(run.seconds)}")
    say(f"metrics, report.json and report.png are in {run.folder}; {report.model_line(run)}; use it:")
    words = ["--reward", str(run.folder), "--init", config.init or str(run.folder / "sft")]
    say("  python train_ppo.py", shlex.join(words + (["--data", config.data] if config.data else [])))
