"""Against the likelihoods written plainly in PyTorch, which differentiates them, and against choix."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopref.feedback import bradley_terry
from nanopref.feedback.bradley_terry import davidson, maximum_likelihood, plackett_luce, rank_centrality

# ---- the likelihoods, outcome by outcome -----------------------------------------------------------------------------


def log_ties(x, winners, losers, tied, n):
    """Davidson's, of the n rewards and log ν behind them; without ties of the rewards alone."""
    total, nu = 0.0, x[n].exp() if len(x) > n else 0.0
    for i, j in zip(winners, losers, strict=True):
        pi, pj = x[i].exp(), x[j].exp()
        total = total + (pi / (pi + pj + nu * (pi * pj).sqrt())).log()
    for i, j in tied:
        pi, pj = x[i].exp(), x[j].exp()
        total = total + (nu * (pi * pj).sqrt() / (pi + pj + nu * (pi * pj).sqrt())).log()
    return total


def log_rankings(x, rankings):
    total = 0.0
    for ranking in (torch.tensor(np.array(ranking, ndmin=2)) for ranking in rankings):  # or many of one length
        for k in range(ranking.shape[1]):
            total = total + (x[ranking[:, k]] - torch.logsumexp(x[ranking[:, k:]], 1)).sum()
    return total


def derivatives(likelihood, x, n, regulariser):
    """The gradient of a penalised log-likelihood at x, and the standard errors of the n rewards on Σ r = 0."""
    x = torch.tensor(x)

    def penalised(x):
        return likelihood(x) - regulariser / 2 * x[:n].square().sum()

    free = torch.zeros(len(x), len(x) - 1, dtype=torch.float64)  # the directions in which x may move
    free[:n, : n - 1] = torch.linalg.qr(torch.cat([torch.ones(n, 1), torch.eye(n)[:, 1:]], 1).double())[0][:, 1:]
    free[n:, n - 1 :] = 1
    information = -torch.autograd.functional.hessian(penalised, x)
    covariance = free @ torch.linalg.inv(free.T @ information @ free) @ free.T
    return torch.autograd.functional.jacobian(penalised, x).numpy(), covariance.diagonal()[:n].sqrt().numpy()


@st.composite
def comparisons(draw, ties: bool = False):
    """winners, losers, n and what tied, with a ring of wins through all."""
    n = draw(st.integers(2, 6))
    two = st.permutations(range(n)).map(lambda order: order[:2])
    ring = draw(st.permutations(range(n)))
    won = [*itertools.pairwise([*ring, ring[0]]), *draw(st.lists(two, max_size=20))]
    winners, losers = np.array(draw(st.permutations(won))).T
    return winners, losers, n, np.array(draw(st.lists(two, min_size=1, max_size=8))) if ties else np.zeros((0, 2), int)


PRIOR = st.sampled_from([0.0, 0.3])


@settings(max_examples=30)
@given(comparisons(), PRIOR)
def test_the_gradient_is_zero_and_the_errors_are_the_inverse_information(data, regulariser):
    winners, losers, n, tied = data
    rewards, errors = maximum_likelihood(winners, losers, n, regulariser=regulariser)
    gradient, expected = derivatives(lambda x: log_ties(x, winners, losers, tied, n), rewards, n, regulariser)
    assert np.abs(gradient).max() < 1e-11 and abs(rewards.sum()) < 1e-12
    assert errors == pytest.approx(expected, rel=1e-9)
    alone, nothing = maximum_likelihood(winners, losers, n, regulariser=regulariser, errors=False)
    assert nothing is None and (alone == rewards).all()


@settings(max_examples=40)
@given(comparisons(ties=True), PRIOR)
def test_ties_are_estimated_beside_the_rewards(data, regulariser):
    winners, losers, n, tied = data
    rewards, errors, nu = davidson(winners, losers, tied, n, regulariser=regulariser)
    x = np.append(rewards, math.log(nu))
    gradient, expected = derivatives(lambda x: log_ties(x, winners, losers, tied, n), x, n, regulariser)
    assert np.abs(gradient).max() < 1e-11 and abs(rewards.sum()) < 1e-12
    assert errors == pytest.approx(expected, rel=1e-9)
    turned = davidson(winners, losers, tied[:, ::-1], n, regulariser=regulariser)
    assert turned[0] == pytest.approx(rewards, abs=1e-12) and turned[2] == pytest.approx(nu)


