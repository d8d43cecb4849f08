"""Advantages, token rewards and KL against their definitions written out, token by token, in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from nanopref.learning import advantages as estimate

finite = st.floats(-5, 5, allow_nan=False)
seeds = st.integers(0, 2**32 - 1)


def responses(seed: int, *, shape: tuple[int, int] | None = None) -> tuple[torch.Generator, torch.Tensor]:
    """A generator, and a mask [B, T] with one run of at least one token in each row, anywhere in it."""
    g = torch.Generator().manual_seed(seed)
    B, T = shape or (int(torch.randint(1, 5, (), generator=g)), int(torch.randint(1, 9, (), generator=g)))
    mask = torch.zeros(B, T)
    for row in mask:
        begin = int(torch.randint(0, T, (), generator=g))
        row[begin : int(torch.randint(begin + 1, T + 1, (), generator=g))] = 1
    return g, mask


def normal(g: torch.Generator, mask: torch.Tensor) -> torch.Tensor:
    """Normal float64 numbers at the mask's tokens; NaN elsewhere, which nothing may read."""
    x = torch.randn(mask.shape, generator=g, dtype=torch.float64)
    return x.masked_fill(mask == 0, math.nan)


def runs(mask: torch.Tensor) -> list[list[int]]:
    """The columns of each row's response."""
    return [row.nonzero()[:, 0].tolist() for row in mask]


# ---- KL --------------------------------------------------------------------------------------------------------------


@given(seeds)
def test_kl_estimates_are_the_sums_by_hand(seed):
    g, mask = responses(seed)
    logprobs, reference = normal(g, mask), normal(g, mask)
    k1, k3 = estimate.kl_k1(logprobs, reference, mask), estimate.kl_k3(logprobs, reference, mask)
    for b, run in enumerate(runs(mask)):
        difference = [(logprobs[b, t] - reference[b, t]).item() for t in run]
        assert k1[b].item() == pytest.approx(sum(difference), abs=1e-9)
        assert k3[b].item() == pytest.approx(sum(math.exp(-d) - 1 + d for d in difference), abs=1e-9)
        assert k3[b] >= 0


@given(st.lists(st.floats(0.05, 1), min_size=2, max_size=6), st.lists(st.floats(0.05, 1), min_size=6, max_size=6))
def test_both_kl_estimates_have_the_mean_kl(p, q):
    """Over all tokens that π_θ could draw, weighted by how often it does."""
    p = torch.tensor(p, dtype=torch.float64) / sum(p)
    q = torch.tensor(q[: len(p)], dtype=torch.float64) / sum(q[: len(p)])
    kl = (p * (p / q).log()).sum().item()
    for kl_of in (estimate.kl_k1, estimate.kl_k3):
        mean = (p * kl_of(p.log()[:, None], q.log()[:, None], torch.ones(len(p), 1))).sum().item()
        assert mean == pytest.approx(kl, abs=1e-9)


@given(st.floats(0.001, 10), st.floats(-5, 500), st.floats(0.1, 50), st.integers(1, 500), st.integers(1, 10**6))
def test_the_kl_coefficient_moves_the_right_way_and_stays_bounded(beta, kl, target, samples, horizon):
    after = estimate.adapt_kl_coefficient(beta, kl, target, samples, horizon)
    assert (after > beta) == (kl > target) or math.isclose(after, beta, rel_tol=1e-12)
    assert 0.8 * beta * (1 - 1e-12) <= after <= 1.2 * beta * (1 + 1e-12)


def test_the_kl_coefficient_by_hand():
    adapt = estimate.adapt_kl_coefficient
    assert adapt(1.0, 11.0, 10.0, 50, 100) == pytest.approx(1.05)  # 10% too high, half a horizon
    assert adapt(1.0, 9.0, 10.0, 50, 100) == pytest.approx(0.95)
    assert adapt(1.0, 100.0, 10.0, 50, 100) == pytest.approx(1.1)  # clipped at 20%, above and below
    assert adapt(1.0, 0.0, 10.0, 50, 100) == pytest.approx(0.9)
    assert adapt(1.0, 0.0, 10.0, 5000, 1) == pytest.approx(0.8)  # and never below 0


