"""A policy beside its reference: the KL, who wins, and the command that says so."""

import re

import by_hand
import numpy as np
import pytest
import torch
from helpers import stopped

from nanopref import evaluate, models
from nanopref.data import reviews
from nanopref.evaluation.compare import compare
from nanopref.evaluation.report import comparison_table
from nanopref.feedback.rewards import Rewards, alone, true_reward
from nanopref.running import flags

PROMPTS = [f"The film {i}" for i in range(300)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return by_hand.tiny_model(tmp_path_factory.mktemp("init"))


def test_the_kl_is_that_of_two_models_that_can_be_enumerated(folder, monkeypatch):
    """One new token: KL(π_θ, π_ref) can be summed over the vocabulary. A model has none to itself."""
    monkeypatch.setattr(reviews, "true_reward", len)
    policy, tokenizer = models.load(folder)
    reference, _ = models.load(folder)
    with torch.no_grad():
        policy.ln_f.weight *= 0.3
    for temperature in (1.0, 0.5):
        options = {"max_new_tokens": 1, "seed": 0, "temperature": temperature, "sample_batch": 128}
        report, rows = compare(policy, reference, tokenizer, PROMPTS, true=True, **options)
        exact = 0.0
        for prompt in PROMPTS:
            tokens = torch.tensor([tokenizer.encode(prompt)])
            with torch.no_grad():
                last = [
                    model.hidden(tokens)[0, -1].double() @ model.wte.weight.double().T for model in (policy, reference)
                ]
            p, q = ((x / temperature).log_softmax(-1) for x in last)
            exact += (p.exp() * (p - q)).sum().item() / len(PROMPTS)
        assert exact > 0.05 and abs(report["kl"] - exact) < 4 * report["kl_standard_error"] < exact
        assert report["response_length"] == {"policy": 1.0, "reference": 1.0}
        assert report["true_reward"]["policy"] == np.mean([len(row["policy"]) for row in rows])
        assert report["true_reward"]["reference_std"] == pytest.approx(np.std([len(row["reference"]) for row in rows]))
    same, _ = compare(reference, reference, tokenizer, PROMPTS[:20], max_new_tokens=4, seed=0)
    assert same["kl"] == 0 and "true_reward" not in same and "win_rate" not in same


def test_a_score_says_who_wins_where_there_is_no_true_reward(folder):
    policy, tokenizer = models.load(folder)
    scores = []

    def score(answers):
        scores.append(torch.tensor([float(sum(answer.tokens)) for answer in answers]))
        return scores[-1]

    options = {"max_new_tokens": 8, "seed": 0, "score": alone(score, "sum")}
    report, _ = compare(policy, policy, tokenizer, PROMPTS[:30], **options)
    (both,) = scores  # all answers are judged in one call
    said = [x.tolist() for x in both.chunk(2)]
    wins = [(p > r) + 0.5 * (p == r) for p, r in zip(*said, strict=True)]
    assert report["win_rate"] == report["score"]["win_rate"] == np.mean(wins) and report["win_rate_by"] == "score"
    assert "win rate by score" in comparison_table(report) and "true reward" not in comparison_table(report)
    figures = {"policy": np.mean(said[0]), "reference": np.mean(said[1])}
    figures |= {"policy_std": np.std(said[0]), "reference_std": np.std(said[1])}
    assert {name: report["score"][name] for name in figures} == pytest.approx(figures)
    assert report["scores"] == {}  # one judge has no parts


@pytest.mark.parametrize("asked", [True, False])
def test_where_both_judge_the_one_that_was_asked_for_says_who_wins_and_both_are_reported(asked, folder, monkeypatch):
    """A reward that someone named speaks for itself; one that PPO made for itself may be gamed: the truth decides."""
    monkeypatch.setattr(reviews, "true_reward", lambda text: -len(text))
    policy, tokenizer = models.load(folder)
    reference, _ = models.load(folder)
    policy.ln_f.bias.data[0] = 0.5  # answers grow longer
    parts = {"length": lambda said: torch.tensor([float(len(answer.text)) for answer in said]), "true": true_reward}
    judge = Rewards(parts, torch.tensor([3.0, 2.0]), [])
    options = {"max_new_tokens": 16, "seed": 0, "score": judge, "true": True, "asked": asked}
    report, rows = compare(policy, reference, tokenizer, PROMPTS[:60], **options)
    lengths = {name: np.array([len(row[name]) for row in rows]) for name in ("policy", "reference")}
    for name, sign, judged in (("score", 1, 1.0), ("true_reward", -1, -1.0)):
        p, r = (judged * lengths[model] for model in ("policy", "reference"))
        assert report[name]["win_rate"] == pytest.approx(((p > r) + 0.5 * (p == r)).mean())
        assert (report[name]["win_rate"] - 0.5) * sign > 0.1
        assert report[name]["policy"] == pytest.approx(p.mean(), rel=1e-5)
        assert [row[f"policy_{name}"] for row in rows] == pytest.approx(p.tolist())
    headline, other = ("score", "true_reward") if asked else ("true_reward", "score")
    assert report["win_rate_by"] == headline and report["win_rate"] == report[headline]["win_rate"]
    table = comparison_table(report)
    assert table.index(headline.replace("_", " ")) < table.index(f"win rate by {other.replace('_', ' ')}")
    means = {model: lengths[model].mean() for model in lengths}
    assert report["scores"]["score length"] == pytest.approx(means)
    assert report["scores"]["score true"] == pytest.approx({model: -mean for model, mean in means.items()})


def test_the_command_compares_policies_and_lets_a_reward_model_judge(folder, tmp_path, capsys):
    judge, other = by_hand.tiny_judge(tmp_path / "rm", folder, heads=2), by_hand.tiny_model(tmp_path / "other", seed=5)
    words = ["--policy", folder, other, "--reference", folder, "--reward", judge, "--eval-prompts", "12"]
    flags.main(evaluate.main, evaluate.Config, [*words, "--max-new-tokens", "8", "--device", "cpu"])
    output = capsys.readouterr().out
    assert f"{folder} (after) against {folder} (before), 12 prompts" in output and f"{other} (after)" in output
    for figure in (
        "true reward",
        "score",
        "win rate by true reward",
        "KL to the reference, nats",
        "responses that end",
    ):
        assert output.count(figure) >= 2
    assert re.search(r"KL to the reference, nats +0 +0\.00 +± 0\.00", output)  # the first policy is the reference


def test_the_command_refuses_what_cannot_be_compared(folder, tmp_path, capsys):
    short = by_hand.tiny_model(tmp_path / "short", block_size=32)
    for policy, message in [((), "name at least one policy"), ((short,), "contexts of different length")]:
        config = evaluate.Config(policy=policy, reference=folder, eval_prompts=2, device="cpu")
        assert message in stopped(evaluate.main, config, capsys)
