"""Precision by model and machine, random streams of their own, and what is seen of a run's progress."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nanopref.running import parallel


@pytest.mark.parametrize(
    "dtype, width, units, expected",
    [
        ("auto", 128, True, torch.float32),  # the built-in task's
        ("auto", 511, True, torch.float32),
        ("auto", 512, True, torch.bfloat16),
        ("auto", 4096, False, torch.float32),
        ("bfloat16", 16, False, torch.bfloat16),
        ("float32", 4096, True, torch.float32),
    ],
)
def test_precision_is_what_was_asked_for_or_what_pays_here(dtype, width, units, expected, monkeypatch):
    monkeypatch.setattr(parallel, "_dtype", "auto")  # so that it is put back
    monkeypatch.setattr(parallel, "_cpu_has_bfloat16", lambda: units)
    parallel.start("cpu", 0, dtype)
    model = SimpleNamespace(device=torch.device("cpu"), config=SimpleNamespace(n_embd=width))
    assert parallel.precision(model) == expected
    with parallel.autocast(model):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected
    on_a_gpu = SimpleNamespace(device=torch.device("cuda"), config=model.config)
    assert parallel.precision(on_a_gpu) == (torch.float32 if dtype == "float32" else torch.bfloat16)


def test_random_streams_depend_on_seed_and_purpose_alone():
    def draw(seed, purpose):
        return torch.rand(4, generator=parallel.generator(seed, purpose)).tolist()

    assert draw(0, "pairs") == draw(0, "pairs")
    assert len({tuple(draw(seed, purpose)) for seed in (0, 1, 2) for purpose in ("pairs", "split", "pairs2")}) == 9


def test_in_a_log_progress_is_a_line_every_so_often(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(parallel.time, "monotonic", lambda: now[0])
    with parallel.progress("SFT", 800, "step") as bar:
        for _ in range(100):
            now[0] += 1.0
            bar.set_postfix({"loss": "1.234"})
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and lines[0] == "SFT: 30 of 800 steps, 12:50 left, loss 1.234", lines


def test_what_was_done_before_a_resume_says_nothing_of_the_time_left(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(parallel.time, "monotonic", lambda: now[0])
    bar = parallel.progress("SFT", 1000, "step", 900)
    for _ in range(3):
        now[0] += 10.0
        bar.update()
    assert capsys.readouterr().err == "SFT: 903 of 1,000 steps, 16:10 left\n"


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with parallel.progress("SFT", 8, "step") as bar:
        assert hasattr(bar, "ncols") and not bar.disable


def test_what_is_said_stands_above_a_progress_bar(monkeypatch, capsys):
    """The bar is wiped, the words have a line of their own, and then the bar is drawn again."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with parallel.progress("training", 10, "step") as bar:
        bar.delay = 0
        bar.update(4)
        bar.refresh()
        capsys.readouterr()
        parallel.say("40 of", 100)
        printed = capsys.readouterr()
    assert printed.out == "40 of 100\n"
    wiped, _, drawn = printed.err.rpartition("\r")
    assert wiped.strip("\r ") == "" and wiped and drawn.startswith("training")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system's own figure is taken")
def test_the_most_memory_is_that_of_a_process_and_not_of_the_one_that_started_it():
    held = np.ones(10**9 // 8)  # which Linux would count as the child's
    code = "from nanopref.running import parallel; print(parallel.most_memory())"
    found = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 5e7 < found < held.nbytes < parallel.most_memory()
