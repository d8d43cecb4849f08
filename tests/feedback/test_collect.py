"""Who judges, and the pairs that come of it."""

import json
import random

import pytest
import torch

from nanopref import models
from nanopref.data import reviews
from nanopref.data.groups import Group
from nanopref.feedback import rewards
from nanopref.feedback.collect import collect, training_prompts
from nanopref.generate import Answer, pack
from nanopref.models.inference import response_scores
from nanopref.models.scalar import ScalarModel
from nanopref.running.flags import UserError

SETTING = {"annotators": 1, "max_new_tokens": 64, "sample_batch": 16, "seed": 0}


@pytest.fixture(scope="module")
def policy(sft_folder):
    return models.load(sft_folder)


def test_without_noise_the_answer_with_the_higher_reward_is_chosen(policy):
    prompts = training_prompts("", 40, "test")
    pairs = collect(*policy, prompts, rewards.true_reward, noise=0.0, **SETTING)
    assert 20 <= len(pairs) <= 40 and {pair.prompt for pair in pairs} <= set(prompts)
    for pair in pairs:
        best, worst = map(reviews.true_reward, pair.responses)
        assert best >= worst and pair.responses[0] != pair.responses[1] and all(map(str.strip, pair.responses))


def test_the_other_way_round_the_other_is_chosen(policy):
    """The same answers, judged by the opposite reward: a pair that is not a tie turns."""
    prompts = training_prompts("", 40, "test")
    pairs = collect(*policy, prompts, rewards.true_reward, noise=0.0, **SETTING)
    turned = collect(*policy, prompts, lambda answers: -rewards.true_reward(answers), noise=0.0, **SETTING)
    differ = [reviews.true_reward(p.responses[0]) != reviews.true_reward(p.responses[1]) for p in pairs]
    assert sum(differ) > 10
    for pair, other, decided in zip(pairs, turned, differ, strict=True):
        assert pair.prompt == other.prompt and set(pair.responses) == set(other.responses)
        assert not decided or pair.responses == other.responses[::-1]


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
    one, true = rewards.model_reward(ensemble, doubt=0.5), rewards.true_reward
    found = rewards.weighted([one, true], (2.0, -3.0))(answers).item()
    expected = 2 * (heads.mean() - 0.5 * heads.std(correction=0)) - 3 * reviews.true_reward(answers[0].text)
    assert found == pytest.approx(expected.item(), abs=1e-5)
    with pytest.raises(UserError, match="no finite numbers"):
        rewards.weighted([lambda answers: torch.tensor([float("nan")])], (1.0,))(answers)


def test_too_few_pairs_that_end_are_an_error_that_says_what_to_do(policy):
    with pytest.raises(UserError, match=r"only \d+ of 30 pairs of answers end: raise --max-new-tokens"):
        collect(
            *policy, training_prompts("", 30, "x"), rewards.true_reward, noise=0.0, **SETTING | {"max_new_tokens": 2}
        )


def test_prompts_come_from_the_file_or_the_task(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(30)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert set(training_prompts(str(tmp_path / "pairs.jsonl"), 5, "s")) < {row["prompt"] for row in rows}
    rng = random.Random("s")
    assert training_prompts("", 5, "s") == [reviews.sample_prompt(rng) for _ in range(5)]


def test_the_policy_of_a_reward_model_is_found_by_its_folder(sft_folder, tmp_path):
    assert rewards.made_from("") == "" and rewards.made_from(str(tmp_path)) == ""
    (tmp_path / "config.json").write_text(json.dumps({"flags": {"init": sft_folder}}))
    assert rewards.made_from(str(tmp_path)) == sft_folder
