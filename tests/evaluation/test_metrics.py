"""The figures of a report against their definitions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopref.evaluation.metrics import calibration, rank_correlation, win_rate

rewards = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=60)


@given(rewards)
def test_win_rate_is_symmetric_counts_ties_half_and_lies_in_its_interval(pairs):
    policy, reference = zip(*pairs, strict=True)
    rate, (low, high) = win_rate(policy, reference)
    assert rate == pytest.approx(sum((p > r) + 0.5 * (p == r) for p, r in pairs) / len(pairs))
    other, (_, other_high) = win_rate(reference, policy)
    assert rate + other == pytest.approx(1) and low == pytest.approx(1 - other_high)
    assert 0 <= low <= rate + 1e-9 and rate <= high + 1e-9 and high <= 1 + 1e-9


def test_wilsons_interval_is_the_published_one():
    # Newcombe 1998, table I: 81 of 263 has the 95% Wilson interval 0.2553 to 0.3662
    rate, (low, high) = win_rate([1] * 81 + [0] * 182, [0] * 81 + [1] * 182)
    assert (rate, low, high) == pytest.approx((81 / 263, 0.2553, 0.3662), abs=5e-5)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        wins = rng.random(200) < 0.9
        _, (low, high) = win_rate(wins, ~wins)
        covered += low <= 0.9 <= high
    assert 0.93 < covered / 2000 < 0.97


def test_rank_correlation_by_hand():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 1000]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # ranks 1, 2½, 2½, 4 against 1, 2, 3, 4: 4.5 / √(4.5 · 5)
    assert rank_correlation([1, 5, 5, 7], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0


def test_calibration_by_hand():
    gap = np.array([0.0, math.log(3), -math.log(3), math.log(9)])
    sure = calibration(gap, bins=2)
    assert [row["pairs"] for row in sure] == [2, 2]
    assert sure[0]["says"] == pytest.approx((0.5 + 0.75) / 2) and sure[1]["says"] == pytest.approx((0.75 + 0.9) / 2)
    assert sorted(row["right"] for row in sure) == [0.5, 0.75]
