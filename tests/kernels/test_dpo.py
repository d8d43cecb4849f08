"""The Triton DPO losses against float64, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import dpo, reference

pytestmark = pytest.mark.filterwarnings("ignore:overflow")  # numpy's, in the interpreter: the exponential may
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
U = 2.0**-24  # float32: half a unit in the last place of 1
CASES = [(loss, 0.0) for loss in reference.MARGIN_LOSSES] + [(loss, 0.2) for loss in reference.SMOOTHED]
ROUND = {torch.float32: U, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7 if kernels.INTERPRETED else 2.0**-8}


def close(got, want, allowed, losses):
    """Within what is allowed; but infinite where float64 is beyond the range of got's dtype, and at its edge perhaps.

    A slope may also be infinite because its loss is.
    """
    most = torch.finfo(got.dtype).max
    infinite = got == want.sign() * torch.inf
    edge = (want.abs() > most / 2) | (losses.abs() > torch.finfo(torch.float32).max / 2)
    fits = ((got - want).abs() <= allowed) | (infinite & edge)
    return torch.where(want.abs() > 2 * most, infinite, fits).all()


def check(tensors, *, beta, loss, label_smoothing=0.0):
    """Losses, rewards and gradients against float64; returns them as computed."""
    x = [t.detach().requires_grad_() for t in tensors]
    y = [t.detach().double().requires_grad_() for t in tensors]
    options = {"beta": beta, "loss": loss, "label_smoothing": label_smoothing}
    with kernels.use("triton"):
        got = kernels.dpo_loss(*x, **options)
    want = reference.dpo_loss(*y, **options)
    got[0].sum().backward()
    want[0].sum().backward()
    # The margin is a sum of four numbers and carries their roundings, those of βh and of an exponent x·log2(e); each
    # loss moves with it by its slope, and the slope by the largest |l''| near, beside the roundings of its own formula.
    slope = y[0].grad.abs()
    margin = 6 * U * sum(t.detach().abs() for t in y)
    from_kink = (1 - beta * (y[0] - y[2] - y[1] + y[3])).abs()
    allowed_slope = {
        "sigmoid": beta**2 / 4 * margin + 16 * U * beta,  # |l''| <= β²/4
        "robust": beta**2 / 4 * margin + 16 * U * beta,  # the same and a straight line
        "hinge": beta * (from_kink <= beta * margin + 4 * U),
        "squared-hinge": 2 * beta**2 * margin + 8 * U * slope,
        "ipo": 2 * margin + 8 * U * (slope + 1 / beta),
        "exponential": slope * torch.expm1(beta * margin + 8 * U) + torch.finfo(torch.float32).tiny,  # l'' = -β l'
        "discopop": 13.3 * beta**2 * margin + 100 * U * beta,  # |l''| <= 13.21 β²; five roundings times 1/τ
        "linear": torch.full_like(margin, 2 * U * beta),
    }[loss].detach()
    allowed = (slope + allowed_slope) * (margin + 4 * U / beta) + 16 * U * (want[0].detach().abs() + 1)
    losses = want[0].detach()
    assert close(got[0], losses, allowed, losses)
    for a, b in zip(got[1:], want[1:], strict=True):
        assert not a.requires_grad and ((a - b).abs() <= beta * margin + 2 * U * b.abs()).all()
    assert all(t.dtype == torch.float32 for t in got)
    for a, b in zip(x[:2], y[:2], strict=True):
        assert a.grad.dtype == a.dtype
        rounding = ROUND[a.dtype] * b.grad.abs() + (2.0**-24 if a.dtype == torch.float16 else 0)
        assert close(a.grad, b.grad, allowed_slope + rounding, losses)
    assert x[2].grad is None and y[2].grad is None  # π_ref is a constant
    return *got, x[0].grad, x[1].grad


@pytest.mark.parametrize(("loss", "label_smoothing"), CASES)
@settings(max_examples=15)
@given(
    n=st.integers(0, 2 * dpo.BLOCK + 1),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.float16, torch.bfloat16])] * 4),
    steps=st.tuples(*[st.integers(1, 3)] * 4),
    beta=st.sampled_from([0.01, 0.1, 1.0]),
    magnitude=st.sampled_from([0.01, 10.0, 1e3]),
    seed=st.integers(0, 2**16),
)
def test_any_batch(loss, label_smoothing, n, dtypes, steps, beta, magnitude, seed):
    g = torch.Generator().manual_seed(seed)
    tensors = [
        (torch.randn(n * s, generator=g) * magnitude).to(DEVICE, t)[::s] for s, t in zip(steps, dtypes, strict=True)
    ]
    check(tensors, beta=beta, loss=loss, label_smoothing=label_smoothing)


def test_a_loss_without_a_branch_is_an_error():
    x = torch.zeros(3, device=DEVICE)
    with pytest.raises(Exception) as error:
        dpo.dpo_loss(x, x, x, x, 0.1, 0.0, "unknown")
    assert "has no branch" in f"{error.value} {error.value.__cause__}"


@pytest.mark.parametrize("loss", ["sigmoid", "robust", "exponential", "discopop"])
def test_small_losses_keep_their_digits(backend, loss):
    """They are e^-x for large x: the relative error must stay small where 1 + e^-x rounds to 1."""
    h = torch.linspace(1, 80, 500, device=DEVICE)
    x, y = h.clone().requires_grad_(), h.double().requires_grad_()
    got, *_ = kernels.dpo_loss(x, *[torch.zeros_like(x)] * 3, beta=1.0, loss=loss)
    want, *_ = reference.dpo_loss(y, *[torch.zeros_like(y)] * 3, beta=1.0, loss=loss)
    for a, b in [(got, want), (torch.autograd.grad(got.sum(), x)[0], torch.autograd.grad(want.sum(), y)[0])]:
        assert ((a - b).abs() <= 2e-5 * b.abs()).all()  # e^x itself carries the rounding of x·log2(e)


@pytest.mark.parametrize(("loss", "label_smoothing"), CASES)
def test_far_margins(backend, loss, label_smoothing):
    """What float32 can hold is right and what it cannot is infinite, never NaN: e^88 fits, e^89 does not."""
    h = torch.tensor([88.0, 89.0, 100.0, 1e4, 1e8], device=DEVICE)
    h = torch.cat([-h, h])
    results = []
    for x, f in [(h.clone(), kernels.dpo_loss), (h.double(), reference.dpo_loss)]:
        zero = torch.zeros_like(x)
        options = {"beta": 1.0, "loss": loss, "label_smoothing": label_smoothing}
        losses = f(x.requires_grad_(), zero, zero, zero, **options)[0]
        results.append([losses.detach().float(), torch.autograd.grad(losses.sum(), x)[0].float()])
    for got, want in zip(*results, strict=True):
        assert got.isfinite().all() or loss == "exponential"
        torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-37)


def test_the_gradient_from_above_may_be_an_expanded_number():
    x = [torch.randn(700, device=DEVICE, requires_grad=True) for _ in range(4)]
    with kernels.use("triton"):
        kernels.dpo_loss(*x, beta=0.5)[0].mean().backward()
    got = x[0].grad.clone()
    x[0].grad = None
    reference.dpo_loss(*x, beta=0.5)[0].mean().backward()
    torch.testing.assert_close(got, x[0].grad)


@pytest.mark.parametrize("loss", reference.MARGIN_LOSSES)
def test_the_same_bits_every_run(parallel, loss):
    tensors = [torch.randn(3000, generator=torch.Generator().manual_seed(i)).to(DEVICE) for i in range(4)]
    runs = [check(tensors, beta=0.1, loss=loss) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
