"""Each function in plain PyTorch: the definition of what is right.

Notation: B sequences, T tokens, N tokens flattened, V vocabulary, D width. float16 and bfloat16 inputs are reduced in
float32; float64 inputs stay float64, and that is the reference every other implementation is measured against.
The public functions, which check their arguments and choose an implementation, are in `kernels/__init__.py`.
"""

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a target that counts for nothing: log-prob 0, no gradient

# The losses of a pair: functions of h, its margin of log-ratios, of β, and of label_smoothing ε, the chance that its
# label is flipped; a row without a use for ε does not name it. Each row has a branch in `kernels/dpo.py`.
MARGIN_LOSSES: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    # -log σ(βh): Rafailov et al. 2023 (DPO), eq. 7; with ε conservative DPO, Mitchell 2023
    "sigmoid": lambda h, beta, label_smoothing: (
        -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)
    ),
    # [(1 - ε) l(h) - ε l(-h)] / (1 - 2ε), l = -log σ(βh): Chowdhury et al. 2024 (rDPO); "sigmoid" of ε' = -ε / (1 - 2ε)
    "robust": lambda h, beta, label_smoothing: MARGIN_LOSSES["sigmoid"](
        h, beta, -label_smoothing / (1 - 2 * label_smoothing)
    ),
    # max(0, 1 - βh): Zhao et al. 2023 (SLiC-HF), eq. 2, with DPO's log-ratios
    "hinge": lambda h, beta, _: F.relu(1 - beta * h),
    # max(0, 1 - βh)²: Tang et al. 2024 (GPO), table 1
    "squared-hinge": lambda h, beta, _: F.relu(1 - beta * h) ** 2,
    # (h - 1/2β)²: Azar et al. 2023 (IPO), eq. 17
    "ipo": lambda h, beta, _: (h - 1 / (2 * beta)) ** 2,
    # e^-βh: Tang et al. 2024 (GPO), table 1
    "exponential": lambda h, beta, _: torch.exp(-beta * h),
    # (1 - m) (-log σ(βh)) + m e^-βh, m = σ(βh/τ), τ = 0.05: Lu et al. 2024 (DiscoPOP), eq. 5; e^-βh alone may overflow
    "discopop": lambda h, beta, _: (
        torch.exp(F.logsigmoid(20 * beta * h) - beta * h) - torch.sigmoid(-20 * beta * h) * F.logsigmoid(beta * h)
    ),
    # -βh: the "unlikelihood" of Rafailov et al. 2023, section 6, after Welleck et al. 2020
    "linear": lambda h, beta, _: -beta * h,
}
SMOOTHED = tuple(name for name, f in MARGIN_LOSSES.items() if "label_smoothing" in inspect.signature(f).parameters)


