"""Losses on groups against the papers' formulas, one group at a time, in float64; where their optima lie; the tables.

A formula here takes the rewards r [K] of one group, what was said s [K] of each answer, and the knobs k.
"""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import train_dpo
from nanopref.data.groups import Encoded, Group, grouped
from nanopref.learning import objectives
from nanopref.learning.objectives import LOGPROBS, LOSSES, OBJECTIVES, Knobs
from nanopref.running import parallel


def σ(x: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + torch.exp(-x))


def logistic(x: torch.Tensor) -> torch.Tensor:
    """-log σ(x)."""
    return -torch.log(σ(x))


def shares(x: torch.Tensor) -> torch.Tensor:
    return torch.exp(x - x.max()) / torch.exp(x - x.max()).sum()  # of an answer to be imitated, said is 1e30


def good(s: torch.Tensor) -> bool:
    return {1.0: True, 0.0: False}[s[0].item()]


FORMULAS = {
    # Rafailov et al. 2023, eq. 7; with ε Mitchell 2023
    "sigmoid": lambda r, s, k: (
        (1 - k.label_smoothing) * logistic(r[0] - r[1]) + k.label_smoothing * logistic(r[1] - r[0])
    ),
    # Chowdhury et al. 2024, eq. 12
    "robust": lambda r, s, k: (
        ((1 - k.label_smoothing) * logistic(r[0] - r[1]) - k.label_smoothing * logistic(r[1] - r[0]))
        / (1 - 2 * k.label_smoothing)
    ),
    "hinge": lambda r, s, k: (1 - (r[0] - r[1])).clamp(min=0),
    "squared-hinge": lambda r, s, k: (1 - (r[0] - r[1])).clamp(min=0) ** 2,
    # Azar et al. 2023, eq. 17
    "ipo": lambda r, s, k: ((r[0] - r[1]) / k.beta - 1 / (2 * k.beta)) ** 2,
    "exponential": lambda r, s, k: torch.exp(r[1] - r[0]),
    # Lu et al. 2024, eq. 5
    "discopop": lambda r, s, k: (
        (1 - σ((r[0] - r[1]) / 0.05)) * logistic(r[0] - r[1]) + σ((r[0] - r[1]) / 0.05) * torch.exp(r[1] - r[0])
    ),
    "linear": lambda r, s, k: r[1] - r[0],
    # Rafailov et al. 2023, eq. 20
    "plackett-luce": lambda r, s, k: -sum(torch.log(torch.exp(r[i]) / torch.exp(r[i:]).sum()) for i in range(len(r))),
    # Chen et al. 2024, table 1
    "infonca": lambda r, s, k: -(shares(s / k.rating_temperature) * torch.log(shares(r))).sum(),
    "nca": lambda r, s, k: (shares(s / k.rating_temperature) * logistic(r) + logistic(-r) / len(r)).sum(),
    # Ethayarajh et al. 2024, eq. 8
    "kto": lambda r, s, k: (
        (k.good_weight - k.good_weight * σ(r[0])) if good(s) else (k.bad_weight - k.bad_weight * σ(-r[0]))
    ),
    "binary": lambda r, s, k: -k.good_weight * torch.log(σ(r[0])) if good(s) else -k.bad_weight * torch.log(σ(-r[0])),
    "regression": lambda r, s, k: ((r - s) ** 2).sum() / len(r),
    "nothing": lambda r, s, k: 0 * r.sum(),
}
MIXED, ALONE = {"plackett-luce", "infonca", "nca", "regression", "nothing"}, {"kto", "binary"}
SMOOTHED, KINKED = {"sigmoid", "robust"}, {"hinge", "squared-hinge"}
COARSE = {"nca", "kto", "binary"}  # their weights are of float32
number = st.floats(-5, 5, width=32)


def test_every_loss_has_a_formula_here():
    assert LOSSES.keys() == FORMULAS.keys()


def in_order(size: int) -> list[float]:
    return list(Group("x", ("",) * size).said())


@st.composite
def batches(draw, name: str) -> list[list[tuple[float, float, float]]]:
    """Groups of (value, baseline, said): sizes and said as the loss's kinds allow."""
    sizes = [1] if name in ALONE else [1, 2, 3, 4] if name in MIXED else [2]
    groups = []
    for size in draw(st.lists(st.sampled_from(sizes), min_size=1, max_size=4)):
        if name in ALONE:
            said = [draw(st.sampled_from([0.0, 1.0]))]
        elif name == "regression" or (name in ("infonca", "nca") and draw(st.booleans())):
            said = draw(st.lists(number, min_size=size, max_size=size))
        else:
            said = in_order(size)
        groups.append([(draw(number), draw(number), s) for s in said])
    return groups


