"""Objectives on rewards [G, K] against their formulas, one group at a time, in float64."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanopref.data.groups import Group, grouped
from nanopref.learning import objectives
from nanopref.learning.objectives import OBJECTIVES, ranked_right
from nanopref.running.flags import UserError

number = st.floats(-5, 5)
groups_of = st.lists(st.lists(st.tuples(number, number), min_size=1, max_size=4), min_size=1, max_size=5)


def as_tensors(groups) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sizes = [len(group) for group in groups]
    flat = torch.tensor([pair for group in groups for pair in group], dtype=torch.float64)
    values, there = grouped(flat[:, 0].clone().requires_grad_(), sizes)
    return values, grouped(flat[:, 1], sizes)[0], there


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


@pytest.mark.parametrize(
    "loss, formula",
    [
        ("sigmoid", lambda h, beta: softplus(-beta * h)),
        ("hinge", lambda h, beta: max(0.0, 1 - beta * h)),
        ("ipo", lambda h, beta: (h - 1 / (2 * beta)) ** 2),
    ],
)
@given(
    groups=st.lists(st.lists(st.tuples(number, number), min_size=2, max_size=2), min_size=1, max_size=5),
    beta=st.floats(0.05, 2),
)
def test_a_function_of_the_margin(loss, formula, groups, beta):
    values, baseline, there = as_tensors(groups)
    found = OBJECTIVES[loss].losses(values, baseline, there, beta=beta)
    expected = [formula((a - b) - (c - d), beta) for (a, b), (c, d) in groups]
    assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_every_margin_function_is_an_objective_and_has_a_formula_here():
    from kernels.reference import MARGIN_LOSSES

    assert OBJECTIVES.keys() == {*MARGIN_LOSSES, "plackett-luce"}
    tested = {args[0] for args in test_a_function_of_the_margin.pytestmark[0].args[1]}
    assert tested == MARGIN_LOSSES.keys()


def test_label_smoothing_reaches_the_loss():
    values, baseline, there = as_tensors([[(2.0, 0.0), (0.0, 0.0)]])
    loss = OBJECTIVES["sigmoid"].losses(values, baseline, there, beta=1.0, label_smoothing=0.1).item()
    assert loss == pytest.approx(0.9 * softplus(-2.0) + 0.1 * softplus(2.0))
    objectives.check("sigmoid", 0.1)
    with pytest.raises(UserError, match="--label-smoothing belongs to --loss sigmoid, not to ipo"):
        objectives.check("ipo", 0.1)


@given(groups_of, st.floats(0.05, 2))
def test_plackett_luce_is_one_choice_after_another(groups, beta):
    """Groups of 1 to 4 in one batch; the gradient too is that of the formula, and padding gets none."""
    values, baseline, there = as_tensors(groups)
    found = OBJECTIVES["plackett-luce"].losses(values, baseline, there, beta=beta)
    expected = []
    for g, group in enumerate(groups):
        r = [beta * (values[g, k] - baseline[g, k]) for k in range(len(group))]
        choices = [torch.stack(r[k:]).softmax(0)[0].log() for k in range(len(r))]
        expected.append(-sum(choices))
    torch.testing.assert_close(found, torch.stack(expected))
    (gradient,) = torch.autograd.grad(found.sum(), values, retain_graph=True)
    (wanted,) = torch.autograd.grad(torch.stack(expected).sum(), values, allow_unused=True)
    torch.testing.assert_close(gradient, torch.zeros_like(values) if wanted is None else wanted)
    assert (gradient[~there] == 0).all()


@given(groups_of, st.floats(0.05, 2))
def test_plackett_luce_of_two_is_dpo_and_of_one_is_nothing(groups, beta):
    pairs = [group[:2] for group in groups if len(group) > 1] or [[(1.0, 0.0), (0.0, 0.0)]]
    tensors = as_tensors(pairs)
    both = [OBJECTIVES[name].losses(*tensors, beta=beta) for name in ("plackett-luce", "sigmoid")]
    torch.testing.assert_close(*both)
    alone = as_tensors([group[:1] for group in groups])
    assert (OBJECTIVES["plackett-luce"].losses(*alone, beta=beta) == 0).all()


@given(groups_of)
def test_the_losses_of_a_batch_do_not_depend_on_who_shares_it(groups):
    together = OBJECTIVES["plackett-luce"].losses(*as_tensors(groups), beta=0.7)
    alone = [OBJECTIVES["plackett-luce"].losses(*as_tensors([group]), beta=0.7) for group in groups]
    torch.testing.assert_close(together, torch.cat(alone))


@given(st.lists(st.lists(st.integers(-2, 2), min_size=1, max_size=4), min_size=1, max_size=5))
def test_ranked_right_counts_pairs_in_order_and_ties_half(groups):
    rewards, there = grouped(torch.tensor([float(r) for group in groups for r in group]), [len(g) for g in groups])
    expected = []
    for group in groups:
        pairs = list(itertools.combinations(group, 2))
        right = sum((a > b) + 0.5 * (a == b) for a, b in pairs)
        expected.append(right / len(pairs) if pairs else 0.0)
    assert ranked_right(rewards, there).tolist() == pytest.approx(expected)


def test_pairs_are_asked_for_where_they_are_needed():
    pair, ranking = Group("x", ("a", "b")), Group("x", ("a", "b", "c"))
    objectives.check_sizes("sigmoid", [pair])
    objectives.check_sizes("plackett-luce", [pair, ranking])
    with pytest.raises(UserError, match="sigmoid compares two answers to a prompt, and the data hold 3: do that"):
        objectives.check_sizes("sigmoid", [pair, ranking], ": do that")
