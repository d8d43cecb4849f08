"""DPO's losses on the margin of a pair, as one Triton launch forward and one backward.

With h = log π_θ(y_w)/π_ref(y_w) - log π_θ(y_l)/π_ref(y_l), one number a pair, the losses l(h) are the rows of
`reference.MARGIN_LOSSES` and the branches of `_margin_loss`, which has the slope l' beside each. h enters with +1 from
the chosen and -1 from the rejected response, so the slope is all the backward needs: the forward stores it, the
backward multiplies it by what comes from above. For B float32 pairs the forward moves 32·B bytes (four vectors in,
losses, two rewards and slope out) and the backward 16·B, the least there is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # pairs a program


@triton.jit
def _log1p(u):
    # Kahan: the rounding of 1 + u is undone by the quotient, so that a small u keeps its digits
    w = 1.0 + u
    return tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def _logistic(x):
    """-log σ(x), and σ(-x), its slope negated."""
    u = tl.exp(-tl.abs(x))
    return _log1p(u) + tl.maximum(-x, 0.0), tl.where(x >= 0, u, 1.0) / (1.0 + u)


@triton.jit
def _margin_loss(h, beta, label_smoothing, LOSS: tl.constexpr):
    """Loss l and slope dl/dh, a branch for each row of `reference.MARGIN_LOSSES`. NaN compares as False."""
    x = beta * h
    if LOSS == "sigmoid" or LOSS == "robust":  # l' = -β (σ(-x) - ε)
        if LOSS == "robust":
            label_smoothing = -label_smoothing / (1 - 2 * label_smoothing)
        right, sigma = _logistic(x)
        wrong, _ = _logistic(-x)
        loss = (1 - label_smoothing) * right + label_smoothing * wrong
        slope = -beta * (sigma - label_smoothing)
    elif LOSS == "hinge":  # l' = -β where x < 1
        loss = tl.where(x >= 1, 0.0, 1 - x)
        slope = tl.where(x >= 1, 0.0, -beta)
    elif LOSS == "squared-hinge":  # l' = -2β max(0, 1 - x)
        short = tl.where(x >= 1, 0.0, 1 - x)
        loss = short * short
        slope = -2 * beta * short
    elif LOSS == "ipo":  # l' = 2 (h - 1/2β)
        distance = h - 0.5 / beta
        loss = distance * distance
        slope = 2 * distance
    elif LOSS == "exponential":  # l' = -β e^-x
        loss = tl.exp(-x)
        slope = -beta * loss
    elif LOSS == "discopop":  # with n = 1 - m, l' = β (n ((m e^-x + m log σ(x)) / τ - σ(-x)) - m e^-x)
        logistic, sigma = _logistic(x)
        minus_log_m, n = _logistic(20 * x)
        exponential = tl.exp(-minus_log_m - x)  # m e^-x: where e^-x overflows, m is the smaller by far
        loss = n * logistic + exponential
        slope = beta * (n * (20 * (exponential - (1 - n) * logistic) - sigma) - exponential)
    elif LOSS == "linear":
        loss = -x
        slope = -beta
    else:
        tl.static_assert(False, "a row of reference.MARGIN_LOSSES has no branch here")
    return loss, slope


@triton.jit
def _forward(
    policy_chosen, policy_rejected, reference_chosen, reference_rejected, losses, chosen, rejected, slopes,
    stride_pc, stride_pr, stride_rc, stride_rr, n, beta, label_smoothing, LOSS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    ratio_w = tl.load(policy_chosen + i * stride_pc, mask=inside, other=0.0).to(tl.float32)
    ratio_w -= tl.load(reference_chosen + i * stride_rc, mask=inside, other=0.0).to(tl.float32)
    ratio_l = tl.load(policy_rejected + i * stride_pr, mask=inside, other=0.0).to(tl.float32)
    ratio_l -= tl.load(reference_rejected + i * stride_rr, mask=inside, other=0.0).to(tl.float32)
    loss, slope = _margin_loss(ratio_w - ratio_l, beta, label_smoothing, LOSS)
    tl.store(losses + i, loss, mask=inside)
    tl.store(chosen + i, beta * ratio_w, mask=inside)
    tl.store(rejected + i, beta * ratio_l, mask=inside)
    tl.store(slopes + i, slope, mask=inside)


@triton.jit
def _backward(grad, slopes, grad_chosen, grad_rejected, stride_grad, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    g = tl.load(grad + i * stride_grad, mask=inside, other=0.0) * tl.load(slopes + i, mask=inside, other=0.0)
    tl.store(grad_chosen + i, g, mask=inside)
    tl.store(grad_rejected + i, -g, mask=inside)


@torch.library.custom_op("kernels::dpo_loss", mutates_args=())
def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    label_smoothing: float,
    loss: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`kernels.dpo_loss` -> losses, chosen rewards, rejected rewards, slopes dl/dh, all [B] float32."""
    x = policy_chosen, policy_rejected, reference_chosen, reference_rejected
    n = len(policy_chosen)
    out = tuple(policy_chosen.new_empty(n, dtype=torch.float32) for _ in range(4))
    if n:
        strides = (t.stride(0) for t in x)
        _forward[(triton.cdiv(n, BLOCK),)](*x, *out, *strides, n, beta, label_smoothing, LOSS=loss, BLOCK=BLOCK)
    return out


@dpo_loss.register_fake
def _(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, label_smoothing, loss):
    return tuple(policy_chosen.new_empty(len(policy_chosen), dtype=torch.float32) for _ in range(4))


@torch.library.custom_op("kernels::dpo_loss_backward", mutates_args=())
def dpo_loss_backward(
    grad: Tensor, slopes: Tensor, chosen_dtype: torch.dtype, rejected_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients for the chosen and the rejected log-probs, each [B] in its input's dtype."""
    n = len(slopes)
    out = slopes.new_empty(n, dtype=chosen_dtype), slopes.new_empty(n, dtype=rejected_dtype)
    if n:  # grad may be one number expanded (stride 0): it is read as it is, not copied first
        _backward[(triton.cdiv(n, BLOCK),)](grad, slopes, *out, grad.stride(0), n, BLOCK=BLOCK)
    return out


@dpo_loss_backward.register_fake
def _(grad, slopes, chosen_dtype, rejected_dtype):
    return slopes.new_empty(len(slopes), dtype=chosen_dtype), slopes.new_empty(len(slopes), dtype=rejected_dtype)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(output[3])
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype


def _first(ctx, grad, *_):
    (slopes,) = ctx.saved_tensors
    return *dpo_loss_backward(grad, slopes, *ctx.dtypes), None, None, None, None, None


def _second(ctx, *_):
    raise RuntimeError("kernels: the Triton dpo_loss has no second derivative; use kernels.use('torch') for it")


dpo_loss.register_autograd(_first, setup_context=_setup)
dpo_loss_backward.register_autograd(_second)