@settings(max_examples=30)
@given(st.integers(3, 6), st.integers(0, 999), PRIOR)
def test_rankings_of_any_length(n, seed, regulariser):
    rng = np.random.default_rng(seed)
    order = rng.permutation(n)
    rankings = [order, order[::-1], *(rng.permutation(n)[: rng.integers(1, n + 1)].tolist() for _ in range(8))]
    rewards, errors = plackett_luce(rankings, n, regulariser=regulariser)
    gradient, expected = derivatives(lambda x: log_rankings(x, rankings), rewards, n, regulariser)
    assert np.abs(gradient).max() < 1e-11 and abs(rewards.sum()) < 1e-12
    assert errors == pytest.approx(expected, rel=1e-9)


@settings(max_examples=30)
@given(comparisons(), PRIOR)
def test_rankings_of_two_are_comparisons(data, regulariser):
    winners, losers, n, _ = data
    expected = maximum_likelihood(winners, losers, n, regulariser=regulariser)
    found = plackett_luce(np.stack([winners, losers], 1), n, regulariser=regulariser)
    assert found[0] == pytest.approx(expected[0], abs=1e-11) and found[1] == pytest.approx(expected[1], rel=1e-9)


def test_two_alternatives_have_a_closed_form():
    rewards, errors = maximum_likelihood([0] * 12 + [1] * 3, [1] * 12 + [0] * 3, 2)
    assert rewards == pytest.approx([math.log(4) / 2, -math.log(4) / 2], rel=1e-12)
    assert errors == pytest.approx([math.sqrt(1 / 12 + 1 / 3) / 2] * 2, rel=1e-12)
    with_ties, _, nu = davidson([0] * 12 + [1] * 3, [1] * 12 + [0] * 3, [[0, 1]] * 5, 2)
    assert with_ties == pytest.approx(rewards, rel=1e-12) and nu == pytest.approx(5 / math.sqrt(12 * 3), rel=1e-12)
    million = 10**6
    rewards, _ = maximum_likelihood([0] * million + [1], [1] * million + [0], 2)
    assert rewards == pytest.approx([math.log(million) / 2, -math.log(million) / 2], rel=1e-9)


def test_without_a_tie_it_is_bradley_terry():
    winners, losers = simulated(np.linspace(-1, 1, 5), 200, np.random.default_rng(0))
    rewards, errors, nu = davidson(winners, losers, [], 5)
    expected = maximum_likelihood(winners, losers, 5)
    assert nu == 0 and (rewards == expected[0]).all() and (errors == expected[1]).all()


def simulated(rewards, m, rng):
    """Winners [m] and losers [m] of random pairs."""
    n = len(rewards)
    i = rng.integers(n, size=m)
    j = (i + rng.integers(1, n, size=m)) % n
    first = rng.random(m) < 1 / (1 + np.exp(rewards[j] - rewards[i]))
    return np.where(first, i, j), np.where(first, j, i)


# ---- the same numbers as choix ---------------------------------------------------------------------------------------


def test_the_estimates_are_those_of_choix():
    choix = pytest.importorskip("choix", reason="choix is the reference: pip install 'nanopref[test]'")
    random.seed(0)
    np.random.seed(0)  # choix draws from both
    truth = choix.generate_params(12, 2.0)
    pairs = choix.generate_pairwise(truth, 500)
    winners, losers = np.array(pairs).T
    rewards, _ = maximum_likelihood(winners, losers, 12)
    assert rewards == pytest.approx(choix.ilsr_pairwise(12, pairs), abs=1e-6)
    assert rewards == pytest.approx(choix.opt_pairwise(12, pairs, alpha=0, tol=1e-9), abs=1e-6)
    rewards, _ = maximum_likelihood(winners, losers, 12, regulariser=0.4)
    assert rewards == pytest.approx(choix.opt_pairwise(12, pairs, alpha=0.2, tol=1e-9), abs=1e-6)
    assert rank_centrality(winners, losers, 12) == pytest.approx(choix.rank_centrality(12, pairs), abs=1e-9)
    rankings = [*choix.generate_rankings(truth, 100, 4), *choix.generate_rankings(truth, 100, 3)]
    assert plackett_luce(rankings, 12)[0] == pytest.approx(choix.mm_rankings(12, rankings), abs=1e-6)
    rewards, _ = plackett_luce(rankings, 12, regulariser=0.4)
    assert rewards == pytest.approx(choix.opt_rankings(12, rankings, alpha=0.2, tol=1e-9), abs=1e-6)


