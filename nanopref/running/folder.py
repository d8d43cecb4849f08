"""A run's folder, and how a run survives being killed.

`out/<stage>/` holds
    config.json     every flag, the versions, the seed
    inputs.json     the digests of what the run has read, which must be the same when it goes on
    seconds.json    what each stage took
    metrics.jsonl   one row a logged step; with --tensorboard, tensorboard/ holds the same as event files
    samples.jsonl   answers to the same prompts, at each look on the way
    feedback.jsonl, round.json, reference.safetensors   of each round: what was said of sampled answers, what was
                    thought of all of them, log π_ref
    state/          what `--resume` continues from, called by its step: weights, optimiser, what was read and logged;
                    and, where no held-out look has found the newest sound yet, the last that one did
    model/          the trained model, a Hugging Face folder, with its tokenizer
    report.json, report.png
Each file but metrics.jsonl, which grows by a line a step, is written under another name and then renamed, and so is
the folder of a state: it is whole or absent whenever the process dies.
"""

import errno
import json
import math
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import kernels
from nanopref.running import functions, parallel, replace, tensorboard
from nanopref.running.files import lock, read_lines, read_object, seconds_of, write_atomic
from nanopref.running.flags import (
    RewardError,
    RunFlags,
    UserError,
    is_code,
    is_loss_of_a_process,
    is_out_of_memory,
    require,
)  # fmt: skip
from nanopref.running.inputs import Inputs, digest, fingerprint, fingerprint_of_word, parts_of, paths_in
from nanopref.running.logs import NOTHING, Logs
from nanopref.running.optim import Both, batches
from nanopref.running.parallel import barrier, by_first, full, progress, rank, say, sum_processes
from nanopref.running.sharding import sum_gradients_of
from nanopref.running.states import States, remove

# flags that may change between the start of a run and its --resume
FREE = {"resume", "overwrite", "out", "device", "kernels", "save_seconds", "tensorboard", "micro_batch", "sample_batch"}
FREE |= {"checkpoint_activations", "compile", "parallel"}
# flags that name what is read: on --resume what they name must be the same, wherever it lies by then
READ = ("init", "data", "judged", "reward", "chooser")


