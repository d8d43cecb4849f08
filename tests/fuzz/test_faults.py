"""One of several processes is killed: the others end with a sentence, and what is started again goes on, in as many
processes as then there are."""

import math
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import small_runs
from fuzzing import SCALE, examples, tried
from helpers import Fork, processes, results
from hypothesis import given
from hypothesis import strategies as st

KILLS = 1 if float(os.environ.get(SCALE, 1)) == 1 else 3  # of a run: more in an hour than in the suite
MOST = 30.0  # seconds that a process may take to see that another is gone, or that a run takes here


def ends(forks: list[Fork], most: float = MOST) -> list[int]:
    """The exit codes; those that have not ended by then are killed, and it is a failure."""
    end = time.monotonic() + most
    for fork in forks:
        fork.join(max(0.1, end - time.monotonic()))
    late = [i for i, fork in enumerate(forks) if fork.exitcode is None]
    codes = [fork.kill() if fork.exitcode is None else fork.finish()[0] for fork in forks]
    assert not late, f"processes {late} did not end: {[fork.log.read_text()[-2000:] for fork in forks]}"
    return codes


def left_alone(name: str, root: Path, n: int, engine: str) -> Path:
    """A run of n processes that nothing befell; made once."""
    out = root / f"{name} {n} {engine}"
    if not out.exists():
        forks = processes(n, root, small_runs.SCRIPTS[name], *words(name, root, out, engine))
        assert ends(forks, 4 * MOST) == [0] * n, [fork.log.read_text() for fork in forks]
    return out


def words(name: str, root: Path, out: Path, engine: str) -> list[str]:
    return [*small_runs.words_of(name, root, out), "--parallel", engine, "--lr", "1e-4"]


def close(a: Path, b: Path, equal: bool) -> None:
    """The same metrics: to the bit, or as near as sums in another order come."""
    (rows, report), (others, other) = results(a), results(b)
    if equal:
        assert (rows, report) == (others, other)
        return
    assert len(rows) == len(others)
    for row, expected in zip(rows, others, strict=True):
        tied = abs(expected.get("margin", 1.0)) < 1e-5  # which of two is ahead is then a matter of rounding
        for key in expected:
            if not (tied and "accuracy" in key):
                assert math.isclose(row[key], expected[key], rel_tol=1e-4, abs_tol=1e-5), (key, row, expected)


def befall(name: str, root: Path, seed: int, counts: tuple[int, ...], engines: tuple[str, ...]) -> list[tuple]:
    """Start a run again and again, each time in as many processes as drawn, and kill one of them at some moment, KILLS
    times at most, until it comes to its end. Returns what was done."""
    rng, out, done = random.Random(seed), root / f"{name} befallen", []
    shutil.rmtree(out, ignore_errors=True)
    while True:
        n, engine = rng.choice(counts), rng.choice(engines)
        forks = processes(n, root, small_runs.SCRIPTS[name], *words(name, root, out, engine), "--resume")
        last, wait, rank = len(done) == KILLS, rng.uniform(0.5, 8.0), rng.randrange(n)
        if not last:
            forks[rank].join(wait)
            ended = forks[rank].exitcode is not None
            if not ended:
                forks[rank].kill()
                for fork in forks:  # those that have not met the others yet wait for them, until torchrun stops them
                    fork.join(4.0)
                    fork.terminate()
        codes = ends(forks, 4 * MOST if last else MOST)
        done.append((n, engine, rank, round(wait, 2), codes))
        if last or codes == [0] * n:
            assert codes == [0] * n, [fork.log.read_text()[-3000:] for fork in forks]
            return done
        others = [fork for i, fork in enumerate(forks) if i != rank]
        said = "".join(fork.log.read_text() for fork in others)
        if any(codes[i] > 0 for i in range(n) if i != rank):
            assert said.count("another process of this run has ended") == 1 and "Traceback" not in said, said
        assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]


@pytest.fixture(scope="module")
def root(tmp_path_factory, small_and_plain) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.mark.parametrize("name", ["dpo", "ppo"])
def test_a_killed_process_and_another_number_of_them_change_nothing(name, root):
    @examples(1)
    @given(seed=st.integers(0, 2**31))
    def check(seed: int) -> None:
        with tried("kill one of several"):
            befall(name, root, seed, (1, 2, 3), ("ddp", "fsdp"))
            close(root / f"{name} befallen", left_alone(name, root, 1, "ddp"), equal=False)

    check()


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_as_many_processes_as_before_give_the_same_to_the_bit(engine, root):
    @examples(1)
    @given(seed=st.integers(0, 2**31))
    def check(seed: int) -> None:
        with tried("kill one of two"):
            befall("dpo", root, seed, (2,), (engine,))
            close(root / "dpo befallen", left_alone("dpo", root, 2, engine), equal=True)

    check()
