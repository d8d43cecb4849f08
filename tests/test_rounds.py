"""Rounds of train_dpo.py: who answers, what they are held to, and a run that is stopped anywhere and goes on."""

import copy
import json
import random
import shutil
from pathlib import Path
from typing import NamedTuple

import by_hand
import pytest
import torch
from helpers import lines, refused, results, saved_state, stopped
from safetensors.torch import load_file

import train_dpo
from nanopref import models
from nanopref.data import formats, reviews
from nanopref.feedback import collect as collecting
from nanopref.feedback.collect import training_prompts
from nanopref.learning import objectives
from nanopref.running.folder import Run

ROUNDS, EACH = 3, 20  # rounds, and prompts of each
SMALL = {"prompts": ROUNDS * EACH, "rounds": ROUNDS, "answers": 4, "batch_size": 6, "micro_batch": 6}
SMALL |= {"eval_prompts": 2, "eval_every": 4, "save_seconds": 0.0, "max_new_tokens": 24, "lr": 2e-3, "warmup": 2}
SMALL |= {"optimizer": "adamw", "device": "cpu"}
REWARD = "def f(prompts, responses):\n    {}return [float(sum(map(ord, x)) % 13) for x in responses]\n"


class Done(NamedTuple):
    """A run, and of each round the policy's weights when it answered, and to whom."""

    folder: Path
    policies: list[dict]
    prompts: list[list[str]]


@pytest.fixture(scope="module", autouse=True)
def short_prompts(small_and_plain):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reviews, "sample_prompt", lambda rng: by_hand.text(rng, 3, 6))  # which no context cuts
        yield


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("started")
    (folder / "mine.py").write_text(REWARD.format(""))
    return SMALL | {"init": by_hand.tiny_model(folder / "init"), "reward": (f"{folder}/mine.py:f",)}


