"""TRPO's step on plain functions, in float64: conjugate gradient, Fisher's matrix, the line search."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nanopref.learning import trust_region
from nanopref.models.gpt2 import GPT, GPTConfig

seeds = st.integers(0, 2**32 - 1)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameter(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values.clone())


@given(seeds, st.integers(1, 9))
@settings(max_examples=30)
def test_conjugate_gradient_solves_a_positive_definite_system(seed, n):
    root, b = normal(seed, n, n), normal(seed + 1, n)
    A = root @ root.T + torch.eye(n, dtype=torch.float64)
    x = trust_region.conjugate_gradient(lambda v: A @ v, b, 3 * n)
    torch.testing.assert_close(x, torch.linalg.solve(A, b), rtol=1e-9, atol=1e-11)
    exact = trust_region.conjugate_gradient(lambda v: 2 * v, b, 50)  # after one step nothing is left, and no 0/0
    torch.testing.assert_close(exact, b / 2)
    assert (trust_region.conjugate_gradient(lambda v: A @ v, 0 * b, 5) == 0).all()


# ---- Fisher's matrix -------------------------------------------------------------------------------------------------


def softmax_model(seed: int) -> tuple[list[nn.Parameter], callable, callable]:
    """Parameters of a softmax over 4 tokens in 5 contexts, its log-probs, and its mean KL from where it began, in two
    pieces of unequal size."""
    contexts = normal(seed, 5, 3)
    parameters = [parameter(normal(seed + 1, 4, 3)), parameter(normal(seed + 2, 4))]
    old = F.linear(contexts, *parameters).log_softmax(-1).detach()

    def logprobs() -> torch.Tensor:
        return F.linear(contexts, *parameters).log_softmax(-1)

    def kl():
        for rows in (slice(0, 2), slice(2, 5)):
            yield (old.exp() * (old - logprobs()))[rows].sum() / 5

    return parameters, logprobs, kl


@given(seeds)
@settings(max_examples=10)
def test_a_fisher_vector_product_is_that_with_the_dense_matrix(seed):
    """Σ_y π(y) ∇log π(y) ∇log π(y)ᵀ, mean over the contexts, each gradient written out."""
    parameters, logprobs, kl = softmax_model(seed)
    v, found, fisher = normal(seed + 3, 16), logprobs(), torch.zeros(16, 16, dtype=torch.float64)
    for logp in found.flatten():
        gradient = torch.autograd.grad(logp, parameters, retain_graph=True)
        g = torch.cat([x.flatten() for x in gradient])
        fisher += logp.exp().detach() * torch.outer(g, g) / len(found)
    torch.testing.assert_close(trust_region.fisher_product(kl, parameters, v), fisher @ v)


@given(seeds)
@settings(max_examples=5)
def test_it_is_the_curvature_of_the_kl(seed):
    """By second differences of the KL alone: (KL(θ + hv) + KL(θ - hv) - 2 KL(θ)) / h² = vᵀFv."""
    parameters, _, kl = softmax_model(seed)
    v, h = F.normalize(normal(seed + 3, 16), dim=0), 1e-3
    product = trust_region.fisher_product(kl, parameters, v)

    def at(distance: float) -> float:
        with torch.no_grad():
            for p, x in zip(parameters, v.split([12, 4]), strict=True):
                p += distance * x.view_as(p)
            value = sum(kl()).item()
            for p, x in zip(parameters, v.split([12, 4]), strict=True):
                p -= distance * x.view_as(p)
        return value

    assert at(0.0) == pytest.approx(0, abs=1e-14)
    assert (at(h) + at(-h)) / h**2 == pytest.approx((v @ product).item(), rel=1e-4, abs=1e-8)


def test_it_goes_through_attention():
    """Of a GPT: against differences of the KL's gradient."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(11, 6, 1, 2, 8)).double()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    tokens, parameters = torch.randint(11, (2, 6)), list(model.parameters())
    old = model.logits(tokens).log_softmax(-1).detach()

    def kl():
        yield F.kl_div(model.logits(tokens).log_softmax(-1), old, log_target=True, reduction="sum") / 12

    start = torch.cat([p.detach().flatten() for p in parameters])
    v, h, slopes = F.normalize(torch.randn_like(start), dim=0), 1e-4, []
    found = trust_region.fisher_product(kl, parameters, v)
    for side in (h, -h):
        nn.utils.vector_to_parameters(start + side * v, parameters)
        slopes.append(trust_region.gradient(kl, parameters))
    torch.testing.assert_close(found, (slopes[0] - slopes[1]) / (2 * h), rtol=1e-4, atol=1e-8)
    assert found.norm() > 1e-3


