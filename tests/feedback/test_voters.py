"""People who differ: each votes with a noise of their own, and their votes tell who is reliable."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopref.data.votes import AGGREGATES, dawid_skene
from nanopref.feedback.voting import (
    bradley_terry_probability,
    noise_of,
    rank,
    rate,
    votes,
)

VOTES = st.tuples(st.integers(1, 5), st.integers(1, 8), st.integers(0, 2**32 - 1)).map(
    lambda x: np.random.default_rng(x[2]).random(x[:2]) < np.random.default_rng(x[2] + 1).random()
)


def people(gap, noise, n, seed=0):
    """Votes on n pairs that are all `gap` apart, of which a is better in 60%; and where it is."""
    rng = np.random.default_rng(seed)
    truth = rng.random(n) < 0.6
    return votes(np.where(truth, gap, -gap), np.zeros(n), noise=noise, rng=rng), truth


# ---- votes -----------------------------------------------------------------------------------------------------------


def test_each_votes_by_bradley_terry_with_a_noise_of_their_own():
    n, gaps, noise = 20_000, np.array([-0.4, 0.0, 0.3, 1.5]), [0.0, 0.2, 0.5, 2.0, 0.5]
    said = votes(np.repeat(gaps, n) + 1, np.ones(4 * n), noise=noise, rng=np.random.default_rng(0))
    assert said.shape == (5, 4 * n) and said.dtype == bool
    for row, s in zip(said.reshape(5, 4, n), noise, strict=True):
        p = bradley_terry_probability(gaps, 0 * gaps, noise=s)
        assert (np.abs(row.sum(1) - n * p) <= 5 * np.sqrt(n * p * (1 - p))).all()
    one, other = said[2], said[4]  # of the same noise, but each on their own
    level = np.repeat(gaps == 0, n)
    assert abs((one == other)[level].mean() - 0.5) < 5 * 0.5 / math.sqrt(n)


def test_votes_come_from_the_seed_and_bad_noise_is_refused():
    a, b = np.random.default_rng(0).normal(size=(2, 500))
    one, same, other = (votes(a, b, noise=[0.5, 1], rng=np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (one == same).all() and (one != other).any()
    with pytest.raises(ValueError, match="noise must be"):
        votes(a, b, noise=[0.5, -1], rng=np.random.default_rng(0))


# ---- rankings and ratings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 3), (40,)])
@pytest.mark.parametrize("judge", [rank, rate])
def test_one_noise_for_all_is_that_noise_for_each(judge, shape):
    rewards = np.random.default_rng(0).normal(size=shape)
    asked = {"annotators": 3}
    all_, each, other = (
        judge(rewards, noise=noise, rng=np.random.default_rng(1), **asked) for noise in (0.7, [0.7] * 3, [0.7, 0.7, 9])
    )
    assert (all_ == each).all() and (all_ != other).any()


def test_one_noise_for_all_draws_what_it_always_drew():
    """The same numbers from a seed as before people differed."""
    rewards = np.random.default_rng(0).normal(size=(30, 4))
    rng = np.random.default_rng(1)
    heard = rewards + 0.6 * rng.gumbel(size=(3, 30, 4))
    places = heard.argsort(-1).argsort(-1)
    expected = np.argsort(-(places.sum(0) + places[0] / 4), axis=-1, kind="stable")
    assert (rank(rewards, noise=0.6, annotators=3, rng=np.random.default_rng(1)) == expected).all()
    expected = rewards + np.random.default_rng(1).normal(scale=0.6, size=(3, 30, 4)).mean(0)
    assert (rate(rewards, noise=0.6, annotators=3, rng=np.random.default_rng(1)) == expected).all()


def test_each_rates_and_ranks_with_a_noise_of_their_own():
    rewards, n = np.tile([1.0, -2.0], (20_000, 1)), 20_000
    off = rate(rewards, noise=[0.0, 0.3, 3.0], annotators=3, rng=np.random.default_rng(0)) - rewards
    assert off.std(0) == pytest.approx([math.sqrt(0.3**2 + 3**2) / 3] * 2, rel=5 / math.sqrt(2 * n))
    # the second is always right, and the third guesses: wrong are they where the first and the third are
    found = rank(rewards / 3, noise=[1.0, 0.0, 1e9], annotators=3, rng=np.random.default_rng(0))
    p = bradley_terry_probability(1.0, 0.0, noise=1.0)
    p = p + (1 - p) / 2
    assert abs((found[:, 0] == 0).sum() - n * p) <= 5 * math.sqrt(n * p * (1 - p))


@pytest.mark.parametrize("judge", [rank, rate])
@pytest.mark.parametrize(
    "noise", [[1.0], [1.0] * 2, [[1.0] * 3], [1.0, 1.0, -1.0], [1.0, math.nan, 1.0], -1.0, math.inf]
)
def test_a_noise_that_is_none_or_not_one_for_each_is_refused(judge, noise):
    with pytest.raises(ValueError, match="noise must be"):
        judge(np.zeros((3, 3)), noise=noise, annotators=3, rng=np.random.default_rng(0))


# ---- Dawid and Skene -------------------------------------------------------------------------------------------------


def joint(said, share, accuracy):
    """P(votes on a pair, a is better) and P(…, b is), for each pair: products of the model's factors [N, 2]."""
    rows = []
    for pair in said.T:
        both = [share, 1 - share]
        for vote, (right_a, right_b) in zip(pair, accuracy, strict=True):
            both[0] *= right_a if vote else 1 - right_a
            both[1] *= 1 - right_b if vote else right_b
        rows.append(both)
    return np.array(rows)


