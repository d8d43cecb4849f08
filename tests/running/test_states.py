"""Which state is kept: the last whose loss, gradient and held-out look were finite, and only where it is whole."""

import contextlib
import json
import math
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import by_hand
import pytest
import small_runs
import torch
from helpers import saved_state, stopped

import train_ppo
from nanopref.running import optim, storage
from nanopref.running.flags import RunFlags, UserError
from nanopref.running.folder import Run
from nanopref.running.inputs import Inputs


@dataclass
class Config(RunFlags):
    eval_every: int = 2


class Training:
    """Steps of a small model, each saved; what is to go wrong, and at which step, is said."""

    def __init__(self, folder: Path, **settings):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(3, 2)
        self.run = Run(Config(out=str(folder), save_seconds=0.0, **settings))
        self.run.begin()
        self.weights: list[torch.Tensor] = []  # before each step

    def steps(self, total: int, loss: int = 99, look: int = 99, act=lambda step: None, looks: bool = True) -> None:
        """The loss of a step becomes NaN, or the look behind one; step numbers count from 1."""
        optimizer = optim.adamw(self.model, 0.1)
        for step, _ in self.run.steps("test", 8, 4, total, self.model, optimizer):
            self.weights.append(self.model.weight.detach().clone())
            act(step + 1)
            self.model(torch.ones(4, 3)).square().sum().backward()
            self.run.update(math.nan if step + 1 == loss else 1.0, 1e9, list(self.model.parameters()))
            found = math.nan if step + 1 == look else 1.0
            self.run.log({"loss": 1.0} | ({"held_out_loss": found} if looks and step % 2 else {}))

    def state(self) -> dict:
        return saved_state(self.run.folder)

    def there(self) -> list[str]:
        """What is in the folder of states."""
        return sorted(path.name for path in (self.run.folder / "state").iterdir())


@pytest.fixture
def each_step(monkeypatch) -> None:
    """A state is due at each step, however long the last took to write."""
    monkeypatch.setattr(Run, "save_is_due", lambda run: True)


def test_at_a_loss_that_is_none_the_state_is_one_whose_loss_was_finite(each_step, tmp_path):
    """The weights before step 6 led there, and were about to be saved; those before step 5 nobody has looked at."""
    training = Training(tmp_path / "run")
    with pytest.raises(UserError, match=r"became nan at step 6; the last good weights, those after 3 steps, are in "):
        training.steps(9, loss=6)
    state = training.state()
    assert state["step"] == 3 and torch.equal(state["model"]["weight"], training.weights[3])
    assert training.there() == ["3"]


def test_a_huge_step_does_not_reach_the_state(each_step, tmp_path):
    """Weights of 1e30 are finite, and so a state of them would look healthy."""
    training = Training(tmp_path / "run")

    def spoil(step: int) -> None:
        if step == 5:
            training.model.weight.data.fill_(1e30)

    with pytest.raises(UserError, match="those after 3 steps"):
        training.steps(9, loss=5, act=spoil)
    assert training.state()["model"]["weight"].abs().max() < 10


def test_at_a_look_that_is_none_the_state_is_one_before_the_last_good_look(each_step, tmp_path):
    """Looks follow the steps 2, 4 and 6; the newest state is by then that of step 5."""
    training = Training(tmp_path / "run")
    with pytest.raises(UserError, match=r"held_out_loss became nan after step 6: the last good weights, those after 3"):
        training.steps(9, look=6)
    assert training.state()["step"] == 3 and torch.equal(training.state()["model"]["weight"], training.weights[3])


def test_while_no_look_has_followed_the_state_before_is_kept_through_a_kill_too(each_step, tmp_path):
    training = Training(tmp_path / "run")

    def kill(step: int) -> None:
        if step == 6:
            raise KeyError("killed")

    with pytest.raises(KeyError):
        training.steps(9, act=kill)
    assert {"3", "4"} < {*training.there()} and training.state()["step"] == 4
    again = Training(tmp_path / "run", resume=True)
    with pytest.raises(UserError, match="those after 3 steps"):
        again.steps(9, look=6)
    assert again.state()["step"] == 3


def test_at_its_end_a_run_has_one_state(tmp_path):
    training = Training(tmp_path / "run")
    training.steps(5)
    assert training.there() == ["5"]