class Run:
    """The folder of one run. Nothing is touched before `begin`, but for giving back an old run, see replace.py."""

    def __init__(self, config: RunFlags):
        """Raises UserError where `config.out` holds another run and neither --resume nor --overwrite was given."""
        self.config = config
        self.folder = Path(config.out)
        self.seconds: dict[str, float] = {}
        self._inputs = Inputs(self.folder)
        self._stage, self._since = "", 0.0
        self._model: nn.Module | None = None  # what `steps` trains, and where it is
        self._optimizer: Optimizer | Both | None = None
        self._states: States | None = None
        self._step, self._bar, self._shown = 0, None, {}
        self._round, self._rounds, self._before = 0, 1, 0
        self.logs, self._logged = Logs(self.folder), NOTHING  # and what was there when the round began
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
        by_first(self._look)

    def _look(self) -> None:
        """Give back an old run that was set aside for one that has nothing to show; check what is there."""
        if self.folder.is_dir() and replace.is_aside(self.folder):
            lock(self.folder)
            replace.put_back(self.folder)
        if self.folder.is_dir() and replace.contents(self.folder):
            self._check_old_run()

    def _check_old_run(self) -> None:
        flags = json.loads(json.dumps(asdict(self.config)))  # in the types that a file gives back
        before = replace.flags_of(self.folder)
        require(
            before is not None,
            f"--out {self.folder}: the folder holds something that is no run of ours, or one whose config.json is "
            "missing or damaged; choose another --out",
        )
        require(
            self.config.resume or self.config.overwrite,
            f"--out {self.folder} holds a run: add --resume to continue it, --overwrite to replace it, "
            "or choose another --out",
        )
        if self.config.overwrite:
            for name, words in self._read().items():
                for parts in words:
                    inside = any(p.resolve().is_relative_to(self.folder.resolve()) for p in paths_in(parts))
                    require(not inside, f"--overwrite would remove {''.join(parts)}, which {name} wants to read")
            replace.check(self.folder)
        else:
            differ = {k: flags[k] != before[k] for k in flags if k not in FREE and k in before}
            differ |= {k: bool(flags[k]) != bool(before[k]) for k in differ if k in READ}  # else its digest tells
            changed = [k for k, differs in differ.items() if differs]
            was = ", ".join(f"--{k.replace('_', '-')} {before.get(k)}" for k in changed)
            require(
                not changed, f"--resume: the run in {self.folder} was started with {was}; use the same, or --overwrite"
            )

    def _read(self) -> dict[str, list[list[str]]]:
        """The words of each flag that names what is read, each in parts, of which some may be paths."""
        found = {f"--{name}": words for name in READ if (words := getattr(self.config, name, None))}
        found |= {"--loss": (loss,)} if is_code(loss := getattr(self.config, "loss", "")) else {}
        return {k: [[x]] if isinstance(x, str) else [parts_of(word) for word in x] for k, x in found.items()}

    def begin(self) -> None:
        """Create the folder, lock it and write config.json. With `--overwrite`, an old run is set aside until this one
        has something to show.

        Raises UserError where another process works in the folder, or where it was begun with other inputs.
        """
        by_first(self._make)
        self._inputs = Inputs(self.folder)  # the same for all processes, who go by it
        self.pin_what_is_read()
        if is_code(loss := getattr(self.config, "loss", "")):  # a judge that failed may be mended, a loss is what it is
            file, hint = functions.file_of(loss), f"is not what the run in {self.folder} began with"
            found = by_first(lambda: fingerprint(file))
            self._inputs.pin("code of --loss", found, f"--loss {loss}: {file} {hint}: put that back, or --overwrite")
        kept = read_object(self.folder / "seconds.json").items()  # a run goes on without them
        self.seconds = {name: x for name, x in kept if isinstance(x, int | float) and math.isfinite(x)}

    def _make(self) -> None:
        if self.config.resume and not (self.folder / "config.json").exists():
            say(f"nothing to resume in {self.folder}: starting from the beginning")
        self.folder.mkdir(parents=True, exist_ok=True)
        lock(self.folder)
        if replace.contents(self.folder):
            self._check_old_run()  # another process may have begun and ended since the first look
            if self.config.overwrite:
                replace.set_aside(self.folder)
        replace.tidy(self.folder)
        versions = {name: parallel.version(name) for name in ("torch", "triton", "numpy", "tiktoken", "safetensors")}
        content = {
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "flags": {**asdict(self.config), "resume": False, "overwrite": False},
            "versions": {"python": platform.python_version(), **versions},
        }
        if not (self.folder / "config.json").exists():
            write_atomic(self.folder / "config.json", json.dumps(content, indent=2) + "\n")

    # ---- what the run depends on -------------------------------------------------------------------------------------

    def pin_what_is_read(self) -> None:
        """Raise UserError where a flag names something else, or what it names is something else, than at the start."""
        for name, words in self._read().items():
            hint = f"is not what the run in {self.folder} began with: put that back, or --overwrite"
            found = by_first(lambda words=words: digest(*map(fingerprint_of_word, words)))
            self._inputs.pin(name, found, f"{name} {hint}")

    def pin(self, name: str, *parts: Any) -> None:
        """Remember what a stage learns from: data with a `digest()`, or lists of text.

        Raises UserError where a resumed run has begun with something else."""
        found = [part.digest() if hasattr(part, "digest") else json.dumps(part) for part in parts]
        hint = "the data, or what was made of them, have changed; start again with --overwrite"
        self._inputs.pin(self.path(name).name, digest(*found), f"--resume: not the same {name}: {hint}")

    def pin_file(self, path: Path, made: bool = False, remove: Path | None = None) -> None:
        """The same of a file, or a model's folder, that a stage has made, just now or before. `remove`: what to remove
        to have it made anew."""
        name = str(path.relative_to(self.folder))
        found = by_first(lambda: fingerprint(path) if path.exists() else "nothing")
        if made:
            self._inputs.remember(name, found)
        hint = f"remove {remove or path}, and --resume makes it again"
        self._inputs.pin(name, found, f"{path} is not as this run made it: {hint}")

    def has_made(self, folder: Path) -> bool:
        """Whether a stage with a folder of its own has come to its end, and it is known what its model was then."""
        model = str((folder / "model").relative_to(self.folder))
        return by_first(lambda: seconds_of(folder) is not None) and model in self._inputs.digests

    def keep(self, make: Callable[[], Sequence[str | bytes]], *names: str) -> list[Path]:
        """Files of these names whose contents a stage makes once: now, unless they are there, in which case they must
        be as they were made, or UserError. All processes make them, each its share, and the first writes."""
        paths, began = [self.path(name) for name in names], time.monotonic()
        if by_first(lambda: all(path.exists() for path in paths)):
            for path in paths:
                self.pin_file(path)
            return paths
        contents = make()
        for path, content in zip(paths, contents, strict=True):
            self._inputs.remember(str(path.relative_to(self.folder)), digest(content))
            by_first(lambda path=path, content=content: self._write(path, content))
        if rank() == 0 and time.monotonic() - began >= self.config.save_seconds:  # it would be lost with this run
            replace.settle(self.folder)
        return paths

    def _write(self, path: Path, content: str | bytes) -> None:
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, content)

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
                self.save(accept=True)
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
        self.seconds[name] = seconds_of(folder) or 0.0

    def log(self, metrics: dict[str, float]) -> None:
        """Append the step's row to metrics.jsonl, and show losses and accuracies beside the progress bar.

        Raises UserError for a figure that is not finite."""
        for name, value in metrics.items():
            if not math.isfinite(value):
                hint = f"{by_first(self._states.fall_back)}; " if self._states else ""
                hint += "lower --lr, or look at the data, and start again with --overwrite"
                raise UserError(f"{name} became {value} after step {self.step + 1}: {hint}")
        if rank() == 0:
            shown = {k: f"{v:.3f}" for k, v in metrics.items() if any(word in k for word in ("loss", "accuracy", "kl"))}
            self._shown |= shown
            if self._bar is not None:
                self._bar.set_postfix(self._shown, refresh=False)
            self.logs.append("metrics.jsonl", {"step": self.step + 1, **metrics})
            if self._states and any(name.startswith("held_out") for name in metrics):
                self._states.found_sound()
            replace.settle(self.folder)
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
            peak = {"peak_memory_MiB": (torch.cuda.max_memory_allocated() or parallel.most_memory()) / 2**20}
            report = {**report, **peak, "seconds": self.seconds}
            write_atomic(self.folder / "report.json", json.dumps(report, indent=2) + "\n")

    # ---- rounds, steps, and the state to resume from -----------------------------------------------------------------

    def rounds(self, n: int) -> Iterator[int]:
        """0 … n - 1: rounds of steps, counted on from one to the next, each with files and a state of its own. Those
        that are done yield no step and leave the model as it was after them."""
        self._rounds = n
        for self._round in range(n):
            yield self._round

    def _made_in(self, round: int) -> list[Path]:
        """The files of a round."""
        names = ("state", "feedback.jsonl", "round.json", "reference.safetensors")
        return [path for name in names if (path := self.path(name, round)).exists()]

    def path(self, name: str, round: int | None = None) -> Path:
        """The file of this name in the folder; from the second round on, one of its own, as feedback-2.jsonl."""
        stem, dot, suffix = name.partition(".")
        number = self._round if round is None else round
        return self.folder / (f"{stem}-{number + 1}{dot}{suffix}" if number else name)

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

        Ctrl-C, or SIGTERM, lets the step in hand finish, saves, and raises KeyboardInterrupt with how to continue; a
        second one does not wait.
        """
        self._model, self._optimizer = model, optimizer
        start = self._step = self.load(total)
        sum_gradients_of(model)
        self._bar = progress(name, total, "step", start)
        interrupted, stop, due, how = [], 0, 0, "add --resume to the same command to continue"

        def interrupt(*_) -> None:
            interrupted.append(True)
            if len(interrupted) > 1:
                raise KeyboardInterrupt(f"step {self._step + 1} of {total} is lost; {how} from the last saved state")

        signals = {number: signal.signal(number, interrupt) for number in (SIGINT, SIGTERM)}
        try:
            for step, rows in batches(n, size, total, self.config.seed, start, lengths):
                if due:
                    self.save()
                # what is drawn in a step, as by dropout, depends on nothing before it, nor on the number of processes
                torch.manual_seed(parallel.generator(self.config.seed, f"{name} {self._round} {step}").initial_seed())
                self._clean = True
                yield step, rows
                self._step, self._clean = step + 1, False
                self._bar.update()
                # what all processes must do together, or some would wait for the others for ever
                agreed = torch.tensor([len(interrupted), rank() == 0 and self.save_is_due()])
                stop, due = sum_processes(agreed).tolist()
                if stop:
                    break
            self.save(accept=True)
            if stop:
                raise KeyboardInterrupt(f"{self._step} of {total} steps are saved in {self.folder}; {how}")
            if rank() == 0:
                self._states.found_sound()
            self._logged = self.logs.seen() if self._step > start else self._logged
            self._before, self._step = self._before + self._step, 0
        finally:
            self._bar.close()
            for number, handler in signals.items():
                signal.signal(number, handler)

    def update(self, loss: float | Tensor, clip: float, *parts: list[nn.Parameter]) -> list[float]:
        """One step of the optimiser. The gradients of each part are clipped to norm `clip`; returns their norms before
        that.

        Where the loss or a norm is not finite nothing may reach the weights, nor may what led there replace the last
        good state: UserError says which that is. (Asking costs the step's one wait for the GPU.)
        """
        self._clean = False
        figures = [torch.as_tensor(loss)]
        for part in parts:
            figures.append(full(nn.utils.clip_grad_norm_(part, clip)))
        loss, *norms = torch.stack([x.to(parts[0][0].device) for x in figures]).tolist()
        if not math.isfinite(loss + sum(norms)):
            self._optimizer.zero_grad()
            kept = f"{by_first(self._states.fall_back)}; "
            raise UserError(
                f"the loss or its gradient became {loss + sum(norms)} at step {self.step + 1}; {kept}"
                "lower --lr, or look at the data, and start again with --overwrite"
            )
        if rank() == 0:
            self._states.accept()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norms

    def save_is_due(self) -> bool:
        """Whether --save-seconds have passed since the last save, or twenty times what that took, if it is more."""
        return time.monotonic() >= self._next_save

    def save(self, accept: bool = False) -> None:
        """Write everything that the following steps depend on and that changes: the newest state, when `update` has
        found its loss finite, or at once. All processes must call it."""
        began = time.monotonic()
        if self._states.at != self._step:
            seen = {"inputs": dict(self._inputs.digests), "logged": self.logs.seen()} if rank() == 0 else {}
            self._states.write(self._step, self._model, self._optimizer, seen)
        if accept:
            self._states.accept(wait=True)
        now, self.last_saved = time.monotonic(), self._step
        self._next_save = now + max(self.config.save_seconds, 20 * (now - began))
        if self._stage:
            self._remember_seconds()

    def load(self, total: int) -> int:
        """Continue from the newest state where there is one; forget what was logged after it. Returns the steps done of
        `total`. All processes must call it.

        Raises UserError where it is damaged or of another run, or where its inputs or its logs have changed.
        """
        self._states = States(self.path("state"), looks=hasattr(self.config, "eval_every"))
        step, logged = 0, self._logged
        if path := self._states.newest():
            try:
                state = self._states.load(self._model, self._optimizer, total)
                step, inputs, logged = state["step"], state["inputs"], state["logged"]
                changed = [name for name, x in inputs.items() if self._inputs.digests.get(name, x) != x]
                changed += self.logs.changed(logged)
            except Exception as error:  # many kinds are raised, and nearly all mean the same here
                beyond = getattr(error, "errno", None) in (errno.EIO, errno.EACCES, errno.EPERM)
                if beyond or is_loss_of_a_process(error) or is_out_of_memory(error):
                    raise
                reason = f"{path}: no state of this run can be read from it ({type(error).__name__})"
                raise UserError(f"{reason}; remove it and --resume {self._states.without_newest()}") from None
            where = [str(self.folder / name) if (self.folder / name).exists() else name for name in changed]
            require(
                not changed,
                f"--resume: {', '.join(where)}: not as when {path.relative_to(self.folder)} was saved; put it back, or "
                "start again with --overwrite",
            )
        later = by_first(lambda: [path for i in range(self._round + 1, self._rounds) for path in self._made_in(i)])
        for path in later if step < total else ():  # what was made of this policy is not what will be made of it
            self._inputs.remember(path.name, None)
            if rank() == 0:
                remove(path) if path.is_dir() else path.unlink()
        if rank() == 0 and (step < total or not later):
            self.logs.cut(logged)
        self._logged = logged
        barrier()
        self._next_save, self.last_saved = time.monotonic() + self.config.save_seconds, step
        return step


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows that a run has logged."""
    return read_lines(folder / "metrics.jsonl")
