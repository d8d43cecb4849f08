import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopref.feedback import voting
from nanopref.feedback.voting import (
    annotate,
    best_accuracy,
    bradley_terry_probability,
    majority_probability,
    rank,
    rate,
)

REWARD = st.floats(allow_nan=False, allow_infinity=False)
N = 40_000


def within_five_sigma(count, p, n):
    return abs(count - n * p) <= 5 * math.sqrt(n * p * (1 - p)) + 1e-9


@given(st.floats(-30, 30), st.floats(-30, 30), st.floats(0.1, 10))
def test_the_probability_is_bradley_terry(a, b, noise):
    strength = np.exp([a / noise, b / noise])  # the form of the 1952 paper: π_a / (π_a + π_b)
    assert bradley_terry_probability([a], [b], noise=noise) == pytest.approx(strength[:1] / strength.sum(), abs=1e-12)


@pytest.mark.filterwarnings("error")
@given(REWARD, REWARD, st.floats(0, 1e300))
def test_either_is_preferred_and_nothing_overflows(a, b, noise):
    forth, back = bradley_terry_probability(a, b, noise=noise), bradley_terry_probability(b, a, noise=noise)
    assert 0 <= forth <= 1
    assert forth + back == pytest.approx(1, abs=1e-15)


@pytest.mark.filterwarnings("error")
def test_without_noise_the_better_one_always_wins():
    a, b = np.array([1.0, 0.0, 2.0, 1e308]), np.array([0.0, 1.0, 2.0, -1e308])
    assert bradley_terry_probability(a, b, noise=0).tolist() == [1, 0, 0.5, 1]
    assert bradley_terry_probability(a, b, noise=1e-12).tolist() == [1, 0, 0.5, 1]
    a, b = np.random.default_rng(0).normal(size=(2, 1000))
    assert (annotate(a, b, noise=0, rng=np.random.default_rng(1)) == (a > b)).all()


@pytest.mark.parametrize("annotators", [1, 3, 5])
@pytest.mark.parametrize("margin, noise", [(1.0, 1.0), (-0.7, 2.0), (0.0, 0.0), (0.3, 0.5)])
def test_the_labels_have_the_stated_frequency(margin, noise, annotators):
    labels = annotate(np.full(N, margin), np.zeros(N), noise=noise, annotators=annotators, rng=np.random.default_rng(0))
    assert labels.dtype == bool and labels.shape == (N,)
    p = majority_probability(bradley_terry_probability(margin, 0.0, noise=noise), annotators)
    assert within_five_sigma(labels.sum(), p, N)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("k", [1_201, 100_001])
def test_any_number_of_annotators(k):
    """The majority of so many against a normal distribution, and what each kind of feedback is made of."""
    p = np.array([0.0, 0.5 - 1 / k**0.5, 0.5, 0.5 + 0.5 / k**0.5, 0.9, 1.0])
    z = 2 * (p - 0.5) * k**0.5
    normal = [0.5 * (1 + math.erf(x / 2**0.5)) for x in z]
    assert majority_probability(p, k) == pytest.approx(normal, abs=1 / k**0.5)
    assert majority_probability(0.5, k) == pytest.approx(0.5, abs=1e-9)
    a, b = np.array([0.0, 0.1, 5.0]), np.array([1.0, 0.0, 5.0])
    assert best_accuracy(a, b, noise=1.0, annotators=k) == pytest.approx(5 / 6, abs=0.06)
    labels = annotate(a[:2], b[:2], noise=1.0, annotators=k, rng=np.random.default_rng(0))
    order = rank(np.stack([a[:2], b[:2]], 1), noise=0.3, annotators=k, rng=np.random.default_rng(0))
    assert labels.tolist() == [False, True] and order[:, 0].tolist() == [1, 0]
    assert rate(a, noise=1.0, annotators=k, rng=np.random.default_rng(0)) == pytest.approx(a, abs=5 / k**0.5)


def test_many_annotators_are_heard_some_at_a_time(monkeypatch):
    """By whom as many numbers are drawn as at once; and those with a noise of their own keep it."""
    rewards = np.random.default_rng(1).normal(size=(50, 4))
    for noise in (0.7, np.linspace(0, 2, 101)):
        found = []
        for size in (lambda annotators, rewards: [range(annotators)], voting._some):
            monkeypatch.setattr(voting, "_some", size)
            monkeypatch.setattr(voting, "AT_ONCE", 3000)
            people = {"noise": noise, "annotators": 101}
            found.append([f(rewards, **people, rng=np.random.default_rng(0)) for f in (rank, rate)])
            monkeypatch.undo()
        assert (found[0][0] == found[1][0]).all() and found[0][1] == pytest.approx(found[1][1])


@given(st.floats(0, 1), st.sampled_from([1, 3, 5, 7]))
def test_the_majority_against_every_way_to_vote(p, k):
    votes = itertools.product([0, 1], repeat=k)
    brute = sum(p ** sum(v) * (1 - p) ** (k - sum(v)) for v in votes if sum(v) > k / 2)
    assert majority_probability(p, k) == pytest.approx(brute, abs=1e-12)
    assert majority_probability(p, k) + majority_probability(1 - p, k) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("annotators", [1, 3, 9])
def test_the_best_accuracy_is_that_of_the_oracle(annotators):
    a, b = np.random.default_rng(0).normal(size=(2, N))
    labels = annotate(a, b, noise=0.8, annotators=annotators, rng=np.random.default_rng(1))
    best = best_accuracy(a, b, noise=0.8, annotators=annotators)
    assert within_five_sigma((labels == (a > b)).sum(), best, N)
    assert best_accuracy(a, b, noise=0, annotators=annotators) == 1
    assert best_accuracy(a, a, noise=0.8, annotators=annotators) == 0.5