# ---- error bars ------------------------------------------------------------------------------------------------------


def comparison_errors(truth, rng):
    return maximum_likelihood(*simulated(truth, 300, rng), len(truth))


def tie_errors(truth, rng):
    """Softmax of d/2, -d/2 and log ν, which by Gumbel noise is the largest."""
    i, j = (np.array(list(itertools.combinations(range(len(truth)), 2)) * 20)).T
    half = (truth[i] - truth[j]) / 2
    said = (np.stack([half, -half, np.full(len(i), math.log(0.7))]) + rng.gumbel(size=(3, len(i)))).argmax(0)
    winners, losers = np.where(said == 0, i, j), np.where(said == 0, j, i)
    return davidson(winners[said < 2], losers[said < 2], np.stack([i, j], 1)[said == 2], len(truth))[:2]


def ranking_errors(truth, rng):
    rankings = [rng.permutation(len(truth))[: rng.integers(2, 5)] for _ in range(80)]
    return plackett_luce([r[np.argsort(-truth[r] - rng.gumbel(size=len(r)))] for r in rankings], len(truth))


@pytest.mark.parametrize("fitted", [comparison_errors, tie_errors, ranking_errors])
def test_two_standard_errors_hold_the_truth_in_95_percent(fitted):
    """One alternative of each data set, so that they are independent: within 4 σ of the binomial."""
    truth, rng, held, data_sets = np.linspace(-1, 1, 5), np.random.default_rng(0), 0, 500
    for k in range(data_sets):
        rewards, errors = fitted(truth, rng)
        held += abs(rewards - truth)[k % 5] <= 1.96 * errors[k % 5]
    assert abs(held / data_sets - 0.95) < 4 * math.sqrt(0.95 * 0.05 / data_sets)


def test_the_errors_of_many_are_those_of_the_dense_inverse():
    truth = np.random.default_rng(0).normal(size=600)
    winners, losers = simulated(truth, 40_000, np.random.default_rng(1))
    rewards, errors = maximum_likelihood(winners, losers, 600)
    p = 1 / (1 + np.exp(rewards[losers] - rewards[winners]))
    information = np.zeros((600, 600))
    np.add.at(information, (winners, losers), -p * (1 - p))
    information += information.T
    np.fill_diagonal(information, -information.sum(1))
    assert errors == pytest.approx(np.sqrt(np.diag(np.linalg.pinv(information, hermitian=True))), rel=1e-9)


# ---- what does not change --------------------------------------------------------------------------------------------

FITS = {
    "maximum likelihood": lambda pairs, ties: maximum_likelihood(*pairs.T, 8),
    "with ties": lambda pairs, ties: davidson(*pairs[ties:].T, pairs[:ties], 8)[:2],
    "rankings": lambda pairs, ties: plackett_luce(pairs, 8),
    "rank centrality": lambda pairs, ties: (rank_centrality(*pairs.T, 8), np.zeros(8)),
}


@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
def test_names_and_order_mean_nothing_and_twice_the_data_halves_the_variance(fit):
    rng = np.random.default_rng(0)
    pairs = np.stack(simulated(np.linspace(-1, 1, 8), 300, rng), 1)  # the first nine may be ties
    rewards, errors = fit(pairs, 9)
    name, order = rng.permutation(8), np.r_[rng.permutation(9), 9 + rng.permutation(291)]
    renamed, its_errors = fit(name[pairs][order], 9)
    assert renamed[name] == pytest.approx(rewards, abs=1e-10) and its_errors[name] == pytest.approx(errors)
    again, its_errors = fit(np.repeat(pairs, 2, axis=0), 18)
    assert again == pytest.approx(rewards, abs=1e-10) and 2 * its_errors**2 == pytest.approx(errors**2)


