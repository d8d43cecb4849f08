"""The Triton PPO losses against float64, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import ppo, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOSSES = ["ppo_clip_loss", "clipped_value_loss"]
ROUND = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7 if kernels.INTERPRETED else 2.0**-8}


def batch(b, t, dtype=torch.float32, *, spread=0.5, kept=0.7, seed=0, sliced=False):
    """new, old and third [B, T], and a mask; padding holds NaN."""
    g = torch.Generator().manual_seed(seed)
    width = t + 1 if sliced else t
    old, third = torch.randn(b, width, generator=g), torch.randn(b, width, generator=g)
    new = old + spread * torch.randn(b, width, generator=g)
    mask = torch.rand(b, width, generator=g) < kept
    tensors = [x.masked_fill(~mask, torch.nan).to(DEVICE, dtype) for x in (new, old, third)] + [mask.to(DEVICE)]
    return [x[:, :-1] if sliced else x for x in tensors]


def check(name, new, old, third, mask, clip=0.2):
    x, y = new.detach().requires_grad_(), new.detach().double().requires_grad_()
    with kernels.use("triton"):
        got, stats = getattr(kernels, name)(x, old, third, mask, clip=clip)
    want, want_stats = getattr(reference, name)(y, old.double(), third.double(), mask, clip=clip)
    assert got.dtype == torch.float32 and got.dim() == 0 and stats.keys() == want_stats.keys()
    (3 * got).backward()
    (3 * want).backward()
    keep = mask.bool()
    # every token's term carries a few roundings of float32 relative to its own size (e^x one of x, too), its mean those
    # of M terms' sizes
    with torch.no_grad():
        a, b, c = (torch.where(keep, t.double(), 0.0) for t in (new, old, third))
        if name == "ppo_clip_loss":
            size = ((a - b).exp() + 1 + clip) * c.abs() * (1 + (a - b).abs() + a.abs() + b.abs())
        else:
            size = (a.abs() + b.abs() + c.abs() + clip) ** 2
        mean = reference.masked_mean(size, mask)
    # a token within rounding of the clip's edge may fall on either side: none does for numbers drawn at random
    assert (got - want).abs() <= 1e-6 * mean
    for key, value in stats.items():
        assert not value.requires_grad and value.dim() == 0
        assert (value - want_stats[key]).abs() <= 1e-5 * (1 + mean if key == "approx_kl" else 1)
    share = 3 / keep.sum().clamp(min=1)
    allowed = ROUND[new.dtype] * y.grad.abs() + share * 2e-6 * (size + size.sqrt())
    allowed += 2.0**-24 if new.dtype == torch.float16 else 0
    assert x.grad.dtype == new.dtype and ((x.grad - y.grad).abs() <= allowed).all()
    assert not x.grad[~keep].any()
    return got, *stats.values(), x.grad


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=25)
@given(
    b=st.integers(0, 5),
    t=st.integers(0, 900),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    spread=st.sampled_from([1e-3, 0.5, 3.0]),
    kept=st.sampled_from([0.0, 0.6, 1.0]),
    clip=st.sampled_from([0.1, 0.2, 0.5]),
    sliced=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_batch(name, b, t, dtype, spread, kept, clip, sliced, seed):
    check(name, *batch(b, t, dtype, spread=spread, kept=kept, seed=seed, sliced=sliced), clip)


@pytest.mark.parametrize("name", LOSSES)
def test_more_blocks_than_programs(name, monkeypatch):
    monkeypatch.setattr(ppo, "PROGRAMS", 4)
    check(name, *batch(7, 1500))


@pytest.mark.parametrize("name", LOSSES)
def test_an_empty_mask_is_zero(name):
    new, old, third, mask = batch(3, 50)
    assert not any(x.any() for x in check(name, new, old, third, mask & False))


@pytest.mark.parametrize("name", LOSSES)
def test_a_single_token(name):
    check(name, *batch(1, 1, kept=1.0))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_a_mask_of_numbers(name, dtype):
    new, old, third, mask = batch(3, 50)
    a, b = check(name, new, old, third, mask), check(name, new, old, third, mask.to(dtype))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_rounding_inside_the_range_is_no_clipping(backend):
    """v_old + (v - v_old) is not v where v is the smaller number, which errors of its size show."""
    g = torch.Generator().manual_seed(0)
    values, returns = (0.01 * torch.randn(1, 2000, generator=g).to(DEVICE) for _ in range(2))
    old = 0.1 * torch.rand(1, 2000, generator=g).to(DEVICE)
    _, stats = kernels.clipped_value_loss(values, old, returns, torch.ones_like(old), clip=0.5)
    assert stats["clip_fraction"] == 0


def test_a_kl_of_small_steps_keeps_its_digits():
    """e^x - 1 - x is x²/2 for small x, of which the plain difference keeps nothing."""
    x = torch.logspace(-6, 0.5, 400, device=DEVICE)[None]
    for sign in (1, -1):
        with kernels.use("triton"):
            stats = [kernels.ppo_clip_loss(sign * v, 0 * v, v, v)[1] for v in x.split(40, 1)[::3]]
        for s, v in zip(stats, x.split(40, 1)[::3], strict=True):
            v = sign * v.double()
            want = torch.where(v.abs() < 1e-3, v**2 / 2 + v**3 / 6 + v**4 / 24, torch.expm1(v) - v).mean()
            assert abs(s["approx_kl"] - want) <= 3e-6 * want


@pytest.mark.parametrize("name", LOSSES)
def test_the_same_bits_every_run(parallel, name):
    runs = [check(name, *batch(9, 700)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
