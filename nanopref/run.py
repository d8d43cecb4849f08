"""A run: its folder, its device, its processes, and how it survives being killed.

`out/<stage>/` holds
    config.json     every flag, the versions, the seed
    seconds.json    what each stage took
    metrics.jsonl   one row a logged step
    state.pt        what `--resume` continues from: weights, optimiser, random state, step
    model/          the trained model, a Hugging Face folder, with its tokenizer
    report.json, report.png
Each file but metrics.jsonl, which grows by a line a step, is written under another name and then renamed, so it is
whole or absent whenever the process dies.
"""

import json
import math
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import kernels

try:
    import fcntl
except ImportError:  # a system without it does not notice two runs in one folder
    fcntl = None


class UserError(Exception):
    """Something the user can mend: one sentence that says what. Commands print it and exit with code 2."""


def require(condition: bool, message: str) -> None:
    """Raise UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


def require_at_least_one(flags: "Options", *names: str) -> None:
    """Raise UserError for a flag that is a number below 1."""
    for name in names:
        value = getattr(flags, name)
        require(value is None or value >= 1, f"--{name.replace('_', '-')} must be at least 1, not {value}")


def require_positive(flags: "Options", *names: str) -> None:
    """Raise UserError for a flag that is a number but not above 0, or not finite."""
    for name in names:
        value = getattr(flags, name)
        require(value is None or 0 < value < math.inf, f"--{name.replace('_', '-')} must be above 0, not {value}")


def require_not_negative(flags: "Options", *names: str) -> None:
    """Raise UserError for a flag that is a number below 0, or not finite."""
    for name in names:
        value = getattr(flags, name)
        require(value is None or 0 <= value < math.inf, f"--{name.replace('_', '-')} must be 0 or above, not {value}")


@dataclass
class Options:
    """The flags that every training command has."""

    out: str
    """the run's folder: model, metrics, report, and the state to resume from"""
    resume: bool = False
    """continue the run in --out, however it ended"""
    overwrite: bool = False
    """replace the run in --out"""
    seed: int = 0
    """the same seed gives the same numbers on the same machine"""
    device: str = "auto"
    """auto (CUDA where there is one), cpu or cuda"""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """which implementation of log-probs and losses: auto is Triton on CUDA, PyTorch elsewhere"""
    save_every: int = 25
    """steps between two saves of the state that --resume continues from"""

    def check(self) -> None:
        """Raise UserError for values that no run can have."""
        require_at_least_one(self, "save_every")
        check_seed(self.seed)
        try:
            with kernels.use(self.kernels):
                pass
        except RuntimeError as error:
            raise UserError(f"--kernels {self.kernels}: {error}") from None


def check_seed(seed: int) -> None:
    """Raise UserError for a seed that numpy would not take."""
    require(0 <= seed < 2**32, f"--seed must be from 0 to 2^32 - 1, not {seed}")


def main(train: Callable[[Any], None], config) -> None:
    """Run a command: UserError becomes one line and exit code 2, Ctrl-C exit code 130."""
    try:
        train(config)
    except (UserError, OSError) as error:  # a full disk or a folder without permission names itself
        sys.exit(_fail(f"error: {error}", 2))
    except KeyboardInterrupt as stop:
        sys.exit(_fail(f"\nstopped: {stop or 'add --resume to the same command to continue'}", 130))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _fail(message: str, code: int) -> int:
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)
    return code


# ---- files -----------------------------------------------------------------------------------------------------------


PARTIAL = ".partial"  # how the names of files end that are being written