def watched(folder: Path, settings: dict) -> Done:
    policies, prompts, ordinary = [], [], collecting.respond

    def respond(policy, tokenizer, asked, **more):
        policies.append(copy.deepcopy(policy.state_dict()))
        prompts.append(asked[: len(asked) // 4])
        return ordinary(policy, tokenizer, asked, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collecting, "respond", respond)
        train_dpo.train(train_dpo.Config(out=str(folder), **settings))
    return Done(folder, policies, prompts)


@pytest.fixture(scope="module")
def left_alone(started, tmp_path_factory) -> Done:
    return watched(tmp_path_factory.mktemp("fixed") / "run", started)


@pytest.fixture(scope="module")
def fresh(started, tmp_path_factory) -> Done:
    return watched(tmp_path_factory.mktemp("fresh") / "run", started | {"fresh_reference": True})


def state(folder: Path, round: int) -> dict:
    """The weights at the end of a round."""
    return saved_state(folder, round)["model"]


def notes(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("round*.json"), key=lambda x: (len(x.name), x))]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def ended_alike(folder: Path, other: Path) -> None:
    """The same figures, rounds and weights."""
    assert results(folder) == results(other) and notes(folder) == notes(other)
    assert same(models.load(folder)[0].state_dict(), models.load(other)[0].state_dict())
    names = [{x.name for x in path.iterdir()} for path in (folder, other)]
    assert names[0] == names[1] and not [name for name in names[0] if "partial" in name]


# ---- what a round is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["left_alone", "fresh"])
def test_each_round_is_answered_by_the_policy_as_the_last_left_it(kind, started, request):
    done = request.getfixturevalue(kind)
    before = [models.load(started["init"])[0].state_dict(), state(done.folder, 1), state(done.folder, 2)]
    assert len(done.policies) == ROUNDS
    assert all(same(found, expected) for found, expected in zip(done.policies, before, strict=True))
    assert same(models.load(done.folder)[0].state_dict(), state(done.folder, 3))
    assert not same(before[0], before[1]) and not same(before[1], before[2])


def test_rounds_share_the_prompts(left_alone):
    every = training_prompts("", ROUNDS * EACH, "pairs 0")
    assert left_alone.prompts == [every[:EACH], every[EACH : 2 * EACH], every[2 * EACH :]]
    for path, prompts in zip(
        ("feedback.jsonl", "feedback-2.jsonl", "feedback-3.jsonl"), left_alone.prompts, strict=True
    ):
        _, pairs, _ = formats.read(left_alone.folder / path)
        assert len(pairs) > 30 and {pair.prompt for pair in pairs} <= set(prompts)


def test_the_first_round_is_a_run_of_one(started, left_alone, tmp_path):
    config = train_dpo.Config(out=str(tmp_path / "run"), **started | {"rounds": 1, "prompts": EACH})
    train_dpo.train(config)
    one, all_of_them = results(tmp_path / "run")[0], results(left_alone.folder)[0]
    assert 3 < len(one) < len(all_of_them) / 2 and all_of_them[: len(one)] == one
    assert same(state(left_alone.folder, 1), models.load(tmp_path / "run")[0].state_dict())
    assert not (tmp_path / "run" / "state-2").exists() and len(notes(tmp_path / "run")) == 1


def test_steps_count_on_and_each_round_has_a_learning_rate_of_its_own(left_alone):
    rows, report = results(left_alone.folder)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    done = [saved_state(left_alone.folder, round)["step"] for round in range(1, ROUNDS + 1)]
    assert len(done) == ROUNDS and sum(done) == len(rows) and min(done) > 3
    for first, n in zip((0, done[0], done[0] + done[1]), done, strict=True):
        lrs = [row["lr"] for row in rows[first : first + n]]
        expected = [SMALL["lr"] * by_hand.triangle(i, n, 2) for i in range(n)]
        assert lrs == pytest.approx(expected) and "held_out_loss" in rows[first + n - 1]
    assert report["rounds"] == notes(left_alone.folder)
    assert [row["round"] for row in report["rounds"]] == [1, 2, 3]
    assert all(row["answers"] == 4 * EACH and {"score", "true_reward"} <= row.keys() for row in report["rounds"])


def log_probs(model, tokenizer, feedback: Path) -> list[float]:
    """log π of each response, of the part that is learnt from and of the other, by hand."""
    learnt, held_out, _ = formats.read_feedback(feedback, objectives.kinds(objectives.OBJECTIVES), "dpo")
    rows = [(group.prompt, text) for part in (learnt, held_out) for group in part for text in group.responses]
    found = []
    with torch.no_grad():
        for prompt, text in rows:
            answer = [*tokenizer.encode(text), tokenizer.end_of_text]
            found.append(by_hand.logprob(model, tokenizer.encode(prompt), answer).item())
    return found


@pytest.mark.parametrize("kind", ["left_alone", "fresh"])
def test_the_reference_is_the_first_policy_or_the_one_that_the_round_began_with(kind, started, request):
    done = request.getfixturevalue(kind)
    first, tokenizer = by_hand.in_float64(started["init"])
    began = copy.deepcopy(first)
    for round, suffix in ((1, ""), (2, "-2"), (3, "-3")):
        if round > 1:
            began.load_state_dict(state(done.folder, round - 1))
        held_to, other = (began, first) if kind == "fresh" else (first, began)
        feedback = done.folder / f"feedback{suffix}.jsonl"
        expected = log_probs(held_to, tokenizer, feedback)
        found = load_file(done.folder / f"reference{suffix}.safetensors")["logprobs"].tolist()
        assert found == pytest.approx(expected, abs=2e-4)
        if round > 1:
            assert found != pytest.approx(log_probs(other, tokenizer, feedback), abs=0.05)
    assert not same(state(done.folder, 1), first.state_dict())


# ---- stopped anywhere ------------------------------------------------------------------------------------------------

MOMENTS = {  # who is called, where, and at which call there is a Ctrl-C: before or behind it
    "sampling of round 2": (collecting, "respond", 2, "before"),
    "sampled, no feedback written": (collecting, "write_groups", 2, "behind"),
    "no reference of round 2": (train_dpo, "reference_logprobs", 2, "before"),
    "the first step of round 2": (Run, "update", 8, "before"),
    "a step of round 2": (Run, "update", 11, "behind"),
    "a step of round 3": (Run, "update", 19, "before"),
    "round 2 learnt": (train_dpo, "fit", 2, "behind"),
    "the report": (train_dpo, "compare", 1, "before"),
}


def stop_at(patch: pytest.MonkeyPatch, moment: str) -> None:
    owner, name, number, when = MOMENTS[moment]
    ordinary, calls = getattr(owner, name), []

    def call(*args, **more):
        calls.append(name)
        if when == "before" and len(calls) == number:
            raise KeyboardInterrupt
        found = ordinary(*args, **more)
        if when == "behind" and len(calls) == number:
            raise KeyboardInterrupt
        return found

    patch.setattr(owner, name, call)


@pytest.mark.parametrize("moment", MOMENTS)
def test_stopped_and_resumed_it_ends_the_same(moment, started, fresh, tmp_path):
    """With a reference of each round's own, which depends on where the last one ended."""
    config = {"out": str(tmp_path / "run"), "fresh_reference": True, **started}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, moment)
        train_dpo.train(train_dpo.Config(**config))
    assert not (tmp_path / "run" / "report.json").exists()
    train_dpo.train(train_dpo.Config(resume=True, **config))
    ended_alike(tmp_path / "run", fresh.folder)


