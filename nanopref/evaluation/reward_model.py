"""How good is a reward model? What it says of held-out pairs: how often it is right, how sure it may be, what it pays
for length, and where the true reward is known, how its scores go with that."""

import shlex
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np
from torch import Tensor

from nanopref.data.groups import Encoded, Group
from nanopref.evaluation import report
from nanopref.evaluation.metrics import calibration, rank_correlation
from nanopref.feedback.collect import best_possible
from nanopref.feedback.rewards import true_rewards
from nanopref.running.folder import Run
from nanopref.running.parallel import say


def conclude(run: Run, scores: Tensor, groups: Sequence[Group], encoded: Encoded, result: dict[str, Any]) -> None:
    """The end of a run of train_rm.py: `result` completed in report.json, report.png and the table.

    `scores` [N, heads] are those of the held-out rows, less `score_shift` and divided by `score_scale`: before that σ
    of a pair's gap was a probability, and of labels σ of the score.
    """
    config, metrics, sampled = run.config, run.metrics(), not run.config.data
    score, length = scores.mean(1).numpy(), encoded.response_lengths.numpy()
    raw = score * result["score_scale"][0] + float(np.mean(result["score_shift"]))
    gap = gaps(raw, groups)
    result["held_out"] = {name: metrics[-1][f"held_out_{name}"] for name in ("accuracy", "loss")}
    result["held_out"] |= {"groups": len(groups)}
    slope = float(np.cov(length, score, bias=True)[0, 1] / (length.var() or 1.0))  # of the line that fits best
    result["length"] = {"score_per_token": slope, "rank_correlation": rank_correlation(length, score)}
    result["doubt"] = scores.std(1, correction=0).mean().item()
    panels = [
        report.curves(metrics, {"loss": "training", "held_out_loss": "held out"}, f"{config.loss} loss"),
        report.curves(metrics, {"accuracy": "training", "held_out_accuracy": "held out"}, "right"),
    ]
    if config.loss == "regression":
        said = np.array([rating for group in groups for rating in group.scores])
        result["rating_correlation"] = rank_correlation(said, score)
        panels.append(report.scatter(said, score, "held-out responses", "rating", "score"))
    elif len(gap):
        result["calibration"] = calibration(gap)
        panels.append(report.reliability(result["calibration"], "is it as right as it says?"))
    panels.append(report.scatter(length, score, "held-out responses: score and length", "tokens", "score"))
    what = "labels" if all(len(group.responses) == 1 for group in groups) else "pairs of answers"
    note, rows = f"of {len(gap):,}", [("held-out loss", f"{result['held_out']['loss']:.3f}", "a group")]
    if sampled:
        truth = true_rewards(groups)
        if best := best_possible(config, groups):
            note += f"; {best:.1%} at best"
            result["held_out"]["best_accuracy"] = best
        result["rank_correlation"] = rank_correlation(truth, score)
        result["length"]["true_reward_rank_correlation"] = rank_correlation(length, truth)
        rows.append(("rank correlation with the true reward", f"{result['rank_correlation']:.3f}", ""))
        panels.append(report.scatter(truth, score, "held-out responses", "true reward", "score"))
    by_length = f"{result['length']['rank_correlation']:.3f}"
    rows.append(("rank correlation with the length", by_length, f"{slope:+.3f} a token"))
    if scores.shape[1] > 1:
        rows.append(("doubt: the heads' spread", f"{result['doubt']:.3f}", "in standard deviations of the score"))
    rows.insert(0, (f"held-out {what} right", f"{result['held_out']['accuracy']:.1%}", note))
    report.plot(panels, run.folder / "report.png")
    run.report(result)
    say(f"\n{report.table(rows, ('', 'held out', ''))}\n\n{report.seconds_line(run.seconds)}")
    say(f"metrics, report.json and report.png are in {run.folder}; {report.model_line(run)}; use it:")
    words = ["--reward", str(run.folder), "--init", config.init or str(run.folder / "sft")]
    say("  python train_ppo.py", shlex.join(words + (["--data", config.data] if config.data else [])))


def gaps(score: np.ndarray, groups: Sequence[Group]) -> np.ndarray:
    """How far the better answer of each pair in a group is ahead; of labels, how far a score is on the right side."""
    found, rows = [], iter(score.tolist())
    for group in groups:
        scores, said = [next(rows) for _ in group.responses], group.said()
        if len(scores) == 1:
            found.append(scores[0] if said[0] > 0.5 else -scores[0])
        found += [scores[i] - scores[j] for i, j in permutations(range(len(scores)), 2) if said[i] > said[j]]
    return np.array(found)
