"""Who judges, and the pairs that come of it."""

import json
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import beginning, lines

from nanopref import models
from nanopref.data import formats, reviews
from nanopref.data.formats import read_feedback
from nanopref.data.groups import Group
from nanopref.feedback import collect as collecting
from nanopref.feedback import rewards
from nanopref.feedback.collect import FEEDBACK, best_possible, collect, training_prompts
from nanopref.feedback.voting import best_accuracy
from nanopref.learning.objectives import OBJECTIVES, kinds
from nanopref.models.inference import response_scores
from nanopref.models.sampling import Answer, pack
from nanopref.models.scalar import ScalarModel
from nanopref.running.flags import UserError
from nanopref.running.folder import Run

SETTING = {"annotators": 1, "max_new_tokens": 64, "sample_batch": 16, "seed": 0}
TRUE = rewards.alone(rewards.true_reward)


@pytest.fixture(scope="module")
def policy(sft_folder):
    return models.load(sft_folder)


@pytest.fixture(scope="module", autouse=True)
def once():
    """The same answers are not sampled twice."""
    sampled, ordinary = {}, collecting.respond

    def respond(policy, tokenizer, prompts, **setting):
        key = tuple(prompts), tuple(sorted(setting.items()))
        if key not in sampled:
            sampled[key] = ordinary(policy, tokenizer, prompts, **setting)
        return sampled[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collecting, "respond", respond)
        yield


def test_without_noise_the_answer_with_the_higher_reward_is_chosen(policy):
    prompts = training_prompts("", 40, "test")
    pairs, figures = collect(*policy, prompts, TRUE, noise=0.0, **SETTING)
    assert 20 <= len(pairs) <= 40 and {pair.prompt for pair in pairs} <= set(prompts)
    for pair in pairs:
        best, worst = map(reviews.true_reward, pair.responses)
        assert best > worst and pair.responses[0] != pair.responses[1] and all(map(str.strip, pair.responses))
    assert figures["answers"] == 80 and figures["score"] == figures["true_reward"]
    unknown = collect(*policy, prompts, TRUE, noise=0.0, true=False, **SETTING)[1]
    assert unknown == {"answers": 80, "score": figures["score"]}  # of --data nobody knows the true reward


def test_the_other_way_round_the_other_is_chosen(policy):
    """The same answers, judged by the opposite reward: every pair turns, for ties are none."""
    prompts = training_prompts("", 40, "test")
    pairs, figures = collect(*policy, prompts, TRUE, noise=0.0, **SETTING)
    opposite = rewards.alone(lambda answers: -rewards.true_reward(answers))
    turned, others = collect(*policy, prompts, opposite, noise=0.0, **SETTING)
    assert others["score"] == -figures["score"] and others["true_reward"] == figures["true_reward"]
    assert len(pairs) > 10
    for pair, other in zip(pairs, turned, strict=True):
        assert pair.prompt == other.prompt and pair.responses == other.responses[::-1]


# ---- every kind of feedback ------------------------------------------------------------------------------------------

PROMPTS = training_prompts("", 40, "test")


@pytest.fixture(scope="module")
def said(policy):
    """What was said of three answers to each prompt, by kind, and every answer that there was, by prompt."""
    found, answers = {}, {x: [] for x in PROMPTS}
    for feedback in ("labels", "rankings", "ratings"):
        people = SETTING | {"noise": 0.0}
        found[feedback], _ = collect(*policy, PROMPTS, TRUE, feedback=feedback, answers=3, **people)
    sampling = {"stream": "sampling pairs", "max_new_tokens": 64, "batch_size": 16, "seed": 0}
    for answer in collecting.respond(*policy, PROMPTS * 3, **sampling):
        answers[policy[1].decode(answer.prompt)].append(answer.text if answer.ended else "")
    return found, answers


def kept(answers: dict) -> dict[str, set[str]]:
    """The answers to each prompt to which three different ones ended."""
    return {x: set(answers[x]) for x in PROMPTS if len(set(answers[x])) == 3 and all(map(str.strip, answers[x]))}


def test_each_prompt_is_answered_as_often_as_asked(said):
    _, answers = said
    assert len(set(PROMPTS)) == 40 and all(len(answers[x]) == 3 for x in PROMPTS)
    assert 20 <= len(kept(answers)) < 40


@pytest.mark.parametrize("feedback", ["rankings", "ratings"])
def test_without_noise_answers_stand_by_their_rewards(feedback, said):
    found, answers = said
    assert {group.prompt: set(group.responses) for group in found[feedback]} == kept(answers)
    assert [group.prompt for group in found[feedback]] == [x for x in PROMPTS if x in kept(answers)]
    for group in found[feedback]:
        true = tuple(map(reviews.true_reward, group.responses))
        assert list(true) == sorted(true, reverse=True)
        assert group.scores == pytest.approx(true if feedback == "ratings" else ()) and group.margin == 1
    assert all(type(score) is float for group in found[feedback] for score in group.scores)