# ---- the algorithms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regulariser", [0.0, 0.01, 5.0])
def test_each_sweep_makes_the_rankings_likelier_and_they_end_at_the_maximum(regulariser):
    rng = np.random.default_rng(0)
    groups = [np.stack([rng.permutation(6)[:K] for _ in range(20)]) for K in (2, 5)]
    rewards, values = 5 * rng.normal(size=6), []
    for _ in range(100):
        values.append(float(log_rankings(torch.tensor(rewards), groups)) - regulariser / 2 * (rewards**2).sum())
        rewards = bradley_terry.minorise_maximise(groups, rewards, regulariser)
    rises = np.diff(values)
    assert (rises > -1e-10).all() and (rises[:5] > 1e-4).all()
    best, _ = plackett_luce([*groups[0], *groups[1]], 6, regulariser=regulariser)
    assert rewards == pytest.approx(best, abs=1e-8)


@pytest.mark.parametrize("regulariser", [0.0, 0.001, 5.0])
def test_a_sweep_is_the_maximum_of_the_minoriser(regulariser):
    """Where e^δ expected + λ (r + δ) = wins, found by bisection."""
    rng = np.random.default_rng(1)
    groups = [np.stack([rng.permutation(6)[:4] for _ in range(20)])]
    rewards = 3 * rng.normal(size=6)
    x = torch.tensor(rewards, requires_grad=True)
    (gradient,) = torch.autograd.grad(log_rankings(x, groups), x)
    wins = np.bincount(groups[0][:, :-1].ravel(), minlength=6)
    expected, low, high = wins - gradient.numpy(), np.full(6, -30.0), np.full(6, 30.0)
    for _ in range(80):
        middle = (low + high) / 2
        above = expected * np.exp(middle) + regulariser * (rewards + middle) > wins
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    found = bradley_terry.minorise_maximise(groups, rewards, regulariser)
    assert found == pytest.approx(rewards + low - (rewards + low).mean(), abs=1e-9)


def test_the_random_walk_of_the_paper_is_at_rest():
    """P_ij = the share that j wins of i, over the largest number of opponents; the rest is to stay."""
    winners, losers = simulated(np.linspace(-1, 1, 7), 120, np.random.default_rng(3))
    won = np.zeros((7, 7))
    np.add.at(won, (winners, losers), 1)
    met = won + won.T
    step = np.divide(won.T, met, out=np.zeros((7, 7)), where=met > 0) / (met > 0).sum(1).max()
    step += np.diag(1 - step.sum(1))
    rewards = rank_centrality(winners, losers, 7)
    place = np.exp(rewards)
    assert place @ step == pytest.approx(place, rel=1e-12) and abs(rewards.sum()) < 1e-12


def test_rewards_that_lie_far_apart():
    """Each beats the next 99 times of 100: by detailed balance log 99 between them, which exp(r) could not hold."""
    n, rng = 400, np.random.default_rng(0)
    better, worse = np.arange(n - 1), np.arange(1, n)
    name = rng.permutation(n)
    winners, losers = name[np.r_[np.repeat(better, 99), worse]], name[np.r_[np.repeat(worse, 99), better]]
    # of a chain of 400 Newton's system has a condition of 400², which leaves ten of sixteen digits
    expected = pytest.approx(math.log(99) * (n / 2 - 0.5 - np.arange(n)), rel=2e-10, abs=1e-9)
    assert maximum_likelihood(winners, losers, n)[0][name] == expected
    assert rank_centrality(winners, losers, n)[name] == expected
    assert plackett_luce(np.stack([winners, losers], 1), n)[0][name] == expected


def test_steps_that_would_go_too_far_are_cut():
    """With so many ties Newton's method alone goes to and fro for ever."""
    rewards, _, nu = davidson([2, 1], [0, 0], [[2, 0]] * 1000, 3, regulariser=0.01)
    x = np.append(rewards, math.log(nu))
    gradient, _ = derivatives(
        lambda x: log_ties(x, [2, 1], [0, 0], [], 3) + 1000 * log_ties(x, [], [], [[2, 0]], 3), x, 3, 0.01
    )
    assert np.abs(gradient).max() < 1e-9


