"""Files that are whole or absent, whenever the process dies; and reading what somebody may have spoilt."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from nanopref.running.flags import UserError, is_out_of_memory

try:
    import fcntl
except ImportError:  # a system without them does not notice two runs in one folder
    fcntl = None

PARTIAL = ".partial"  # how the names of files end that are being written
LEFT = re.compile(rf"\.[^/]*\.(\d+|next|gone){re.escape(PARTIAL)}")  # and what ours are like


Content = str | bytes | Callable[[Path], None]  # of a file: text, bytes, or a function that writes to a path


def write_atomic(path: str | Path, content: Content) -> None:
    """Write a file whole or not at all.

    OSError, which names the file, where the disk is full or the folder read-only; UserError where a library says so in
    words of its own.
    """
    with prepared(Path(path), content) as partial, named(Path(path)):
        partial.replace(path)


@contextmanager
def prepared(path: Path, content: Content) -> Iterator[Path]:
    """What will be the file, on the disk under another name: inside it may be renamed, or else it is gone after."""
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with named(path):
            partial.touch()
            mode = partial.stat().st_mode  # which follows the umask; safetensors makes files for their owner alone
            if callable(content):
                content(partial)
            else:
                partial.write_bytes(content.encode() if isinstance(content, str) else content)
            partial.chmod(mode)
            with partial.open("rb") as f:
                os.fsync(f.fileno())
        yield partial
    finally:
        with suppress(OSError):  # of a folder that has become read-only
            partial.unlink(missing_ok=True)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """What goes wrong while a file is written names it, and not what it is called until it is whole."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    except (RuntimeError, SafetensorError) as error:  # as which torch and safetensors tell of a full disk
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path}: could not be written ({' '.join(str(error).split())})") from None


def append(path: Path, content: bytes) -> None:
    """Add to a file all of this, or nothing."""
    with named(path), path.open("ab", buffering=0) as f:
        end = f.tell()
        try:
            if f.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            f.truncate(end)
            raise


def clean(folder: Path) -> None:
    """Remove what processes that were killed while they wrote have left in a run's folder."""
    for left in folder.rglob(f".*{PARTIAL}"):
        if LEFT.fullmatch(left.name) and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()


_locks: dict[Path, int] = {}  # the folders that this process works in, and the open handles that lock them


def lock(folder: Path) -> None:
    """Raise UserError where another process works in the folder; keep others out until this one ends, however it ends.

    The folder itself is locked, so nothing is left in it that could be stale.
    """
    if fcntl is None:
        return
    if folder.resolve() in _locks:  # locked by an earlier run of this process
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


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_object(path: Path) -> dict[str, Any]:
    """The object in a file of JSON; {} where there is no such file, or something else in it."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_bytes())
        return found if isinstance(found, dict) else {}
    return {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON Lines, if it is there; a line cut off by a kill is left out."""
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def seconds_of(folder: Path) -> float | None:
    """How long the run in a folder took; None where it has not come to its end."""
    seconds = read_object(folder / "report.json").get("seconds")
    with suppress(AttributeError, TypeError):
        return round(float(sum(seconds.values())), 2)
    return None
