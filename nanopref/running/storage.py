"""One state as files: what it holds, and how all processes together write it and read it again.

torch.distributed.checkpoint cuts the tensors up among the processes, and puts them together however many there are by
then and however each holds them: whole, or as DTensors of FSDP2. The files are safetensors, since its own are pickles.
run.json is written last: what is no tensor, and size and CRC-32 of each file, without which nothing is read.
"""

import json
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.optim import Optimizer

from nanopref.running.files import named, write_atomic
from nanopref.running.inputs import digest
from nanopref.running.optim import Both
from nanopref.running.parallel import gathered, rank, world_size
from nanopref.running.sharding import gather_again

FILE = 2**27  # the bytes of tensors in a file, which is put together in memory; a larger tensor has one of its own

# which is said where there is one process, to whom it is no news; the thread that writes cannot silence it for itself
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


# ---- what a state holds ----------------------------------------------------------------------------------------------


def tensors_of(model: nn.Module, optimizer: Optimizer | Both) -> dict[str, Tensor]:
    """Weights that learn, persistent buffers, and what the optimiser remembers of each weight, by their names: views to
    write or to read into. What is shared is there once, and a number is a tensor of one."""
    names = model.state_dict().keys()
    found = _learning(model) | {name: x for name, x in model.named_buffers() if name in names}
    for name, p in _learning(model).items():
        for own in _own(optimizer):
            found |= {f"optimizer.{name}.{key}": x for key, x in own.state.get(p, {}).items()}
    return {name: x.detach() if x.dim() else x.detach().view(1) for name, x in found.items()}


def _learning(model: nn.Module) -> dict[str, nn.Parameter]:
    """Without what is frozen, which is again what it was."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _own(optimizer: Optimizer | Both) -> tuple[Optimizer, ...]:
    """The optimisers of torch that it is."""
    return optimizer.optimizers if isinstance(optimizer, Both) else (optimizer,)


def _extra(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that have more to remember than tensors."""
    modules = model.named_modules()
    return {name: x for name, x in modules if type(x).get_extra_state is not nn.Module.get_extra_state}


# ---- writing ---------------------------------------------------------------------------------------------------------


class Writer(HuggingFaceStorageWriter):
    """Writes each process's files into a folder, and then in the first process run.json."""

    def __init__(self, folder: Path, tensors: dict[str, Tensor], run: dict[str, Any]):
        sizes, places, filled = {name: x.nbytes for name, x in tensors.items()}, {}, 0
        number = 1
        for name, size in sizes.items():
            if filled and filled + size > FILE:
                number, filled = number + 1, 0
            places[name], filled = number, filled + size
        super().__init__(str(folder), places, save_distributed=True)
        self._run = run

    def prepare_local_plan(self, plan):
        with named(self.path.parent):
            return super().prepare_local_plan(plan)

    def write_data(self, plan, planner) -> torch.futures.Future:
        """Of each file its name, size and checksum: what `finish` gets."""
        with named(self.path.parent):
            written = super().write_data(plan, planner).value()
            names = sorted({result.storage_data.relative_path for result in written})
            done = torch.futures.Future()
            done.set_result([(name, _sum_of(self.path / name)) for name in names])
            return done

    def finish(self, metadata, results) -> None:
        files = dict(file for part in results for file in part)
        with named(self.path.parent):
            write_atomic(self.path / "run.json", _as_text(self._run | {"files": files}))


def write(
    folder: Path, model: nn.Module, optimizer: Optimizer | Both, run: dict[str, Any], group: Any = None,
    background: bool = False,
) -> Future | None:  # fmt: skip
    """Write a state into a folder that is not there yet; all processes must call it. In the background it goes on while
    the weights, of which it has a copy, learn: then with the `group` of processes that nothing else talks through, and
    `wait` is to be called for what comes back."""
    gather_again(model)
    tensors = tensors_of(model, optimizer)
    run = run | {"extra": {name: x.get_extra_state() for name, x in _extra(model).items()}}
    writer = Writer(folder, tensors, run)
    tensors = {name: x.contiguous() for name, x in tensors.items()}
    if background:
        return dcp.async_save(tensors, storage_writer=writer, process_group=group)
    with _as_it_was():
        dcp.save(tensors, storage_writer=writer)
    return None


def wait(writing: Future) -> None:
    """Until a state is written; raises what went wrong."""
    with _as_it_was():
        writing.result()


@contextmanager
def _as_it_was() -> Iterator[None]:
    """What went wrong in a process is raised as that, in all of them."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def _sum_of(path: Path) -> list[int]:
    """A file's size and CRC-32."""
    size, found = 0, 0
    with path.open("rb") as file:
        while part := file.read(2**20):
            size, found = size + len(part), zlib.crc32(part, found)
    return [size, found]


def _as_text(run: dict[str, Any]) -> str:
    """run.json, which tells of itself too whether it is whole."""
    return json.dumps(run | {"digest": digest(json.dumps(run))}) + "\n"


# ---- reading ---------------------------------------------------------------------------------------------------------


def load(folder: Path, model: nn.Module, optimizer: Optimizer | Both) -> dict[str, Any]:
    """Give a model and its optimiser what they had; all processes must call it. Returns what is in run.json.

    An error of some kind, the same in all processes, where a file is damaged or of something else.
    """
    run = _checked(folder)
    gather_again(model)
    _begin(optimizer)
    tensors = tensors_of(model, optimizer)
    reader = HuggingFaceStorageReader(str(folder))
    saved = {name: (x.size, x.properties.dtype) for name, x in reader.read_metadata().state_dict_metadata.items()}
    for name, p in _learning(model).items():  # those that never had a gradient have nothing to remember
        if not any(key.startswith(f"optimizer.{name}.") for key in saved):
            for own in _own(optimizer):
                own.state.pop(p, None)
    tensors = tensors_of(model, optimizer)
    extra = _extra(model)
    if saved != {name: (x.shape, x.dtype) for name, x in tensors.items()} or run["extra"].keys() != extra.keys():
        raise ValueError("other tensors")
    with _as_it_was():
        dcp.load(tensors, storage_reader=reader)
    for name, module in extra.items():
        module.set_extra_state(run["extra"][name])
    return run


def _checked(folder: Path) -> dict[str, Any]:
    """What is in run.json, where all files are as they were written."""
    text = (folder / "run.json").read_text()
    run = json.loads(text)
    run.pop("digest")
    files = run["files"]
    if _as_text(run) != text or files.keys() != {path.name for path in folder.glob("*.safetensors")}:
        raise ValueError("run.json")

    def check() -> None:
        for name in sorted(files)[rank() :: world_size()]:
            if _sum_of(folder / name) != files[name]:
                raise ValueError(name)

    gathered(check, Exception)
    return run


def _begin(optimizer: Optimizer | Both) -> None:
    """Let an optimiser remember something of every weight, as it does from its first step on, which moves none here."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
