"""Two processes and one folder: --overwrite, a signal to one of them, inputs that have changed."""

import os
import signal
import time
from pathlib import Path

import pytest
import small_runs
from helpers import Fork, flags, processes, two_processes

from nanopref.running.files import read_lines

ENDLESS = {"epochs": 2000, "save_seconds": 0.0}


def words(root: Path, out: Path, **more) -> list[str]:
    """A run of DPO on a file of pairs, from an SFT model of its own."""
    data = small_runs.settings(root)["ppo"]["data"]
    own = {"data": data, "sft_steps": 2, "block_size": 32, "epochs": 1, "eval_every": 2}
    return flags(**small_runs.SMALL | small_runs.SAMPLING | own | {"out": out} | more)


def ends(forks: list[Fork]) -> list[tuple[int, str]]:
    return [fork.finish() for fork in forks]


def test_overwrite_by_two_processes(tmp_path):
    """Of a run with stages in folders of their own, which both look at."""
    out = tmp_path / "run"
    Fork(tmp_path / "log", "train_dpo.py", *words(tmp_path, out)).succeed()
    found = ends(two_processes(tmp_path, "train_dpo.py", *words(tmp_path, out, overwrite=True, seed=7)))
    assert [code for code, _ in found] == [0, 0], found
    assert sorted(path.name for path in out.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_of_two_ends_both_and_is_no_success(rank, tmp_path):
    out = tmp_path / "run"
    forks = two_processes(tmp_path, "train_dpo.py", *words(tmp_path, out, **ENDLESS))
    end = time.monotonic() + 120
    while len(read_lines(out / "metrics.jsonl")) < 3 and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(forks[rank].pid, signal.SIGTERM)
    (code, said), (other, quiet) = ends(forks)
    assert (code, other) == (130, 130) and (said + quiet).count("add --resume to the same command to continue") == 1
    assert "Traceback" not in said + quiet and not (out / "report.json").exists() and [*out.glob("state/*/run.json")]


def test_an_input_that_has_changed_is_said_once(tmp_path):
    out = tmp_path / "run"
    given = words(tmp_path, out)
    Fork(tmp_path / "log", "train_dpo.py", *given).succeed()
    data = Path(small_runs.settings(tmp_path)["ppo"]["data"])
    data.write_text(data.read_text().replace(" bad", " sad", 1))
    (code, said), (other, quiet) = ends(two_processes(tmp_path, "train_dpo.py", *given, "--resume"))
    assert code == 2 and other == 2
    assert (said + quiet).count("error: --data is not what the run in") == 1 and "Traceback" not in said + quiet


@pytest.mark.parametrize("first", [1, 2])
def test_what_some_have_begun_another_number_of_processes_ends(first, tmp_path):
    """To all but rounding with the figures of one that has done all of it."""
    out, given = tmp_path / "run", {"epochs": 10, "save_seconds": 0.0}
    Fork(tmp_path / "log", "train_dpo.py", *words(tmp_path, tmp_path / "whole", **given)).succeed()
    expected = read_lines(tmp_path / "whole" / "metrics.jsonl")
    for n, more in ((first, []), (3 - first, ["--resume"])):
        command = ("train_dpo.py", *words(tmp_path, out, **given), *more)
        forks = [Fork(tmp_path / "log 0", *command)] if n == 1 else two_processes(tmp_path, *command)
        end = time.monotonic() + 120
        while not more and len(read_lines(out / "metrics.jsonl")) < 3 and time.monotonic() < end:
            time.sleep(0.005)
        if not more:
            os.kill(forks[0].pid, signal.SIGTERM)
        assert [code for code, _ in ends(forks)] == [0 if more else 130] * n
        newest = max((out / "state").iterdir(), key=lambda path: int(path.name))
        assert len({path.name[:11] for path in newest.glob("shard-*")}) == n  # each process has written its share
        assert more or int(newest.name) < len(expected)
    found = read_lines(out / "metrics.jsonl")
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=1e-3)


def test_what_torchrun_starts_again_goes_on(tmp_path):
    """It has them meet where those before have left their addresses."""
    out = tmp_path / "run"
    given = words(tmp_path, out, epochs=60, save_seconds=0.0)
    forks = two_processes(tmp_path, "train_dpo.py", *given)
    end = time.monotonic() + 60
    while len(read_lines(out / "metrics.jsonl")) < 3 and time.monotonic() < end:
        time.sleep(0.05)
    forks[1].kill()
    code, said = forks[0].finish()
    assert code == 2 and said.count("error: another process of this run has ended") == 1
    again = processes(2, tmp_path, "train_dpo.py", *given, "--resume", after=forks[0])
    assert [code for code, _ in ends(again)] == [0, 0] and (out / "report.json").exists()