def upcast(x: Tensor) -> Tensor:
    """x in the precision of reductions: float32, or float64 where it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the mask's tokens of the whole batch, 0-dim; 0 where the mask is empty. Padding may hold NaN."""
    mask = mask.bool()
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def autocast(*factors: Tensor) -> list[Tensor]:
    """The factors of a product as autocast rounds them: to its dtype, but for float64. Without autocast as they are."""
    kind = factors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return list(factors)
    dtype = torch.get_autocast_dtype(kind)
    return [x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in factors]


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [..., D], weight [V, D] -> hidden · weightᵀ [..., V], summed and returned in float32 (float64 stays).

    Autocast rounds the two factors but not their product: around -80, bfloat16 numbers are half a nat apart.
    """
    hidden, weight = autocast(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        halves = hidden.dtype == weight.dtype and hidden.dtype in (torch.float16, torch.bfloat16)
        differentiable = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        if hidden.is_cuda and hidden.dim() == 2 and halves and not differentiable:
            return torch.mm(hidden, weight.t(), out_dtype=torch.float32)  # needs no float32 copies, has no derivative
        return F.linear(upcast(hidden), upcast(weight))


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, entropy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """log π(target) for each token, with π = softmax(hidden · weightᵀ / temperature).

    hidden [N, D], weight [V, D], targets [N] -> logprobs [N], and with `entropy` also H(π) [N] in nats.
    A target of -100 gives 0 for both, and its hidden state is not read.
    """
    (rows,) = (targets != IGNORE).nonzero(as_tuple=True)  # only these tokens meet the vocabulary
    logp = (logits(hidden[rows], weight) / temperature).log_softmax(-1)
    zeros = logp.new_zeros(len(targets))
    logprobs = zeros.index_add(0, rows, logp.gather(-1, targets[rows, None])[:, 0])
    return (logprobs, zeros.index_add(0, rows, -(logp.exp() * logp).sum(-1))) if entropy else logprobs


def sequence_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """log π(y | x): the sum of the token log-probs under the mask.

    hidden [B, T, D], weight [V, D], targets [B, T], mask [B, T] -> logprobs [B]. hidden[:, t] predicts targets[:, t].
    """
    targets = targets.where(mask.bool(), IGNORE)
    logprobs = token_logprobs(hidden.flatten(0, 1), weight, targets.flatten(), temperature=temperature)
    return logprobs.view(targets.shape).sum(-1)


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    loss: str = "sigmoid",
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses on the margin h = log π_θ(y_w)/π_ref(y_w) - log π_θ(y_l)/π_ref(y_l), one a pair: see MARGIN_LOSSES.

    Four sequence log-probs, each [B] -> losses [B], chosen_rewards [B], rejected_rewards [B]. Gradients go from the
    losses to the policy's log-probs only.
    """
    chosen = upcast(policy_chosen) - upcast(reference_chosen.detach())
    rejected = upcast(policy_rejected) - upcast(reference_rejected.detach())
    losses = MARGIN_LOSSES[loss](chosen - rejected, beta, label_smoothing)
    return losses, beta * chosen.detach(), beta * rejected.detach()


def ppo_clip_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip: float = 0.2
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate, Schulman et al. 2017, eq. 7, negated: -mean min(ρA, clip(ρ, 1-ε, 1+ε)A), ρ = π_θ / π_old.

    All [B, T] -> loss 0-dim, stats. `clip_fraction` is the share of tokens where the clipped term is the smaller one;
    `approx_kl` is mean(ρ - 1 - log ρ), an unbiased estimate of KL(π_old, π_θ) (Schulman 2020, k3), nats per token.
    """
    log_ratio = upcast(logprobs) - upcast(old_logprobs.detach())
    log_ratio = torch.where(mask.bool(), log_ratio, 0.0)  # padding may hold anything
    advantages = torch.where(mask.bool(), upcast(advantages.detach()), 0.0)
    ratio = log_ratio.exp()
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    with torch.no_grad():
        stats = {
            "clip_fraction": masked_mean((clipped < unclipped).to(ratio.dtype), mask),
            "approx_kl": masked_mean(torch.expm1(log_ratio) - log_ratio, mask),
        }
    return -masked_mean(torch.minimum(unclipped, clipped), mask), stats


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float = 0.2
) -> tuple[Tensor, dict[str, Tensor]]:
    """½ mean max((v - R)², (v_clip - R)²), v_clip = v_old + clip(v - v_old, -ε, ε): PPO2's value loss
    (Huang et al. 2022, "The 37 implementation details of PPO", detail 9).

    All [B, T] -> loss 0-dim, stats. `clip_fraction` is the share of tokens where the clipped term is the larger one.
    """
    keep = mask.bool()
    values, old_values, returns = (
        torch.where(keep, upcast(x), 0.0) for x in (values, old_values.detach(), returns.detach())
    )
    moved = values - old_values
    unclipped = (values - returns) ** 2
    clipped = (old_values + moved.clamp(-clip, clip) - returns) ** 2
    # inside the range both terms are the same but for the rounding of v_old + (v - v_old), which is no clipping
    cut = (moved.abs() > clip) & (clipped > unclipped)
    stats = {"clip_fraction": masked_mean(cut.to(values.dtype), mask).detach()}
    # an old value that is NaN is not beyond the range, and not inside it either
    return 0.5 * masked_mean(torch.where(cut | clipped.isnan(), clipped, unclipped), mask), stats