def test_a_run_that_is_over_does_not_write_its_state_again(tmp_path):
    Training(tmp_path / "run").steps(5)
    before = {path: path.stat().st_ino for path in (tmp_path / "run" / "state").rglob("*")}
    Training(tmp_path / "run", resume=True).steps(5)
    assert {path: path.stat().st_ino for path in (tmp_path / "run" / "state").rglob("*")} == before and len(before) == 3


def test_what_is_drawn_in_a_step_depends_on_the_step_alone(each_step, tmp_path):
    """Not on what was drawn before, as at a look, nor on where the run was resumed."""

    def draws(folder: Path, more: int, stop: int) -> list[float]:
        found = []

        def act(step: int) -> None:
            found.append(torch.rand(()).item())
            torch.rand(more * step)
            if step == stop:
                raise KeyError("killed")

        with contextlib.suppress(KeyError):
            Training(folder, resume=folder.exists()).steps(6, act=act)
        return found

    whole, first, last = (draws(tmp_path / name, *how) for name, *how in (("a", 0, 9), ("b", 5, 4), ("b", 7, 9)))
    assert len({*whole}) == 6 and first == whole[:4] and last == whole[2:]


def test_before_the_first_state_none_is_named(tmp_path):
    with pytest.raises(UserError, match="became nan at step 1; no state had been saved before; lower --lr"):
        Training(tmp_path / "run").steps(9, loss=1)


def test_a_second_ctrl_c_does_not_wait_for_the_step(each_step, tmp_path):
    training = Training(tmp_path / "run")

    def interrupt(step: int) -> None:
        for _ in range(2 * (step == 4)):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="step 4 of 9 is lost; add --resume"):
        training.steps(9, act=interrupt)
    assert training.state()["step"] == 2  # of which the third found the loss finite


# ---- what is not believed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [-5, 10, 2.0, "2", None])
def test_a_step_that_cannot_be(step, tmp_path):
    Training(tmp_path / "run").steps(9)
    path = tmp_path / "run" / "state" / "9" / "run.json"
    run = json.loads(path.read_text()) | {"step": step}
    run.pop("digest")
    path.write_text(storage._as_text(run))
    if type(step) is int and step > 0:
        path.parent.rename(path.parent.with_name(str(step)))
    with pytest.raises(UserError, match="no state of this run can be read from it"):
        Training(tmp_path / "run", resume=True).steps(9)


def test_a_weight_of_which_a_bit_has_flipped(tmp_path):
    """safetensors reads it without a word."""
    training = Training(tmp_path / "run")
    training.steps(9)
    (path,) = (tmp_path / "run" / "state" / "9").glob("*.safetensors")
    weight = training.model.weight.detach().numpy().tobytes()
    content = path.read_bytes()
    at = content.index(weight)
    path.write_bytes(content[: at + 3] + bytes([content[at + 3] ^ 64]) + content[at + 4 :])
    assert not torch.equal(training.state()["model"]["weight"], training.model.weight)
    with pytest.raises(UserError, match=r"state/9: no state of this run can be read from it .*; remove it and"):
        Training(tmp_path / "run", resume=True).steps(9)


@pytest.mark.parametrize("log", ["metrics.jsonl", "samples.jsonl"])
@pytest.mark.parametrize("how", ["emptied", "a line less", "a figure"])
def test_a_log_that_is_not_what_the_state_has_seen(log, how, tmp_path):
    training = Training(tmp_path / "run")
    training.run.logs.add("samples.jsonl", [{"step": 0, "policy": "x 1.0"}, {"step": 0, "policy": "y"}])
    training.run._logged = training.run.logs.seen()
    training.steps(5)
    path = tmp_path / "run" / log
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(
        {"emptied": "", "a line less": "".join(lines[1:]), "a figure": "".join(lines).replace("1.0", "2.0")}[how]
    )
    with pytest.raises(UserError, match=f"{log}: not as when state/5 was saved"):
        Training(tmp_path / "run", resume=True).steps(9)


# ---- the scripts -----------------------------------------------------------------------------------------------------


