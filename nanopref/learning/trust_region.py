"""A step of natural gradient inside a trust region (TRPO, Schulman et al. 2015): max L(θ) with mean KL(π_old, π_θ) ≤ δ.

L and the KL are closures that give a mean in pieces, whose sum over all processes it is: a micro-batch each, so that
one graph is held. A process may have none of them.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanopref.running import parallel

Pieces = Callable[[], Iterable[Tensor]]  # of a mean at the parameters as they are

# λ in F + λI: along most of a large model's directions a few responses show noise only, to which F⁻¹ would give all δ
DAMPING = 0.1
HALVINGS = 10


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tensors])


def total(mean: Pieces, parameters: Sequence[nn.Parameter]) -> Tensor:
    """A mean, from its pieces in all processes, 0-dim."""
    return parallel.sum_processes(sum((piece.detach() for piece in mean()), parameters[0].new_zeros(())))


def gradient(mean: Pieces, parameters: Sequence[nn.Parameter]) -> Tensor:
    """∇ of a mean, flat [P]."""
    slopes = (flat(torch.autograd.grad(piece, parameters)) for piece in mean())
    return parallel.sum_processes(sum(slopes, torch.zeros_like(flat(parameters))))


def fisher_product(kl: Pieces, parameters: Sequence[nn.Parameter], v: Tensor) -> Tensor:
    """F v [P], where F is the Hessian of the mean KL at θ_old, which is Fisher's matrix: ∇(vᵀ∇KL) (appendix C.1)."""
    product = torch.zeros_like(v)
    with sdpa_kernel(SDPBackend.MATH):  # the other forms of attention have no second derivative
        for piece in kl():
            slope = flat(torch.autograd.grad(piece, parameters, create_graph=True)) @ v
            product += flat(torch.autograd.grad(slope, parameters))
    return parallel.sum_processes(product)


def conjugate_gradient(product: Callable[[Tensor], Tensor], b: Tensor, steps: int) -> Tensor:
    """x with A x ≈ b after so many steps, from v -> A v for a positive definite A (Hestenes & Stiefel 1952)."""
    x, residual = torch.zeros_like(b), b.clone()
    direction, left = residual, residual @ residual
    enough = torch.finfo(b.dtype).eps ** 2 * left  # what is left then is rounding
    for _ in range(steps):
        if left <= enough:
            break
        ahead = product(direction)
        length = left / (direction @ ahead)
        x, residual = x + length * direction, residual - length * ahead
        left, before = residual @ residual, left
        direction = residual + left / before * direction
    return x


@torch.no_grad()
def line_search(
    surrogate: Pieces, kl: Pieces, parameters: Sequence[nn.Parameter], step: Tensor, delta: float
) -> dict[str, float]:
    """The first of θ + step, θ + step/2, θ + step/4 … where the surrogate is higher and the KL at most δ; after so many
    halvings θ, as it was. What changed: `improvement` of the surrogate, `approx_kl` as measured, and the `halvings`."""
    old, before = flat(parameters), total(surrogate, parameters)

    def go_to(weights: Tensor) -> None:
        for p, new in zip(parameters, weights.split([p.numel() for p in parameters]), strict=True):
            p.copy_(new.view_as(p))

    for halvings in range(HALVINGS + 1):
        go_to(old + 0.5**halvings * step)
        improvement = (total(surrogate, parameters) - before).item()
        distance = total(kl, parameters).item()
        if improvement > 0 and distance <= delta:
            return {"improvement": improvement, "approx_kl": distance, "halvings": halvings}
    go_to(old)
    return {"improvement": 0.0, "approx_kl": 0.0, "halvings": HALVINGS}


def improve(
    surrogate: Pieces, kl: Pieces, parameters: Sequence[nn.Parameter], *, delta: float, cg_steps: int
) -> dict[str, float]:
    """One step: along s = F⁻¹∇L as far as ½ sᵀFs = δ allows, then the line search; see there for what is returned, and
    `grad_norm`, |∇L|."""
    g = gradient(surrogate, parameters)
    s = conjugate_gradient(lambda v: fisher_product(kl, parameters, v) + DAMPING * v, g, cg_steps)
    curvature = s @ fisher_product(kl, parameters, s)
    length = (2 * delta / curvature.clamp(min=torch.finfo(g.dtype).tiny)).sqrt()
    return line_search(surrogate, kl, parameters, length * s, delta) | {"grad_norm": g.norm().item()}