def test_the_kl_coefficient_settles_where_the_kl_is_the_target():
    """On a policy that answers a price of β with a KL of 1/β, as a tame one would."""
    beta = 0.001
    for _ in range(2000):
        beta = estimate.adapt_kl_coefficient(beta, 1 / beta, 8.0, 100, 1000)
    assert beta == pytest.approx(1 / 8, rel=1e-3)


# ---- token-level rewards ---------------------------------------------------------------------------------------------


@given(seeds, st.floats(0, 2))
def test_token_rewards_sum_to_the_score_less_beta_times_kl(seed, beta):
    g, mask = responses(seed)
    logprobs, reference = normal(g, mask), normal(g, mask)
    scores = torch.randn(len(mask), generator=g, dtype=torch.float64)
    rewards = estimate.token_rewards(scores, logprobs, reference, mask, beta)
    torch.testing.assert_close(rewards.sum(1), scores - beta * estimate.kl_k1(logprobs, reference, mask))
    assert (rewards[mask == 0] == 0).all()
    for b, run in enumerate(runs(mask)):
        for t in run:
            expected = -beta * (logprobs[b, t] - reference[b, t]) + (scores[b] if t == run[-1] else 0)
            assert rewards[b, t].item() == pytest.approx(expected.item(), abs=1e-9)


# ---- GAE -------------------------------------------------------------------------------------------------------------


@given(seeds, st.floats(0.5, 1), st.floats(0, 1))
def test_gae_is_its_definition(seed, gamma, lam):
    """Â_t = Σ_l (γλ)^l δ_{t+l}, each sum written out: O(T²)."""
    g, mask = responses(seed)
    rewards, values = normal(g, mask), normal(g, mask)
    advantages, returns = estimate.gae(rewards, values, mask, gamma=gamma, lam=lam)
    assert (advantages[mask == 0] == 0).all()
    for b, run in enumerate(runs(mask)):

        def delta(t, b=b, run=run):
            following = values[b, t + 1] if t + 1 in run else 0.0
            return rewards[b, t] + gamma * following - values[b, t]

        for t in run:
            expected = sum((gamma * lam) ** (s - t) * delta(s) for s in run if s >= t)
            assert advantages[b, t].item() == pytest.approx(expected.item(), abs=1e-9)
            assert returns[b, t].item() == pytest.approx((expected + values[b, t]).item(), abs=1e-9)


@given(seeds)
def test_gae_with_lambda_1_is_the_return_less_the_value(seed):
    g, mask = responses(seed)
    rewards, values = normal(g, mask), normal(g, mask)
    _, returns = estimate.gae(rewards, values, mask, gamma=1.0, lam=1.0)
    for b, run in enumerate(runs(mask)):
        for t in run:
            to_come = sum(rewards[b, s].item() for s in run if s >= t)
            assert returns[b, t].item() == pytest.approx(to_come, abs=1e-9)


@given(seeds, st.floats(0.5, 1), st.floats(0, 1))
def test_of_replayed_tokens_it_is_v_trace(seed, gamma, lam):
    """Espeholt et al. 2018, eq. 1: v_s = V_s + Σ_t γ^(t-s) (Π_(s ≤ i < t) c_i) ρ_t (r_t + γ V_(t+1) - V_t), with
    c = λρ; and Â_s has the same sum but for ρ_s, since PPO's own ratio stands there."""
    g, mask = responses(seed)
    rewards, values, log_ratios = normal(g, mask), normal(g, mask), normal(g, mask)
    advantages, returns = estimate.gae(rewards, values, mask, gamma=gamma, lam=lam, log_ratios=log_ratios)
    assert (advantages[mask == 0] == 0).all()
    for b, run in enumerate(runs(mask)):
        rho = {t: min(1.0, math.exp(log_ratios[b, t])) for t in run}
        for s in run:
            target, advantage = values[b, s].item(), 0.0
            for t in run[run.index(s) :]:
                following = values[b, t + 1].item() if t + 1 in run else 0.0
                delta = rewards[b, t].item() + gamma * following - values[b, t].item()
                target += gamma ** (t - s) * math.prod(lam * rho[i] for i in range(s, t)) * rho[t] * delta
                between = math.prod(rho[i] for i in range(s + 1, t + 1))
                advantage += (gamma * lam) ** (t - s) * between * delta
            assert returns[b, s].item() == pytest.approx(target, abs=1e-9)
            assert advantages[b, s].item() == pytest.approx(advantage, abs=1e-9)


