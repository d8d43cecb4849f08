"""A run's folder, and how a run survives being killed.

`out/<stage>/` holds
    config.json     every flag, the versions, the seed
    seconds.json    what each stage took
    metrics.jsonl   one row a logged step; with --tensorboard, tensorboard/ holds the same as event files
    samples.jsonl   answers to the same prompts, at each look on the way
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
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import kernels
from nanopref.running import tensorboard
from nanopref.running.flags import RewardError, RunFlags, UserError, require
from nanopref.running.optim import Both, batches
from nanopref.running.parallel import barrier, progress, rank, say, sum_gradients, sum_processes, world_size

try:
    import fcntl
    import resource
except ImportError:  # a system without them does not notice two runs in one folder, nor what they take
    fcntl = resource = None

PARTIAL = ".partial"  # how the names of files end that are being written
# flags that may change between the start of a run and its --resume
FREE = {"resume", "overwrite", "out", "device", "kernels", "save_seconds", "tensorboard", "micro_batch", "sample_batch"}
FREE |= {"checkpoint_activations", "compile"}


def write_atomic(path: str | Path, content: str | bytes | Callable[[Path], None]) -> None:
    """Write a file whole or not at all. `content` is text, bytes, or a function that writes to the path it is given."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # which follows the umask; safetensors makes files for their owner alone
        if callable(content):
            content(partial)
        else:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.chmod(mode)
        with partial.open("rb") as f:
            os.fsync(f.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


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
        raise UserError(f"--out {folder}: another process is at work there; wait, or choose another --out") from None
    except OSError:  # a file system without locks
        pass
    _locks[folder.resolve()] = handle


class Run:
    """The folder of one run. Nothing is touched before `begin`."""

    def __init__(self, config: RunFlags):
        """Raises UserError where `config.out` holds another run and neither --resume nor --overwrite was given."""
        self.config = config
        self.folder = Path(config.out)
        self.seconds: dict[str, float] = {}
        self._stage, self._since = "", 0.0
        self._model: nn.Module | None = None  # what `steps` trains, and where it is
        self._optimizer: Optimizer | Both | None = None
        self._step, self._bar, self._shown = 0, None, {}
        self._round, self._before = 0, 0
        self._clean = False  # whether a step has begun of which no weight knows yet
        self._next_save, self.last_saved = 0.0, 0
        self._board = None  # TensorBoard's writer, once there is something to write
        if config.tensorboard:
            tensorboard.writer_class()
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
            for name in ("init", "data", "reward", "judged", "chooser"):
                read = flags.get(name) or []
                for word in [read] if isinstance(read, str) else read:
                    # of a reward the path may stand before or behind a colon, and a weight behind it
                    paths = [Path(part).resolve() for part in (word, *re.split("[:*]", word)) if part]
                    inside = any(path.is_relative_to(self.folder.resolve()) for path in paths)
                    require(not inside, f"--overwrite would remove {word}, which --{name} wants to read")
        else:
            changed = [k for k in flags if k not in FREE and k in before and flags[k] != before[k]]
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

    # ---- stages and what they log ------------------------------------------------------------------------------------

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Use the kernels that --kernels names, and add the time that the block takes to `seconds[name]`."""
        self._stage, self._since = name, time.monotonic()
        try:
            with kernels.use(self.config.kernels):
                yield
        except RewardError:
            if self._clean:
                self.save()
            raise
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

    def log(self, metrics: dict[str, float]) -> None:
        """Append the step's row to metrics.jsonl, and show losses and accuracies beside the progress bar.

        Raises UserError for a figure that is not finite."""
        for name, value in metrics.items():
            require(
                math.isfinite(value),
                f"{name} became {value} after step {self.step + 1}: lower --lr, or look at the data, and start again "
                "with --overwrite",
            )
        if rank() == 0:
            shown = {k: f"{v:.3f}" for k, v in metrics.items() if any(word in k for word in ("loss", "accuracy", "kl"))}
            self._shown |= shown
            if self._bar is not None:
                self._bar.set_postfix(self._shown, refresh=False)
            with (self.folder / "metrics.jsonl").open("a") as f:
                f.write(json.dumps({"step": self.step + 1, **metrics}) + "\n")
            if self.config.tensorboard:  # at first with all that was logged before the run was resumed
                rows = [{"step": self.step + 1, **metrics}] if self._board else self.metrics()
                self._board = self._board or tensorboard.open_board(self.folder / "tensorboard")
                tensorboard.show(self._board, self._stage, rows)

    def metrics(self) -> list[dict[str, float]]:
        """The rows logged so far."""
        return read_metrics(self.folder)

    def report(self, report: dict[str, Any]) -> None:
        """Write report.json, with the most that tensors of this process held on a GPU, or else what all of it held."""
        if rank() == 0:
            peak = {"peak_memory_MiB": (torch.cuda.max_memory_allocated() or most_memory()) / 2**20}
            report = {**report, **peak, "seconds": self.seconds}
            write_atomic(self.folder / "report.json", json.dumps(report, indent=2) + "\n")

    def note(self, name: str, *rows: dict[str, Any], after: int) -> None:
        """Let a file of JSON Lines hold these rows behind its first `after`."""
        rows = (*self.notes(name)[:after], *rows)
        write_atomic(self.folder / name, "".join(json.dumps(row) + "\n" for row in rows))

    def notes(self, name: str) -> list[dict[str, Any]]:
        """The rows of such a file."""
        return read_lines(self.folder / name)

    # ---- rounds, steps, and the state to resume from -----------------------------------------------------------------

    def rounds(self, n: int) -> Iterator[int]:
        """0 … n - 1: rounds of steps, counted on from one to the next, each with files and a state of its own. Those
        that are done yield no step and leave the model as it was after them."""
        for self._round in range(n):
            yield self._round

    def path(self, name: str) -> Path:
        """The file of this name in the folder; from the second round on, one of its own, as feedback-2.jsonl."""
        stem, dot, suffix = name.partition(".")
        return self.folder / (f"{stem}-{self._round + 1}{dot}{suffix}" if self._round else name)

    @property
    def step(self) -> int:
        """How many steps of all rounds are done."""
        return self._before + self._step

    def steps(
        self, name: str, n: int, size: int, total: int, model: nn.Module, optimizer: Optimizer | Both,
        lengths: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, list[int]]]:  # fmt: skip
        """(step, `size` of n row numbers) for the steps that are left of `total`, with a progress bar; see
        `optim.batches`. The state is saved from time to time and at the end.

        Ctrl-C, or SIGTERM, lets the step in hand finish, saves, and raises KeyboardInterrupt with how to continue.
        """
        self._model, self._optimizer = model, optimizer
        start = self._step = self.load(total)
        self._bar = progress(name, total, "step", start)
        interrupted = []
        signals = {number: signal.signal(number, lambda *_: interrupted.append(True)) for number in (SIGINT, SIGTERM)}
        device = next(model.parameters()).device
        try:
            for step, rows in batches(n, size, total, self.config.seed, start, lengths):
                if step > start and self.save_is_due():
                    self.save()
                self._clean = True
                yield step, rows
                self._step, self._clean = step + 1, False
                self._bar.update()
                # all processes must agree to stop, or some would wait for the others' gradients for ever
                if sum_processes(torch.tensor(len(interrupted), device=device)) if world_size() > 1 else interrupted:
                    break
            self.save()
            if interrupted:
                where = f"{self._step} of {total} steps are saved in {self.folder}"
                raise KeyboardInterrupt(f"{where}; add --resume to the same command to continue")
            self._before, self._step = self._before + self._step, 0
        finally:
            self._bar.close()
            for number, handler in signals.items():
                signal.signal(number, handler)

    def update(self, loss: float | Tensor, clip: float, *parts: list[nn.Parameter]) -> list[float]:
        """One step of the optimiser. The gradients of each part are summed over the processes and clipped to norm
        `clip`; returns their norms before that.

        Where the loss or a norm is not finite nothing may reach the weights: they are saved as they were before the
        step, and UserError says so. (Asking costs the step's one wait for the GPU.)
        """
        self._clean = False
        figures = [torch.as_tensor(loss)]
        for part in parts:
            sum_gradients(part)
            figures.append(nn.utils.clip_grad_norm_(part, clip))
        loss, *norms = torch.stack([x.to(parts[0][0].device) for x in figures]).tolist()
        if not math.isfinite(loss + sum(norms)):
            self._optimizer.zero_grad()
            self.save()
            raise UserError(
                f"the loss or its gradient became {loss + sum(norms)} at step {self.step + 1}; the weights before "
                f"that step are in {self.path('state.pt')}: lower --lr, or look at the data, and start again with "
                "--overwrite"
            )
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norms

    def save_is_due(self) -> bool:
        """Whether --save-seconds have passed since the last save, or twenty times what that took, if it is more."""
        return time.monotonic() >= self._next_save

    def save(self) -> None:
        """Write state.pt: everything that the following steps depend on and that changes."""
        if rank() == 0:
            began = time.monotonic()
            state = {
                "step": self._step,
                "model": {name: x for name, x in self._model.state_dict().items() if name not in self._frozen()},
                "optimizer": self._optimizer.state_dict(),
                "random": torch.get_rng_state(),
                "cuda_random": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
            }
            write_atomic(self.path("state.pt"), lambda path: torch.save(state, path))
            now, self.last_saved = time.monotonic(), self._step
            self._next_save = now + max(self.config.save_seconds, 20 * (now - began))
        if self._stage:
            self._remember_seconds()

    def _frozen(self) -> set[str]:
        """The weights that do not learn, which need not be saved: they are again what they were."""
        return {name for name, p in self._model.named_parameters(remove_duplicate=False) if not p.requires_grad}

    def load(self, total: int) -> int:
        """Continue from state.pt where there is one; forget what the round's `total` steps logged after it. Returns the
        updates done."""
        path = self.path("state.pt")
        step = 0
        if path.is_file():
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
                weights = self._model.state_dict()
                self._model.load_state_dict({name: weights[name] for name in self._frozen()} | state["model"])
                self._optimizer.load_state_dict(state["optimizer"])
                torch.set_rng_state(state["random"])
                if state["cuda_random"] is not None and torch.cuda.is_available():
                    torch.cuda.set_rng_state(state["cuda_random"])
                step = state["step"]
            except Exception as error:  # torch and pickle raise many kinds, and all mean the same here
                reason = f"{path}: no state of this run can be read from it ({type(error).__name__})"
                raise UserError(f"{reason}; remove it and --resume starts this stage from its beginning") from None
        if rank() == 0:
            last = self._before + total
            rows = [row for row in self.metrics() if row["step"] <= self._before + step or row["step"] > last]
            write_atomic(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        barrier()
        self._next_save, self.last_saved = time.monotonic() + self.config.save_seconds, step
        return step


def most_memory() -> int:
    """The bytes that this process had in memory at most; 0 where the system does not tell."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else 0


def version(package: str) -> str | None:
    """The installed version of a package, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows that a run has logged."""
    return read_lines(folder / "metrics.jsonl")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON Lines, if it is there; a line cut off by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows
