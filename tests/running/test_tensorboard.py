"""Event files: TRL's names, what is left after a kill, and what happens without the package."""

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import board, refused
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_dpo
from nanopref.running import optim
from nanopref.running.flags import RunFlags
from nanopref.running.folder import Run
from nanopref.running.tensorboard import TAGS, tag


def curve(folder, kill=None, **settings) -> None:
    """Ten steps of a run, which is killed in one of them: three steps after it was last saved."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    run = Run(RunFlags(out=str(folder), save_seconds=1e9, **settings))
    run.begin()
    with run.stage("dpo"):
        for step, _ in run.steps("test", 8, 4, 10, model, optim.adamw(model, 0.1)):
            if step == kill:
                raise KeyError("killed")
            loss = model(torch.randn(4, 3)).square().sum()
            loss.backward()
            run.update(loss.detach(), 1e9, list(model.parameters()))
            run.log({"loss": loss.item(), "accuracy": step / 10} | ({"held_out_accuracy": 0.5} if step % 2 else {}))
            if kill and step == kill - 3:
                run._step += 1  # as `steps` counts it
                run.save()
                run._step -= 1


def test_a_board_shows_what_was_logged(tmp_path):
    curve(tmp_path / "run", tensorboard=True)
    rows, found = Run(RunFlags(out=str(tmp_path / "run"), resume=True)).metrics(), board(tmp_path / "run")
    assert found.keys() == {"train/loss", "train/rewards/accuracies", "eval/rewards/accuracies"}
    assert found["train/loss"] == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in rows]
    assert [step for step, _ in found["eval/rewards/accuracies"]] == [2, 4, 6, 8, 10]


@pytest.mark.parametrize("when", [(True, True, True), (False, True, True), (True, False, True)])
def test_killed_and_resumed_a_board_ends_the_same(when, tmp_path, monkeypatch):
    """Even where --tensorboard was not given to each of the processes: nothing is missing and nothing stands twice."""
    clock = SimpleNamespace(time=itertools.count(1e9).__next__)  # no two processes start in the same second
    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer.time", clock)
    curve(tmp_path / "whole", tensorboard=True)
    looking_on = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"scalars": 0})
    for kill, tensorboard, resume in zip((4, 8, None), when, (False, True, True), strict=True):
        try:
            curve(tmp_path / "run", kill, tensorboard=tensorboard, resume=resume)
        except KeyError:
            if tensorboard:  # further than the state
                assert board(tmp_path / "run", looking_on)["train/loss"][-1][0] == kill
    assert board(tmp_path / "run") == board(tmp_path / "whole") == board(tmp_path / "run", looking_on)


def test_without_the_flag_nothing_is_written(tmp_path):
    curve(tmp_path / "run")
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_without_the_package_a_sentence_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    config = train_dpo.Config(out=str(tmp_path / "run"), tensorboard=True)
    refused(train_dpo.train, config, "pip install 'nanopref[tensorboard]'", capsys)


@given(st.text(), st.sampled_from([*TAGS, ""]))
def test_what_has_no_name_in_trl_keeps_its_own(name, stage):
    if name not in TAGS.get(stage, {}) and not name.startswith("held_out_"):
        assert tag(stage, name) == f"train/{name}" and tag(stage, f"held_out_{name}") == f"eval/{name}"
    assert len(set(TAGS.get(stage, {}).values())) == len(TAGS.get(stage, {}))  # and no two share one


def test_names_are_those_of_trls_trainers():
    """As TRL's trainers, where it is installed, name them in their source; PPOTrainer is no longer among them."""
    trl = pytest.importorskip("trl")
    for stage, trainer in (("dpo", "dpo_trainer"), ("reward model", "reward_trainer")):
        source = (Path(trl.__file__).parent / "trainer" / f"{trainer}.py").read_text()
        for name in {tag(stage, x).removeprefix("train/") for x in (*TAGS[stage], "accuracy")} - {"learning_rate"}:
            assert f'["{name}"]' in source, name