def brute_force(said, steps):
    """EM as the paper states it, with each rate counted once more as held and once as not."""
    k, n = said.shape
    p = [sum(map(int, pair)) / k for pair in said.T]
    for _ in range(steps):
        better_a, better_b = sum(p), sum(1 - x for x in p)
        share = (better_a + 1) / (n + 2)
        accuracy = []
        for row in said:
            said_a = sum(x for x, vote in zip(p, row, strict=True) if vote)
            said_b = sum(1 - x for x, vote in zip(p, row, strict=True) if not vote)
            accuracy.append(((said_a + 1) / (better_a + 2), (said_b + 1) / (better_b + 2)))
        both = joint(said, share, accuracy)
        p = [float(a / (a + b)) for a, b in both]
    return np.array(p), np.array(accuracy)


@given(VOTES, st.integers(1, 12))
def test_em_is_that_of_the_paper(said, steps):
    p, accuracy = dawid_skene(said, steps=steps, tolerance=0)
    expected, rates = brute_force(said, steps)
    assert p == pytest.approx(expected, abs=1e-10) and accuracy == pytest.approx(rates, abs=1e-10)
    assert accuracy.shape == (len(said), 2) and ((accuracy > 0) & (accuracy < 1)).all()


@given(VOTES)
def test_the_posterior_never_falls(said):
    """What EM climbs: the marginal likelihood of the votes, times the prior that keeps the rates off 0 and 1."""
    climbed = []
    for steps in (1, 2, 3, 8, 30):
        _, accuracy = dawid_skene(said, steps=steps, tolerance=0)
        p = dawid_skene(said, steps=steps - 1, tolerance=0)[0] if steps > 1 else said.mean(0)
        share = (p.sum() + 1) / (said.shape[1] + 2)
        rates = np.array([share, *accuracy.ravel()])
        climbed.append(np.log(joint(said, share, accuracy).sum(1)).sum() + np.log(rates * (1 - rates)).sum())
    assert (np.diff(climbed) >= -1e-9).all()