def test_a_ring_of_thousands_is_no_recursion():
    ring = np.random.default_rng(0).permutation(5000)
    rewards, _ = maximum_likelihood(ring, np.roll(ring, 1), 5000, errors=False)
    assert np.abs(rewards).max() == 0


# ---- what has no answer ----------------------------------------------------------------------------------------------


def connected(edges, n):
    """Whether each is reached from each, by squaring the matrix of who is reached."""
    reached = np.eye(n, dtype=bool)
    for a, b in edges:
        reached[a, b] = True
    for _ in range(n):
        reached = reached @ reached
    return reached.all()


@settings(max_examples=50)
@given(st.integers(2, 5).flatmap(lambda n: st.lists(st.permutations(range(n)), min_size=1, max_size=12)))
def test_what_is_not_strongly_connected_is_refused_without_a_prior(orders):
    n, rankings = len(orders[0]), [order[:2] for order in orders]
    winners, losers = np.array(rankings).T
    fits = [
        lambda prior: maximum_likelihood(winners, losers, n, regulariser=prior),
        lambda prior: plackett_luce(rankings, n, regulariser=prior),
    ]
    for fit in fits:
        if connected(zip(losers, winners, strict=True), n):
            fit(0.0)
        else:
            with pytest.raises(ValueError, match=r"no finite rewards are the best: .* a regulariser above 0"):
                fit(0.0)
            rewards, errors = fit(0.1)
            gradient, expected = derivatives(lambda x: log_rankings(x, rankings), rewards, n, 0.1)
            assert np.abs(gradient).max() < 1e-11 and errors == pytest.approx(expected)


@settings(max_examples=300)
@given(st.integers(2, 4).flatmap(lambda n: st.lists(st.permutations(range(n)), min_size=2, max_size=6)), st.data())
def test_ties_need_a_circle_with_more_wins(orders, data):
    """ν has a finite maximum unless whole heights exist, by 1 apart where one won and within 1 where they tied."""
    n, pairs = len(orders[0]), np.array([order[:2] for order in orders])
    k = data.draw(st.integers(1, len(pairs) - 1))
    tied, (winners, losers) = pairs[:k], pairs[k:].T
    edges = [*zip(losers, winners, strict=True), *tied, *tied[:, ::-1]]
    endless = any(
        (h[winners] - h[losers] >= 1).all() and (abs(h[tied[:, 0]] - h[tied[:, 1]]) <= 1).all()
        for h in map(np.array, itertools.product(range(n), repeat=n))
    )
    if endless or not connected(edges, n):
        with pytest.raises(ValueError, match=r"no finite (rewards are|ν is) the best"):
            davidson(winners, losers, tied, n)
    rewards, _, nu = davidson(winners, losers, tied, n, regulariser=0.2 * (endless or not connected(edges, n)))
    assert np.isfinite(rewards).all() and 0 < nu < math.inf


MANY = range(1, 21)
REFUSED = {
    "0 never lost to the rest; 2 never won against the rest;": ([0, 1], [1, 2]),
    "2 never won against the rest; 0, 1 never lost to the rest;": ([0, 1, 0], [1, 0, 2]),
    "2 never met the rest; 0, 1 never met the rest;": ([0, 1], [1, 0]),  # 0 and 1 are one part, as each beat the other
    r"0 never lost to the rest; 1, 2, 3, 4, 5 … \(20 in all\) never won against the rest;": (
        [0, *MANY, 20],
        [1, *MANY[1:], 1, 19],
    ),
    "0 never won .*; 1 never lost .*; 2 never won .*; 3 never lost .*; … of 20 parts;": (MANY[::2], range(0, 20, 2)),
}


