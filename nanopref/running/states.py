"""The states from which a run goes on: which of them is known to be good, and which are kept. What one holds and how it
is written is in storage.py."""

import re
import shutil
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from nanopref.running.files import PARTIAL
from nanopref.running.optim import Both
from nanopref.running.parallel import barrier, by_first, rank


class States:
    """A folder of states, each called by the number of steps that led to it: the newest, whose loss and gradient were
    finite where the run went on from it; and the one before, the last that a held-out look found sound, for as long as
    no look has followed the newest.

    All processes have one and must `write` and `load` together; the first alone moves and removes.
    """

    background: bool | None = None  # whether the run goes on while a state is written; None: where there is a GPU

    def __init__(self, folder: Path, looks: bool):
        """`looks`: whether the run looks at held-out data on its way."""
        self.folder, self._waiting = folder, folder / f".state.next{PARTIAL}"
        by_first(lambda: self._tidy(looks))
        self._steps = by_first(lambda: [int(path.name) for path in _states(folder)])
        self.at = self._steps[-1] if self._steps else None  # after how many steps there is a state
        self._waits = False  # whether one waits to be accepted
        self._sound = looks and len(self._steps) < 2  # whether a look has followed the newest
        self._writing: Any = None  # what the background is at

    def _tidy(self, looks: bool) -> None:
        """Remove what a process that was killed has not come to remove."""
        there = _states(self.folder)
        keep = [*there[:1], *there[1:][-1:]] if looks else there[-1:]
        for path in _numbered(self.folder):
            if path not in keep:
                remove(path)

    def _path(self, step: int) -> Path:
        return self.folder / str(step)

    def write(self, step: int, model: nn.Module, optimizer: Optimizer | Both, run: dict[str, Any]) -> None:
        """Write a state, of which nobody knows yet whether it is good. `run` is what else of it the first process is to
        remember, as JSON."""
        from nanopref.running import storage  # which takes half a second that not every command has to spend

        self.accept(wait=True)  # steps have followed what was written before
        if rank() == 0 and self._waiting.exists():
            shutil.rmtree(self._waiting)
        background = self.background
        if background is None:
            background = any(p.is_cuda for p in model.parameters())
        barrier()
        try:
            run = {"step": step, **run}
            group = _group(dist.group.WORLD) if background and dist.is_initialized() else None
            self._writing = storage.write(self._waiting, model, optimizer, run, group, background)
        except BaseException:
            self._give_up()
            raise
        self.at, self._waits = step, True

    def _failed(self) -> bool:
        return self._writing.exception() is not None

    def _wait(self) -> None:
        """Until what is written in the background is there; raises what went wrong."""
        from nanopref.running import storage

        if self._writing is not None:
            try:
                storage.wait(self._writing)
            except BaseException:
                self._give_up()
                raise
            finally:
                self._writing = None

    def _give_up(self) -> None:
        """What is not written to its end."""
        self._waits = False
        if rank() == 0:
            shutil.rmtree(self._waiting, ignore_errors=True)  # of a folder that has become read-only

    def accept(self, wait: bool = False) -> None:
        """The state that was written last becomes the newest: now or, unless it is to `wait`, when asked again and the
        background is done. What went wrong there is raised where all processes wait."""
        if not self._waits or not (wait or self._writing is None or (self._writing.done() and not self._failed())):
            return
        self._wait()
        self._waits = False
        if rank() > 0:
            return
        if self._path(self.at).exists():  # and is none
            remove(self._path(self.at))
        self._waiting.rename(self._path(self.at))
        kept = self._steps if self._sound else self._steps[:-1]
        for step in self._steps[len(kept) :]:
            remove(self._path(step))
        self._steps, self._sound = [*kept, self.at], False

    def found_sound(self) -> None:
        """A held-out look was finite."""
        self._sound = True
        for step in self._steps[:-1]:
            remove(self._path(step))
        self._steps = self._steps[-1:]

    def fall_back(self) -> str:
        """Keep the last good state, and say which."""
        with suppress(Exception):  # there is worse to tell
            self._wait()
        self._give_up()
        if not self._sound and len(self._steps) > 1:
            remove(self._path(self._steps.pop()))
        if not self._steps:
            return "no state had been saved before"
        step = self._steps[-1]
        return f"the last good weights, those after {step} steps, are in {self._path(step)}"

    def newest(self) -> Path | None:
        """The state to go on from."""
        return self._path(self._steps[-1]) if self._steps else None

    def load(self, model: nn.Module, optimizer: Optimizer | Both, total: int) -> dict[str, Any]:
        """Go on from the newest state, with `total` steps at most behind it; what was remembered of the run.

        An error of some kind, the same in all processes, where it is damaged or of something else."""
        from nanopref.running import storage

        run = storage.load(self._path(self.at), model, optimizer)
        if run["step"] != self.at or not 0 <= self.at <= total:
            raise ValueError(run["step"])
        return run

    def without_newest(self) -> str:
        """What a run does once the newest is removed."""
        if len(self._steps) > 1:
            return f"goes on from {self.folder.name}/{self._steps[0]}"
        return "starts this stage from its beginning"


@lru_cache(maxsize=1)
def _group(everyone: Any) -> Any:
    """The same processes, as they talk while a state is written, beside what they say in steps."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=1))


def _numbered(folder: Path) -> list[Path]:
    """What is called like a state, by number."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in found if re.fullmatch("0|[1-9][0-9]*", path.name)), key=lambda path: int(path.name))


def _states(folder: Path) -> list[Path]:
    """And is one: run.json comes last."""
    return [path for path in _numbered(folder) if (path / "run.json").is_file()]


def remove(folder: Path) -> None:
    """Remove a folder, which is at once no longer there: a kill leaves no half of it."""
    gone = folder.with_name(f".{folder.name}.gone{PARTIAL}")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