# ---- the step --------------------------------------------------------------------------------------------------------


def hill(seed: int, n: int = 6):
    """Parameters in two shapes; a surrogate that rises along `up`, and ½ (θ - θ_old)ᵀ A (θ - θ_old) for the KL."""
    root, up = normal(seed, n, n), normal(seed + 1, n)
    A = root @ root.T + torch.eye(n, dtype=torch.float64)
    parameters = [parameter(normal(seed + 2, 2, 2)), parameter(normal(seed + 3, n - 4))]
    old = trust_region.flat(parameters).detach()

    def surrogate():
        yield from (up[i] * trust_region.flat(parameters)[i] for i in range(n))

    def kl():
        moved = trust_region.flat(parameters) - old
        yield moved @ A @ moved / 2

    return parameters, old, A, up, surrogate, kl


@given(seeds, st.floats(0.01, 30), st.floats(0.001, 1))
@settings(max_examples=30)
def test_the_line_search_halves_until_the_kl_allows_it(seed, length, delta):
    parameters, old, A, up, surrogate, kl = hill(seed)
    step = length * up
    before = sum(surrogate()).item()
    found = trust_region.line_search(surrogate, kl, parameters, step, delta)
    whole = (step @ A @ step / 2).item()  # a half of the step has a quarter of the KL
    halvings = max(0, math.ceil(math.log(whole / delta, 4)))
    if halvings > trust_region.HALVINGS:
        assert (trust_region.flat(parameters) == old).all() and found["halvings"] == trust_region.HALVINGS
        return
    assert found["halvings"] == halvings and found["approx_kl"] <= delta
    torch.testing.assert_close(trust_region.flat(parameters).detach(), old + step / 2**halvings)
    assert found["approx_kl"] == pytest.approx(whole / 4**halvings)
    assert (
        found["improvement"] == pytest.approx(sum(surrogate()).item() - before, rel=1e-6) and found["improvement"] > 0
    )


def test_a_step_that_worsens_the_surrogate_is_not_taken():
    for wrong in (lambda up: -up, lambda up: 0 * up, lambda up: math.nan * up):
        parameters, old, _, up, surrogate, kl = hill(0)
        found = trust_region.line_search(surrogate, kl, parameters, wrong(up), 1e9)
        assert (trust_region.flat(parameters) == old).all()  # bit for bit
        assert found == {"improvement": 0.0, "approx_kl": 0.0, "halvings": trust_region.HALVINGS}


@given(seeds, st.floats(1e-4, 1.0))
@settings(max_examples=20)
def test_the_step_is_the_natural_gradient_as_far_as_the_trust_region_reaches(seed, delta):
    parameters, old, A, up, surrogate, kl = hill(seed)
    found = trust_region.improve(surrogate, kl, parameters, delta=delta, cg_steps=30)
    best = torch.linalg.solve(A + trust_region.DAMPING * torch.eye(6, dtype=torch.float64), up)
    step = best * (2 * delta / (best @ A @ best)).sqrt() / 2 ** found["halvings"]
    torch.testing.assert_close(trust_region.flat(parameters).detach() - old, step, rtol=1e-6, atol=1e-9)
    assert found["halvings"] in (0, 1)  # the whole step stands on the border itself, which rounding may cross
    assert found["approx_kl"] == pytest.approx(delta / 4 ** found["halvings"]) and found["approx_kl"] <= delta
    assert found["grad_norm"] == pytest.approx(up.norm().item())


def test_where_nothing_is_to_be_gained_nothing_moves():
    parameters, old, _, _, _, kl = hill(0)
    found = trust_region.improve(lambda: [0 * sum(p.sum() for p in parameters)], kl, parameters, delta=1.0, cg_steps=5)
    assert (trust_region.flat(parameters) == old).all() and found["improvement"] == found["grad_norm"] == 0
