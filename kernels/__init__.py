"""Sequence log-probs and the DPO and PPO losses: one signature each, implemented in PyTorch and in Triton.

    with kernels.use("torch"):                      # or "triton", or "auto": Triton on CUDA tensors, else PyTorch
        logprobs = kernels.sequence_logprobs(hidden, weight, targets, mask)

This module checks arguments and chooses the implementation; the maths is in `kernels/reference.py`. It imports torch
and nothing of the project around it.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kernels import reference
from kernels.reference import IGNORE

try:
    import triton
except ImportError:  # no wheel for this system: the PyTorch implementation is all there is
    triton = None
else:
    from kernels import dpo, logprob, ppo

BACKENDS = ("auto", "torch", "triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Triton reads TRITON_INTERPRET when it decorates a kernel: with 1, kernels run in Python, on CPU tensors too
INTERPRETED = triton is not None and triton.knobs.runtime.interpret

# What each thread has chosen, and what holds in those that have not: the first thread's choice. torch.compile reads and
# guards both, where it cannot read a ContextVar or ask which thread it is in.
_chosen, _elsewhere = threading.local(), "auto"
_chosen.first = True


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Choose the implementation inside a `with` block: "torch", "triton" or "auto".

    The choice is the thread's own. Threads without one, as those in which autograd runs backward on a GPU, see what the
    thread that imported this package has chosen at that moment, and "auto" where it has not.
    Raises ValueError for another name, and RuntimeError for "triton" where no Triton kernel can run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"kernels: there is no backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    if backend == "triton" and triton is None:
        raise RuntimeError("kernels: asked for Triton, which is not installed here; use 'torch' or 'auto'")
    if backend == "triton" and not (torch.cuda.is_available() or INTERPRETED):
        raise RuntimeError(
            "kernels: asked for Triton, but there is no GPU; use 'torch' or 'auto', or set TRITON_INTERPRET=1 before "
            "the start to run the kernels in Triton's interpreter, slowly"
        )
    before = getattr(_chosen, "backend", None)
    _choose(backend)
    try:
        yield
    finally:
        _choose(before)


def _choose(backend: str | None) -> None:
    global _elsewhere
    _chosen.backend = backend
    if getattr(_chosen, "first", False):
        _elsewhere = backend or "auto"


def _with_triton(x: Tensor) -> bool:
    """Whether a call on tensors like x goes to Triton; RuntimeError where that was asked for and cannot be."""
    backend = getattr(_chosen, "backend", None) or _elsewhere
    if backend == "triton" and not (x.is_cuda or INTERPRETED):
        raise RuntimeError(f"kernels: asked for Triton, which cannot take a tensor on {x.device}")
    if backend == "triton" and x.dtype == torch.float64:
        raise RuntimeError("kernels: asked for Triton, which has no float64 kernels; use 'torch'")
    return backend == "triton" or (backend == "auto" and triton is not None and x.is_cuda and x.dtype != torch.float64)


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, entropy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """hidden [N, D], weight [V, D], targets [N] -> log π(target) [N] (and the entropy [N]), nats, float32.

    A target of -100 gives 0 and no gradient. Differentiable in `hidden` and `weight`.
    Raises ValueError for shapes, dtypes, devices, targets or a temperature that do not fit.
    """
    hidden, weight = reference.autocast(hidden, weight)
    _check_head(hidden, weight, targets, temperature, "hidden [N, D], weight [V, D] and targets [N]", 1)
    if _with_triton(hidden):
        logprobs, entropies, _ = logprob.token_logprobs(hidden[None], weight, targets[None], temperature)
        return (logprobs[0], entropies[0]) if entropy else logprobs[0]
    return reference.token_logprobs(hidden, weight, targets, temperature=temperature, entropy=entropy)


def sequence_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """hidden [B, T, D], weight [V, D], targets [B, T], mask [B, T] -> log π(y | x) [B], nats, float32.

    The sum over the tokens where the mask is 1; hidden[:, t] predicts targets[:, t]. Other tokens cost nothing and
    their targets may hold anything. Raises ValueError as `token_logprobs` does.
    """
    if mask.shape != targets.shape or mask.device != targets.device:
        raise ValueError(f"kernels: mask {_say(mask)} must have the shape and device of targets {_say(targets)}")
    hidden, weight = reference.autocast(hidden, weight)
    want = "hidden [B, T, D], weight [V, D] and targets [B, T]"
    _check_head(hidden, weight, targets.where(mask.bool(), IGNORE), temperature, want, 2)
    if _with_triton(hidden):
        targets = targets.where(mask.bool(), IGNORE)
        return logprob.token_logprobs(hidden, weight, targets, temperature)[0].sum(-1)
    return reference.sequence_logprobs(hidden, weight, targets, mask, temperature=temperature)


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
    """Four sequence log-probs, each [B] -> losses [B], chosen_rewards [B], rejected_rewards [B].

    The rewards are implicit rewards β·log(π_θ/π_ref) and carry no gradient. `loss` is a row of
    `reference.MARGIN_LOSSES`, which says what each is. Raises ValueError for arguments that do not fit.
    """
    _check_alike(
        1,
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
    )
    if not beta > 0:
        raise ValueError(f"kernels: beta must be above 0, not {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"kernels: label_smoothing must be at least 0 and below 0.5, not {label_smoothing}")
    if loss not in reference.MARGIN_LOSSES:
        raise ValueError(f"kernels: loss must be one of {', '.join(reference.MARGIN_LOSSES)}, not {loss!r}")
    if label_smoothing and loss not in reference.SMOOTHED:
        raise ValueError(f"kernels: label_smoothing belongs to {', '.join(reference.SMOOTHED)}, not to {loss!r}")
    if _with_triton(policy_chosen):
        losses, chosen, rejected, _ = dpo.dpo_loss(
            policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, label_smoothing, loss
        )
        return losses, chosen.detach(), rejected.detach()
    return reference.dpo_loss(
        policy_chosen,
        policy_rejected,
        reference_chosen,
        reference_rejected,
        beta=beta,
        label_smoothing=label_smoothing,
        loss=loss,
    )


def ppo_clip_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip: float = 0.2
) -> tuple[Tensor, dict[str, Tensor]]:
    """All [B, T] -> loss 0-dim, stats {"clip_fraction", "approx_kl"} 0-dim without gradient.

    Raises ValueError for arguments that do not fit.
    """
    _check_alike(2, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    _check_clip(clip)
    if _with_triton(logprobs):
        loss, clip_fraction, approx_kl, *_ = ppo.clipped_loss(logprobs, old_logprobs, advantages, mask, clip, True)
        return loss, {"clip_fraction": clip_fraction.detach(), "approx_kl": approx_kl.detach()}
    return reference.ppo_clip_loss(logprobs, old_logprobs, advantages, mask, clip=clip)


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float = 0.2
) -> tuple[Tensor, dict[str, Tensor]]:
    """All [B, T] -> loss 0-dim, stats {"clip_fraction"} 0-dim without gradient.

    Raises ValueError for arguments that do not fit.
    """
    _check_alike(2, values=values, old_values=old_values, returns=returns, mask=mask)
    _check_clip(clip)
    if _with_triton(values):
        loss, clip_fraction, *_ = ppo.clipped_loss(values, old_values, returns, mask, clip, False)
        return loss, {"clip_fraction": clip_fraction.detach()}
    return reference.clipped_value_loss(values, old_values, returns, mask, clip=clip)


def _say(x: Tensor) -> str:
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"


def _check_head(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, want: str, dims: int) -> None:
    got = f"hidden {_say(hidden)}, weight {_say(weight)}, targets {_say(targets)}"
    if (
        targets.dim() != dims
        or hidden.dim() != dims + 1
        or weight.dim() != 2
        or hidden.shape[:-1] != targets.shape
        or hidden.shape[-1] != weight.shape[1]
    ):
        raise ValueError(f"kernels: needs {want}; got {got}")
    if hidden.dtype not in DTYPES or weight.dtype != hidden.dtype:
        raise ValueError(f"kernels: hidden and weight must share a floating dtype; got {got}")
    if targets.dtype != torch.int64:
        raise ValueError(f"kernels: targets must be int64; got {got}")
    if not hidden.device == weight.device == targets.device:
        raise ValueError(f"kernels: all tensors must be on one device; got {got}")
    if targets.numel() >= 2**31:
        raise ValueError(f"kernels: at most 2^31 - 1 tokens in a call; got {got}")
    if not temperature > 0:
        raise ValueError(f"kernels: temperature must be above 0, not {temperature}")
    # reading the targets of a GPU tensor would wait for the GPU, where the kernel itself asserts; fake ones are empty
    if targets.device.type == "cpu" and type(targets) is Tensor and not torch.compiler.is_compiling():
        wrong = (targets != IGNORE) & ((targets < 0) | (targets >= len(weight)))
        if wrong.any():
            raise ValueError(f"kernels: target {targets[wrong][0].item()} is not in [0, {len(weight)}) and not -100")


def _check_alike(dims: int, **tensors: Tensor) -> None:
    first = next(iter(tensors.values()))
    for name, x in tensors.items():
        if x.dim() != dims or x.shape != first.shape or x.device != first.device:
            got = ", ".join(f"{n} {_say(t)}" for n, t in tensors.items())
            raise ValueError(f"kernels: all must share a shape {'[B, T]' if dims == 2 else '[B]'} and a device; {got}")
        if name != "mask" and x.dtype not in DTYPES:
            raise ValueError(f"kernels: {name} must be floating, not {_say(x)}")


def _check_clip(clip: float) -> None:
    if not clip > 0:
        raise ValueError(f"kernels: clip must be above 0, not {clip}")
