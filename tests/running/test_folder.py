"""Files whole or absent, folders that are left alone, states that resume."""

import json
import math
import os
import pickle
import resource
import stat
import time

import pytest
import torch
from helpers import forks

from nanopref.running import folder as folder_module
from nanopref.running import optim, parallel, storage
from nanopref.running.files import append, write_atomic
from nanopref.running.flags import RunFlags, UserError
from nanopref.running.folder import Run


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, "old")

    def half(partial):
        partial.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError):
        write_atomic(path, half)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]


def test_a_row_for_which_there_is_no_room_leaves_the_log_as_it_was(tmp_path):
    path, before = tmp_path / "log", resource.getrlimit(resource.RLIMIT_FSIZE)
    append(path, b"a row\n")
    resource.setrlimit(resource.RLIMIT_FSIZE, (9, before[1]))
    try:
        with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
            append(path, b"another\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"a row\n"


def a_run(folder, **settings):
    this = Run(RunFlags(out=str(folder), **settings))
    this.begin()
    return this


def steps_of(run, model, optimizer, total, stop=None):
    """Steps as a script makes them; `stop` leaves the loop as a kill would."""
    for step, _ in run.steps("test", 8, 4, total, model, optimizer):
        if step == stop:
            raise KeyError("killed")
        loss = model(torch.randn(4, 3)).square().sum()
        loss.backward()
        run.update(loss.detach(), 1e9, list(model.parameters()))
        run.log({"loss": loss.item()})


def new_model():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    return model, optim.adamw(model, 0.1)


def test_a_run_that_died_goes_on_from_its_state_and_forgets_what_was_logged_after_it(tmp_path):
    model, optimizer = new_model()
    whole = a_run(tmp_path / "whole")
    steps_of(whole, model, optimizer, 6)

    again, its_optimizer = new_model()
    run = a_run(tmp_path / "run", save_seconds=1e9)
    with pytest.raises(KeyError):
        steps_of(run, again, its_optimizer, 6, stop=3)
    run.save(accept=True)
    run = a_run(tmp_path / "run", resume=True, save_seconds=1e9)
    with pytest.raises(KeyError):
        steps_of(run, again, its_optimizer, 6, stop=5)  # two more, which no state remembers
    with (tmp_path / "run" / "metrics.jsonl").open("a") as f:
        f.write('{"step": 6, "lo')  # the process died here
    last, its_optimizer = new_model()
    torch.manual_seed(99)
    run = a_run(tmp_path / "run", resume=True)
    steps_of(run, last, its_optimizer, 6)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), last.parameters(), strict=True))
    assert run.metrics() == whole.metrics() and [row["step"] for row in run.metrics()] == [1, 2, 3, 4, 5, 6]


def test_states_are_saved_by_the_clock_and_at_most_a_twentieth_of_the_time(tmp_path, monkeypatch):
    """Writing a state of gigabytes takes seconds, and then the next is due after twenty times as long."""
    now, saved = [0.0], []
    monkeypatch.setattr(folder_module.time, "monotonic", lambda: now[0])

    def write(folder, *_):
        folder.mkdir(parents=True)
        saved.append(now[0])
        now[0] += cost

    monkeypatch.setattr(storage, "write", write)
    for cost, expected in ((0.0, [11.0, 22.0]), (1.0, [11.0, 32.0])):
        now[0], _ = 0.0, saved.clear()
        model, optimizer = new_model()
        run = a_run(tmp_path / str(cost), save_seconds=10.5)
        for step, _ in run.steps("test", 8, 4, 33, model, optimizer):
            now[0] = max(now[0], step + 1.0)
        assert saved[:2] == expected, saved


def test_a_state_that_is_a_pickle_of_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    steps_of(a_run(tmp_path / "run"), *new_model(), 3)
    state = tmp_path / "run" / "state" / "3"
    with (state / ".metadata").open("wb") as file:  # where torch.distributed.checkpoint itself would look for one
        pickle.dump(Evil(), file)
    assert list(a_run(tmp_path / "run", resume=True).steps("test", 8, 4, 3, *new_model())) == []
    (path,) = state.glob("*.safetensors")
    torch.save({"weight": Evil()}, path)
    run = json.loads((state / "run.json").read_text()) | {"files": {path.name: storage._sum_of(path)}}
    run.pop("digest")
    (state / "run.json").write_text(storage._as_text(run))
    with pytest.raises(UserError, match="no state of this run"):
        next(a_run(tmp_path / "run", resume=True).steps("test", 8, 4, 3, *new_model()))
    assert not (tmp_path / "pwned").exists()