def test_without_noise_what_is_better_than_the_middle_is_good(said):
    found, answers = said
    middle = np.median([reviews.true_reward(text) for x in PROMPTS for text in answers[x]])
    expected = Counter((x, text) for x in PROMPTS for text in answers[x] if text.strip())
    assert Counter((group.prompt, *group.responses) for group in found["labels"]) == expected
    assert len(expected) > sum(map(len, kept(answers).values()))  # one that did not end spoils no other
    decided = [(group, reviews.true_reward(group.responses[0])) for group in found["labels"]]
    decided = [(group, true) for group, true in decided if true != middle]
    assert all(group.scores == (float(true > middle),) for group, true in decided)
    assert len({group.scores for group, _ in decided}) == 2 and len(decided) > 40


@pytest.mark.parametrize("feedback, lost", [("pairs", 4), ("rankings", 4), ("ratings", 4), ("labels", 3)])
def test_equal_answers_and_such_as_are_empty_or_have_no_end_are_left_out(feedback, lost, policy, monkeypatch):
    def respond(policy, tokenizer, prompts, **setting):
        given = [(f" good {i}", True) for i in range(len(prompts))]
        given[30] = given[0]  # the second answer to the first prompt
        given[1] = given[32] = (" \n", True)
        given[33] = (" good 99", False)
        return [Answer([1], [2], [], text, ended) for text, ended in given]

    monkeypatch.setattr(collecting, "respond", respond)
    prompts = [f"p{i}" for i in range(30)]
    longer = rewards.alone(lambda answers: torch.tensor([float(answer.text.split()[-1]) for answer in answers]))
    found, figures = collect(*policy, prompts, longer, feedback=feedback, noise=0.0, **SETTING)
    if feedback == "labels":  # each answer by itself, the equal ones too
        assert len(found) == 60 - lost
    else:
        assert [group.prompt for group in found] == prompts[lost:]
    there = [i if i != 30 else 0 for i in range(60) if i not in (1, 32, 33)]
    assert figures["answers"] == 60 and figures["score"] == pytest.approx(np.mean(there))  # of those that are there


@pytest.mark.parametrize("feedback", ["pairs", "labels", "rankings", "ratings"])
def test_people_err_as_often_as_they_are_said_to(feedback):
    """The noise, the number of annotators and the seed reach them."""
    true = np.random.default_rng(1).normal(size=(4000, 2))
    groups = [Group(str(i), ("0", "1")) for i in range(len(true))]

    def heard(noise: float, annotators: int, seed: int = 0) -> list[Group]:
        people = {"noise": noise, "annotators": annotators, "votes": "majority", "rng": np.random.default_rng(seed)}
        return FEEDBACK[feedback](groups, true, **people)[0]

    def right(found: list[Group]) -> float:
        if feedback == "labels":
            middle = np.median(true)
            said = [group.scores[0] > 0.5 for group in found]
            return np.mean([a == (b > middle) for a, b in zip(said, true.flatten(), strict=True)])
        return np.mean([true[int(g.prompt), int(g.responses[0])] == true[int(g.prompt)].max() for g in found])

    assert right(heard(0.0, 1)) == 1
    assert 0.6 < right(heard(1.0, 1)) < right(heard(1.0, 9)) - 0.02 and right(heard(1.0, 9)) < 0.97
    assert heard(1.0, 1) == heard(1.0, 1) != heard(1.0, 1, seed=1)


def test_ratings_stay_with_their_answers_and_prompts_with_their_groups():
    true = np.array([[1.0, 3.0, 2.0], [0.0, -1.0, 0.0]])
    groups = [Group("p", ("a", "b", "c")), Group("q", ("d", "e", "f"))]
    people = {"noise": 0.0, "annotators": 1, "votes": "majority", "rng": np.random.default_rng(0)}
    assert FEEDBACK["ratings"](groups, true, **people)[0] == [
        Group("p", ("b", "c", "a"), scores=(3.0, 2.0, 1.0)),
        Group("q", ("d", "f", "e"), scores=(0.0, 0.0, -1.0)),
    ]
    assert [group.responses for group in FEEDBACK["rankings"](groups[:1], true[:1], **people)[0]] == [("b", "c", "a")]
    found, _ = FEEDBACK["labels"](groups, true - 0.25, **people)  # the middle is at 0.25
    assert found[:3] == [Group("p", (x,), scores=(1.0,)) for x in "abc"]
    assert found[3:] == [Group("q", (x,), scores=(0.0,)) for x in "def"]