def test_stopped_twice_in_round_2_without_a_fresh_reference_it_ends_the_same(started, left_alone, tmp_path):
    config = {"out": str(tmp_path / "run"), **started}
    for moment, resume in (("no reference of round 2", False), ("a step of round 2", True)):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            if resume:  # of the first round nothing is done again
                patch.setitem(MOMENTS, moment, (Run, "update", 2, "behind"))
            stop_at(patch, moment)
            train_dpo.train(train_dpo.Config(resume=resume, **config))
    train_dpo.train(train_dpo.Config(resume=True, **config))
    ended_alike(tmp_path / "run", left_alone.folder)


def test_a_finished_run_that_is_resumed_learns_nothing_more(started, left_alone, tmp_path, monkeypatch):
    config = {"out": str(tmp_path / "run"), **started}
    shutil.copytree(left_alone.folder, tmp_path / "run")
    monkeypatch.setattr(Run, "update", lambda *args: pytest.fail("a step"))
    monkeypatch.setattr(collecting, "respond", lambda *args, **more: pytest.fail("an answer"))
    train_dpo.train(train_dpo.Config(resume=True, **config))
    ended_alike(tmp_path / "run", left_alone.folder)


# ---- rounds that go wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault, message",
    [
        ("raise ValueError('asleep')", "mine.py:f: ValueError: asleep; it was asked for the prompt"),
        ("return [1.0] * len(prompts)", "only 0 of 120 pairs can be used"),
    ],
    ids=["raises", "all alike"],
)
def test_a_judge_that_fails_in_round_2_leaves_round_1_and_can_be_mended(
    fault, message, started, left_alone, tmp_path, capsys
):
    """One sentence and exit code 2; with the function mended --resume goes on as if nothing had been."""
    mine, out = tmp_path / "mine.py", tmp_path / "run"
    later = f"if os.path.exists({str(out / 'round.json')!r}): {fault}\n    "
    mine.write_text("import os\n" + REWARD.format(later))
    config = started | {"out": str(out), "reward": (f"{mine}:f",)}
    assert message in stopped(train_dpo.train, train_dpo.Config(**config), capsys)
    assert same(state(out, 1), state(left_alone.folder, 1)) and len(notes(out)) == 1
    assert not list(out.glob("*-2*")) and not (out / "model").exists()
    assert message in stopped(train_dpo.train, train_dpo.Config(resume=True, **config), capsys)
    mine.write_text(REWARD.format(""))
    train_dpo.train(train_dpo.Config(resume=True, **config))
    ended_alike(out, left_alone.folder)


def test_rounds_without_anybody_to_ask_or_with_too_few_prompts_are_refused(started, tmp_path, capsys):
    rng = random.Random(0)
    rows = [{"prompt": by_hand.text(rng, 2, 5), "chosen": " good", "rejected": " bad"} for _ in range(12)]
    (tmp_path / "pairs.jsonl").write_bytes(lines(*rows))
    file, plain = (
        str(tmp_path / "pairs.jsonl"),
        {"out": str(tmp_path / "out"), "device": "cpu", "init": started["init"]},
    )
    for settings, message in [
        ({"data": file, "rounds": 2}, "--rounds asks who judges anew, and here a file is read"),
        ({"judged": file, "rounds": 2}, "--rounds asks who judges anew, and here a file is read"),
        ({"prompts": 59, "rounds": 3}, "--prompts: at least 20 for each of the 3 --rounds"),
        ({"rounds": 0}, "--rounds must be at least 1"),
    ]:
        refused(train_dpo.train, train_dpo.Config(**plain, **settings), message, capsys)
