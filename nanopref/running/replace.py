"""--overwrite: a run makes place for another, and is there again if that one ends before it has anything to show.

Everything happens inside the folder, which may be a mount point, a link or the current folder, and is never itself
renamed or removed. The old run moves to OUT/.overwritten-run.moving, its config.json first, and when all of it is there
that becomes OUT/.overwritten-run: a process that was killed at any moment has left one or the other, and the next one
to look knows what to do.
"""

import atexit
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from nanopref.running.files import PARTIAL, clean, lock, read_object
from nanopref.running.flags import require
from nanopref.running.parallel import say

OLD, MOVING = ".overwritten-run", ".overwritten-run.moving"
# what a run writes, in its folder or, below sft/ or rm/, in that of a stage; see folder.py
OURS = re.compile(
    r"((sft|rm)/)*("
    r"(config|inputs|seconds|report|round(-\d+)?)\.json|report\.png|(metrics|samples|rounds|feedback(-\d+)?)\.jsonl"
    r"|state(-\d+)?/\d+/(run\.json|[^/]*\.safetensors)|reference(-\d+)?\.safetensors|tensorboard/events\.[^/]*"
    r"|(model|critic)/(adapter/)?[^/]*\.(json|safetensors|jinja)"
    r"|(.*/)?\.[^/]*\.partial)"
)
BELONGS = {"lost+found"}  # to a file system

_aside: set[Path] = set()  # the folders in which this process has set a run aside


def contents(folder: Path) -> list[Path]:
    """What stands in a folder, files that were being written left out."""
    return [path for path in folder.iterdir() if not path.name.endswith(PARTIAL) and path.name not in BELONGS]


def flags_of(folder: Path) -> dict[str, Any] | None:
    """The flags of the run in a folder, None where none of ours is there."""
    config = read_object(folder / "config.json")
    flags = config.get("flags")
    return flags if isinstance(flags, dict) and isinstance(config.get("versions"), dict) else None


def check(folder: Path) -> None:
    """Raise UserError where --overwrite would remove what no run has written, or a run in which somebody works."""
    for path in _files(folder):
        ours = OURS.fullmatch(path.relative_to(folder).as_posix()) and not path.is_symlink()
        require(bool(ours), f"--overwrite would remove {path}, which is of no run; move it, or choose another --out")
        if path.name == "config.json" and path.parent != folder and path.parent.name in ("sft", "rm"):
            lock(path.parent)


def _files(folder: Path) -> Iterator[Path]:
    """The files below a folder, and links, which are not followed; without those of a run that was set aside."""
    for path in contents(folder):
        if path.name in (OLD, MOVING):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _files(path)
        else:
            yield path


def tidy(folder: Path) -> None:
    """Remove what processes that were killed have left in a run's folder."""
    clean(folder)
    with suppress(OSError):  # unless it is empty, as before the first file has moved or behind the last
        (folder / MOVING).rmdir()


def set_aside(folder: Path) -> None:
    """Move the run in a folder, which must be ours alone (`check`), out of the way."""
    (folder / MOVING).mkdir(exist_ok=True)
    try:
        for path in sorted(contents(folder), key=lambda path: path.name != "config.json"):
            if path.name != MOVING:
                path.rename(folder / MOVING / path.name)
    except OSError:  # a mount point, or somebody else's folder
        put_back(folder)
        raise
    (folder / MOVING).rename(folder / OLD)
    _aside.add(folder.resolve())


def is_aside(folder: Path) -> bool:
    """Whether a run was set aside, and not removed yet."""
    return any(flags_of(folder / name) is not None for name in (OLD, MOVING))


def put_back(folder: Path) -> None:
    """The old run again, and nothing of the new one, which has shown nothing yet."""
    if (folder / OLD).is_dir():
        new = [path for path in _files(folder) if OURS.fullmatch(path.relative_to(folder).as_posix())]
        for path in new:
            path.unlink()
        for place in sorted({place for path in new for place in path.parents if place.is_relative_to(folder)})[:0:-1]:
            with suppress(OSError):  # which holds something else
                place.rmdir()
        (folder / OLD).rename(folder / MOVING)
    _move(folder / MOVING, folder)
    _aside.discard(folder.resolve())
    say(f"{folder} holds the run again that --overwrite had set aside: the new one had come to no result")


def _move(source: Path, to: Path) -> None:
    """All that is in one folder into another, where what is empty, or still being written, may be left of a new run;
    config.json, by which a run is known, comes last."""
    for path in sorted(source.iterdir(), key=lambda path: path.name == "config.json"):
        there = to / path.name
        if path.is_dir() and there.is_dir():
            _move(path, there)
            continue
        require(not there.exists(), f"{there} is in the place of {path}, which --overwrite had set aside: move it away")
        path.rename(there)
    source.rmdir()


@atexit.register
def _put_back_at_the_end() -> None:
    for folder in [*_aside]:
        put_back(folder)


def settle(folder: Path) -> None:
    """The new run, or a stage of it in a folder below, has something to show: the old one is removed."""
    for place in _aside & {folder.resolve(), folder.resolve().parent} if _aside else ():
        gone = place / f"{OLD}.gone{PARTIAL}"
        (place / OLD).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)  # what is somebody else's stays
        _aside.discard(place)