def a_run(folder: Path, **settings) -> Run:
    """As much of a run as `ensure_feedback` needs."""
    more = {"data": "", "prompts": 40, "noise": 0.0, "loss": "dpo", "select": "all", "voters": (), "votes": "majority"}
    return beginning(folder, **SETTING, **more | settings)


@pytest.mark.parametrize(
    "feedback, loss, answers, lost", [("pairs", "kto", 2, 7), ("labels", "binary", 3, 87), ("ratings", "nca", 4, 7)]
)
def test_what_was_said_is_kept_and_read_as_from_a_file(feedback, loss, answers, lost, tmp_path, monkeypatch):
    groups = {
        "pairs": [Group(f"p{i}", ("a", "b")) for i in range(33)],
        "labels": [Group(f"p{i}", ("a",), scores=(float(i % 2),)) for i in range(33)],
        "ratings": [Group(f"p{i}", ("a", "b"), scores=(7.0, 3.0)) for i in range(33)],
    }[feedback]
    run, calls = a_run(tmp_path, feedback=feedback, answers=answers, loss=loss, beta=0.7), []
    monkeypatch.setattr(
        collecting, "collect", lambda *args, **more: calls.append((args, more)) or (groups, {"score": 0.5})
    )
    for _ in range(2):  # the second time it is there
        found = collecting.ensure_feedback(run, "policy", "tokenizer", "judge", "chooser", kinds(OBJECTIVES))
        expected = read_feedback(tmp_path / "feedback.jsonl", kinds(OBJECTIVES), loss)
        notes = Counter({f"{feedback} dropped: answers equal, alike in reward, empty or without an end": lost})
        assert found == (*expected[:2], notes)
    ((policy, tokenizer, prompts, *who), more), *others = calls
    assert (policy, tokenizer, who) == ("policy", "tokenizer", ["judge", "chooser"]) and not others
    people = {"noise": 0.0, "voters": (), "votes": "majority", **SETTING}
    asked = {"feedback": feedback, "answers": answers, "select": "all", "beta": 0.7, "round": 0, "true": True}
    assert more == asked | people
    assert json.loads((tmp_path / "round.json").read_text()) == {"round": 1, "score": 0.5}
    assert prompts == training_prompts("", 40, "pairs 0")
    assert formats.read(tmp_path / "feedback.jsonl")[:2] == (feedback, groups)


def test_the_prompts_of_a_file_are_shuffled_and_come_again_where_more_are_asked_for(tmp_path, monkeypatch):
    file, asked = tmp_path / "prompts.jsonl", []
    file.write_bytes(lines(*({"prompt": f"p{i}"} for i in range(20))))
    pairs = [Group(f"p{i}", ("a", "b")) for i in range(40)]
    monkeypatch.setattr(
        collecting, "collect", lambda policy, tokenizer, prompts, *_, **__: asked.append(prompts) or (pairs, {})
    )
    run = a_run(tmp_path / "run", feedback="pairs", answers=2, data=str(file))
    _, _, notes = collecting.ensure_feedback(run, None, None, None, None, kinds(OBJECTIVES))
    training, _ = formats.read_prompts(file)
    (prompts,) = asked
    assert (
        len(prompts) == 40 and prompts[:18] == prompts[18:36] != training and sorted(prompts[:18]) == sorted(training)
    )
    assert not notes


A_PAIR = Group("p", (" The plot is superb.", " The acting is dull."))
PAIRS = [A_PAIR, Group("p", (" It.", " The music is bold.")), Group("q", (" Fine.", ""))]


def of_people(**settings) -> SimpleNamespace:
    plain = {"data": "", "judged": "", "reward": None, "feedback": "pairs", "noise": 0.5, "annotators": 3}
    return SimpleNamespace(**plain | {"voters": (), "votes": "majority"} | settings)


def test_the_best_possible_is_how_often_people_agree_with_the_truth():
    better, worse = np.array([[reviews.true_reward(text) for text in pair.responses] for pair in PAIRS]).T
    for settings in ({}, {"noise": 0.1}, {"annotators": 1}):
        config = of_people(**settings)
        people = {"noise": config.noise, "annotators": config.annotators}
        assert best_possible(config, PAIRS) == pytest.approx(best_accuracy(better, worse, **people))
    assert best_possible(of_people(noise=0.1), PAIRS) > best_possible(of_people(noise=5.0), PAIRS) > 0.5