def test_it_stops_where_it_no_longer_moves_and_at_the_cap():
    said, _ = people(1.0, [0.1, 0.5, 1.0, 2.0, 2.0, 3.0], 500)
    p, _ = dawid_skene(said)
    for more in ({"steps": 20_000}, {"tolerance": 1e-12}):
        assert dawid_skene(said, **more)[0] == pytest.approx(p, abs=1e-5)
    assert (dawid_skene(said, tolerance=0.5)[0] == dawid_skene(said, steps=1)[0]).all()
    assert np.abs(dawid_skene(said, steps=1)[0] - p).max() > 0.01


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("k", [1, 2, 1000])
def test_any_number_of_people_and_ties_are_fine(k):
    said, truth = people(1.0, np.full(k, 3.0), 300)
    p, accuracy = dawid_skene(said)
    assert np.isfinite(p).all() and ((accuracy > 0) & (accuracy < 1)).all()
    if k == 1000:
        assert ((p > 0.5) == truth).all()
    alike, _ = dawid_skene(np.array([[True, False] * 5, [False, True] * 5]))  # two who never agree: nothing is known
    assert alike == pytest.approx([0.5] * 10)
    for one in (True, False):
        same, accuracy = dawid_skene(np.full((k, 50), one))
        assert ((same > 0.5) == one).all() and ((accuracy > 0) & (accuracy < 1)).all()


@pytest.mark.parametrize("noise", [[0.5, 1, 2], [0.2, 0.5, 0.5, 1, 2], [0.3, 0.5, 0.5, 0.7, 1, 1, 2, 2, 5]], ids=len)
def test_how_reliable_people_are_comes_back(noise):
    """The mean of 8 estimates lies within 4 standard errors of the truth, which their spread tells, and 0.004 (what
    the prior moves); and the spread is not much above that of a count with the truth known, √(q (1-q) / n)."""
    found = np.array([dawid_skene(people(0.7, noise, 3000, seed)[0])[1] for seed in range(8)])
    q = 1 / (1 + np.exp(-0.7 / np.array(noise)))[:, None]
    error = found.std(0, ddof=1)
    assert (np.abs(found.mean(0) - q) <= 4 * error / math.sqrt(8) + 0.004).all()
    known = np.sqrt(q * (1 - q) / (3000 * np.array([0.6, 0.4])))
    assert (error <= (6 if len(noise) == 3 else 3) * known).all()


def test_the_noise_of_people_comes_back_where_pairs_are_equally_hard():
    noise, runs = [0.2, 0.5, 0.5, 2.0, 2.0], []
    for seed in range(4):
        said, _ = people(0.7, noise, 10_000, seed)
        runs.append([noise_of(rates.mean(), np.full(10, 0.7)) for rates in dawid_skene(said)[1]])
    assert np.mean(runs, axis=0) == pytest.approx(noise, rel=0.1)
    assert np.array(runs) == pytest.approx(np.array([noise] * 4), rel=0.25)


def test_where_some_pairs_are_hard_for_all_people_seem_better_than_they_are():
    """What the docstring warns of: errors on close pairs are shared, so the noise comes out too small, by up to 30%."""
    rng, noise = np.random.default_rng(0), np.array([0.2, 0.5, 0.5, 1, 2])
    gaps = rng.normal(size=20_000)
    found = [noise_of(x.mean(), gaps) for x in dawid_skene(votes(gaps, 0 * gaps, noise=noise, rng=rng))[1]]
    assert ((0.7 * noise < found) & (found < 0.97 * noise)).all()
    assert (np.diff(np.array(found)[[0, 1, 3, 4]]) > 0).all()  # but their order is right


def test_votes_are_needed():
    for nothing in (np.zeros((0, 3)), np.zeros((3, 0)), np.zeros(3)):
        for use in (dawid_skene, *AGGREGATES.values()):
            with pytest.raises(ValueError, match="votes must be"):
                use(nothing)


# ---- the noise of an accuracy ----------------------------------------------------------------------------------------