def test_more_annotators_and_less_noise_make_better_labels():
    a, b = np.random.default_rng(0).normal(size=(2, 1000))
    by_annotators = [best_accuracy(a, b, noise=1.0, annotators=k) for k in (1, 3, 5, 21)]
    by_noise = [best_accuracy(a, b, noise=noise) for noise in (10, 3, 1, 0.1)]
    for accuracies in (by_annotators, by_noise):
        assert sorted(set(accuracies)) == accuracies


def test_the_same_seed_gives_the_same_labels():
    a, b = np.random.default_rng(0).normal(size=(2, 1000))
    one, same, other = (annotate(a, b, rng=np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (one == same).all() and (one != other).any()


@pytest.mark.parametrize(
    "bad, reason",
    [
        ({"noise": -1.0}, "noise must be"),
        ({"noise": math.nan}, "noise must be"),
        ({"noise": math.inf}, "noise must be"),
        ({"annotators": 0}, "odd and at least 1"),
        ({"annotators": -1}, "odd and at least 1"),
        ({"annotators": 2}, "odd and at least 1"),
        ({"reward_a": [math.nan, 0.0]}, "finite"),
        ({"reward_b": [math.inf, 0.0]}, "finite"),
        ({"reward_a": [0.0]}, "same shape"),
    ],
)
def test_bad_arguments_are_refused(bad, reason):
    arguments = {"reward_a": [0.0, 1.0], "reward_b": [1.0, 0.0], "noise": 1.0, "annotators": 1} | bad
    with pytest.raises(ValueError, match=reason):
        annotate(**arguments, rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match=reason):
        best_accuracy(**arguments)


# ---- rankings and ratings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [1.0, 0.5])
def test_three_answers_are_ranked_as_plackett_and_luce_have_it(noise):
    """The best is chosen of all, the next of the rest (Plackett 1975)."""
    rewards = np.array([0.3, -0.4, 0.8])
    found = rank(np.tile(rewards, (N, 1)), noise=noise, rng=np.random.default_rng(0))
    strength, seen = np.exp(rewards / noise), 0
    for order in itertools.permutations(range(3)):
        left, p = list(order), 1.0
        while left:
            p *= strength[left[0]] / strength[left].sum()
            left.pop(0)
        count = (found == order).all(1).sum()
        seen += count
        assert within_five_sigma(count, p, N), order
    assert seen == N


@pytest.mark.parametrize("annotators", [1, 3, 5])
@pytest.mark.parametrize("margin, noise", [(1.0, 1.0), (-0.7, 2.0), (0.3, 0.5)])
def test_two_answers_are_ranked_as_often_as_the_majority_prefers_them(margin, noise, annotators):
    rewards = np.tile([margin, 0.0], (N, 1))
    found = rank(rewards, noise=noise, annotators=annotators, rng=np.random.default_rng(0))
    p = majority_probability(bradley_terry_probability(margin, 0.0, noise=noise), annotators)
    assert within_five_sigma((found[:, 0] == 0).sum(), p, N) and (found.sum(1) == 1).all()


def test_the_mean_place_decides_and_between_equals_the_first_annotator():
    class Given:
        """In place of Gumbel noise: what each annotator hears."""

        def gumbel(self, size):
            assert size == (3, 2, 3)
            return np.array([[[3, 2, 1], [1, 3, 2]], [[3, 1, 2], [2, 1, 3]], [[1, 3, 2], [3, 2, 1]]], dtype=float)

    # places, the worst 0: 2 1 0, 2 0 1, 0 2 1, together 4 3 2; and 0 2 1, 1 0 2, 2 1 0, together 3 3 3
    assert rank(np.zeros((2, 3)), noise=1.0, annotators=3, rng=Given()).tolist() == [[0, 1, 2], [1, 2, 0]]
    # noise is in units of reward: halved, it leaves the third answer ahead
    found = rank([[0, 0, 1.5], [0, 0, 9]], noise=0.5, annotators=3, rng=Given())
    assert found.tolist() == [[2, 0, 1], [2, 0, 1]]


@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 3]), st.integers(0, 99))
def test_without_noise_a_ranking_sorts_and_a_rating_is_the_reward(G, K, annotators, seed):
    rewards = np.random.default_rng(seed).normal(size=(G, K))
    people = {"noise": 0.0, "annotators": annotators, "rng": np.random.default_rng(1)}
    assert (rank(rewards, **people) == np.argsort(-rewards, axis=1)).all()
    assert (rate(rewards, **people) == rewards).all()


@pytest.mark.parametrize("annotators", [1, 3, 9])
def test_ratings_are_off_by_the_noise_over_the_root_of_the_annotators(annotators):
    rewards = np.tile([1.0, -2.0], (N, 1))
    off = rate(rewards, noise=0.6, annotators=annotators, rng=np.random.default_rng(0)) - rewards
    expected = 0.6 / math.sqrt(annotators)
    assert off.std(0) == pytest.approx([expected] * 2, rel=5 / math.sqrt(2 * N))
    assert abs(off.mean(0)).max() < 5 * expected / math.sqrt(N)
    assert abs(np.corrcoef(off.T)[0, 1]) < 5 / math.sqrt(N)  # each answer by itself


@pytest.mark.parametrize("judge", [rank, rate])
def test_rankings_and_ratings_come_from_the_seed_and_from_an_odd_number(judge):
    rewards = np.random.default_rng(0).normal(size=(50, 4))
    one, same, other = (judge(rewards, annotators=3, rng=np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one.shape == (50, 4) and (one == same).all() and (one != other).any()
    for annotators in (0, 2):
        with pytest.raises(ValueError, match="odd and at least 1"):
            judge(rewards, annotators=annotators, rng=np.random.default_rng(0))
