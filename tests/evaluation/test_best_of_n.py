import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopref.evaluation.best_of_n import best_of, kl, kl_bound, subset_weights

# scores with ties, among few values
POOL = st.lists(st.integers(-2, 2).map(float) | st.sampled_from([-math.inf, math.inf]), min_size=1, max_size=7)


def best_of_subsets(scores, values, n):
    """Every subset of n; of the answers with its highest score, the mean value."""
    found = []
    for subset in itertools.combinations(range(len(scores)), n):
        best = max(scores[i] for i in subset)
        found.append(np.mean([values[i] for i in subset if scores[i] == best]))
    return np.mean(found)


def best_of_draws(scores, n):
    """P(answer) of best-of-n with replacement, by all N^n draws, chance between the equal."""
    p = np.zeros(len(scores))
    for draw in itertools.product(range(len(scores)), repeat=n):
        best = [i for i in draw if scores[i] == max(scores[j] for j in draw)]
        for i in best:
            p[i] += 1 / len(best) / len(scores) ** n
    return p


@given(st.integers(1, 40).flatmap(lambda N: st.tuples(st.just(N), st.integers(1, N))))
def test_the_weights_are_the_binomials(case):
    N, n = case
    exact = [float(Fraction(math.comb(i - 1, n - 1), math.comb(N, n))) for i in range(1, N + 1)]
    assert subset_weights(N, n) == pytest.approx(exact, rel=1e-12)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n", [1, 2, 100, 5000, 9999, 10_000])
def test_the_weights_of_ten_thousand_answers_are_right(n):
    weights = subset_weights(10_000, n)
    assert len(weights) == 10_000 and weights.sum() == pytest.approx(1, abs=1e-12)
    for i in (10_000, 9_999, 9_000, 6_000):
        exact = float(Fraction(math.comb(i - 1, n - 1), math.comb(10_000, n)))
        assert weights[i - 1] == pytest.approx(exact, rel=1e-9, abs=1e-300)


@given(POOL, st.integers(1, 7), st.integers(0, 99))
def test_the_mean_over_all_subsets(scores, n, seed):
    n = min(n, len(scores))
    values = np.random.default_rng(seed).normal(size=len(scores))
    assert best_of([scores], [values], n) == pytest.approx([best_of_subsets(scores, values, n)], abs=1e-12)


def test_each_prompt_has_its_own_and_one_answer_is_the_mean_and_all_the_best():
    scores, values = np.random.default_rng(0).normal(size=(2, 5, 8))
    assert best_of(scores, values, 1) == pytest.approx(values.mean(1))
    assert best_of(scores, values, 8) == pytest.approx(values[range(5), scores.argmax(1)])
    assert best_of(scores, scores, 8) == pytest.approx(scores.max(1))
    alone = [best_of([s], [v], 3) for s, v in zip(scores, values, strict=True)]
    assert best_of(scores, values, 3) == pytest.approx(np.concatenate(alone))
    assert best_of(scores[:0], values[:0], 3).shape == kl(scores[:0], 3).shape == (0,)


def test_it_is_unbiased():
    """Pools of 6 from a policy with four answers, two of them with the same score, against the exact best-of-3."""
    q, score, value = np.array([0.1, 0.4, 0.3, 0.2]), np.array([2.0, 0.0, 1.0, 1.0]), np.array([-1.0, 0.5, 3.0, 1.0])
    exact = 0.0
    for draw in itertools.product(range(4), repeat=3):
        best = [i for i in draw if score[i] == score[list(draw)].max()]
        exact += q[list(draw)].prod() * value[best].mean()
    pools = np.random.default_rng(0).choice(4, p=q, size=(10_000, 6))
    found = best_of(score[pools], value[pools], 3)
    assert abs(found.mean() - exact) < 4 * found.std() / math.sqrt(len(found))
    assert found.std() < 0.8 * best_of(score[pools[:, :3]], value[pools[:, :3]], 3).std()  # six tell more than three