@given(st.floats(-2, 2), st.integers(0, 9))
def test_the_noise_is_the_one_with_which_one_is_so_often_right(power, seed):
    gaps, noise = np.random.default_rng(seed).normal(size=50), 10.0**power
    accuracy = bradley_terry_probability(np.abs(gaps), np.zeros(50), noise=noise).mean()
    assert noise_of(accuracy, gaps) == pytest.approx(noise, rel=1e-6)
    assert noise_of(accuracy, 3 * gaps) == pytest.approx(3 * noise, rel=1e-6)


def test_an_accuracy_that_no_noise_gives_has_the_end_of_the_range():
    assert noise_of(0.5, [1, -3]) == noise_of(0.2, [1, -3]) == pytest.approx(2e6, rel=1e-3)
    assert noise_of(1.0, [0, 4]) == noise_of(0.8, [0, 4]) == pytest.approx(2e-6, rel=1e-3)
    for bad in ((math.nan, [1.0]), (1.1, [1.0]), (-0.1, [1.0]), (0.7, [0.0]), (0.7, [math.inf]), (0.7, [math.nan])):
        with pytest.raises(ValueError, match="accuracy in"):
            noise_of(*bad)


# ---- pairs of votes --------------------------------------------------------------------------------------------------


def test_pairs_of_three_votes_on_two():
    said = np.array([[True, False], [False, False], [True, True]])
    assert [x.tolist() for x in AGGREGATES["majority"](said)] == [[0, 1], [True, False]]
    assert [x.tolist() for x in AGGREGATES["count"](said)] == [
        [0, 0, 0, 1, 1, 1],
        [True, False, True, False, False, True],
    ]
    assert [x.tolist() for x in AGGREGATES["dawid-skene"](said)] == [[0, 1], [True, False]]


@given(VOTES)
def test_every_vote_counts_once(said):
    rows, first = AGGREGATES["count"](said)
    k, n = said.shape
    assert len(rows) == len(first) == k * n
    for pair in range(n):
        assert sorted(first[rows == pair]) == sorted(said[:, pair])
    if k % 2:
        rows, first = AGGREGATES["majority"](said)
        assert rows.tolist() == list(range(n)) and first.tolist() == [sum(map(int, x)) > k / 2 for x in said.T]


def test_where_as_many_say_one_as_the_other_there_is_no_pair():
    said = np.array([[1, 1, np.nan, np.nan], [0, 1, 0, np.nan]])
    assert [x.tolist() for x in AGGREGATES["majority"](said)] == [[1, 2], [True, False]]
    assert [x.tolist() for x in AGGREGATES["count"](said)] == [[0, 0, 1, 1, 2], [True, False, True, True, False]]


def test_who_does_not_speak_of_all_pairs_is_judged_by_those_of_which_they_do():
    """Two fifths of the votes are missing: what people are is found all the same."""
    said, truth = people(1.0, [0.3, 0.6, 1, 2, 3], 6000)
    whole = dawid_skene(said)[1]
    said = np.where(np.random.default_rng(1).random(said.shape) < 0.4, np.nan, said)
    p, accuracy = dawid_skene(said)
    assert accuracy == pytest.approx(whole, abs=0.04)
    assert ((p > 0.5) == truth).mean() > ((np.nan_to_num(said, nan=0.5).mean(0) > 0.5) == truth).mean() + 0.02
    alone = np.array([[1, np.nan], [np.nan, 0]])
    assert dawid_skene(alone)[0] == pytest.approx(1 - dawid_skene(1 - alone)[0])


def test_who_is_reliable_is_worth_knowing():
    """One good person among four bad ones: the majority does not hear them, Dawid and Skene do."""
    said, truth = people(1.0, [0.2, 3, 3, 3, 3], 3000)
    right = {name: (AGGREGATES[name](said)[1] == truth).mean() for name in ("majority", "dawid-skene")}
    assert right["majority"] < 0.8 and right["dawid-skene"] > 0.97
