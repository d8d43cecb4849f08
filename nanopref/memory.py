"""How much memory a training step takes, without the hardware: `python -m nanopref.memory`

The steps of the scripts run on tensors without contents (FakeTensorMode), and the bytes of each are counted from the
operation that makes it until nothing refers to it; the workspace of the kernels, at most 256 MiB, is added. What is
not counted: CUDA's context (of each card in the table 0.6 GiB are left to it), what the allocator loses between
tensors, and the keys and values of what is sampled at once, which --sample-batch says, when no step is under way.
The optimiser is AdamW; with --optimizer adafactor its column is next to nothing. `the rest` is what the peak has beyond
the other columns: activations, mostly, less the gradients that are not there yet when there are most of these.
"""

import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import kernels
from nanopref import models
from nanopref.data.groups import Batch
from nanopref.evaluation.report import table
from nanopref.models.actor_critic import Learner, new_critic
from nanopref.models.checkpoint import configuration, family_of
from nanopref.models.llama import LlamaConfig
from nanopref.models.scalar import ScalarModel
from nanopref.running import flags, optim, parallel
from nanopref.running.flags import ModelFlags, flag, require
from nanopref.running.parallel import say

SIZES = ("vocab_size", "block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_inner", "head_dim")
SHAPES = {  # the sizes of some models whose embedding is their unembedding
    "SmolLM2-135M": (49152, 8192, 30, 9, 3, 576, 1536, 64),
    "Qwen2.5-0.5B": (151936, 32768, 24, 14, 2, 896, 4864, 64),
    "Llama-3.2-1B": (128256, 131072, 16, 32, 8, 2048, 8192, 64),
    "Llama-3.2-3B": (128256, 131072, 28, 24, 8, 3072, 8192, 128),
}
GIB = 2**30
CARDS = (8, 24, 80)  # GiB
CONTEXT = 0.6  # GiB that CUDA, cuBLAS and the loaded kernels take of a card


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


class Fake(FakeTensorMode):
    """Tensors without contents; a copy of one is of the same kind."""

    def __deepcopy__(self, memo: dict) -> "Fake":
        return self


class Peak(TorchDispatchMode):
    """Counts the bytes of all that operations make inside, and the most that there ever were."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return tree_map_only(Tensor, self.count, func(*args, **kwargs or {}))

    def count(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        key, size = id(storage), storage.nbytes()

        def forget(_: weakref.ref) -> None:
            del self.seen[key]
            self.now -= size

        if key not in self.seen:
            self.seen[key] = weakref.ref(storage, forget)
            self.now += size
            self.most = max(self.most, self.now)
        return x


# ---- a step of each script -------------------------------------------------------------------------------------------


def dpo(policy: nn.Module, batch: Batch, config: ModelFlags) -> tuple[list[nn.Module], Callable[[], Tensor]]:
    """What is held, and the loss: π_ref is evaluated before, and then no longer there."""

    def loss() -> Tensor:
        with parallel.autocast(policy):
            logprobs = policy(batch.inputs, batch.targets, batch.mask).sum(-1)
        return -F.logsigmoid(0.1 * (logprobs[::2] - logprobs[1::2])).mean()

    return [policy], loss


def rm(policy: nn.Module, batch: Batch, config: ModelFlags) -> tuple[list[nn.Module], Callable[[], Tensor]]:
    model = ScalarModel(policy)

    def loss() -> Tensor:
        with parallel.autocast(model):
            scores = model(batch.inputs, batch.last)[:, 0]
        return -F.logsigmoid(scores[::2] - scores[1::2]).mean()

    return [model], loss


def ppo(policy: nn.Module, batch: Batch, config: ModelFlags) -> tuple[list[nn.Module], Callable[[], Tensor]]:
    """With a reward model of the policy's size, and a critic that starts from it."""
    reward_model = models.frozen(ScalarModel(new(policy.config)))
    reference = models.reference(policy)
    learner = Learner(policy, new_critic("network", policy, [reward_model], config), 0.1)
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
    """Bytes of the weights that learn, or of those that do not."""
    each = {id(p): p for module in modules for p in module.parameters() if p.requires_grad == learn}
    return sum(p.nbytes for p in each.values())


def prepared(
    script: str, shape: Any, rows: int, tokens: int, config: ModelFlags
) -> tuple[list[nn.Module], int, Callable[[], None]]:
    """What a script holds, the bytes of AdamW's state, and a step."""
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
        loss().backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()

    state = sum(x.nbytes for s in optimizer.state.values() for x in s.values() if isinstance(x, Tensor))
    return modules, state, step


def predicted(script: str, *args: Any) -> dict[str, float]:
    """GiB that a step of a script takes at its peak, and of what; the arguments are those of `prepared`."""
    with Fake(), Peak() as peak, kernels.use("triton"):
        modules, state, step = prepared(script, *args)
        peak.most = peak.now
        step()
    trained, held = weights(modules, True), weights(modules, False)
    total = peak.most + (kernels.logprob.LIMIT if script != "rm" else 0)
    rest = total - 2 * trained - state - held
    parts = {"weights": trained, "gradients": trained, "optimiser": state, "frozen": held, "the rest": rest}
    return {name: size / GIB for name, size in parts.items()} | {"GiB": total / GIB}


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
                    found = predicted(script, shape, config.rows, config.tokens, settings)
                    fits = next((str(card) for card in CARDS if found["GiB"] + CONTEXT <= card), "no")
                    how = "adapters" if lora else "all weights"
                    again = "computed again" if again else "held"
                    yield name, script, how, again, *(f"{x:.1f}" for x in found.values()), fits


def main(config: Config) -> None:
    flags.check(config)
    require(kernels.triton is not None, "the memory of Triton's kernels is counted, and Triton is not installed here")
    parallel.start("cpu", 0, config.dtype)
    kernels.INTERPRETED = True  # what no kernel runs on may look as if it were Triton's
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # which copying one does
    names = ("model", "step", "learns", "activations", "weights", "gradients", "optimiser", "frozen", "the rest", "GiB")
    say(table(list(measure(config)), (*names, "card of GiB")))


if __name__ == "__main__":
    flags.main(main, Config)