@pytest.mark.parametrize("parts", REFUSED)
def test_a_refusal_says_who_stands_apart(parts):
    winners, losers = REFUSED[parts]
    n = max(3, *winners, *losers) + 1 if len(winners) > 3 else 3
    with pytest.raises(ValueError, match=parts):
        maximum_likelihood(winners, losers, n)
    with pytest.raises(ValueError, match=parts):
        plackett_luce(np.stack([winners, losers], 1), n)
    with pytest.raises(ValueError, match=parts.removesuffix(";") + "$"):
        rank_centrality(winners, losers, n)


def test_only_ties_are_refused_with_a_prior_too():
    for regulariser in (0.0, 1.0):
        with pytest.raises(ValueError, match="all 2 comparisons are ties"):
            davidson([], [], [[0, 1], [1, 0]], 2, regulariser=regulariser)


@pytest.mark.parametrize(
    "winners, losers, n, more, reason",
    [
        ([0, 2], [1, 0], 2, {}, "whole numbers from 0 to 1: 0, 2"),
        ([0, 1], [-1, 0], 2, {}, "whole numbers from 0 to 1: -1, 0"),
        ([0.5, 1], [1, 0], 2, {}, "whole numbers"),
        ([True, False], [False, True], 2, {}, "whole numbers"),
        ([0, 1], [0, 0], 2, {}, "compared with itself: 0"),
        ([0, 1, 0], [1, 0], 2, {}, r"not \(3,\) and \(2,\)"),
        ([[0, 1]], [[1, 0]], 2, {}, "a winner and a loser"),
        ([], [], 1, {}, "at least two alternatives"),
        ([], [], 2, {}, "nothing was compared"),
        ([], [], 2, {"regulariser": 1.0}, "nothing was compared"),
        ([0, 1], [1, 0], 2, {"regulariser": -1.0}, "regulariser must be"),
        ([0, 1], [1, 0], 2, {"regulariser": math.nan}, "regulariser must be"),
        ([0, 1], [1, 0], 2, {"regulariser": math.inf}, "regulariser must be"),
    ],
)
def test_bad_comparisons_are_refused(winners, losers, n, more, reason):
    with pytest.raises(ValueError, match=reason):
        maximum_likelihood(winners, losers, n, **more)
    with pytest.raises(ValueError, match=reason):
        davidson(winners, losers, [], n, **more)
    if not more:
        with pytest.raises(ValueError, match=reason):
            rank_centrality(winners, losers, n)


@pytest.mark.parametrize(
    "rankings, n, more, reason",
    [
        ([[0, 3]], 3, {}, "whole numbers from 0 to 2"),
        ([[0, 1.5]], 3, {}, "whole numbers"),
        ([[0, 1, 2], [0, 1, 0]], 3, {}, "names an alternative once: 0"),
        ([[0], [1], []], 3, {}, "nothing was compared"),
        ([], 3, {}, "nothing was compared"),
        ([[0]], 1, {}, "at least two alternatives"),
        ([[0, 1]], 2, {"regulariser": -1.0}, "regulariser must be"),
    ],
)
def test_bad_rankings_are_refused(rankings, n, more, reason):
    with pytest.raises(ValueError, match=reason):
        plackett_luce(rankings, n, **more)


@pytest.mark.parametrize("tied, reason", [([[0, 1, 2]], "pairs"), ([0, 1], "pairs"), ([[0, 0]], "with itself")])
def test_bad_ties_are_refused(tied, reason):
    with pytest.raises(ValueError, match=reason):
        davidson([0, 1], [1, 0], tied, 3)


def test_the_walk_comes_to_the_place_that_is_solved_for(monkeypatch):
    """Among 20, and on a chain of 60, where a thousand steps are too few: each beats the next in two of three."""
    mixed, steps = np.random.default_rng(0).integers(20, size=(2, 600)), np.arange(59)
    chain = np.concatenate([[steps, steps + 1], [steps + 1, steps], [steps, steps + 1]], axis=1)
    for n, pairs in ((20, mixed[:, mixed[0] != mixed[1]]), (60, chain)):
        walked = rank_centrality(*pairs, n)
        monkeypatch.setattr(bradley_terry, "WALK", 0)
        assert walked == pytest.approx(rank_centrality(*pairs, n), abs=1e-10)
        monkeypatch.undo()
    assert np.diff(walked) == pytest.approx(-np.log(2))
