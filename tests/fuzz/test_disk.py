"""A disk that is full at any byte, or read-only from any moment on: one sentence, no partial file; and when there is
room again --resume ends as if nothing had been."""

import errno
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import small_runs
from fuzzing import examples, how_it_ends, tried
from hypothesis import given
from hypothesis import strategies as st

NAMES = st.sampled_from(sorted(small_runs.COMMANDS))


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file may be longer: writing stops in the middle of it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def goes_on(name: str, root: Path, out: Path, whole: dict[str, tuple]) -> None:
    code, _, error = how_it_ends(small_runs.run, small_runs.config_of(name, root, out, resume=out.exists()))
    assert (code, error) == (0, "")
    assert small_runs.alike(small_runs.outcome(out), whole[name])


@examples(5)
@given(name=NAMES, size=st.floats(0, 1).map(lambda x: int(10 ** (7 * x))))
def test_a_disk_that_is_full(name, size, root, whole):
    out = root / "full"
    shutil.rmtree(out, ignore_errors=True)
    with tried("full disks"):
        config = small_runs.config_of(name, root, out)
        with room_for(size):
            code, _, error = how_it_ends(small_runs.run, config)
        assert not code or str(out) in error, error
        assert not [path for path in out.rglob("*") if path.name.endswith(".partial")]
        goes_on(name, root, out, whole)


@examples(4)
@given(name=NAMES, moment=st.floats(0, 1, exclude_max=True), reason=st.sampled_from(["EROFS", "EACCES", "EDQUOT"]))
def test_a_folder_that_becomes_read_only(name, moment, reason, root, whole):
    out = root / "read-only"
    shutil.rmtree(out, ignore_errors=True)
    number, n = int(moment * small_runs.moments(name, root)), getattr(errno, reason)

    def refuse(count: int, event: str, args: tuple) -> None:
        writes = event != "open" or any(letter in (args[1] or "r") for letter in "wax+")
        if count >= number and writes:
            raise OSError(n, os.strerror(n), str(args[0]))

    with tried("read-only folders"):  # in which a file that is not whole cannot be removed either, but by --resume
        config = small_runs.config_of(name, root, out)
        code, _, error = how_it_ends(small_runs.watched, out, refuse, small_runs.run, config)
        assert not code or str(out) in error, error
        goes_on(name, root, out, whole)
