"""Files whole or absent, batches that resume, random streams of their own, schedules."""

import json
import math
import os
import time
from collections import Counter

import pytest
import torch
from helpers import forks
from hypothesis import given
from hypothesis import strategies as st

from nanopref import run
from nanopref.run import Options, Run, UserError


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    run.write_atomic(path, "old")

    def half(partial):
        partial.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError):
        run.write_atomic(path, half)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    run.write_atomic(path, b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 30), st.integers(0, 30), st.integers(0, 5))
def test_batches_resume_where_they_stopped_and_each_epoch_sees_all(n, size, steps, start, seed):
    whole = list(run.batches(n, size, steps, seed))
    assert [step for step, _ in whole] == list(range(steps))
    assert list(run.batches(n, size, steps, seed, start)) == whole[start:]
    an_epoch = -(-n // size)
    for begin in range(0, steps - an_epoch + 1, an_epoch):
        seen = Counter(row for _, rows in whole[begin : begin + an_epoch] for row in rows)
        assert seen == Counter(range(n))


def test_random_streams_depend_on_seed_and_purpose_alone():
    def draw(seed, purpose):
        return torch.rand(4, generator=run.generator(seed, purpose)).tolist()

    assert draw(0, "pairs") == draw(0, "pairs")
    assert len({tuple(draw(seed, purpose)) for seed in (0, 1, 2) for purpose in ("pairs", "split", "pairs2")}) == 9


def test_the_schedule_warms_up_and_decays_to_a_tenth():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=9.0)
    lrs = [run.set_lr(optimizer, 1.0, step, 100, 10) for step in range(101)]
    assert lrs[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert lrs[10] == pytest.approx(1.0) and lrs[55] == pytest.approx(0.55) and lrs[100] == pytest.approx(0.1)
    assert optimizer.param_groups[0]["lr"] == lrs[-1]


def test_adamw_decays_matrices_only():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    groups = run.adamw(model, 1e-3, 0.1).param_groups
    assert {tuple(p.shape) for p in groups[0]["params"]} == {(3, 3)} and groups[0]["weight_decay"] == 0.1
    assert {tuple(p.shape) for p in groups[1]["params"]} == {(3,)} and groups[1]["weight_decay"] == 0.0


def a_run(folder, **settings):
    this = Run(Options(out=str(folder), **settings))
    this.begin()
    return this


def test_load_forgets_what_was_logged_after_the_saved_state(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = run.adamw(model, 0.1)

    def step():
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    this = a_run(tmp_path / "run")
    assert this.load(model, optimizer) == 0
    for i in range(3):
        step()
        this.log(i + 1, {"loss": float(i)})
    this.save(3, model, optimizer)
    step()
    this.log(4, {"loss": 3.0})
    with (tmp_path / "run" / "metrics.jsonl").open("a") as f:
        f.write('{"step": 5, "lo')  # the process died here
    after = [p.detach().clone() for p in model.parameters()]

    other = torch.nn.Linear(3, 2)
    model, optimizer = other, run.adamw(other, 0.1)
    this = a_run(tmp_path / "run", resume=True)
    assert this.load(model, optimizer) == 3
    assert [row["step"] for row in this.metrics()] == [1, 2, 3]
    step()  # the same random numbers and the same moments of Adam: the same step
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), after, strict=True))


def test_a_state_that_is_a_pickle_of_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    this = a_run(tmp_path / "run")
    torch.save({"step": 1, "model": Evil()}, tmp_path / "run" / "state.pt")
    model = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match="no state of this run"):
        this.load(model, run.adamw(model, 1.0))
    assert not (tmp_path / "pwned").exists()


def test_overwrite_replaces_a_run_only_when_it_begins(tmp_path):
    a_run(tmp_path / "run").log(1, {"loss": 1.0})
    this = Run(Options(out=str(tmp_path / "run"), overwrite=True, seed=7))
    assert (tmp_path / "run" / "metrics.jsonl").exists()  # nothing is lost before the input has been checked
    this.begin()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["flags"]["seed"] == 7


def work(folder, begun) -> None:
    a_run(folder)
    begun.set()
    time.sleep(600)


def test_a_folder_in_which_another_process_works_is_refused_until_it_ends(tmp_path):
    started_together = Run(Options(out=str(tmp_path / "run")))
    begun = forks.Event()
    other = forks.Process(target=work, args=(tmp_path / "run", begun))
    other.start()
    try:
        assert begun.wait(60)
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        late = (Run(Options(out=str(tmp_path / "run"), **{how: True})) for how in ("resume", "overwrite"))
        for this in (started_together, *late):
            with pytest.raises(UserError, match="another process is training there"):
                this.begin()
        assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    finally:
        other.kill()
        other.join()
    a_run(tmp_path / "run", resume=True)
    a_run(tmp_path / "run", overwrite=True)  # and one process may work there again and again


def test_seconds_add_up_over_resumed_runs(tmp_path):
    with a_run(tmp_path / "run").stage("work"):
        pass
    first = a_run(tmp_path / "run", resume=True)
    first.seconds["work"] = 10.0
    with first.stage("work"):
        pass
    assert 10 <= a_run(tmp_path / "run", resume=True).seconds["work"] < 11


def test_a_run_goes_on_without_its_timings(tmp_path):
    a_run(tmp_path / "run")
    (tmp_path / "run" / "seconds.json").write_text("{")
    assert a_run(tmp_path / "run", resume=True).seconds == {}


def test_a_figure_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(UserError, match="held_out_loss became nan after step 7"):
        a_run(tmp_path / "run").log(7, {"loss": 1.0, "held_out_loss": math.nan})


def test_only_finite_losses_pass(tmp_path):
    this = a_run(tmp_path / "run")
    model = torch.nn.Linear(1, 1)
    optimizer = run.adamw(model, 1.0)
    this.stop_if_not_finite(0, 1.0, model, optimizer)
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(UserError, match="at step 3"):
            this.stop_if_not_finite(2, bad, model, optimizer)


def test_the_report_holds_the_peak_of_gpu_memory_where_there_is_a_gpu(tmp_path, monkeypatch):
    for peak, found in ((3 * 2**20, {"peak_memory_MiB": 3.0}), (0, {})):
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda peak=peak: peak)
        Run(Options(out=str(tmp_path))).report({"kl": 1.0})
        assert json.loads((tmp_path / "report.json").read_text()) == {"kl": 1.0, **found, "seconds": {}}
        (tmp_path / "report.json").unlink()


def test_a_run_that_came_and_went_between_two_looks_is_left_alone(tmp_path):
    late = Run(Options(out=str(tmp_path / "run"), seed=1))  # the folder is not there yet
    Run(Options(out=str(tmp_path / "run"))).begin()
    before = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(UserError, match="holds a run"):
        late.begin()
    assert (tmp_path / "run" / "config.json").read_text() == before
