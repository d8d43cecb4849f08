"""The references: against autograd's numerical derivative and against the formulas written out for each token."""

import math

import pytest
import torch

from kernels import reference

G = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, generator=G, dtype=torch.float64)


def softplus(x):
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


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


@pytest.mark.parametrize("loss", reference.DPO_LOSSES)
def test_dpo_loss_written_out(loss):
    pc, pr, rc, rr = (3 * randn(6) for _ in range(4))
    smoothing = 0.1 if loss == "sigmoid" else 0.0
    losses, chosen, rejected = reference.dpo_loss(pc, pr, rc, rr, beta=0.5, loss=loss, label_smoothing=smoothing)
    for i in range(6):
        h = (pc[i] - rc[i] - pr[i] + rr[i]).item()
        want = {
            "sigmoid": 0.9 * softplus(-0.5 * h) + 0.1 * softplus(0.5 * h),
            "hinge": max(0.0, 1 - 0.5 * h),
            "ipo": (h - 1.0) ** 2,
        }[loss]
        assert losses[i].item() == pytest.approx(want)
        assert chosen[i].item() == pytest.approx(0.5 * (pc[i] - rc[i]).item())
        assert rejected[i].item() == pytest.approx(0.5 * (pr[i] - rr[i]).item())


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


def test_rounding_inside_the_range_is_no_clipping():
    values = torch.randn(1, 1000, generator=G)
    old = values + 0.05 * torch.randn(1, 1000, generator=G).clamp(-1, 1)
    stats = reference.clipped_value_loss(values, old, torch.randn(1, 1000, generator=G), torch.ones(1, 1000))[1]
    assert stats["clip_fraction"] == 0


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
    for loss in reference.DPO_LOSSES:
        assert check(lambda c, r, loss=loss: reference.dpo_loss(c, r, *constants, beta=0.3, loss=loss)[0], pair)
    x, rest = randn(1, 3).requires_grad_(), [randn(1, 3) for _ in range(2)]
    assert check(lambda x: reference.ppo_clip_loss(x, *rest, mask)[0], x)
    assert check(lambda x: reference.clipped_value_loss(x, *rest, mask)[0], x)
