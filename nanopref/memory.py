"""How much memory a training step takes, without the hardware: `python -m nanopref.memory`

The steps of the scripts run on tensors without contents (FakeTensorMode), and the bytes of each are counted from the
operation that makes it until nothing refers to it; the workspace of the kernels, at most 256 MiB, is added. What is
not counted: CUDA's context (of each card in the table 0.6 GiB are left to it), what the allocator loses between
tensors, NCCL's buffers, and the keys and values of what is sampled at once (--sample-batch), between steps.
The optimiser is AdamW; with --optimizer adafactor its column is next to nothing. `the rest` is what the peak has beyond
the other columns: activations, mostly, less the gradients that are not there yet when there are most of these.

With --gpus the step is that of the first of so many processes, the others of which are not there, with --parallel fsdp
in the very code of FSDP2: what is gathered is counted for as long as it is held. What is sent is counted as rings send
it: of N processes each (N-1)/N of what is gathered or scattered, twice that of what is summed. Sending and computing
overlap at best and add up at worst. Not counted: latency, and what is done once, as π_ref's log-probs and samples.
"""

import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

import kernels
from nanopref import models
from nanopref.data.groups import Batch
from nanopref.evaluation.report import table
from nanopref.models.actor_critic import Learner, new_critic
from nanopref.models.checkpoint import configuration, family_of
from nanopref.models.llama import LlamaConfig
from nanopref.models.scalar import ScalarModel
from nanopref.running import flags, optim, parallel, sharding
from nanopref.running.flags import ModelFlags, flag, require
from nanopref.running.parallel import say

SIZES = ("vocab_size", "block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_inner", "head_dim", "tied")
SHAPES = {  # the sizes of some models, whose embedding is their unembedding unless the last says no
    "SmolLM2-135M": (49152, 8192, 30, 9, 3, 576, 1536, 64),
    "Qwen2.5-0.5B": (151936, 32768, 24, 14, 2, 896, 4864, 64),
    "Llama-3.2-1B": (128256, 131072, 16, 32, 8, 2048, 8192, 64),
    "Llama-3.2-3B": (128256, 131072, 28, 24, 8, 3072, 8192, 128),
    "Llama-3.1-8B": (128256, 131072, 32, 32, 8, 4096, 14336, 128, False),
}
GIB = 2**30
CARDS = (8, 24, 80)  # GiB
CONTEXT = 0.6  # GiB that CUDA, cuBLAS and the loaded kernels take of a card

# of H100 SXM, by NVIDIA's data sheets of it and of DGX H100
NODE = 8  # GPUs
NVLINK = 450e9  # bytes a second from a GPU to the others of its node: half of the 900 both ways
NETWORK = 50e9  # and from each GPU's own card (ConnectX-7, 400 Gb/s) to other nodes
PRODUCTS = 989e12  # FLOP/s in bfloat16, dense
USED = 0.4  # of it by a model that trains well

# what a ring sends for a collective, in units of (N-1)/N of its largest tensor
RINGS = {"c10d::_allgather_base_": 1, "c10d::_reduce_scatter_base_": 1, "c10d::allreduce_": 2}
# FLOPs that torch's own table has not: attention without its mask, and unembedding, whose logits are made again
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
FLOPS: dict[str, Callable[..., int]] = {
    ATTENTION: lambda q, k, *_, **__: 4 * q.numel() * k.shape[2],
    f"{ATTENTION}_backward": lambda _, q, k, *__, **___: 10 * q.numel() * k.shape[2],
    "kernels::token_logprobs": lambda hidden, weight, *_: 2 * hidden.numel() * len(weight),
    "kernels::token_logprobs_backward": lambda _, __, hidden, weight, *___: 6 * hidden.numel() * len(weight),
}


@dataclass
class Config:
    """Count the memory of a step of each script, for all weights and for adapters, with and without what saves memory.

    Example: python -m nanopref.memory --model Llama-3.2-1B
    """

    model: tuple[str, ...] = flag(tuple(SHAPES), f"any of {', '.join(SHAPES)}, or a model's folder or hub name")
    rows: int = flag(2, "sequences in memory at once: a pair is two", least=2)
    tokens: int = flag(1024, "in each, prompt and answer together", least=2)
    lora: int = flag(16, "rank of the adapters", least=1)
    dtype: str = flag("bfloat16", "of matrix products", among=("bfloat16", "float32"))
    gpus: int = flag(1, "cards, each with a process, in nodes of eight", least=1)
    parallel: str = flag("ddp", "with --gpus: as of the scripts", among=("ddp", "fsdp"))
    pieces: int = flag(1, "micro-batches of these rows that a process makes a step of", least=1)


