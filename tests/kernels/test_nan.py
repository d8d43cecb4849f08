"""A NaN at what counts comes out as NaN, in both implementations; what does not count is never read."""

import pytest
import torch

import kernels
from kernels import reference

pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's maximum is numpy's
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PPO = {
    "ppo_clip_loss": ["logprobs", "old_logprobs", "advantages"],
    "clipped_value_loss": ["values", "old_values", "returns"],
}
PAIRS = ["policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected"]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def head(v, ignored=()):
    """hidden [2, 3, 8], weight [V, 8], targets [6] of which some are ignored."""
    hidden, weight = randn(2, 3, 8), randn(v, 8, seed=1)
    targets = torch.tensor([3, v - 10, 0, 7, v // 2, v - 1], device=DEVICE)
    return hidden, weight, targets.scatter(0, torch.tensor(ignored, dtype=torch.int64, device=DEVICE), -100)


def token_outputs(hidden, weight, targets):
    """Log-probs, entropies, and the gradients that both have for hidden and weight."""
    hidden, weight = hidden.flatten(0, 1).requires_grad_(), weight.clone().requires_grad_()
    out = kernels.token_logprobs(hidden, weight, targets, entropy=True)
    return *(x.detach() for x in out), *torch.autograd.grad(out[0].sum() + out[1].sum(), (hidden, weight))


def test_a_hidden_state_that_counts(backend):
    hidden, weight, targets = head(1100)  # more than one span
    clean = token_outputs(hidden, weight, targets)
    hidden[0, 2, 5] = torch.nan
    *spoilt, weight_grad = token_outputs(hidden, weight, targets)
    for a, b in zip(spoilt, clean, strict=False):
        assert a[2].isnan().all()
        assert torch.equal(a[[0, 1, 3, 4, 5]], b[[0, 1, 3, 4, 5]])
    assert weight_grad.isnan().all()


@pytest.mark.parametrize("entry", [1, 600, 1098])
def test_a_weight_of_which_no_target_is_one(backend, entry):
    hidden, weight, targets = head(1100)  # more than one span
    weight[entry, 3] = torch.nan
    assert all(x.isnan().all() for x in kernels.token_logprobs(hidden.flatten(0, 1), weight, targets, entropy=True))


def test_a_hidden_state_whose_target_is_ignored(backend):
    ignored = 0, 4
    hidden, weight, targets = head(50, ignored)
    clean = token_outputs(hidden, weight, targets)
    hidden.view(6, 8)[ignored, :] = torch.nan
    spoilt = token_outputs(hidden, weight, targets)
    assert all(torch.equal(a, b) for a, b in zip(spoilt, clean, strict=True))
    assert not any(x[ignored,].any() for x in clean[:3])


def test_hidden_states_of_sequences(backend):
    """In the first row one outside the mask, in the second one inside."""
    hidden, weight, targets = head(50)
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]], device=DEVICE)
    results = []
    for rows in ([], [0], [0, 1]):
        x, w = hidden.clone(), weight.clone().requires_grad_()
        x[rows, 1] = torch.nan
        x.requires_grad_()
        logprobs = kernels.sequence_logprobs(x, w, targets.view(2, 3), mask)
        results.append((logprobs.detach(), *torch.autograd.grad(logprobs[0], (x, w))))
    clean, outside, inside = results
    assert all(torch.equal(a, b) for a, b in zip(outside, clean, strict=True))
    assert inside[0][0] == clean[0][0] and inside[0][1].isnan()


@pytest.mark.parametrize("count", [0, 3])
def test_no_token_that_counts_is_a_differentiable_zero(backend, count):
    hidden, weight = torch.full((count, 8), torch.nan, device=DEVICE, requires_grad=True), randn(50, 8).requires_grad_()
    targets = torch.full((count,), -100, device=DEVICE)
    for out in kernels.token_logprobs(hidden, weight, targets, entropy=True):
        assert out.shape == (count,) and not out.any()
        grads = torch.autograd.grad(out.sum(), (hidden, weight), retain_graph=True)
        assert not any(g.any() for g in grads)
    sequence = hidden[None].expand(2, count, 8), weight, targets.expand(2, count), torch.zeros(2, count, device=DEVICE)
    logprobs = kernels.sequence_logprobs(*sequence)
    assert logprobs.tolist() == [0, 0]
    assert not any(g.any() for g in torch.autograd.grad(logprobs.sum(), (hidden, weight)))


@pytest.mark.parametrize("loss", reference.MARGIN_LOSSES)
def test_a_pair(backend, loss):
    """Four of forty, each with another number spoilt."""
    pairs = {name: 5 * randn(40, seed=i) for i, name in enumerate(PAIRS)}

    def outputs():
        policy = [pairs[name].requires_grad_() for name in PAIRS[:2]]
        out = kernels.dpo_loss(**pairs, beta=0.3, loss=loss)
        return *(x.detach() for x in out), *torch.autograd.grad(out[0].sum(), policy)

    clean = outputs()
    for i, name in enumerate(PAIRS):
        pairs[name] = pairs[name].detach().index_fill(0, torch.tensor([17 + i], device=DEVICE), torch.nan)
    spoilt = outputs()
    for i, name in enumerate(PAIRS):
        assert [x[17 + i].isnan().item() for x in spoilt[:3]] == [True, "_chosen" in name, "_rejected" in name]
    for a, b in zip(spoilt, clean, strict=True):
        a[17:21] = b[17:21] = 0
        assert torch.equal(a, b)


@pytest.mark.parametrize(("name", "argument"), [(name, a) for name, arguments in PPO.items() for a in arguments])
def test_a_token(backend, name, argument):
    tokens = {a: randn(2, 6, seed=i) for i, a in enumerate(PPO[name])}
    mask = torch.tensor([[0, 1, 1, 1, 0, 1], [1, 1, 1, 0, 0, 1]], device=DEVICE)

    def outputs():
        new = tokens[PPO[name][0]].requires_grad_()
        loss, stats = getattr(kernels, name)(**tokens, mask=mask)
        return loss.detach(), *stats.values(), *torch.autograd.grad(loss, new)

    clean = outputs()
    untouched = tokens[argument].detach()
    for row, column in mask.nonzero().tolist():  # one at a time: beyond the clip and inside it, better and worse
        tokens[argument] = untouched.clone()
        tokens[argument][row, column] = torch.nan
        loss, *_, grad = outputs()
        assert loss.isnan()
        grad[row, column] = clean[-1][row, column]
        assert torch.equal(grad, clean[-1])
    tokens[argument] = untouched.where(mask.bool(), torch.nan)
    assert all(torch.equal(a, b) for a, b in zip(outputs(), clean, strict=True))
    assert not clean[-1][mask == 0].any()