def test_ppo_that_breaks_in_the_middle_of_a_round_keeps_the_weights_from_before_it(
    each_step, tmp_path, monkeypatch, capsys, no_picture
):
    """Of the third round the second minibatch; its first has moved the weights."""
    ordinary, calls, before = Run.update, [], {}

    def spoil(run, loss, *more):
        calls.append(1)
        if len(calls) == 5:
            before.update((name, p.detach().clone()) for name, p in run._model.policy.named_parameters())
        return ordinary(run, math.nan if len(calls) == 6 else loss, *more)

    config = small_runs.config_of("ppo", tmp_path, tmp_path / "run", reward=("length.py:f",), minibatch=4, epochs=1)
    (tmp_path / "length.py").write_text("def f(prompt, response):\n    return len(response)\n")
    monkeypatch.chdir(tmp_path)
    config.init = small_runs.settings(tmp_path)["dpo"]["init"]
    monkeypatch.setattr(Run, "update", spoil)
    said = stopped(train_ppo.train, config, capsys)
    assert "at step 3" in said and "those after 2 steps" in said
    state = saved_state(tmp_path / "run")
    kept = {name.removeprefix("policy."): x for name, x in state["model"].items() if name.startswith("policy.")}
    assert state["step"] == 2 and kept.keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in kept.items())


@pytest.mark.parametrize("name, what", [*((x, "data") for x in small_runs.COMMANDS), ("dpo", "init"), ("rm", "init")])
def test_an_input_that_has_changed_is_refused_and_one_that_has_moved_is_not(name, what, tmp_path, capsys, no_picture):
    config = small_runs.config_of(name, tmp_path, tmp_path / "run")
    small_runs.run(config)
    expected = small_runs.outcome(tmp_path / "run")
    path = Path(getattr(config, what))
    path.rename(tmp_path / f"moved{path.suffix}")
    moved = small_runs.config_of(name, tmp_path, tmp_path / "run", resume=True)
    setattr(moved, what, str(tmp_path / f"moved{path.suffix}"))
    small_runs.run(moved)
    assert small_runs.alike(small_runs.outcome(tmp_path / "run"), expected)
    spoilt = path if what == "data" else path / "model.safetensors"
    content = spoilt.read_bytes()
    spoilt.unlink()  # of the old one models may still be read
    spoilt.write_bytes(content.replace(b" bad", b" sad", 1) if what == "data" else content[:-4] + b"\0\0\0\1")
    capsys.readouterr()
    config.resume = True
    assert f"--{what} is not what the run in" in stopped(small_runs.COMMANDS[name].train, config, capsys)


@pytest.mark.parametrize("name", ["feedback.jsonl", "reference.safetensors", "round-2.json", "feedback-2.jsonl"])
def test_what_a_stage_made_must_be_as_it_was_made_or_is_made_again(name, tmp_path, capsys, no_picture):
    config = small_runs.config_of("dpo", tmp_path, tmp_path / "run")
    small_runs.run(config)
    expected, path = small_runs.outcome(tmp_path / "run"), tmp_path / "run" / name
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])
    config.resume = True
    said = stopped(small_runs.COMMANDS["dpo"].train, config, capsys)
    assert f"{path} is not as this run made it: remove {path}, and --resume makes it again" in said
    path.unlink()
    small_runs.run(config)
    assert small_runs.alike(small_runs.outcome(tmp_path / "run"), expected)


def test_what_a_state_was_made_of_is_remembered_in_it_too(tmp_path, capsys, no_picture):
    """Without inputs.json: answers that are judged have lost a line."""
    config = small_runs.config_of("rm", tmp_path, tmp_path / "run")
    small_runs.run(config)
    (tmp_path / "run" / "inputs.json").unlink()
    path, step = tmp_path / "run" / "feedback.jsonl", saved_state(tmp_path / "run")["step"]
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    config.resume = True
    said = stopped(small_runs.COMMANDS["rm"].train, config, capsys)
    assert f"{path}, rows: not as when state/{step} was saved" in said


def test_digests_that_are_spoilt_themselves_are_made_again(tmp_path, no_picture):
    config = small_runs.config_of("rm", tmp_path, tmp_path / "run")
    small_runs.run(config)
    expected, path = small_runs.outcome(tmp_path / "run"), tmp_path / "run" / "inputs.json"
    whole = path.read_text()
    path.write_text(whole.replace(whole[-20], "0" if whole[-20] != "0" else "1"))
    config.resume = True
    small_runs.run(config)
    assert small_runs.alike(small_runs.outcome(tmp_path / "run"), expected) and path.read_text() == whole