@pytest.mark.parametrize(
    "settings, other",
    [
        ({"data": "pairs.jsonl"}, A_PAIR),
        ({"judged": "feedback.jsonl"}, A_PAIR),
        ({"reward": ("out/rm",)}, A_PAIR),
        ({"voters": (0.5, 0.5, 0.5)}, A_PAIR),
        ({"votes": "count"}, A_PAIR),
        *(({"feedback": kind}, A_PAIR) for kind in ("labels", "rankings", "ratings")),
        ({}, Group("p", ("a", "b", "c"))),
        ({}, Group("p", ("a",), scores=(1.0,))),  # a pair that became two labels
        ({}, A_PAIR._replace(scores=(1.0, 0.0))),
        ({}, A_PAIR._replace(prompts=("p", "q"))),  # which met
    ],
)
def test_what_is_best_possible_is_not_said_where_it_cannot_be_known(settings, other):
    assert best_possible(of_people(**settings), [*PAIRS, other]) is None


# ---- rewards ---------------------------------------------------------------------------------------------------------


def test_a_reward_model_scores_the_text_as_it_will_be_trained_on(policy):
    """Its tokens are those of the tokenizer, end-of-text behind them, not those that happened to be drawn."""
    gpt, tokenizer = policy
    torch.manual_seed(0)
    model = ScalarModel(gpt, 2)
    groups = [Group("A film.", (" The plot is superb.", "")), Group("", (" It.", " It works."))]
    answers = rewards.as_answers(groups, tokenizer, gpt.config.block_size)
    assert [answer.text for answer in answers] == [" The plot is superb.", "", " It.", " It works."]
    end = tokenizer.end_of_text
    assert answers[0].prompt == tokenizer.encode("A film.") and answers[2].prompt == [end]
    assert answers[0].tokens == [*tokenizer.encode(" The plot is superb."), end] and answers[1].tokens == [end]
    found = rewards.model_reward(model)(answers)
    for answer, score in zip(answers, found.tolist(), strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([answer.prompt + answer.tokens]))[0, -1].mean().item()
        assert score == pytest.approx(expected, abs=1e-5)


def test_weights_and_doubt(policy):
    gpt, tokenizer = policy
    torch.manual_seed(1)
    ensemble = ScalarModel(gpt, 4)
    tokens = [*tokenizer.encode(" The plot is superb."), tokenizer.end_of_text]
    answers = [Answer(tokenizer.encode("A film."), tokens, [], " The plot is superb.", True)]
    heads = response_scores(ensemble, pack(answers))[0]
    parts = {"rm": rewards.model_reward(ensemble, doubt=0.5), "true": rewards.true_reward}
    found = rewards.Rewards(parts, torch.tensor([2.0, -3.0]), [])(answers).item()
    expected = 2 * (heads.mean() - 0.5 * heads.std(correction=0)) - 3 * reviews.true_reward(answers[0].text)
    assert found == pytest.approx(expected.item(), abs=1e-5)
    with pytest.raises(UserError, match="--reward one: gives nan, which is no finite number"):
        rewards.alone(lambda answers: torch.tensor([float("nan")]), "one")(answers)
    huge = {name: lambda answers: torch.tensor([3e38]) for name in "ab"}
    with pytest.raises(UserError, match="no finite numbers"):
        rewards.Rewards(huge, torch.ones(2), [])(answers)


def test_too_few_pairs_that_end_are_an_error_that_says_what_to_do(policy):
    setting, prompts = SETTING | {"max_new_tokens": 2, "noise": 0.0}, training_prompts("", 30, "x")
    for asked, more in (("30 pairs", {}), ("90 labels", {"feedback": "labels", "answers": 3})):
        with pytest.raises(UserError, match=rf"only \d+ of {asked} can be used: .*start again with --overwrite"):
            collect(*policy, prompts, TRUE, **setting, **more)


def test_prompts_come_from_the_file_or_the_task(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(30)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert set(training_prompts(str(tmp_path / "pairs.jsonl"), 5, "s")) < {row["prompt"] for row in rows}
    rng = random.Random("s")
    assert training_prompts("", 5, "s") == [reviews.sample_prompt(rng) for _ in range(5)]


def test_the_policy_of_a_reward_model_is_found_by_its_folder(sft_folder, tmp_path):
    assert rewards.made_from(()) == rewards.made_from([""]) == rewards.made_from([str(tmp_path), "true"]) == ""
    (tmp_path / "config.json").write_text(json.dumps({"flags": {"init": sft_folder}}))
    for words in ([str(tmp_path)], ["true", f"{tmp_path}*0.5"], [f"implicit:{tmp_path}*-1"]):
        assert rewards.made_from(words) == sft_folder