@given(seeds)
def test_tokens_of_the_policy_itself_have_no_ratio(seed):
    """Bit for bit, in float32 as in a run; and those that it likes more than who drew them have none either."""
    g, mask = responses(seed)
    rewards, values = normal(g, mask).float(), normal(g, mask).float()
    plain = estimate.gae(rewards, values, mask, gamma=0.99, lam=0.95)
    for log_ratios in (torch.zeros_like(mask), normal(g, mask).float().abs()):
        found = estimate.gae(rewards, values, mask, gamma=0.99, lam=0.95, log_ratios=log_ratios)
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


# ---- without a critic ------------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(2, 5), seeds)
def test_rloo_never_sees_its_own_sample(prompts, group, seed):
    g = torch.Generator().manual_seed(seed)
    returns = torch.randn(prompts * group, generator=g, dtype=torch.float64)
    advantages = estimate.rloo_advantages(returns, group)
    for i in range(len(returns)):
        first = i // group * group
        others = [returns[j].item() for j in range(first, first + group) if j != i]
        assert advantages[i].item() == pytest.approx(returns[i].item() - sum(others) / len(others), abs=1e-9)
        # moving a sample moves its advantage by as much: the baseline does not follow
        moved = returns.clone()
        moved[i] += 1
        assert (estimate.rloo_advantages(moved, group) - advantages)[i].item() == pytest.approx(1, abs=1e-9)


@given(st.integers(1, 4), st.integers(2, 5), seeds)
def test_grpo_standardises_each_group(prompts, group, seed):
    g = torch.Generator().manual_seed(seed)
    returns = torch.randn(prompts * group, generator=g, dtype=torch.float64)
    advantages = estimate.grpo_advantages(returns, group).view(prompts, group)
    for row, found in zip(returns.view(prompts, group).tolist(), advantages.tolist(), strict=True):
        mean, deviation = np.mean(row), np.std(row, ddof=1)
        assert found == pytest.approx([(x - mean) / (deviation + 1e-4) for x in row], abs=1e-9)
    assert (estimate.grpo_advantages(torch.ones(4), 4) == 0).all()  # all alike: nothing to learn, and no NaN


@given(seeds, st.sampled_from(["rloo", "grpo", "reinforce"]))
def test_a_whole_response_of_another_policy_counts_less(seed, name):
    """Each token has the response's advantage, times the truncated ratios of the tokens behind it."""
    g, mask = responses(seed, shape=(4, 6))
    rewards = torch.where(mask.bool(), normal(g, mask), 0.0)
    log_ratios, baseline = normal(g, mask), torch.tensor(0.3, dtype=torch.float64)
    found, returns = estimate.ADVANTAGES[name](
        rewards, rewards, mask, gamma=0.5, lam=0.5, group=2, baseline=baseline, log_ratios=log_ratios
    )
    R = rewards.sum(1)
    better = {"rloo": estimate.rloo_advantages(R, 2), "grpo": estimate.grpo_advantages(R, 2), "reinforce": R - 0.3}[
        name
    ]
    assert (returns == 0).all() and (found[mask == 0] == 0).all()
    for b, run in enumerate(runs(mask)):
        for t in run:
            weight = math.prod(min(1.0, math.exp(log_ratios[b, s])) for s in run if s > t)
            assert found[b, t].item() == pytest.approx(better[b].item() * weight, abs=1e-9)


# ---- whitening -------------------------------------------------------------------------------------------------------


@given(seeds, st.floats(0.01, 100), st.floats(-50, 50))
def test_whitening_gives_mean_0_and_variance_1_over_the_mask(seed, scale, shift):
    g, mask = responses(seed, shape=(4, 8))
    x = normal(g, mask) * scale + shift
    white = estimate.whiten(x, mask)
    inside, before = white[mask == 1], x[mask == 1]
    assert (white[mask == 0] == 0).all()
    assert inside.mean().item() == pytest.approx(0.0, abs=1e-9 * (1 + abs(shift) / scale))
    if before.var(correction=0) > 1e-7:
        assert inside.var(correction=0).item() == pytest.approx(1, abs=1e-9)