def test_what_an_implicit_reward_is_made_of(tmp_path, capsys, no_picture):
    """The policy, what it began as, and β; in a folder whose name looks like a word of --reward."""
    place = tmp_path / "a:b"
    made = small_runs.config_of("dpo", tmp_path, place / "made", rounds=1)
    small_runs.run(made)
    given = {"reward": (f"implicit:{place}/made*0.5",), "rounds": 1, "prompts": 240}
    config = small_runs.config_of("dpo", tmp_path, tmp_path / "run", **given)
    other = by_hand.tiny_model(tmp_path / "other")
    config.init = other
    small_runs.run(config)
    expected = small_runs.outcome(tmp_path / "run")
    config.resume = True
    small_runs.run(config)
    assert small_runs.alike(small_runs.outcome(tmp_path / "run"), expected)
    for file in ("made/model/model.safetensors", "made/config.json", "../init/model.safetensors"):
        path = place / file
        content = path.read_bytes()
        path.unlink()
        spoilt = content.replace(b'"beta": 0.1', b'"beta": 0.7') if path.name == "config.json" else content[:-1] + b"\1"
        assert spoilt != content
        path.write_bytes(spoilt)
        said = stopped(small_runs.COMMANDS["dpo"].train, config, capsys)
        assert "--reward is not what the run in" in said, (file, said)
        path.unlink()
        path.write_bytes(content)
    for read in (place / "made", tmp_path / "init"):
        again = small_runs.config_of("dpo", tmp_path, read, **given, overwrite=True)
        again.init = other
        if read.name == "made":
            said = stopped(small_runs.COMMANDS["dpo"].train, again, capsys)
            assert "--overwrite would remove" in said and "which --reward wants to read" in said


def test_a_model_that_is_replaced_while_a_run_goes_on_from_it(tmp_path, monkeypatch, capsys, no_picture):
    """π_ref is read again for the report."""
    config = small_runs.config_of("dpo", tmp_path, tmp_path / "run", rounds=1)
    log = Run.log

    def log_and_replace(run, metrics) -> None:
        log(run, metrics)
        path = Path(config.init) / "model.safetensors"
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content[:-1] + b"\1")

    monkeypatch.setattr(Run, "log", log_and_replace)
    said = stopped(small_runs.COMMANDS["dpo"].train, config, capsys)
    assert "--init is not what the run in" in said and not (tmp_path / "run" / "report.json").exists()


def test_a_round_that_is_done_again_is_followed_by_the_others(tmp_path, no_picture):
    """As whoever follows the advice to remove a damaged state has it: what came of the old one is made again."""
    config = small_runs.config_of("dpo", tmp_path, tmp_path / "run")
    small_runs.run(config)
    expected = small_runs.outcome(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "state")
    made = (tmp_path / "run" / "feedback-2.jsonl").stat().st_mtime_ns
    config.resume = True
    small_runs.run(config)
    assert small_runs.alike(small_runs.outcome(tmp_path / "run"), expected)
    assert (tmp_path / "run" / "feedback-2.jsonl").stat().st_mtime_ns > made


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_a_stage_of_which_nobody_has_taken_note_ends_once_more(stage, tmp_path, no_picture):
    """Killed between the end of a stage and the note of what its model was; and then the model is spoilt."""
    config = small_runs.config_of("ppo", tmp_path, tmp_path / "run")
    small_runs.run(config)
    expected = small_runs.outcome(tmp_path / "run")
    inputs = Inputs(tmp_path / "run")
    for name in (f"{stage}/model", "rm/model", "prompts"):
        inputs.remember(name, None)
    shutil.rmtree(tmp_path / "run" / "state")
    path = tmp_path / "run" / stage / "model" / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1] + b"\1")
    config.resume = True
    small_runs.run(config)
    assert small_runs.alike(small_runs.outcome(tmp_path / "run"), expected)


@pytest.mark.parametrize("name", sorted(small_runs.COMMANDS))
@pytest.mark.parametrize("moment", [0.45, 0.8])
def test_a_killed_run_whose_folder_has_moved_and_is_named_otherwise_goes_on(
    moment, name, tmp_path, monkeypatch, small_and_plain
):
    """For PPO with the stages before it, which name one another by their paths: first in the second of them."""
    small_runs.run(small_runs.config_of(name, tmp_path, tmp_path / "whole"))
    small_runs.killed(name, tmp_path, moment, tmp_path / "elsewhere" / "moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    small_runs.run(small_runs.config_of(name, tmp_path, Path("moved"), resume=True))
    assert small_runs.alike(small_runs.outcome(Path("moved")), small_runs.outcome(tmp_path / "whole"))
