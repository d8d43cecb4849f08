"""Advantages, token rewards and KL: plain functions of tensors, each with its formula and its source.

B responses, T tokens. A `mask` [B, T] is 1 on the tokens of a response, which stand in one run; what stands elsewhere
in the other arguments may be anything, NaN too, and is never read. Inputs may have any floating dtype; float64 stays.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference import masked_mean

# ---- KL between the policy and its reference, from tokens that the policy drew ---------------------------------------


def kl_k1(logprobs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """Σ_t log π_θ - log π_ref, [B, T] -> [B], nats a response: unbiased for KL(π_θ, π_ref) (Schulman 2020, k1)."""
    return torch.where(mask.bool(), logprobs - reference, 0.0).sum(-1)


def kl_k3(logprobs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """Σ_t ρ - 1 - log ρ with ρ = π_ref/π_θ, [B, T] -> [B], nats a response: never negative, and of less variance
    while the two are close (Schulman 2020, k3)."""
    log_ratio = torch.where(mask.bool(), reference - logprobs, 0.0)
    return (torch.expm1(log_ratio) - log_ratio).sum(-1)


def adapt_kl_coefficient(beta: float, kl: float, target: float, samples: int, horizon: int) -> float:
    """The next β after n `samples` at this KL: β (1 + clip(KL/target - 1, -0.2, 0.2) · min(1, n/horizon)).

    Ziegler et al. 2019, section 2.2, with K_β = 1/horizon a response; one step changes β by a fifth at most.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * min(1.0, samples / horizon))


# ---- rewards and advantages ------------------------------------------------------------------------------------------


def token_rewards(scores: Tensor, logprobs: Tensor, reference: Tensor, mask: Tensor, beta: float | Tensor) -> Tensor:
    """-β (log π_θ - log π_ref) at each token and the score [B] at the last one: [B, T], 0 outside the mask.

    Ziegler et al. 2019, eq. 2, spread over the tokens as in Stiennon et al. 2020. A row's sum is score - β·k1.
    """
    keep = mask.bool()
    penalty = torch.where(keep, -beta * (logprobs - reference), 0.0)
    return penalty + torch.where(_is_last(keep), scores[:, None], 0.0)


def _is_last(keep: Tensor) -> Tensor:
    """True at the last token of each row's run [B, T]."""
    return keep & ~F.pad(keep[:, 1:], (0, 1))


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float, log_ratios: Tensor | float = 0.0, **_
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, Schulman et al. 2016, eq. 16: [B, T] -> advantages, returns [B, T].

    Â_t = Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ V_{t+1} - V_t, where V is 0 after the last token: a response is a whole
    episode, and one that was cut off is treated as if it ended there. Returns are Â + V, the critic's targets (TD(λ)).

    `log_ratios` say log π_θ - log μ of tokens that another policy μ drew, 0 where it was π_θ. Then it is V-trace
    (Espeholt et al. 2018, eq. 1 and remark 2) with ρ_t = min(1, π_θ/μ) and c_t = λ ρ_t: the returns are
    v_t = V_t + ρ_t Â_t with Â_t = δ_t + γλ (v_{t+1} - V_{t+1}), what follows weighted as often as π_θ would go there.
    """
    keep = mask.bool()
    rewards, values = torch.where(keep, rewards, 0.0), torch.where(keep, values, 0.0)
    ratios = torch.where(keep, log_ratios, 0.0).clamp(max=0).exp()
    deltas = torch.where(keep, rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values, 0.0)
    advantages, corrections, carry = [], [], torch.zeros_like(deltas[:, 0])
    for delta, ratio in zip(deltas.flip(1).unbind(1), ratios.flip(1).unbind(1), strict=True):
        advantages.append(delta + gamma * lam * carry)  # 0 behind the run, so nothing leaks in from the padding
        carry = ratio * advantages[-1]
        corrections.append(carry)
    advantages, corrections = (torch.where(keep, torch.stack(x[::-1], 1), 0.0) for x in (advantages, corrections))
    return advantages, corrections + values


def rloo_advantages(returns: Tensor, group: int, **_) -> Tensor:
    """Return minus the mean return of the other responses to the same prompt: [B] -> [B].

    The responses to a prompt stand side by side, `group` of them. REINFORCE leave-one-out: Kool et al. 2019; Ahmadian
    et al. 2024, eq. 8.
    """
    return (centred(returns, group) * (group / (group - 1))).flatten()


def grpo_advantages(returns: Tensor, group: int, **_) -> Tensor:
    """Return, standardised among the responses to the same prompt: [B] -> [B] (Shao et al. 2024, section 4.1.2)."""
    spread = returns.view(-1, group).std(1, keepdim=True)
    return (centred(returns, group) / (spread + 1e-4)).flatten()


def centred(returns: Tensor, group: int) -> Tensor:
    """[B] -> [G, group], less the mean of each group: of returns that are all alike 0, and not what rounding left."""
    returns = returns.view(-1, group)
    return (returns[:, :, None] - returns[:, None, :]).mean(2)


def reinforce_advantages(returns: Tensor, baseline: Tensor | float, **_) -> Tensor:
    """Return minus what earlier rounds had: [B] -> [B] (REINFORCE with a reinforcement baseline: Williams 1992)."""
    return returns - baseline


def compared(
    by: Callable[..., Tensor], rewards: Tensor, values: Tensor, mask: Tensor, *, log_ratios: Tensor | float = 0.0, **how
) -> tuple[Tensor, Tensor]:
    """A whole response is one action, whose return, its score less β times its KL, is compared `by` rloo, grpo or
    reinforce; there is no critic, and so nothing for it to learn.

    The difference is earned at the last token. For a response of the policy itself each token has it as its advantage;
    of another, what V-trace makes of it: less where π_θ would hardly have gone on so. The other responses of its group
    are of that policy too, but a baseline may be anything that does not depend on the response.
    """
    better = by(rewards.sum(1), **how)
    earned, nothing = torch.where(_is_last(mask.bool()), better[:, None], 0.0), torch.zeros_like(mask)
    return gae(earned, nothing, mask, gamma=1.0, lam=1.0, log_ratios=log_ratios)[0], nothing


# rewards, values, mask [B, T], gamma=, lam=, group=, baseline=, log_ratios= -> advantages, returns [B, T]
ADVANTAGES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "gae": gae,
    "rloo": partial(compared, rloo_advantages),
    "grpo": partial(compared, grpo_advantages),
    "reinforce": partial(compared, reinforce_advantages),
}


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """x divided by its deviation over the mask's tokens, and unless not `shift_mean` brought to mean 0: [B, T], 0
    elsewhere.

    Advantages lose their mean (Huang et al. 2022, detail 7). Rewards are scaled only: taking the mean away, or putting
    it back afterwards as some code does, pays or charges for each token, which is a price on length.
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    scale = torch.where(variance > 1e-8, torch.rsqrt(variance), 1.0)  # what is all alike has no scale
    return torch.where(mask.bool(), (x - mean if shift_mean else x) * scale, 0.0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(R - V)/Var(R) over the mask's tokens, 0-dim: 1 for a critic that knows, 0 for a constant (or R)."""

    def variance(x: Tensor) -> Tensor:
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

    left, all_of_it = variance(returns - values), variance(returns)
    return torch.where(all_of_it > 0, 1 - left / all_of_it.clamp(min=1e-12), 0.0)