@given(st.lists(st.integers(-2, 2).map(float), min_size=1, max_size=5), st.integers(1, 4))
def test_the_kl_is_that_of_all_draws(scores, n):
    """Answers of one score are equally likely before and after, so that their scores tell all of the KL."""
    p = best_of_draws(scores, n)
    expected = sum(x * math.log(x * len(scores)) for x in p if x)
    assert kl([scores], n) == pytest.approx([expected], abs=1e-12)


@given(POOL, st.integers(1, 10_000))
def test_no_kl_is_above_the_bound_or_what_the_pool_allows(scores, n):
    [found] = kl([scores], n)
    assert -1e-12 <= found <= min(kl_bound(n), math.log(len(scores))) + 1e-12
    if len(set(scores)) == 1:
        assert found == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("n", [2, 4, 16, 64])
def test_without_ties_it_comes_to_the_bound_from_below(n):
    rng = np.random.default_rng(0)
    few, many, most = (kl(rng.normal(size=(1, N)), n)[0] for N in (10 * n, 100 * n, 10_000 * n))
    assert few < many < most <= kl_bound(n) + 1e-12
    assert most == pytest.approx(kl_bound(n), abs=2e-4) and many == pytest.approx(kl_bound(n), abs=0.02)


def test_the_bound_is_the_one_of_the_papers():
    assert kl_bound(1) == 0 and kl_bound(2) == pytest.approx(math.log(2) - 0.5)
    u = (np.arange(200_000) + 0.5) / 200_000  # ∫ n u^(n-1) log(n u^(n-1)) du, of the largest of n uniform numbers
    for n in (3, 7):
        density = n * u ** (n - 1)
        assert kl_bound(n) == pytest.approx(np.mean(density * np.log(density)), abs=1e-6)


def test_the_best_of_a_bandit_has_the_stated_distribution():
    """Five answers of known probability: F(v)^n - F(v-)^n, shared by probability between the equal; drawn and kept."""
    q, score, n = np.array([0.1, 0.3, 0.2, 0.25, 0.15]), np.array([3.0, 1.0, 2.0, 0.0, 2.0]), 4
    lower, upper = ([q[test(score, v)].sum() for v in score] for test in (np.less, np.less_equal))
    exact = (np.power(upper, n) - np.power(lower, n)) * q / [q[score == v].sum() for v in score]
    draws = np.random.default_rng(0).choice(5, p=q, size=(100_000, n))
    kept = draws[np.arange(len(draws)), score[draws].argmax(1)]
    share = np.bincount(kept, minlength=5) / len(draws)
    assert (np.abs(share - exact) < 5 * np.sqrt(exact * (1 - exact) / len(draws))).all()
    # as a pool of 100 it has the KL of that distribution; and in pools that it draws, its mean values are unbiased
    pool = score[np.repeat(np.arange(5), (100 * q).round().astype(int))]
    assert kl([pool], n) == pytest.approx([np.sum(exact * np.log(exact / q))], abs=1e-12)
    pools = np.random.default_rng(1).choice(5, p=q, size=(4_000, 8))
    for answer in range(5):
        found = best_of(score[pools], pools == answer, n)
        assert abs(found.mean() - exact[answer]) < 5 * found.std() / math.sqrt(len(found))


def test_bad_pools_are_refused():
    pool = np.zeros((2, 4))
    for n in (0, 5, -1):
        with pytest.raises(ValueError, match="between 1 and the 4"):
            best_of(pool, pool, n)
    with pytest.raises(ValueError, match="at least 1"):
        kl(pool, 0)
    with pytest.raises(ValueError, match="same shape"):
        best_of(pool, pool[:, :1], 2)
    for bad in (pool[0], np.zeros((2, 0)), pool * math.nan):
        for use in (lambda scores: best_of(scores, scores, 1), lambda scores: kl(scores, 1)):
            with pytest.raises(ValueError, match="scores must be"):
                use(bad)