@given(seeds, st.floats(0.01, 100))
def test_rewards_are_scaled_only(seed, scale):
    """Each by the same factor: what is 0 stays 0, and a response of twice as many tokens without reward earns the same.
    Adding the mean back, as some code does, pays or charges for each token."""
    g, mask = responses(seed, shape=(4, 8))
    x = torch.where(torch.rand(mask.shape, generator=g) < 0.5, normal(g, mask) * scale, 0.0)
    white = estimate.whiten(x, mask, shift_mean=False)[mask == 1]
    inside = x[mask == 1]
    deviation = inside.std(correction=0).item()
    if deviation > 1e-3:
        assert white.tolist() == pytest.approx((inside / deviation).tolist(), rel=1e-9)
    assert (white[inside == 0] == 0).all()


def test_what_is_all_alike_has_no_scale():
    assert (estimate.whiten(torch.ones(2, 2), torch.ones(2, 2)) == 0).all()
    assert (estimate.whiten(torch.ones(2, 2), torch.ones(2, 2), shift_mean=False) == 1).all()


@given(seeds)
def test_explained_variance(seed):
    g, mask = responses(seed, shape=(4, 8))
    values, returns = normal(g, mask), normal(g, mask)
    v, r = (x[mask == 1].numpy() for x in (values, returns))
    if len(r) > 1:
        expected = 1 - np.var(r - v) / np.var(r)
        assert estimate.explained_variance(values, returns, mask).item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert estimate.explained_variance(returns, returns, mask).item() == pytest.approx(1)
    assert estimate.explained_variance(values, torch.ones_like(values), mask) == 0  # nothing to explain


# ---- properties of the losses that PPO takes from kernels ------------------------------------------------------------


@given(seeds, st.floats(0.05, 0.5))
def test_at_ratio_1_the_clipped_loss_has_the_gradient_of_reinforce(seed, clip):
    g, mask = responses(seed)
    old, advantages = normal(g, mask), normal(g, mask)
    new = old.clone().requires_grad_()
    (found,) = torch.autograd.grad(kernels.ppo_clip_loss(new, old, advantages, mask, clip=clip)[0], new)
    expected = torch.where(mask.bool(), -advantages, 0.0) / mask.sum()  # ∂/∂ log π of -mean A log π
    torch.testing.assert_close(found, expected)


@given(seeds, st.floats(0.05, 0.5), st.floats(0.01, 3), st.booleans())
def test_beyond_the_clip_on_the_wrong_side_the_gradient_is_exactly_0(seed, clip, beyond, up):
    g, mask = responses(seed)
    old = normal(g, mask)
    new = (old + (math.log(1 + clip) + beyond if up else math.log(1 - clip) - beyond)).requires_grad_()
    worse = torch.rand(mask.shape, generator=g, dtype=torch.float64) + 0.1
    for advantages, zero in ((worse if up else -worse, True), (-worse if up else worse, False)):
        (found,) = torch.autograd.grad(kernels.ppo_clip_loss(new, old, advantages, mask, clip=clip)[0], new)
        inside = found[mask == 1]
        assert (inside == 0).all() if zero else (inside != 0).all()


@given(seeds)
@settings(max_examples=30)
def test_permuting_the_batch_changes_nothing(seed):
    """Of a whole round's arithmetic, from rewards to losses: rows may change places, sums change in the last digits."""
    g, mask = responses(seed, shape=(5, 7))
    logprobs, old, reference, values, new_values = (normal(g, mask) * 0.1 for _ in range(5))
    scores = torch.randn(5, generator=g, dtype=torch.float64)

    def arithmetic(order):
        m = mask[order]
        rewards = estimate.token_rewards(scores[order], old[order], reference[order], m, 0.1)
        advantages, returns = estimate.gae(rewards, values[order], m, gamma=1.0, lam=0.95)
        white = estimate.whiten(advantages, m)
        policy, _ = kernels.ppo_clip_loss(logprobs[order], old[order], white, m)
        value, _ = kernels.clipped_value_loss(new_values[order], values[order], returns, m)
        return policy, value, estimate.explained_variance(values[order], returns, m)

    order = torch.randperm(5, generator=g)
    torch.testing.assert_close(arithmetic(order), arithmetic(torch.arange(5)))


@settings(deadline=None)
@given(st.floats(-1e3, 1e3, width=32), st.integers(2, 9))
def test_returns_that_are_all_alike_are_no_advantage(value, group):
    """Whatever rounding makes of their mean: divided by their spread it would be a gradient."""
    returns = torch.full((2 * group,), value)
    assert not estimate.rloo_advantages(returns, group).any() and not estimate.grpo_advantages(returns, group).any()