def tensors(groups, dtype=torch.float64) -> tuple[torch.Tensor, ...]:
    """Values (a leaf, padding included), baselines, there and said [G, K]."""
    sizes = [len(group) for group in groups]
    values, baseline, said = torch.tensor([row for group in groups for row in group], dtype=dtype).unbind(1)
    values, there = grouped(values, sizes)
    return values.clone().requires_grad_(), grouped(baseline, sizes)[0], there, grouped(said, sizes)[0]


knobs_of = {
    "beta": st.floats(0.05, 1.5),
    "rating_temperature": st.floats(0.2, 3),
    "good_weight": st.floats(0.3, 3),
    "bad_weight": st.floats(0.3, 3),
}


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=25)
@given(data=st.data(), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_losses_and_slopes_are_those_of_the_formula(name, data, dtype):
    """Groups of different sizes in one batch: padding has no slope, and who shares the batch changes nothing."""
    groups, knobs = data.draw(batches(name)), Knobs(**data.draw(st.fixed_dictionaries(knobs_of)))
    if name in SMOOTHED:
        knobs = knobs._replace(label_smoothing=data.draw(st.floats(0, 0.4)))
    values, baseline, there, said = tensors(groups, dtype)
    if name in KINKED:
        assume(((knobs.beta * (values - baseline) @ torch.tensor([1.0, -1.0], dtype=dtype) - 1).abs() > 1e-4).all())
    found = LOSSES[name].losses(values, baseline, there, said, knobs)
    assert found.dtype == dtype and found.shape == (len(groups),)
    (slopes,) = torch.autograd.grad(found.sum() + 0 * values.sum(), values)
    rtol = (2e-7 if name in COARSE else 1e-10) if dtype == torch.float64 else 2e-4
    near = {"rtol": rtol, "atol": rtol if dtype == torch.float64 else 2e-4}
    for g, group in enumerate(groups):
        v, b, s = (x[g, : len(group)].detach().double() for x in (values, baseline, said))
        loss = FORMULAS[name](knobs.beta * (v.requires_grad_() - b), s, knobs)
        (slope,) = torch.autograd.grad(loss, v)
        torch.testing.assert_close(found[g].double(), loss, **near)
        torch.testing.assert_close(slopes[g, : len(group)].double(), slope, **near)
        assert (slopes[g, len(group) :] == 0).all()
        torch.testing.assert_close(LOSSES[name].losses(*tensors([group], dtype), knobs)[0], found[g], **near)


@given(batches("sigmoid"), knobs_of["beta"])
@settings(max_examples=20)
def test_of_a_pair_in_order_several_losses_are_one(groups, beta):
    """Plackett-Luce and InfoNCA are DPO, and NCA is -log σ(r_w) - ½ log σ(-r_w) - ½ log σ(-r_l)."""
    values, baseline, there, said = tensors(groups)
    losses = {
        name: LOSSES[name].losses(values, baseline, there, said, Knobs(beta, rating_temperature=7.0))
        for name in ("sigmoid", "plackett-luce", "infonca", "nca")
    }
    torch.testing.assert_close(losses["plackett-luce"], losses["sigmoid"])
    torch.testing.assert_close(losses["infonca"], losses["sigmoid"])
    r = beta * (values - baseline)
    torch.testing.assert_close(losses["nca"], logistic(r[:, 0]) + logistic(-r[:, 0]) / 2 + logistic(-r[:, 1]) / 2)


@pytest.mark.parametrize("name", sorted(FORMULAS.keys() - {"nothing"}))
def test_what_is_nan_stays_nan_in_its_group_alone(name):
    size = 1 if name in ALONE else 2
    for label, place, which in itertools.product((0.0, 1.0), range(size), range(2)):
        said = [label] if name in ALONE else [label, 0.5] if name == "regression" else in_order(size)
        groups = [[(1.0 + k, 0.5, s) for k, s in enumerate(said)] for _ in range(3)]
        row = list(groups[1][place])
        row[which] = math.nan
        groups[1][place] = tuple(row)
        found = LOSSES[name].losses(*tensors(groups), Knobs())
        assert found.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("name", FORMULAS)
def test_far_away_losses_and_slopes_stay_finite(name):
    """Margins of ±90 nats in float32, where naive formulas overflow, as that of exponential must."""
    size = 1 if name in ALONE else 3 if name in MIXED else 2
    for label, way in itertools.product((0.0, 1.0), (-1, 1)):
        said = [label] if name in ALONE else in_order(size) if name != "regression" else [label] * size
        far = [(way * (100.0 - 90 * k), 0.0, s) for k, s in enumerate(said)]
        values, *rest = tensors([far, [(0.0, 0.0, s) for s in said]], torch.float32)
        found = LOSSES[name].losses(values, *rest, Knobs())
        (slopes,) = torch.autograd.grad(found.sum() + 0 * values.sum(), values)
        assert (found.isfinite().all() and slopes.isfinite().all()) or (name, way) == ("exponential", -1)


# ---- where the optimum lies ------------------------------------------------------------------------------------------


class Table(torch.nn.Module):
    """A policy on answers of one token to one prompt, softmax(logits): what the papers prove theirs on."""

    device, config = torch.device("cpu"), SimpleNamespace(n_embd=1)

    def __init__(self, reference: torch.Tensor):
        super().__init__()
        self.reference, self.logits = reference, torch.nn.Parameter(torch.zeros_like(reference))

    def forward(self, inputs, targets, mask, packed):
        return self.logits.log_softmax(0)[targets] * mask

    def descend(self, name: str, groups, weights, rounds: int = 100, **flags) -> torch.Tensor:
        """log π/π_ref [answers] where train_dpo.py's weighted losses of groups (answers, said, margin) are least."""
        config = objectives.resolve(train_dpo.Config(loss=name, data="some", **flags), OBJECTIVES[name])
        rows = Encoded.pack(
            [[([0], [y]) for y in answers] for answers, _, _ in groups],
            [s for _, said, _ in groups for s in said],
            [m for answers, _, margin in groups for m in (margin, *[0.0] * (len(answers) - 1))],
        )
        part = train_dpo.Part(rows, torch.cat([self.reference[list(answers)] for answers, _, _ in groups]))
        knobs = objectives.knobs(config, [])
        every, z0 = list(range(len(groups))), torch.zeros(())
        options = {"line_search_fn": "strong_wolfe", "tolerance_grad": 1e-14, "tolerance_change": 1e-18}
        optimizer = torch.optim.LBFGS(self.parameters(), max_iter=rounds, **options)

        def closure():
            optimizer.zero_grad()
            losses, _ = train_dpo.preference_losses(self, part, z0, every, config, knobs)
            (loss := (losses * weights).sum()).backward()
            return loss

        optimizer.step(closure)
        return self.logits.detach().log_softmax(0) - self.reference


N = 5
REFERENCE = torch.tensor([0.25, 0.2, 0.3, 0.1, 0.15], dtype=torch.float64).log()
R1 = torch.tensor([1.0, -0.5, 0.25, 2.0, 0.0], dtype=torch.float64)
R2 = torch.tensor([-1.5, 1.0, 0.5, -0.75, 2.25], dtype=torch.float64)
PAIRS = list(itertools.permutations(range(N), 2))


def same_tilt(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Log-ratios up to the constant that normalises them."""
    expected = (REFERENCE + expected).log_softmax(0) - REFERENCE
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert expected.max() - expected.min() > 1


def bradley_terry(r: torch.Tensor) -> torch.Tensor:
    return torch.stack([σ(r[a] - r[b]) for a, b in PAIRS])


@pytest.mark.parametrize("name", ["dpo", "plackett-luce"])
def test_of_preferences_by_a_reward_the_optimum_is_the_reference_tilted_by_it(name):
    """π* ∝ π_ref e^{r/β} (Rafailov et al. 2023, eq. 4)."""
    groups = [(pair, in_order(2), 1.0) for pair in PAIRS]
    same_tilt(Table(REFERENCE).descend(name, groups, bradley_terry(R1), beta=0.7), R1 / 0.7)


def test_with_margins_of_another_reward_the_optimum_is_tilted_by_both():
    """MODPO (Zhou et al. 2023, eq. 9): -log σ((β/w₁) Δ log π/π_ref - (w₂/w₁) Δr₂) on preferences by r₁ is least where
    (β Δ log π/π_ref - w₂ Δr₂) / w₁ = Δr₁, which is π* ∝ π_ref e^{(w₁ r₁ + w₂ r₂)/β}: `margin` is Δr₂ in the file, and
    the flags are --beta β/w₁ --margin w₂/w₁."""
    β, w1, w2 = 0.8, 0.6, 0.4
    groups = [((a, b), in_order(2), (R2[a] - R2[b]).item()) for a, b in PAIRS]
    assert min(m for *_, m in groups) < 0 < max(m for *_, m in groups)
    found = Table(REFERENCE).descend("dpo", groups, bradley_terry(R1), beta=β / w1, margin=w2 / w1)
    same_tilt(found, (w1 * R1 + w2 * R2) / β)


def test_of_ratings_the_optimum_of_infonca_is_tilted_by_them():
    """π* ∝ π_ref e^{r/αβ} (Chen et al. 2024, theorem 3.1)."""
    groups = [(tuple(range(N)), R1.tolist(), 1.0)]
    found = Table(REFERENCE).descend("infonca", groups, torch.ones(1), beta=0.7, rating_temperature=1.5)
    same_tilt(found, R1 / (1.5 * 0.7))


def test_of_ratings_nca_leaves_each_likelihood_where_the_data_put_it():
    """σ(r_k) = p_k / (p_k + 1/K), so π* = π_ref K p where that is a distribution: of uniform π_ref and β = 1 it is."""
    groups, uniform = [(tuple(range(N)), R1.tolist(), 1.0)], torch.full((N,), -math.log(N), dtype=torch.float64)
    found = Table(uniform).descend("nca", groups, torch.ones(1), beta=1.0)
    torch.testing.assert_close(found, R1.log_softmax(0) + math.log(N), rtol=1e-5, atol=1e-5)


def test_where_one_always_wins_ipo_stops_at_its_distance_and_dpo_goes_on():
    """h = 1/2β (Azar et al. 2023, section 5.2), however long it is trained; DPO has no optimum."""
    groups, weights, far = [((0, 1), in_order(2), 1.0)], torch.ones(1), []
    for rounds in (3, 10, 30):
        ratios = Table(REFERENCE).descend("dpo", groups, weights, rounds, beta=0.25)
        far.append((ratios[0] - ratios[1]).item())
    assert 2 < far[0] < far[1] - 1 < far[2] - 2
    ratios = Table(REFERENCE).descend("ipo", groups, weights, 30, beta=0.25)
    assert (ratios[0] - ratios[1]).item() == pytest.approx(1 / (2 * 0.25), rel=1e-6)


# ---- figures ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.tuples(*[st.integers(-2, 2)] * 2), min_size=1, max_size=4), min_size=1, max_size=5))
@settings(max_examples=20)
def test_ranked_right_counts_pairs_that_differ_and_ties_half(groups):
    """Of those of whom the same was said neither can be right; without a pair that differs it is 1/2, as by chance."""
    sizes = [len(group) for group in groups]
    flat = torch.tensor([row for group in groups for row in group], dtype=torch.float64)
    rewards, there = grouped(flat[:, 0], sizes)
    expected = []
    for group in groups:
        pairs = [(a, b) for a, b in itertools.permutations(group, 2) if a[1] > b[1]]
        right = sum((a > b) + 0.5 * (a == b) for (a, _), (b, _) in pairs)
        expected.append(right / len(pairs) if pairs else 0.5)
    assert objectives.ranked_right(rewards, there, grouped(flat[:, 1], sizes)[0]).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    "groups, expected",  # of (reward, said): loss, right, best rewards, worst rewards, bests, worsts, groups judged
    [
        ([[(3.0, 0.0), (1.0, -1e30)], [(-2.0, 0.0), (5.0, -1e30)]], [30, 1, 1, 6, 2, 2, 2]),
        ([[(3.0, 0.0), (3.0, -1e30)]], [10, 0.5, 3, 3, 1, 1, 1]),
        # rankings of two, three and four: the worst is the last that is there
        (
            [
                [(1.0, 0.0), (2.0, -1e30)],
                [(3.0, 0.0), (2.0, -1e30), (-7.0, -2e30)],
                [(4.0, 0.0), (1.0, -1e30), (2.0, -2e30), (2.0, -3e30)],
            ],
            [60, 0 + 1 + 3.5 / 6, 8, -3, 3, 3, 3],
        ),
        # ratings, two alike
        ([[(0.5, 0.9), (1.5, 0.2), (-1.0, 0.2)]], [10, 0.5, 0.5, -1, 1, 1, 1]),
        # labels: good, bad, good on the wrong side, bad at 0
        ([[(2.0, 1.0)], [(-3.0, 0.0)], [(-0.5, 1.0)], [(0.0, 0.0)]], [100, 2.5, 1.5, -3, 2, 2, 4]),
        ([[(4.0, 0.0)]], [10, 0, 0, 4, 0, 1, 1]),
        ([[(4.0, 1.0)]], [10, 1, 4, 0, 1, 0, 1]),
        # an answer to be imitated is best and says nothing of right or wrong; beside a pair
        ([[(4.0, 1e30)]], [10, 0, 4, 0, 1, 0, 0]),
        ([[(-4.0, 1e30)], [(3.0, 0.0), (1.0, -1e30)]], [30, 1, -1, 1, 2, 1, 1]),
    ],
)
def test_figures_are_sums_over_groups(groups, expected):
    rewards, _, there, said = tensors([[(r, 0.0, s) for r, s in group] for group in groups])
    losses = 10.0 * torch.arange(1, len(groups) + 1, dtype=torch.float64)
    assert objectives.figures(losses.requires_grad_(), rewards, there, said).tolist() == pytest.approx(expected)
    assert not objectives.figures(losses, rewards, there, said).requires_grad


def test_averages_are_over_all_processes(monkeypatch):
    """Loss of groups, accuracy of those that say what is right, rewards of the answers that are best or worst; none of
    what there is none of."""

    def averages(sums: list[float], groups: int) -> list[float]:
        return list(objectives.averages(torch.tensor(sums), groups).items())

    names = "loss", "accuracy", "chosen_reward", "rejected_reward", "margin"
    every = list(zip(names, (1.5, 0.75, 2.0, -4.5, 6.5), strict=True))
    assert averages([6.0, 3.0, 8.0, -9.0, 4.0, 2.0, 4.0], 4) == every
    assert averages([6.0, 3.0, 0.0, -9.0, 0.0, 3.0, 3.0], 3) == [
        ("loss", 2.0),
        ("accuracy", 1.0),
        ("rejected_reward", -3.0),
    ]
    assert averages([6.0, 3.0, 9.0, 0.0, 3.0, 0.0, 3.0], 3) == [
        ("loss", 2.0),
        ("accuracy", 1.0),
        ("chosen_reward", 3.0),
    ]
    imitated = [("loss", 2.0), ("chosen_reward", 3.0)]
    assert averages([6.0, 0.0, 9.0, 0.0, 3.0, 0.0, 0.0], 3) == imitated
    assert averages([6.0, 1.0, 9.0, 0.0, 3.0, 0.0, 2.0], 3) == [imitated[0], ("accuracy", 0.5), imitated[1]]
    monkeypatch.setattr(parallel, "sum_processes", lambda x: x + torch.tensor([6.0, 1.0, 4.0, 1.0, 4.0, 2.0, 4.0]))
    every = list(zip(names, (1.5, 0.5, 1.5, -2.0, 3.5), strict=True))
    assert averages([6.0, 3.0, 8.0, -9.0, 4.0, 2.0, 4.0], 8) == every


@given(st.floats(-40, -1e-3), st.integers(1, 9))
@settings(max_examples=20)
def test_an_answers_value_is_its_logprob_a_mean_over_tokens_or_odds(logprob, n):
    """Odds are p/(1 - p), with p the geometric mean of the tokens' probabilities (Hong et al. 2024, eq. 4)."""
    p = math.exp(logprob / n)
    expected = {"sum": logprob, "mean": logprob / n, "log-odds": math.log(p / (1 - p))}
    x, tokens = torch.tensor([logprob], dtype=torch.float64, requires_grad=True), torch.tensor([float(n)])
    assert {name: f(x, tokens).item() for name, f in LOGPROBS.items()} == pytest.approx(expected, rel=1e-9, abs=1e-9)
    (slope,) = torch.autograd.grad(LOGPROBS["log-odds"](x, tokens), x)
    assert slope.item() == pytest.approx(1 / n / (1 - p), rel=1e-6)


def test_the_odds_of_a_certain_answer_are_finite():
    x = torch.tensor([0.0, -1e-9, -1e4], requires_grad=True)
    odds = LOGPROBS["log-odds"](x, torch.tensor([3.0, 1.0, 2.0]))
    assert odds.tolist() == pytest.approx([math.log(1e6)] * 2 + [-5e3], rel=1e-4)
    assert torch.autograd.grad(odds.sum(), x)[0].isfinite().all()
