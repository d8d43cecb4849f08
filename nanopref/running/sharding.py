"""How what learns is spread over processes: a copy in each, whose gradients are summed (DDP, Li et al. 2020), or a
share of each weight in each, gathered a block at a time while it is needed (FSDP2; ZeRO-3: Rajbhandari et al. 2020).

A model's file knows nothing of it. Losses are divided by the whole batch, so gradients are added and not averaged.
What takes half a second to import is imported where it is used, and known by what it can.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanopref.running import parallel

Model = TypeVar("Model", bound=nn.Module)
T = TypeVar("T")

AS_MODULE = ("hidden", "logprobs", "logits")  # methods of a language model that are called as itself is


def put(model: Model, device: torch.device | str, prepare: Callable[[nn.Module], Any]) -> Model:
    """A language model, or one with a scalar head, on this device; with --parallel fsdp a share of it in each process.
    Each part, which may be on the disk still, is first prepared (`prepare`, a block or what is around them), so that a
    model that is read and shared out is never whole in one process.

    Shares are gathered as autocast would round them: matrices of blocks in the dtype of products, all else as it is.
    """
    body, device = getattr(model, "transformer", model), torch.device(device)
    if not parallel.shards():
        prepare(body)
        there = all(x.device == device for x in [*model.parameters(), *model.buffers()])
        return model if there else model.to(device)
    from torch.distributed.fsdp import MixedPrecisionPolicy, register_fsdp_forward_method

    # log-probs are a view, which nobody changes in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    rounded = MixedPrecisionPolicy(parallel.precision(model, device), torch.float32, cast_forward_inputs=False)
    if not sharded(body):
        for block in body.blocks:
            prepare(block)
            norms = [part for part in block.modules() if isinstance(part, nn.LayerNorm | nn.RMSNorm)]
            _shard(norms, device)
            _shard(block, device, rounded)
        prepare(body)
        _shard(body, device)
        for name in AS_MODULE:
            register_fsdp_forward_method(body, name)
    if body is not model and not sharded(model.score):
        _shard(model.score, device)
        model.bias = model.bias.to(device)
    return model


def _shard(part: nn.Module | list[nn.Module], device: torch.device, policy: Any = None) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    usual, blocks = MixedPrecisionPolicy(cast_forward_inputs=False), policy is not None
    # what is not a block is little, or needed again at once
    fully_shard(part, mesh=mesh(device.type), mp_policy=policy or usual, reshard_after_forward=blocks)
    module = part[0] if isinstance(part, list) else part
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)  # gloo has no other


@lru_cache(maxsize=1)
def mesh(kind: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(kind, (parallel.world_size(),))


def sharded(model: nn.Module) -> list[Any]:
    """The parts of a model that are shared out, each by itself."""
    return [part for part in model.modules() if hasattr(part, "unshard")]


def spread(model: nn.Module) -> bool:
    """Whether a model is tied to those in other processes, so that it cannot be copied."""
    return any(hasattr(part, "set_requires_gradient_sync") for part in model.modules())


def gather_again(model: nn.Module) -> None:
    """Hold no more than the shares until a model is next called, as after calls that no backward pass followed."""
    for part in sharded(model):
        part.reshard()


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """All weights are there inside, so that processes may call the model as often as each likes, as in sampling."""
    with torch.no_grad():
        for part in sharded(model):
            part.unshard()
    try:
        yield
    finally:
        gather_again(model)


def sum_gradients_of(model: nn.Module) -> None:
    """From now on each backward pass through a call of this module sums gradients over the processes, while it goes on
    for the layers before: unless `accumulated` says that another follows. (Those of shares are always summed.)"""
    if parallel.world_size() > 1 and not spread(model):
        from torch.distributed._composable.replicate import replicate  # DDP without a wrapper

        replicate(model, gradient_as_bucket_view=True)
        model.register_comm_hook(None, _added)


def _added(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])


def accumulated(model: nn.Module, pieces: Iterable[T]) -> Iterator[T]:
    """Pieces of a batch, whose gradients add up in each process and are summed over the processes with the last one.

    Where weights are shared out so are gradients, each time: whole ones would take the memory that was saved.
    """
    pieces, waits = list(pieces), hasattr(model, "set_requires_gradient_sync") and not sharded(model)
    for i, piece in enumerate(pieces, 1):
        if waits:
            model.set_requires_gradient_sync(i == len(pieces))
        yield piece


# ---- tensors of which each process may hold a share ------------------------------------------------------------------


@torch.no_grad()
def assign(x: Tensor, values: Tensor) -> None:
    """Let a tensor hold the same values in all processes, or each its share of them."""
    if hasattr(x, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values, x.device_mesh, x.placements)
    x.copy_(values)


def one_by_one(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f, which takes a stack of matrices [n, …] and gives as many, one by one; of sharded ones each process has whole
    matrices to do, its share of the n."""
    if not hasattr(x, "device_mesh"):
        return f(x)
    from torch.distributed.tensor import DTensor, Shard

    mine = x.redistribute(placements=[Shard(0)])
    done = DTensor.from_local(f(mine.to_local()), x.device_mesh, [Shard(0)], shape=x.shape, stride=x.stride())
    return done.redistribute(placements=x.placements)