class Fake(FakeTensorMode):
    """Tensors without contents; a copy of one is of the same kind."""

    def __deepcopy__(self, memo: dict) -> "Fake":
        return self


class Peak(TorchDispatchMode):
    """Counts the bytes of all that operations make inside, and the most that there ever were; besides the FLOPs of
    matrix products, and the bytes that this process sends to others."""

    def __init__(self):
        super().__init__()
        self.now = self.most = self.flops = 0
        self.sent = 0.0
        self.seen: dict[int, tuple[weakref.ref, int]] = {}

    def __enter__(self) -> "Peak":
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            result = resize(storage, size)
            if id(storage) in self.seen:
                self.hold(storage)
            return result

        torch.UntypedStorage.resize_ = resized  # is no operation, and how FSDP2 frees what it gathered
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        del torch.UntypedStorage.resize_  # which is its base's again
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result, name = func(*args, **(kwargs or {})), func._schema.name
        if name in RINGS:
            largest = max(x.nbytes for x in tree_leaves(args) if isinstance(x, Tensor))
            self.sent += RINGS[name] * largest * (1 - 1 / parallel.world_size())
        if name in FLOPS:
            self.flops += FLOPS[name](*args, **(kwargs or {}))
        elif known := flop_registry.get(func._overloadpacket):
            self.flops += known(*args, **(kwargs or {}), out_val=result)
        return tree_map_only(Tensor, self.count, result)

    def count(self, x: Tensor) -> Tensor:
        if not hasattr(x, "device_mesh"):  # whose share is counted where it is made
            self.hold(x.untyped_storage())
        return x

    def hold(self, storage: torch.UntypedStorage) -> None:
        """As many bytes as it has now."""
        key, size = id(storage), storage.nbytes()
        kept, before = self.seen.get(key) or (weakref.ref(storage, lambda _: self.forget(key)), 0)
        self.seen[key] = kept, size
        self.now += size - before
        self.most = max(self.most, self.now)

    def forget(self, key: int) -> None:
        self.now -= self.seen.pop(key)[1]


# ---- a step of each script -------------------------------------------------------------------------------------------


def dpo(policy: nn.Module, batch: Batch, config: ModelFlags) -> tuple[list[nn.Module], Callable[[], Tensor]]:
    """What is held, and the loss: π_ref is evaluated before, and then no longer there."""

    def loss() -> Tensor:
        with parallel.autocast(policy):
            logprobs = policy(batch.inputs, batch.targets, batch.mask).sum(-1)
        return -F.logsigmoid(0.1 * (logprobs[::2] - logprobs[1::2])).mean()

    return [policy], loss


def rm(policy: nn.Module, batch: Batch, config: ModelFlags) -> tuple[list[nn.Module], Callable[[], Tensor]]:
    model = models.placed(ScalarModel(policy), "cpu")

    def loss() -> Tensor:
        with parallel.autocast(model):
            scores = model(batch.inputs, batch.last)[:, 0]
        return -F.logsigmoid(scores[::2] - scores[1::2]).mean()

    return [model], loss


def ppo(policy: nn.Module, batch: Batch, config: ModelFlags) -> tuple[list[nn.Module], Callable[[], Tensor]]:
    """With a reward model of the policy's size, and a critic that starts from it."""
    reward_model = models.frozen(ScalarModel(new(policy.config)), "cpu")
    if parallel.shards():  # each is read by itself
        reference, trunk = models.frozen(new(policy.config), "cpu"), new(policy.config)
        models.set_up(trunk, config)
        critic = models.placed(ScalarModel(trunk), "cpu")
    else:
        reference, critic = models.reference(policy), new_critic("network", policy, [reward_model], config)
    learner = Learner(policy, critic, 0.1)
    old = torch.zeros_like(batch.mask)

    def loss() -> Tensor:
        logprobs, entropies, values = learner(batch, 1.0)
        gain, _ = kernels.ppo_clip_loss(logprobs, old, old, batch.mask)
        return gain + kernels.clipped_value_loss(values, old, old, batch.mask)[0] + 0.0 * entropies.mean()

    return [learner, reference, reward_model], loss


STEPS = {"dpo": dpo, "rm": rm, "ppo": ppo}


def new(shape: Any) -> nn.Module:
    return family_of(shape).Model(shape)


def weights(modules: list[nn.Module], learn: bool) -> int:
    """Bytes of the weights that learn, or of those that do not: of this process's share."""
    each = {id(p): p for module in modules for p in module.parameters() if p.requires_grad == learn}
    return sum(_share(p).nbytes for p in each.values())


def _share(x: Tensor) -> Tensor:
    return x.to_local() if hasattr(x, "to_local") else x


