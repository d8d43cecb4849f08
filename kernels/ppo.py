"""PPO's clipped losses: the masked mean, the statistics and the gradient factor in one pass over the tokens.

    policy (Schulman et al. 2017, eq. 7)       l = -min(ρA, clip(ρ, 1-ε, 1+ε) A),   ρ = π_θ / π_old
    value  (Huang et al. 2022, detail 9)       l = ½ max((v - R)², (v_old + clip(v - v_old, -ε, ε) - R)²)

The loss is the mean of l over the M tokens of the mask. M is known only after the pass, so the forward stores dl/dx of
every token, and the backward multiplies it by (gradient from above) / M.

The same bits on every run: each program adds its blocks in a fixed order and writes one partial sum of each quantity;
a second, one-program launch adds the partial sums in a fixed order. How many programs there are depends on the
number of tokens alone. With float32 inputs and a bool mask the forward moves 17 bytes a token (three numbers and the
mask in, the factor out) and the backward 8.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # tokens a program handles at a time
PROGRAMS = 1024  # at most; a power of two, added up by one program


@triton.jit
def _kl(x):
    """e^x - 1 - x, by its series where the difference would cancel: relative error below 1e-6 everywhere."""
    tail = 1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040 + x * (1 / 40320 + x * (1 / 362880)))))
    return tl.where(tl.abs(x) < 0.5, x * x * (0.5 + x * (1 / 6 + x * tail)), tl.exp(x) - 1 - x)


@triton.jit
def _policy(logprob, old, advantage, clip):
    """Loss, its derivative by `logprob`, whether it was clipped, and the KL term of a token."""
    ratio = tl.exp(logprob - old)
    unclipped = ratio * advantage
    clipped = tl.minimum(tl.maximum(ratio, 1 - clip), 1 + clip) * advantage
    cut = clipped < unclipped
    return -tl.where(cut, clipped, unclipped), tl.where(cut, 0.0, -unclipped), cut, _kl(logprob - old)


@triton.jit
def _value(value, old, target, clip):
    """As `_policy`, with nothing for the KL term."""
    moved = value - old
    error, clipped = value - target, old + tl.minimum(tl.maximum(moved, -clip), clip) - target
    # inside the range both terms are the same but for the rounding of v_old + (v - v_old), which is no clipping
    cut = (clipped * clipped > error * error) & (tl.abs(moved) > clip)
    # an old value that is NaN is not beyond the range, and not inside it either
    square = tl.where(cut | (clipped != clipped), clipped * clipped, error * error)
    return 0.5 * square, tl.where(cut, 0.0, error), cut, tl.zeros_like(value)


@triton.jit
def _forward(new, old, third, mask, factors, partial, n, steps, clip, POLICY: tl.constexpr, BLOCK: tl.constexpr):
    program, programs = tl.program_id(0), tl.num_programs(0)
    loss_sum = tl.zeros([BLOCK], tl.float32)
    cut_sum = tl.zeros([BLOCK], tl.float32)
    kl_sum = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for step in range(steps):
        i = (step * programs + program).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = i < n
        keep = tl.load(mask + i, mask=inside, other=0) != 0
        # padding may hold anything, NaN too: zeros stand in for it before any arithmetic
        x = tl.where(keep, tl.load(new + i, mask=inside, other=0.0).to(tl.float32), 0.0)
        y = tl.where(keep, tl.load(old + i, mask=inside, other=0.0).to(tl.float32), 0.0)
        z = tl.where(keep, tl.load(third + i, mask=inside, other=0.0).to(tl.float32), 0.0)
        if POLICY:
            loss, slope, cut, kl = _policy(x, y, z, clip)
        else:
            loss, slope, cut, kl = _value(x, y, z, clip)
        tl.store(factors + i, slope, mask=inside)
        loss_sum += loss
        cut_sum += cut.to(tl.float32)
        kl_sum += kl
        count += keep.to(tl.float32)
    tl.store(partial + program, tl.sum(loss_sum))
    tl.store(partial + programs + program, tl.sum(cut_sum))
    tl.store(partial + 2 * programs + program, tl.sum(kl_sum))
    tl.store(partial + 3 * programs + program, tl.sum(count))


@triton.jit
def _finish(partial, loss, clip_fraction, approx_kl, share, programs, PROGRAMS: tl.constexpr):
    i = tl.arange(0, PROGRAMS)
    inside = i < programs
    count = tl.sum(tl.load(partial + 3 * programs + i, mask=inside, other=0.0))
    count = tl.maximum(count, 1.0)  # an empty mask: everything is 0
    tl.store(loss, tl.sum(tl.load(partial + i, mask=inside, other=0.0)) / count)
    tl.store(clip_fraction, tl.sum(tl.load(partial + programs + i, mask=inside, other=0.0)) / count)
    tl.store(approx_kl, tl.sum(tl.load(partial + 2 * programs + i, mask=inside, other=0.0)) / count)
    tl.store(share, 1.0 / count)


@triton.jit
def _backward(grad, factors, share, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    tl.store(out + i, tl.load(factors + i, mask=inside, other=0.0) * (tl.load(grad) * tl.load(share)), mask=inside)


@torch.library.custom_op("kernels::clipped_loss", mutates_args=())
def clipped_loss(
    new: Tensor, old: Tensor, third: Tensor, mask: Tensor, clip: float, policy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`kernels.ppo_clip_loss` (policy) or `kernels.clipped_value_loss` -> loss, clip fraction, approximate KL, 1/M,
    all 0-dim, and the factors [B, T]; all float32."""
    n = new.numel()
    scalars = tuple(new.new_empty((), dtype=torch.float32) for _ in range(4))
    factors = torch.empty(new.shape, dtype=torch.float32, device=new.device)
    programs = max(1, min(triton.cdiv(n, BLOCK), PROGRAMS))
    steps = triton.cdiv(n, BLOCK * programs)
    partial = factors.new_empty(4 * programs)
    x = (t.contiguous() for t in (new, old, third))
    bits = mask.bool().contiguous().view(torch.uint8)
    _forward[(programs,)](*x, bits, factors, partial, n, steps, clip, POLICY=policy, BLOCK=BLOCK)
    _finish[(1,)](partial, *scalars, programs, PROGRAMS=PROGRAMS)
    return *scalars, factors


@clipped_loss.register_fake
def _(new, old, third, mask, clip, policy):
    scalars = (new.new_empty((), dtype=torch.float32) for _ in range(4))
    return *scalars, torch.empty(new.shape, dtype=torch.float32, device=new.device)


@torch.library.custom_op("kernels::clipped_loss_backward", mutates_args=())
def clipped_loss_backward(grad: Tensor, factors: Tensor, share: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient [B, T] for the log-probs or values, in their dtype."""
    out = torch.empty_like(factors, dtype=dtype)
    if out.numel():
        _backward[(triton.cdiv(out.numel(), BLOCK),)](grad, factors, share, out, out.numel(), BLOCK=BLOCK)
    return out


@clipped_loss_backward.register_fake
def _(grad, factors, share, dtype):
    return torch.empty_like(factors, dtype=dtype)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(output[4], output[3])
    ctx.dtype = inputs[0].dtype


def _first(ctx, grad, *_):
    return clipped_loss_backward(grad, *ctx.saved_tensors, ctx.dtype), None, None, None, None, None


def _second(ctx, *_):
    raise RuntimeError("kernels: the Triton PPO losses have no second derivative; use kernels.use('torch') for it")


clipped_loss.register_autograd(_first, setup_context=_setup)
clipped_loss_backward.register_autograd(_second)
