"""What a reward model is judged by."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nanopref.data import reviews
from nanopref.data.groups import Encoded, Group
from nanopref.evaluation.metrics import calibration, rank_correlation
from nanopref.evaluation.reward_model import conclude, gaps
from nanopref.feedback.voting import best_accuracy


def test_a_gap_is_how_far_the_better_of_two_is_ahead_or_a_label_on_the_right_side():
    groups = [
        Group("pair", ("a", "b")),
        Group("ranking", ("a", "b", "c")),
        Group("good", ("a",), scores=(1.0,)),
        Group("bad", ("a",), scores=(0.0,)),
        Group("ratings", ("a", "b", "c"), scores=(2.0, 2.0, -1.0)),
        Group("met", ("a", "b"), prompts=("x", "y")),
        Group("alike", ("a", "b"), scores=(0.5, 0.5)),
        Group("the worst first", ("a", "b"), scores=(0.0, 1.0)),
    ]
    score = np.array([3.0, 1.0, 5.0, 6.0, 8.0, 0.5, 0.25, 1.0, 4.0, 2.5, 0.0, 7.0, 9.0, 9.5, 2.0, 5.0])
    pair, ranking, good, bad, rated, met = [2.0], [5 - 6.0, 5 - 8.0, 6 - 8.0], [0.5], [-0.25], [1 - 2.5, 4 - 2.5], [-7]
    assert gaps(score, groups).tolist() == pair + ranking + good + bad + rated + met + [3.0]
    assert gaps(score[:2], groups[:1]).dtype == np.float64 and len(gaps(np.array([]), [])) == 0


def test_labels_and_pairs_are_as_sure_as_their_gap():
    groups = [Group("p", ("a",), scores=(0.0,)), Group("q", ("a", "b"))]
    (row,) = calibration(gaps(np.array([-math.log(3), math.log(9), 0.0]), groups), bins=1)
    assert row == {"says": (0.75 + 0.9) / 2, "right": 1.0, "pairs": 2}


TEXTS = [
    " The plot is superb.",
    " The acting is dull.",
    " The music is bold, but the plot drags.",
    "",
    " It.",
    " Fine.",
]
SAID = {
    "pairs": [Group("p", (a, b)) for a, b in zip(TEXTS[::2], TEXTS[1::2], strict=True)],
    "labels": [Group("p", (text,), scores=(float(i < 3),)) for i, text in enumerate(TEXTS)],
    "ratings": [Group("p", tuple(TEXTS[:4]), scores=(2.0, 1.0, 0.5, -1.0)),
                Group("q", tuple(TEXTS[4:]), scores=(1.0, 0.0))],
    "rankings": [Group("p", tuple(TEXTS[:3])), Group("q", tuple(TEXTS[3:]))],
}  # fmt: skip


SAID["pairs as labels"] = SAID["labels"]
REPORTED = {  # what is counted, and how many of them there are
    "pairs": ("pairs of answers", "bradley-terry", 3),
    "labels": ("labels", "binary", 6),
    "ratings": ("pairs of answers", "regression", 7),
    "rankings": ("pairs of answers", "plackett-luce", 6),
    "pairs as labels": ("labels", "binary", 6),
}


def concluded(folder: Path, heads: torch.Tensor, groups: list[Group], **settings) -> dict:
    """The report of a run of these flags that ends with these scores."""
    plain = {"data": "", "judged": "", "reward": None, "noise": 0.5, "annotators": 3, "init": "init"}
    config = SimpleNamespace(**plain | {"voters": (), "votes": "majority"} | settings)
    rows, written = [{"step": 1, "loss": 1.0, "held_out_loss": 0.9, "accuracy": 0.5, "held_out_accuracy": 0.75}], []
    run = SimpleNamespace(
        config=config, metrics=lambda: rows, folder=folder, report=written.append, seconds={"reward model": 1.0}
    )
    encoded = Encoded.pack([[([1], [2] * (i + 1))] for i in range(len(heads))])
    conclude(run, heads, groups, encoded, {"score_scale": [2.0, 2.0], "score_shift": [0.5, 1.5], "data": {}})
    (report,) = written
    return report


@pytest.mark.parametrize("file", ["", "file.jsonl"])
@pytest.mark.parametrize("feedback", SAID)
def test_the_report_says_what_the_feedback_lets_it_know(feedback, file, tmp_path, capsys, no_picture):
    """What is right at best of pairs alone; ratings of regression; the truth where it is known."""
    groups, heads = SAID[feedback], torch.tensor([[2.0, 1], [0, 0.5], [1, 1], [-1, 0], [0, 0], [0.25, 0]])
    what, loss, n = REPORTED[feedback]
    report = concluded(tmp_path, heads, groups, data=file, loss=loss, feedback=feedback.split()[0])
    score, truth = heads.mean(1).numpy(), np.array([reviews.true_reward(text) for text in TEXTS])
    best = best_accuracy(truth[::2], truth[1::2], noise=0.5, annotators=3)
    assert best < 1
    held_out = {"accuracy": 0.75, "loss": 0.9, "groups": len(groups)}
    sampled = not file
    assert report["held_out"] == held_out | ({"best_accuracy": best} if feedback == "pairs" and sampled else {})
    if sampled:
        assert report["rank_correlation"] == rank_correlation(truth, score)
        assert report["length"]["true_reward_rank_correlation"] == rank_correlation(range(1, 7), truth)
    else:
        assert "rank_correlation" not in report and report["length"].keys() == {"score_per_token", "rank_correlation"}
    if feedback == "ratings":
        assert report["rating_correlation"] == rank_correlation([2.0, 1.0, 0.5, -1.0, 1.0, 0.0], score)
        assert "calibration" not in report
    else:
        assert report["calibration"] == calibration(gaps(2 * score + 1, groups)) and "rating_correlation" not in report
    assert report["doubt"] == pytest.approx(heads.std(1, correction=0).mean().item())
    said = capsys.readouterr().out
    assert f"held-out {what} right" in said and f"of {n}" in said
    assert ("at best" in said) == ("best_accuracy" in report["held_out"])
    assert ("--data file.jsonl" in said) == bool(file) and "--init init" in said


def test_what_people_said_elsewhere_has_no_best_that_is_known(tmp_path, no_picture):
    """The truth is: the answers are to the built-in task."""
    heads = torch.tensor([[2.0, 1], [0, 0.5], [1, 1], [-1, 0], [0, 0], [0.25, 0]])
    report = concluded(tmp_path, heads, SAID["pairs"], judged="x.jsonl", loss="bradley-terry", feedback="pairs")
    assert "best_accuracy" not in report["held_out"] and "rank_correlation" in report


@pytest.mark.parametrize("loss", ["infonca", "regression"])
def test_ratings_that_all_tie_are_reported_too(loss, tmp_path, capsys):
    """No pair of them can be right or wrong."""
    groups = [Group(x, ("a", "b"), scores=(r, r)) for x, r in (("p", 1.0), ("q", -0.5))]
    heads = torch.tensor([[2.0, 1], [0, 0.5], [1, 1], [-1, 0]])
    report = concluded(tmp_path, heads, groups, data="file.jsonl", loss=loss, feedback="ratings")
    assert "calibration" not in report and ("rating_correlation" in report) == (loss == "regression")
    assert (tmp_path / "report.png").exists() and "of 0" in capsys.readouterr().out
