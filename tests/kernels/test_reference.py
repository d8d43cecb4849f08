"""The references: against autograd's numerical derivative and against the formulas written out for each token."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
G = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, generator=G, dtype=torch.float64)


def softplus(x):
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def sigma(x):
    return math.exp(-softplus(-x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_logits_are_summed_in_float32(shape, dtype):
    hidden, weight = randn(*shape, 16).to(DEVICE, dtype), randn(7, 16).to(DEVICE, dtype).requires_grad_()
    got = reference.logits(hidden, weight)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    want = hidden.double() @ weight.double().t()
    assert (got - want).abs().max() <= 1e-6 * hidden.double().norm(dim=-1).max() * weight.double().norm(dim=-1).max()
    assert torch.autograd.grad(got.sum(), weight)[0].dtype == dtype
    with torch.no_grad():
        torch.testing.assert_close(reference.logits(hidden, weight), got)
    with torch.autocast(DEVICE, torch.bfloat16):  # rounds the factors, but float64 stays
        under = reference.logits(hidden, weight)
    assert under.dtype == got.dtype
    if dtype != torch.float64:
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
    assert torch.equal(under, reference.logits(hidden, weight))


def test_only_tokens_that_count_are_multiplied():
    hidden, weight, targets = randn(10, 8).requires_grad_(), randn(50, 8).requires_grad_(), torch.full((10,), -100)
    targets[[2, 7, 9]] = 4
    for function, arguments in (
        (reference.token_logprobs, (hidden, weight, targets)),
        (reference.sequence_logprobs, (hidden[None], weight, targets.clamp(min=0)[None], (targets >= 0)[None])),
    ):
        with FlopCounterMode(display=False) as flops:
            logprobs = function(*arguments)
        assert flops.get_total_flops() == 2 * 3 * 8 * 50
        with FlopCounterMode(display=False) as flops:
            logprobs.sum().backward()
        assert flops.get_total_flops() == 2 * 2 * 3 * 8 * 50


def test_token_logprobs_written_out():
    hidden, weight, targets = randn(4, 3), randn(5, 3), torch.tensor([0, 4, -100, 2])
    logp, entropy = reference.token_logprobs(hidden, weight, targets, temperature=0.7, entropy=True)
    for n, t in enumerate(targets.tolist()):
        z = [sum(hidden[n, i].item() * weight[v, i].item() for i in range(3)) / 0.7 for v in range(5)]
        total = sum(math.exp(x) for x in z)
        p = [math.exp(x) / total for x in z]
        assert logp[n].item() == pytest.approx(0 if t == -100 else math.log(p[t]))
        assert entropy[n].item() == pytest.approx(0 if t == -100 else -sum(q * math.log(q) for q in p))
    torch.testing.assert_close(reference.token_logprobs(hidden, weight, targets, temperature=0.7), logp)


def test_sequence_logprobs_written_out():
    hidden, weight, targets = randn(2, 3, 4), randn(5, 4), torch.tensor([[1, 2, 3], [4, 0, 99]])
    mask = torch.tensor([[1, 0, 1], [0, 0, 0]])
    got = reference.sequence_logprobs(hidden, weight, targets, mask)
    logits = hidden[0] @ weight.t()
    want = sum(logits[t, targets[0, t]].item() - math.log(sum(math.exp(x) for x in logits[t].tolist())) for t in (0, 2))
    assert got.tolist() == pytest.approx([want, 0.0])


WRITTEN_OUT = {  # of h, beta and label_smoothing
    "sigmoid": lambda h, b, e: (1 - e) * softplus(-b * h) + e * softplus(b * h),
    "robust": lambda h, b, e: ((1 - e) * softplus(-b * h) - e * softplus(b * h)) / (1 - 2 * e),
    "hinge": lambda h, b, e: max(0.0, 1 - b * h),
    "squared-hinge": lambda h, b, e: max(0.0, 1 - b * h) ** 2,
    "ipo": lambda h, b, e: (h - 0.5 / b) ** 2,
    "exponential": lambda h, b, e: math.exp(-b * h),
    "discopop": lambda h, b, e: (1 - sigma(b * h / 0.05)) * softplus(-b * h) + sigma(b * h / 0.05) * math.exp(-b * h),
    "linear": lambda h, b, e: -b * h,
}


@pytest.mark.parametrize("loss", reference.MARGIN_LOSSES)
def test_dpo_loss_written_out(loss):
    formula = WRITTEN_OUT[loss]
    assert (loss in reference.SMOOTHED) == (formula(1.0, 0.5, 0.1) != formula(1.0, 0.5, 0.0))
    pc, pr, rc, rr = (3 * randn(20) for _ in range(4))
    for beta in (0.1, 0.5, 2.0):
        for smoothing in (0.0, 0.1) if loss in reference.SMOOTHED else (0.0,):
            options = {"beta": beta, "loss": loss, "label_smoothing": smoothing}
            losses, chosen, rejected = reference.dpo_loss(pc, pr, rc, rr, **options)
            for i in range(20):
                h = (pc[i] - rc[i] - pr[i] + rr[i]).item()
                assert losses[i].item() == pytest.approx(formula(h, beta, smoothing), rel=1e-12)
                assert chosen[i].item() == pytest.approx(beta * (pc[i] - rc[i]).item())
                assert rejected[i].item() == pytest.approx(beta * (pr[i] - rr[i]).item())


def test_ppo_clip_loss_written_out():
    new, old, advantages, mask = 0.4 * randn(3, 5), 0.4 * randn(3, 5), randn(3, 5), torch.rand(3, 5, generator=G) < 0.6
    loss, stats = reference.ppo_clip_loss(new, old, advantages, mask, clip=0.2)
    total = cut = kl = 0.0
    for b, t in mask.nonzero().tolist():
        x, a = (new[b, t] - old[b, t]).item(), advantages[b, t].item()
        plain, clipped = math.exp(x) * a, min(max(math.exp(x), 0.8), 1.2) * a
        total, cut, kl = total - min(plain, clipped), cut + (clipped < plain), kl + math.exp(x) - 1 - x
    m = mask.sum().item()
    assert [loss.item(), *(s.item() for s in stats.values())] == pytest.approx([total / m, cut / m, kl / m])


def test_clipped_value_loss_written_out():
    new, old, returns, mask = randn(3, 5), randn(3, 5), randn(3, 5), torch.rand(3, 5, generator=G) < 0.6
    loss, stats = reference.clipped_value_loss(new, old, returns, mask, clip=0.2)
    total = cut = 0.0
    for b, t in mask.nonzero().tolist():
        v, o, r = new[b, t].item(), old[b, t].item(), returns[b, t].item()
        plain, clipped = (v - r) ** 2, (o + min(max(v - o, -0.2), 0.2) - r) ** 2
        total, cut = total + 0.5 * max(plain, clipped), cut + (clipped > plain)
    m = mask.sum().item()
    assert [loss.item(), stats["clip_fraction"].item()] == pytest.approx([total / m, cut / m])


def test_gradients():
    mask, targets = torch.tensor([[1, 1, 0]]), torch.tensor([[2, 0, -100]])
    check = torch.autograd.gradcheck
    token, sequence = reference.token_logprobs, reference.sequence_logprobs
    hidden, weight = randn(3, 4).requires_grad_(), randn(5, 4).requires_grad_()
    assert check(lambda h, w: token(h, w, targets[0], temperature=0.7, entropy=True), (hidden, weight))
    assert check(lambda h, w: token(h, w, targets[0]), (hidden, weight))
    assert check(lambda h, w: sequence(h[None], w, targets, mask), (hidden, weight))
    pair = [randn(4).requires_grad_() for _ in range(2)]
    constants = [randn(4) for _ in range(2)]
    for loss in reference.MARGIN_LOSSES:
        options = {"beta": 0.3, "loss": loss, "label_smoothing": 0.2 * (loss in reference.SMOOTHED)}
        assert check(lambda c, r, options=options: reference.dpo_loss(c, r, *constants, **options)[0], pair)
    x, rest = randn(1, 3).requires_grad_(), [randn(1, 3) for _ in range(2)]
    assert check(lambda x: reference.ppo_clip_loss(x, *rest, mask)[0], x)
    assert check(lambda x: reference.clipped_value_loss(x, *rest, mask)[0], x)