def prepared(
    script: str, shape: Any, rows: int, tokens: int, config: ModelFlags, pieces: int = 1
) -> tuple[list[nn.Module], int, Callable[[], None]]:
    """What a script holds, the bytes of AdamW's state, and a step on so many micro-batches."""
    policy = new(shape)
    models.set_up(policy, config)
    models.placed(policy, "cpu")
    whole = torch.zeros(rows, tokens + 1, dtype=torch.long)
    batch = Batch(whole, torch.ones(rows, tokens), torch.zeros(rows, dtype=torch.long), *whole.T[:2], [rows])
    modules, loss = STEPS[script](policy, batch, config)
    learning = optim.learning(modules[0])
    optimizer = optim.adamw(modules[0], 1e-4)
    for p in learning:
        p.grad = torch.zeros_like(p)
    optimizer.step()  # which makes its state, as the first of many does
    optimizer.zero_grad()

    def step() -> None:
        for _ in sharding.accumulated(modules[0], range(pieces)):
            loss().backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()

    state = sum(_share(x).nbytes for s in optimizer.state.values() for x in s.values() if isinstance(x, Tensor))
    return modules, state, step


def predicted(script: str, *args: Any, pieces: int = 1) -> dict[str, float]:
    """GiB that a step of a script takes at its peak, and of what; the arguments are those of `prepared`. Of several
    processes also GB that this one sends to others, and for how many ms it sends and computes."""
    processes, few = parallel.world_size(), min(pieces, 2)  # all that follow are as the second
    with Fake(), Peak() as peak, kernels.use("triton"):
        modules, state, step = prepared(script, *args, few)
        summed = optim.learning(modules[0]) if processes > 1 and not parallel.shards() else []
        buckets = [torch.zeros_like(p) for p in summed]  # of DDP, which has no fake, from step to step
        if few == 1:  # else gradients are summed outside them first, since DDP looks on at the last micro-batch alone
            for p, bucket in zip(summed, buckets, strict=True):
                p.grad = bucket
        peak.most, peak.flops, peak.sent = peak.now, 0, 0.0
        step()
        sent, flops = peak.sent * pieces / few, peak.flops * pieces / few
        for p in summed:
            parallel.sum_processes(p.grad)
        sent += peak.sent if summed else 0.0
    trained, held = weights(modules, True), weights(modules, False)
    total = peak.most + (kernels.logprob.LIMIT if script != "rm" else 0)
    rest = total - 2 * trained - state - held
    parts = {"weights": trained, "gradients": trained, "optimiser": state, "frozen": held, "the rest": rest}
    found = {name: size / GIB for name, size in parts.items()} | {"GiB": total / GIB}
    if processes > 1:  # a ring leaves each node once, and there are as many rings as cards
        rate = min(NVLINK, NODE * NETWORK) if processes > NODE else NVLINK
        found |= {"GB sent": sent / 1e9, "ms sending": 1e3 * sent / rate, "ms computing": 1e3 * flops / PRODUCTS / USED}
    return found


def join(processes: int, dtype: str, engine: str) -> None:
    """From now on this is the first of so many processes, of which there are no others."""
    if processes > 1:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    parallel.start("cpu", 0, dtype, engine)
    if parallel.shards():
        sharding.mesh("cpu")  # which is not made of fakes


# ---- the command -----------------------------------------------------------------------------------------------------


def measure(config: Config) -> Iterator[tuple[str, ...]]:
    """Rows of the table."""
    for name in config.model:
        known = dict(zip(SIZES, SHAPES.get(name, ()), strict=False))
        shape = LlamaConfig(**known) if known else configuration(models.find(name))
        for script in STEPS:
            for lora in (0, config.lora):
                for again in (False, True):
                    settings = ModelFlags(dtype=config.dtype, lora=lora, checkpoint_activations=again)
                    settings.seed = 0
                    found = predicted(script, shape, config.rows, config.tokens, settings, pieces=config.pieces)
                    fits = next((str(card) for card in CARDS if found["GiB"] + CONTEXT <= card), "no")
                    how = "adapters" if lora else "all weights"
                    again = "computed again" if again else "held"
                    yield name, script, how, again, *(f"{x:,.1f}" for x in found.values()), fits


def main(config: Config) -> None:
    flags.check(config)
    require(kernels.triton is not None, "the memory of Triton's kernels is counted, and Triton is not installed here")
    join(config.gpus, config.dtype, config.parallel)
    kernels.INTERPRETED = True  # what no kernel runs on may look as if it were Triton's
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # which copying one does
    names = ("model", "step", "learns", "activations", "weights", "gradients", "optimiser", "frozen", "the rest", "GiB")
    names += ("GB sent", "ms sending", "ms computing") if config.gpus > 1 else ()
    say(table(list(measure(config)), (*names, "card of GiB")))


if __name__ == "__main__":
    flags.main(main, Config)
