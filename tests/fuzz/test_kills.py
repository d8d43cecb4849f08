"""SIGKILL, of a process of its own, at a moment of which nobody knows what is under way."""

import shutil
import time

import small_runs
from fuzzing import examples, how_it_ends, tried
from helpers import Fork
from hypothesis import given
from hypothesis import strategies as st

_seconds: dict[str, float] = {}  # what each command takes in a process of its own


@examples(3)
@given(name=st.sampled_from(sorted(small_runs.COMMANDS)), moment=st.floats(0, 1))
def test_a_process_that_is_killed(name, moment, root, whole):
    out = root / "killed for good"
    shutil.rmtree(out, ignore_errors=True)
    words = small_runs.words_of(name, root, out)
    if name not in _seconds:
        began = time.monotonic()
        Fork(root / "log", small_runs.SCRIPTS[name], *words).succeed()
        _seconds[name] = time.monotonic() - began
        assert small_runs.alike(small_runs.outcome(out), whole[name])
        shutil.rmtree(out)
    with tried("SIGKILL"):
        fork = Fork(root / "log", small_runs.SCRIPTS[name], *words)
        time.sleep(moment * _seconds[name])
        fork.kill()
        code, _, error = how_it_ends(small_runs.run, small_runs.config_of(name, root, out, resume=True))
        assert (code, error) == (0, "")
        assert small_runs.alike(small_runs.outcome(out), whole[name])
