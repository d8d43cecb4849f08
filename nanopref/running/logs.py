"""The files of a run that grow while it learns, and how much of them a state has seen."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanopref.running.files import append, read_lines, write_atomic
from nanopref.running.inputs import digest

NAMES = ("metrics.jsonl", "samples.jsonl")
Seen = dict[str, tuple[int, str]]  # of each log how many lines, and their digest


class Logs:
    def __init__(self, folder: Path):
        self._folder = folder

    def lines(self, name: str) -> list[bytes]:
        path = self._folder / name
        return path.read_bytes().splitlines(keepends=True) if path.is_file() else []

    def rows(self, name: str) -> list[dict[str, Any]]:
        return read_lines(self._folder / name)

    def add(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        """Write a log with more rows."""
        write_atomic(self._folder / name, b"".join(self.lines(name)) + b"".join(as_line(row) for row in rows))

    def append(self, name: str, row: dict[str, Any]) -> None:
        """The same, without writing the others again: a row comes whole, or not at all where the disk is full."""
        append(self._folder / name, as_line(row))

    def seen(self) -> Seen:
        """What there is now, on the disk too, since a state is there that counts on it."""
        for name in NAMES:
            if (path := self._folder / name).is_file():
                with path.open("rb") as f:
                    os.fsync(f.fileno())
        return {name: (len(lines := self.lines(name)), digest(*lines)) for name in NAMES}

    def changed(self, seen: Seen) -> list[str]:
        """The logs that no longer begin with what was seen."""
        return [name for name, (n, found) in seen.items() if digest(*self.lines(name)[:n]) != found]

    def cut(self, seen: Seen) -> None:
        """Forget what came after that."""
        for name, (n, _) in seen.items():
            if (lines := self.lines(name))[n:]:
                write_atomic(self._folder / name, b"".join(lines[:n]))


def as_line(row: dict[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"


NOTHING: Seen = {name: (0, digest()) for name in NAMES}
