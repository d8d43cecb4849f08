"""A run that was killed at any moment, and of whose files any may be spoilt: --resume ends as if nothing had been, or
says in a sentence which file it is and what to do."""

import re
import shutil
from pathlib import Path

import small_runs
from fuzzing import examples, how_it_ends, tried
from hypothesis import given
from hypothesis import strategies as st

NAMES = st.sampled_from(sorted(small_runs.COMMANDS))
MOMENTS = st.floats(0, 1, exclude_max=True)
WAY_OUT = ("remove", "--overwrite", "choose another --out", "put")


def resumed(name: str, root: Path, out: Path) -> tuple[int, str]:
    code, _, error = how_it_ends(small_runs.run, small_runs.config_of(name, root, out, resume=True))
    return code, error


@examples(6)
@given(name=NAMES, moment=MOMENTS)
def test_a_run_that_is_killed_and_moved_goes_on(name, moment, root, whole):
    out = root / "moved"
    with tried("kill moments"):
        small_runs.killed(name, root, moment, out)
        assert resumed(name, root, out) == (0, "")
        assert small_runs.alike(small_runs.outcome(out), whole[name])


NESTED = b"[" * 100_000
JSON = [
    b"null", b"0", b'"x"', b"[]", b"{}", b"[1, 2]", b'{"a": {"b": [null]}}', b'{"step": "x"}', b'[{"step": 1}]',
    NESTED,
]  # fmt: skip
JSON += [b'{"flags": [], "versions": 0}', b'{"seconds": [1]}', b'{"seconds": {"a": "b"}}', b"1e999", b"-5"]
SPOILT = st.one_of(
    st.just(("delete",)),
    st.just(("empty",)),
    st.tuples(st.just("cut"), st.floats(0, 1)),
    st.tuples(st.just("garble"), st.floats(0, 1, exclude_max=True), st.integers(1, 255)),
    st.tuples(st.just("line"), st.floats(0, 1, exclude_max=True)),
    st.tuples(st.just("json"), st.sampled_from(range(len(JSON)))),
    st.tuples(st.just("replace"), st.binary(max_size=40).map(b"\xff\xfe".__add__)),
)


def spoil(path: Path, how: str, *more) -> None:
    content = path.read_bytes()
    path.unlink()  # it may be a file that a model in memory is read from
    if how == "cut":
        content = content[: int(more[0] * len(content))]
    elif how == "garble" and content:
        at = int(more[0] * len(content))
        content = content[:at] + bytes([content[at] ^ more[1]]) + content[at + 1 :]
    elif how == "line":
        lines = content.splitlines(keepends=True)
        content = b"".join(line for i, line in enumerate(lines) if i != int(more[0] * len(lines)))
    elif how in ("empty", "replace"):
        content = more[0] if more else b""
    elif how == "json":
        content = JSON[more[0]]
    if how != "delete":
        path.write_bytes(content)


@examples(24)
@given(name=NAMES, moment=st.sampled_from([0.3, 0.6, 0.8, 0.95]), which=st.floats(0, 1, exclude_max=True), how=SPOILT)
def test_any_file_of_a_run_may_be_spoilt(name, moment, which, how, root, whole):
    killed, out = root / f"{name} killed at {moment}", root / "spoilt"
    if not killed.exists():
        small_runs.killed(name, root, moment, killed)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(killed, out)
    files = sorted(path for path in out.rglob("*") if path.is_file() and not path.name.endswith(".partial"))
    path = files[int(which * len(files))]
    with tried("run folders"):
        spoil(path, *how)
        code, error = resumed(name, root, out)
        if code:
            named = path.name in error or str(path.parent) in error
            assert named and any(word in error for word in WAY_OUT), (path.name, error)
            if advice := re.search(r"remove (/.*?)(, and| and) --resume", error):
                removed = Path(advice[1])
                shutil.rmtree(removed) if removed.is_dir() else removed.unlink(missing_ok=True)
                code, error = resumed(name, root, out)
                assert not code or "--overwrite" in error, error
        if not code:
            relative = str(path.relative_to(out))
            if relative.startswith(("sft/", "rm/")) and not path.exists():  # a stage that was over makes none
                path.touch()
            assert small_runs.alike(small_runs.outcome(out), whole[name]), path.name
