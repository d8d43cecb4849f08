"""Each function in plain PyTorch: the definition of what is right.

Notation: B sequences, T tokens, N tokens flattened, V vocabulary, D width. float16 and bfloat16 inputs are reduced in
float32; float64 inputs stay float64, and that is the reference every other implementation is measured against.
The public functions, which check their arguments and choose an implementation, are in `kernels/__init__.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a target that counts for nothing: log-prob 0, no gradient
DPO_LOSSES = ("sigmoid", "hinge", "ipo")


def upcast(x: Tensor) -> Tensor:
    """x in the precision of reductions: float32, or float64 where it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the mask's tokens of the whole batch, 0-dim; 0 where the mask is empty. Padding may hold NaN."""
    mask = mask.bool()
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, entropy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """log π(target) for each token, with π = softmax(hidden · weightᵀ / temperature).

    hidden [N, D], weight [V, D], targets [N] -> logprobs [N], and with `entropy` also H(π) [N] in nats.
    A target of -100 gives 0 for both.
    """
    logits = upcast(F.linear(hidden, weight)) / temperature
    if not entropy:
        return -F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    counts = targets != IGNORE
    logp = logits.log_softmax(-1)
    chosen = logp.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    return torch.where(counts, chosen, 0.0), torch.where(counts, -(logp.exp() * logp).sum(-1), 0.0)


def sequence_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """log π(y | x): the sum of the token log-probs under the mask.

    hidden [B, T, D], weight [V, D], targets [B, T], mask [B, T] -> logprobs [B]. hidden[:, t] predicts targets[:, t].
    """
    rows, columns = mask.nonzero(as_tuple=True)  # only these tokens meet the vocabulary
    logprobs = token_logprobs(hidden[rows, columns], weight, targets[rows, columns], temperature=temperature)
    return logprobs.new_zeros(len(mask)).index_add(0, rows, logprobs)


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
    """Losses on the margin h = log π_θ(y_w)/π_ref(y_w) - log π_θ(y_l)/π_ref(y_l), one a pair.

    Four sequence log-probs, each [B] -> losses [B], chosen_rewards [B], rejected_rewards [B]. Gradients go from the
    losses to the policy's log-probs only.
    "sigmoid": -log σ(βh), Rafailov et al. 2023, eq. 7; `label_smoothing` ε is the chance that a label is flipped
               (Mitchell 2023, conservative DPO): -(1-ε) log σ(βh) - ε log σ(-βh).
    "hinge":   max(0, 1 - βh), Zhao et al. 2023 (SLiC-HF), eq. 2, with DPO's log-ratios.
    "ipo":     (h - 1/2β)², Azar et al. 2023, eq. 17.
    """
    chosen = upcast(policy_chosen) - upcast(reference_chosen.detach())
    rejected = upcast(policy_rejected) - upcast(reference_rejected.detach())
    h = chosen - rejected
    if loss == "sigmoid":
        losses = -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)
    elif loss == "hinge":
        losses = F.relu(1 - beta * h)
    elif loss == "ipo":
        losses = (h - 1 / (2 * beta)) ** 2
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
    return 0.5 * masked_mean(torch.where(cut, clipped, unclipped), mask), stats
