"""A tournament: the scale, the intervals, and the command."""

import math
import re

import numpy as np
import pytest

from nanopref import evaluate, models
from nanopref.evaluation.tournament import ELO, PRIOR, ratings, table
from nanopref.running import flags


def column(text: str, name: str, k: int) -> str:
    line = next(line for line in text.splitlines() if line.startswith(name))
    return re.split(r"\s{2,}", line.strip())[k]


def test_two_players_differ_by_the_log_odds_of_winning():
    """With the pull of the prior, in which the odds of 3 to 1 are a little less: the derivative is 0."""
    scores = np.array([[1.0] * 75 + [0.0] * 25, [0.5] * 100])
    r = ratings(scores)
    assert r.sum() == pytest.approx(0) and r[0] - r[1] == pytest.approx(math.log(3), abs=0.01)
    p = 1 / (1 + math.exp(r[1] - r[0]))
    assert 75 - 100 * p - PRIOR * r[0] == pytest.approx(0, abs=1e-6)


def test_a_tie_is_half_a_win():
    """400 points of Elo's are odds of ten to one; whoever wins 9 of 10 and ties once is expected to have 95%."""
    assert ELO == pytest.approx(173.7178, abs=1e-4)
    assert ratings(np.zeros((3, 5))) == pytest.approx(0, abs=1e-12)
    scores = np.array([[1.0] * 900 + [0.0] * 100, [0.0] * 1000])
    assert np.ptp(ratings(scores)) == pytest.approx(math.log(0.95 / 0.05), abs=0.01)


def test_the_intervals_hold_the_truth():
    """Of three policies: one that is the reference but for a little, and one that goes up and down with it, by which
    they differ more surely than if each had luck of its own."""
    rng, widths = np.random.default_rng(0), []

    def draw(n: int) -> np.ndarray:
        luck = rng.normal(size=n)
        return np.array([luck, 0.2 + luck + 0.5 * rng.normal(size=n), 0.4 + 2 * rng.normal(size=n)])

    truth, held = ratings(draw(100_000)), []
    for seed in range(60):
        text = table("abc", draw(100), 0, draws=60, seed=seed)
        for name, r in zip("bc", truth[1:] - truth[0], strict=True):
            low, high = map(float, column(text, name, 2).split(" to "))
            held.append(low - 0.5 <= 1000 + ELO * r <= high + 0.5)
            widths.append(high - low)
    assert 0.9 <= np.mean(held) <= 0.99
    assert 100 < np.mean(widths) < 200


def test_who_always_wins_is_beyond_what_can_be_measured():
    text = table(["start", "best"], np.array([[0.0] * 50, [1.0] * 50]), reference=0)
    assert column(text, "best", 2) == "–" and float(column(text, "best", 1)) > 1400
    turned = table(["best", "start"], np.array([[1.0] * 50, [0.0] * 50]), reference=1)
    assert turned == text


def test_the_best_comes_first_and_the_reference_is_at_1000():
    scores = np.array([[0.0] * 50, [1.0] * 40 + [-1.0] * 10, [2.0] * 45 + [-2.0] * 4 + [0.0]])
    text = table(["the start", "some", "the best"], scores, reference=0)
    assert [line.split("  ")[0] for line in text.splitlines()[2:]] == ["the best", "some", "the start"]
    assert column(text, "the start", 1) == "1000" and column(text, "the start", 2) == "the reference"
    assert column(text, "some", 5) == "80.0%" and column(text, "the best", 5) == "91.0%"
    assert [column(text, name, 3) for name in ("the best", "some", "the start")] == ["91.0%", "44.0%", "14.0%"]
    assert column(text, "the best", 4) == "1.0%" and column(text, "some", 6) == "0.60"


def test_the_command(sft_folder, tmp_path, capsys):
    """The same weights, and one that is half noise, from which they differ."""
    twin, worse = tmp_path / "twin", tmp_path / "worse"
    policy, tokenizer = models.load(sft_folder)
    models.save(policy, tokenizer, twin)
    for p in policy.parameters():
        p.data += 0.5 * p.data.std() * p.data.new_empty(p.shape).normal_()
    models.save(policy, tokenizer, worse)
    words = {"reference": sft_folder, "eval_prompts": 48, "device": "cpu"}
    evaluate.main(evaluate.Config(tournament=(str(twin), str(worse)), **words))
    text = capsys.readouterr().out
    assert "3 models, 48 prompts, each two answers to a prompt compared by the true reward" in text
    low, high = map(int, column(text, str(twin), 2).split(" to "))
    assert low <= 1000 <= high
    bad = [
        ({"tournament": (str(twin), str(twin))}, "--tournament: name each model once"),
        ({"tournament": (sft_folder,)}, "the reference takes part by itself"),
        ({"tournament": (str(twin),), "data": "x.jsonl"}, "--tournament: name a --reward"),
    ]
    for given, message in bad:
        with pytest.raises(flags.UserError, match=message):
            evaluate.main(evaluate.Config(**words | given))