def test_overwrite_replaces_a_run_only_when_it_begins(tmp_path):
    a_run(tmp_path / "run").log({"loss": 1.0})
    this = Run(RunFlags(out=str(tmp_path / "run"), overwrite=True, seed=7))
    assert (tmp_path / "run" / "metrics.jsonl").exists()  # nothing is lost before the input has been checked
    this.begin()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["flags"]["seed"] == 7


def work(folder, begun) -> None:
    a_run(folder)
    begun.set()
    time.sleep(600)


def test_a_folder_in_which_another_process_works_is_refused_until_it_ends(tmp_path):
    started_together = Run(RunFlags(out=str(tmp_path / "run")))
    begun = forks.Event()
    other = forks.Process(target=work, args=(tmp_path / "run", begun))
    other.start()
    try:
        assert begun.wait(60)
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        late = (Run(RunFlags(out=str(tmp_path / "run"), **{how: True})) for how in ("resume", "overwrite"))
        for this in (started_together, *late):
            with pytest.raises(UserError, match="another process is at work there"):
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
    with pytest.raises(UserError, match="held_out_loss became nan after step 1"):
        a_run(tmp_path / "run").log({"loss": 1.0, "held_out_loss": math.nan})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nothing_that_is_not_finite_reaches_the_weights(where, bad, tmp_path):
    model, optimizer = new_model()
    run = a_run(tmp_path / "run")
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(UserError, match="at step 1"):
        for _ in run.steps("test", 8, 4, 2, model, optimizer):
            model(torch.ones(1, 3)).sum().backward()
            if where == "gradient":
                model.weight.grad[0, 0] = bad
            run.update(bad if where == "loss" else 1.0, 1.0, list(model.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert not list((tmp_path / "run").glob("*.pt"))


def test_each_part_has_a_gradient_clip_of_its_own(tmp_path):
    model = torch.nn.ModuleList([torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [p.item() for p in model.parameters()]
    run = a_run(tmp_path / "run")
    for _ in run.steps("test", 8, 4, 1, model, optimizer):
        model[0].weight.grad, model[1].weight.grad = torch.full((1, 1), 30.0), torch.full((1, 1), 0.25)
        assert run.update(0.0, 0.5, [model[0].weight], [model[1].weight]) == [30.0, 0.25]
    moved = [a - p.item() for a, p in zip(before, model.parameters(), strict=True)]
    assert moved == pytest.approx([0.5, 0.25], rel=1e-5)


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_files_are_readable_as_the_umask_says(umask, mode, tmp_path):
    """Whoever writes them: safetensors makes files for their owner alone."""

    def by_another(path):
        path.unlink(missing_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))

    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "text", "text")
        write_atomic(tmp_path / "made", by_another)
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("text", "made")] == [mode, mode]


def test_the_report_holds_the_peak_of_the_gpus_memory_or_the_processs(tmp_path, monkeypatch):
    for peak, found in ((3 * 2**20, {"peak_memory_MiB": 3.0}), (0, {"peak_memory_MiB": 5.0})):
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda peak=peak: peak)
        monkeypatch.setattr(parallel, "most_memory", lambda: 5 * 2**20)
        Run(RunFlags(out=str(tmp_path))).report({"kl": 1.0})
        assert json.loads((tmp_path / "report.json").read_text()) == {"kl": 1.0, **found, "seconds": {}}
        (tmp_path / "report.json").unlink()


def test_a_run_that_came_and_went_between_two_looks_is_left_alone(tmp_path):
    late = Run(RunFlags(out=str(tmp_path / "run"), seed=1))  # the folder is not there yet
    Run(RunFlags(out=str(tmp_path / "run"))).begin()
    before = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(UserError, match="holds a run"):
        late.begin()
    assert (tmp_path / "run" / "config.json").read_text() == before
