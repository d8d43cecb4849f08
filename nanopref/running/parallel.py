"""Where a run computes: device, precision, random streams, processes, and what they say while they work."""

import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from nanopref.running import terminal
from nanopref.running.flags import UserError, require

try:
    import resource
except ImportError:  # a system without it does not tell what a process takes
    resource = None


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


WIDE = 512  # the least width of a model that a CPU multiplies in bfloat16, see `precision`
_dtype = "auto"  # what --dtype says
_shards = False  # whether --parallel shares models out

T = TypeVar("T")


def start(device: str, seed: int, dtype: str = "auto", engine: str = "ddp") -> torch.device:
    """Choose the device ("auto": CUDA where there is one), join the other processes under torchrun, seed everything;
    and remember the `dtype` of products ("auto", "float32" or "bfloat16") for `autocast`, and for `shards` whether the
    `engine` (--parallel) is "ddp" or "fsdp".

    Raises UserError for a device that is unknown or not there.
    """
    global _dtype, _shards
    _dtype, place = dtype, terminal.place()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if place:
        require(":" not in device, f"--device {device}: of several processes each has a GPU of its own: give cuda")
        several = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if device == "cuda" else 0
        there = torch.cuda.device_count()
        require(several <= there, f"{several} processes on this machine, and {there} GPUs: start at most one for each")
        device = f"cuda:{place[1]}" if device == "cuda" else device
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {device}: there is no such device here; use auto, cpu or cuda") from None
    require(chosen.type in ("cpu", "cuda"), f"--device {device}: only cpu and cuda are supported")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")
    if place and not dist.is_initialized():
        # beside NCCL what is no tensor on a GPU goes by gloo; a network that says nothing for so long is gone
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        meet, number, size = next(dist.rendezvous("env://"))
        # after a restart by torchrun what the processes before have left there is of no use
        meet = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", meet)
        much = timedelta(minutes=30)
        dist.init_process_group(backend, store=meet, rank=number, world_size=size, timeout=much)
    _shards = engine == "fsdp" and world_size() > 1
    torch.manual_seed(seed)
    return chosen


def precision(model: Any, device: torch.device | str | None = None) -> torch.dtype:
    """In what a model's products are computed, on its device or this one: as --dtype says, or where that is "auto" in
    what is faster, which is bfloat16 on a GPU, and on a CPU with units for it where the model is wide.

    On 2 cores with AVX512-BF16, four blocks of each family, 8 x 128 tokens forward and backward, 128 rows sampled, and
    one, time in float32 over that in bfloat16: at width 128 1.1-1.4, 0.8-1.0, 0.6; at 384 1.4, 1.1-1.2, 0.8-0.9; at 512
    1.4, 1.1-1.2, 1.0; at 768 1.6, 1.4, 0.9. So below 512 sampling, half of what the scripts do, would lose.
    """
    if _dtype != "auto":
        return getattr(torch, _dtype)
    pays = torch.device(device or model.device).type == "cuda" or (model.config.n_embd >= WIDE and _cpu_has_bfloat16())
    return torch.bfloat16 if pays else torch.float32


def _cpu_has_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(model: Any) -> torch.autocast:
    """Products of a model (with `device` and `config.n_embd`) in its `precision`; weights stay as they are."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=precision(model) == torch.bfloat16)


def generator(seed: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A random stream of its own for each purpose, so that no stage depends on what another has drawn."""
    words = np.frombuffer(purpose.encode().ljust(-(-len(purpose.encode()) // 4) * 4), dtype=np.uint32)
    entropy = np.random.SeedSequence([seed, *words.tolist()]).generate_state(2, np.uint32)
    return torch.Generator(device).manual_seed(int(entropy[0]) << 31 | int(entropy[1]) >> 1)


# ---- several processes that do the same, each its share of the work --------------------------------------------------


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def shards() -> bool:
    """Whether each process holds a share of each model only."""
    return _shards


def sum_processes(x: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def share(n: int) -> range:
    """Which of n things this process does: those of the first process come first."""
    return range(rank() * n // world_size(), (rank() + 1) * n // world_size())


def gathered(act: Callable[[], T], errors: Any = (UserError, OSError)) -> list[T]:
    """What `act` gives in each process. One of these errors is raised in all of them, who would wait else."""
    try:
        found: list[tuple[T | None, Exception | None]] = [(act(), None)]
    except errors as error:
        found = [(None, error)]
    if world_size() > 1:
        mine, found = found[0], [(None, None)] * world_size()
        dist.all_gather_object(found, mine)
    for _, error in found:
        if error is not None:
            raise error
    return [value for value, _ in found]


def shared(act: Callable[[Sequence[Any]], Sequence[T]], things: Sequence[Any]) -> list[T]:
    """What `act`, which gives something for each of some things, gives for all, each process asking about its share."""
    mine = share(len(things))
    return [x for part in gathered(lambda: act(things[mine.start : mine.stop]) if mine else []) for x in part]


def by_first(act: Callable[[], T]) -> T:
    """What `act` gives in the first process, which alone carries it out."""
    return gathered(lambda: act() if rank() == 0 else None)[0]


def full(x: Tensor) -> Tensor:
    """The whole of a tensor that is sharded, which all processes must ask for together; any other as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x  # a DTensor, by what it can: its import takes 0.6 s


def most_memory() -> int:
    """The bytes that this process had in memory at most; 0 where the system does not tell."""
    status = Path("/proc/self/status")  # Linux, whose getrusage counts what the process held that started this one
    if status.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return 1024 * int(found[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else 0


def version(package: str) -> str | None:
    """The installed version of a package, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# ---- what the user sees while it works -------------------------------------------------------------------------------


def say(*words) -> None:
    """Print from one process only, at once, and above a progress bar where there is one; what a terminal would obey, as
    an answer may hold, is shown."""
    if rank() == 0:
        tqdm.write(terminal.shown(" ".join(map(str, words))))
        sys.stdout.flush()


def progress(description: str, total: int, unit: str = "row", done: int = 0):
    """A progress bar on stderr for what takes more than two seconds; where that is no terminal, a line every half
    minute. Both have `update`, `set_postfix` and `close`, and work as a context manager."""
    description = terminal.line(description, 80)
    if rank() == 0 and not sys.stderr.isatty():
        return Lines(description, total, unit, done)
    options = {"disable": rank() > 0, "delay": 2, "leave": False, "dynamic_ncols": True, "initial": done}
    return tqdm(desc=description, total=total, unit=unit, **options)


class Lines:
    """Progress in a log file."""

    SECONDS = 30.0

    def __init__(self, description: str, total: int, unit: str, done: int):
        self.description, self.total, self.unit, self.shown = description, total, unit, ""
        self.n = self.first = done
        self.began = self.printed = time.monotonic()

    def set_postfix(self, figures: dict[str, str], refresh: bool = False) -> None:
        self.shown = ", ".join(f"{name} {value}" for name, value in figures.items())

    def update(self, n: int = 1) -> None:
        self.n += n
        now = time.monotonic()
        if now - self.printed >= self.SECONDS:
            self.printed = now
            left = tqdm.format_interval((now - self.began) / (self.n - self.first) * (self.total - self.n))
            line = f"{self.description}: {self.n:,} of {self.total:,} {self.unit}s, {left} left"
            line += f", {self.shown}" if self.shown else ""
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        pass

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_) -> None:
        self.close()
