"""The states from which a run goes on: which of them is known to be good, and what is read of one."""

import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from nanopref.running.files import PARTIAL, write_atomic


class States:
    """state.pt, whose loss and gradient were finite where the run went on from it; and state.before.pt, the last state
    that a held-out look found sound, for as long as no look has followed state.pt."""

    def __init__(self, path: Path, looks: bool):
        """`looks`: whether the run looks at held-out data on its way."""
        self.path, self.before = path, path.with_suffix(".before.pt")
        self._waiting = path.with_name(f".{path.name}.next{PARTIAL}")
        self._written = False  # whether one waits to be accepted
        self._sound = looks and not self.before.exists()  # whether a look has followed state.pt

    def write(self, state: dict[str, Any]) -> None:
        """Write a state, of which nobody knows yet whether it is good."""
        write_atomic(self._waiting, lambda path: torch.save(state, path))
        self._written = True

    def accept(self) -> None:
        """The state that was written last becomes state.pt."""
        if not self._written:
            return
        if self._sound and self.path.exists():
            self.before.unlink(missing_ok=True)
            try:
                os.link(self.path, self.before)
            except OSError:  # a file system without links
                self.path.replace(self.before)
        self._waiting.replace(self.path)
        self._written = self._sound = False

    def found_sound(self) -> None:
        """A held-out look was finite."""
        self._sound = True
        self.before.unlink(missing_ok=True)

    def fall_back(self) -> str:
        """Keep the last good state, and say which."""
        self._waiting.unlink(missing_ok=True)
        self._written = False
        if not self._sound and self.before.exists():
            self.before.replace(self.path)
        if not self.path.exists():
            return "no state had been saved before"
        step = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)["step"]
        return f"the last good weights, those after {step} steps, are in {self.path}"

    def newest(self) -> Path | None:
        """The file to go on from."""
        return next((path for path in (self.path, self.before) if path.is_file()), None)

    def without(self, path: Path) -> str:
        """What a run does once that file is removed."""
        another = path == self.path and self.before.exists()
        return f"goes on from {self.before.name}" if another else "starts this stage from its beginning"


def read(path: Path) -> dict[str, Any]:
    """What a state holds. An error of some kind where it is damaged, which torch does not notice of a weight."""
    with zipfile.ZipFile(path) as file:
        if spoilt := file.testzip():
            raise zipfile.BadZipFile(spoilt)
    return torch.load(path, map_location="cpu", weights_only=True)
