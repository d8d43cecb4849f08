"""What a judge may do that nobody expects: a sentence, no traceback, and nothing removed."""

import json
from types import SimpleNamespace

import by_hand
import pytest
import torch

import train_dpo
from nanopref import models
from nanopref.feedback import collect as collecting
from nanopref.feedback import rewards
from nanopref.models.sampling import Answer
from nanopref.running.flags import UserError
from nanopref.running.folder import Run

PEOPLE = {"noise": 0.0, "annotators": 1, "max_new_tokens": 8, "sample_batch": 8, "seed": 0}
CONFIG = SimpleNamespace(data="", init="", doubt=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bugs")
    by_hand.tiny_judge(folder / "rm", by_hand.tiny_model(folder / "init"), heads=2)
    return folder


@pytest.fixture
def policy(folder):
    return models.load(folder / "init")


def collect(policy, monkeypatch, texts, judge, **more):
    flat = [row[k] for k in range(2) for row in texts]
    monkeypatch.setattr(collecting, "respond", lambda *a, **k: [Answer([1], [2], [], x, True) for x in flat])
    return collecting.collect(*policy, [f"p{i}" for i in range(len(texts))], judge, **PEOPLE | more)


def test_people_without_noise_who_find_all_alike_are_a_sentence(policy, monkeypatch):
    same = rewards.alone(lambda answers: torch.ones(len(answers)))
    with pytest.raises(UserError, match="only 0 of 24"):
        collect(policy, monkeypatch, [["1", "2"]] * 24, same, votes="count")
    with pytest.raises(UserError, match="only 0 of 72"):  # and where no two answers can be compared
        collect(policy, monkeypatch, [["1", ""]] * 24, same, votes="count", annotators=3)


def test_a_policy_none_of_whose_answers_ends_is_a_sentence_with_a_reward_model_too(folder, policy, monkeypatch):
    judge = rewards.load([str(folder / "rm")], *policy, CONFIG)
    with pytest.raises(UserError, match="only 0 of 24 pairs"):
        collect(policy, monkeypatch, [["", ""]] * 24, judge)


@pytest.mark.parametrize("word", ["{}*0.5", "implicit:{}", "rules:{}/x.toml", "{}/mine.py:f", "{}/rm*0.5"])
@pytest.mark.parametrize("flag", ["reward", "chooser"])
def test_overwrite_spares_whoever_judges_or_chooses(flag, word, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"flags": {}, "versions": {}}))
    (tmp_path / "x.toml").touch(), (tmp_path / "mine.py").touch(), (tmp_path / "rm").mkdir()
    more = {flag: (word.format(tmp_path),), "select": "rso"}
    with pytest.raises(UserError, match=f"--overwrite would remove .*, which --{flag} wants to read"):
        Run(train_dpo.Config(out=str(tmp_path), overwrite=True, **more))


def said(tmp_path, policy, body):
    (tmp_path / "m.py").write_text(body)
    judge = rewards.load([f"{tmp_path}/m.py:f"], *policy, CONFIG)
    return judge([Answer([300], [2], [], " x", True)] * 2)


def test_an_error_of_several_lines_is_one_sentence(tmp_path, policy):
    with pytest.raises(UserError) as error:
        said(tmp_path, policy, "def f(prompt, response):\n    raise ValueError('a\\nb')\n")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("arguments", ["responses, prompts", "*, prompts, responses"])
def test_lists_are_given_by_their_names(arguments, tmp_path, policy):
    body = f"def f({arguments}):\n    assert responses == [' x'] * 2\n    return [1.0, 2.0]\n"
    assert said(tmp_path, policy, body).tolist() == [1, 2]


def test_a_file_may_hold_a_dataclass(tmp_path, policy):
    body = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass X:\n    a: int = 3\n"
    )
    assert said(tmp_path, policy, body + "def f(prompt, response):\n    return X().a\n").tolist() == [3, 3]


def test_a_file_that_exits_is_a_sentence(tmp_path, policy):
    with pytest.raises(UserError):
        said(tmp_path, policy, "import sys\nsys.exit(3)\ndef f(prompt, response): return 1\n")


def test_text_is_no_list_of_numbers(tmp_path, policy):
    with pytest.raises(UserError):
        said(tmp_path, policy, "def f(prompts, responses):\n    return '12'\n")


def test_a_class_without_a_signature_is_a_sentence(tmp_path, policy):
    with pytest.raises(UserError):
        said(tmp_path, policy, "f = dict\n")


@pytest.mark.parametrize("select", ["best-worst", "best"])
def test_where_no_prompt_has_two_answers_there_is_a_sentence(select, policy, monkeypatch):
    feedback = "responses" if select == "best" else "pairs"
    with pytest.raises(UserError, match="only 0 of 24"):  # the 24 answers are there, but alone
        collect(
            policy, monkeypatch, [["1", ""]] * 24, rewards.alone(rewards.true_reward), select=select, feedback=feedback
        )