def write_atomic(path: str | Path, content: str | bytes | Callable[[Path], None]) -> None:
    """Write a file whole or not at all. `content` is text, bytes, or a function that writes to the path it is given."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        if callable(content):
            content(partial)
        else:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
        with partial.open("rb") as f:
            os.fsync(f.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def say(*words) -> None:
    """Print from one process only, and at once."""
    if rank() == 0:
        print(*words, flush=True)


def progress(description: str, total: int, unit: str = "it") -> tqdm:
    """A progress bar on stderr for what takes more than two seconds; nothing where stderr is no terminal."""
    hidden = True if rank() else None
    return tqdm(desc=description, total=total, unit=unit, disable=hidden, delay=2, leave=False, dynamic_ncols=True)


# ---- device, precision, seeds, processes -----------------------------------------------------------------------------


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def start(device: str, seed: int) -> torch.device:
    """Choose the device ("auto": CUDA where there is one), join the other processes under torchrun, seed everything.

    Raises UserError for a device that is unknown or not there.
    """
    local_rank = os.environ.get("LOCAL_RANK")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and local_rank is not None:
        device = f"cuda:{local_rank}"
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {device}: there is no such device here; use auto, cpu or cuda") from None
    if chosen.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: only cpu and cuda are supported")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if local_rank is not None and not dist.is_initialized():
        # the others wait while the first process samples the pairs, which may take hours
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(days=1))
    if chosen.type == "cuda":
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(seed)
    return chosen


def autocast(device: torch.device):
    """bfloat16 where tensor cores make it pay; float32 on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def generator(seed: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A random stream of its own for each purpose, so that no stage depends on what another has drawn."""
    words = np.frombuffer(purpose.encode().ljust(-(-len(purpose.encode()) // 4) * 4), dtype=np.uint32)
    entropy = np.random.SeedSequence([seed, *words.tolist()]).generate_state(2, np.uint32)
    return torch.Generator(device).manual_seed(int(entropy[0]) << 31 | int(entropy[1]) >> 1)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def sum_gradients(model: nn.Module) -> None:
    """Add the gradients of all processes, in one message. The loss must already be divided by the whole batch."""
    if world_size() == 1:
        return
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    gradients = [p.grad for p in model.parameters()]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for g, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        g.copy_(summed.view_as(g))


def sum_processes(x: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


# ---- optimisation ----------------------------------------------------------------------------------------------------


def adamw(model: nn.Module, lr: float, weight_decay: float = 0.0, betas=(0.9, 0.95)) -> torch.optim.AdamW:
    """AdamW that decays matrices only: biases and LayerNorm gains have no reason to be small."""
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int, warmup: int) -> float:
    """Linear warm-up over `warmup` steps, then a cosine down to a tenth of the peak (nanoGPT's schedule)."""
    if step < warmup:
        lr = peak * (step + 1) / warmup
    else:
        lr = peak * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def batches(n: int, size: int, steps: int, seed: int, start: int = 0) -> Iterator[tuple[int, list[int]]]:
    """(step, row numbers) for the steps from `start` on. Each epoch is a permutation that depends on the seed and its
    number alone, so a run that resumes sees what it would have seen."""
    step, epoch = 0, 0
    while True:
        order = torch.randperm(n, generator=generator(seed, f"epoch {epoch}"))
        for rows in order.split(size):
            if step == steps:
                return
            if step >= start:
                yield step, rows.tolist()
            step += 1
        epoch += 1


# ---- the folder ------------------------------------------------------------------------------------------------------


_locks: dict[Path, int] = {}  # the folders that this process works in, and the open handles that lock them


def lock(folder: Path) -> None:
    """Raise UserError where another process works in the folder; keep others out until this one ends, however it ends.

    The folder itself is locked, so nothing is left in it that could be stale.
    """
    if fcntl is None:
        return
    if folder.resolve() in _locks:  # locked by an earlier run of this process, or an old folder that was overwritten
        os.close(_locks.pop(folder.resolve()))
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"--out {folder}: another process is training there; wait, or choose another --out") from None
    except OSError:  # a file system without locks
        pass
    _locks[folder.resolve()] = handle


class Run:
    """The folder of one run. Nothing is touched before `begin`."""

    def __init__(self, config: Options):
        """Raises UserError where `config.out` holds another run and neither --resume nor --overwrite was given."""
        self.config = config
        self.folder = Path(config.out)
        self.seconds: dict[str, float] = {}
        self._bar = None
        self._shown: dict[str, str] = {}
        self._stage, self._since = "", 0.0
        require(not self.folder.exists() or self.folder.is_dir(), f"--out {self.folder}: that is a file; name a folder")
        require(
            not (config.resume and config.overwrite),
            "--resume continues a run and --overwrite removes it: give one of them",
        )
        if self.folder.is_dir() and any(not path.name.endswith(PARTIAL) for path in self.folder.iterdir()):
            self._check_old_run()

    def _check_old_run(self) -> None:
        old = self.folder / "config.json"
        flags = json.loads(json.dumps(asdict(self.config)))  # in the types that a file gives back
        try:
            before = json.loads(old.read_text())
            before, ours = before["flags"], isinstance(before["flags"], dict) and isinstance(before["versions"], dict)
        except (OSError, ValueError, KeyError, TypeError):
            ours = False
        require(ours, f"--out {self.folder}: the folder holds something that is no run of ours; choose another")
        require(
            self.config.resume or self.config.overwrite,
            f"--out {self.folder} holds a run: add --resume to continue it, --overwrite to replace it, "
            "or choose another --out",
        )
        if self.config.overwrite:
            for name in ("init", "data", "reward"):
                read = flags.get(name) or []
                for path in [read] if isinstance(read, str) else read:
                    inside = Path(path).resolve().is_relative_to(self.folder.resolve())
                    require(not inside, f"--overwrite would remove {path}, which --{name} wants to read")
        else:
            # what changes nothing in the results may change
            free = {"resume", "overwrite", "out", "device", "kernels", "save_every"}
            changed = [k for k in flags if k not in free and k in before and flags[k] != before[k]]
            was = ", ".join(f"--{k.replace('_', '-')} {before.get(k)}" for k in changed)
            require(
                not changed, f"--resume: the run in {self.folder} was started with {was}; use the same, or --overwrite"
            )

    def begin(self) -> None:
        """Create the folder, lock it and write config.json. With `--overwrite`, an old run is removed first.

        Raises UserError where another process works in the folder.
        """
        barrier()  # all processes have looked at the folder before one of them changes it
        if rank() == 0:
            if self.config.overwrite and self.folder.exists():
                lock(self.folder)
                aside = self.folder.with_name(f".{self.folder.name}.{os.getpid()}{PARTIAL}")
                self.folder.rename(aside)
                shutil.rmtree(aside)
            if self.config.resume and not (self.folder / "config.json").exists():
                say(f"nothing to resume in {self.folder}: starting from the beginning")
            self.folder.mkdir(parents=True, exist_ok=True)
            lock(self.folder)
            if (self.folder / "config.json").exists():
                self._check_old_run()  # another process may have begun and ended since the first look
            for left in self.folder.rglob(f".*{PARTIAL}"):  # by a process that was killed while it wrote
                left.unlink()
            versions = {name: version(name) for name in ("torch", "triton", "numpy", "tiktoken", "safetensors")}
            content = {
                "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
                "flags": {**asdict(self.config), "resume": False, "overwrite": False},
                "versions": {"python": platform.python_version(), **versions},
            }
            if not (self.folder / "config.json").exists():
                write_atomic(self.folder / "config.json", json.dumps(content, indent=2) + "\n")
        barrier()
        with suppress(OSError, ValueError):  # it holds timings only: a run goes on without them
            self.seconds = json.loads((self.folder / "seconds.json").read_text())

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time that the block takes to `seconds[name]`, and remember it for a resumed run."""
        self._stage, self._since = name, time.monotonic()
        try:
            yield
        finally:
            self._remember_seconds()
            self._stage = ""

    def _remember_seconds(self) -> None:
        now = time.monotonic()
        self.seconds[self._stage] = round(self.seconds.get(self._stage, 0.0) + now - self._since, 2)
        self._since = now
        if rank() == 0:
            write_atomic(self.folder / "seconds.json", json.dumps(self.seconds) + "\n")

    def add_seconds(self, folder: Path, name: str) -> None:
        """Count what another run, on which this one builds, took."""
        self.seconds[name] = round(sum(json.loads((folder / "report.json").read_text())["seconds"].values()), 2)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one row to metrics.jsonl, and show losses and accuracies beside the progress bar."""
        for name, value in metrics.items():
            require(
                math.isfinite(value),
                f"{name} became {value} after step {step}; {self.folder / 'state.pt'} holds the last good state: "
                "lower --lr, or look at the data, and start again with --overwrite",
            )
        if rank() == 0:
            self._shown |= {
                k: f"{v:.3f}" for k, v in metrics.items() if "loss" in k or "accuracy" in k or "margin" in k
            }
            if self._bar is not None:
                self._bar.set_postfix(self._shown, refresh=False)
            with (self.folder / "metrics.jsonl").open("a") as f:
                f.write(json.dumps({"step": step, **metrics}) + "\n")

    def metrics(self) -> list[dict[str, float]]:
        """The rows logged so far; a line cut off by a kill is left out."""
        path = self.folder / "metrics.jsonl"
        rows = []
        for line in path.read_text().splitlines() if path.is_file() else []:
            with suppress(ValueError):
                rows.append(json.loads(line))
        return rows

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write state.pt: everything that the steps after `step` updates depend on."""
        if rank() == 0:
            state = {
                "step": step,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "random": torch.get_rng_state(),
                "cuda_random": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
            }
            write_atomic(self.folder / "state.pt", lambda path: torch.save(state, path))
        if self._stage:
            self._remember_seconds()

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Continue from state.pt where there is one; forget what was logged after it. Returns the updates done."""
        path = self.folder / "state.pt"
        step = 0
        if path.is_file():
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
                model.load_state_dict(state["model"])
                optimizer.load_state_dict(state["optimizer"])
                torch.set_rng_state(state["random"])
                if state["cuda_random"] is not None and torch.cuda.is_available():
                    torch.cuda.set_rng_state(state["cuda_random"])
                step = state["step"]
            except Exception as error:  # torch and pickle raise many kinds, and all mean the same here
                reason = f"{path}: no state of this run can be read from it ({type(error).__name__})"
                raise UserError(f"{reason}; remove it and --resume starts this stage from its beginning") from None
        if rank() == 0:
            rows = [row for row in self.metrics() if row["step"] <= step]
            write_atomic(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        barrier()
        return step

    def steps(self, batches, total: int, model: nn.Module, optimizer: torch.optim.Optimizer, description: str):
        """Iterate over (step, rows) with a progress bar, saving every `config.save_every` steps.

        Ctrl-C, or SIGTERM, lets the step in hand finish, saves, and raises KeyboardInterrupt with how to continue.
        """
        interrupted = []
        signals = {number: signal.signal(number, lambda *_: interrupted.append(True)) for number in (SIGINT, SIGTERM)}
        bar = self._bar = progress(description, total, "step")
        device = next(model.parameters()).device
        done = None
        try:
            for step, rows in batches:
                if done is None:
                    bar.update(step)
                elif step % self.config.save_every == 0:
                    self.save(step, model, optimizer)
                yield step, rows
                done = step + 1
                bar.update()
                # all processes must agree to stop, or some would wait for the others' gradients for ever
                if sum_processes(torch.tensor(len(interrupted), device=device)) if world_size() > 1 else interrupted:
                    break
            self.save(total if done is None else done, model, optimizer)
            if interrupted:
                where = f"{done} of {total} steps are saved in {self.folder}"
                raise KeyboardInterrupt(f"{where}; add --resume to the same command to continue")
        finally:
            bar.close()
            for number, handler in signals.items():
                signal.signal(number, handler)

    def stop_if_not_finite(
        self, step: int, loss: float | Tensor, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        """Call before the optimiser's step: a loss or gradient that is NaN or infinite must not reach the weights.

        Saves the weights as they were before the step and raises UserError. (Costs the step's one wait for the GPU.)
        """
        if not math.isfinite(loss):
            optimizer.zero_grad()
            self.save(step, model, optimizer)
            raise UserError(
                f"the loss or its gradient became {float(loss)} at step {step + 1}; the weights before that step are "
                f"in {self.folder / 'state.pt'}: lower --lr, or look at the data, and start again with --overwrite"
            )

    def report(self, report: dict[str, Any]) -> None:
        """Write report.json, with the most GPU memory that tensors of this process ever held, where there is a GPU."""
        if rank() == 0:
            peak = torch.cuda.max_memory_allocated() / 2**20
            report = {**report, **({"peak_memory_MiB": peak} if peak else {}), "seconds": self.seconds}
            write_atomic(self.folder / "report.json", json.dumps(report, indent=2) + "\n")


def version(package: str) -> str | None:
    """The installed version of a package, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
