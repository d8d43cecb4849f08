"""The figures of a report against their definitions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopref import evaluate
from nanopref.model import GPT, GPTConfig, ScalarGPT, load_pretrained


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_response_logprobs_are_those_of_one_row_at_a_time(temperature):
    torch.manual_seed(0)
    model = GPT(GPTConfig(50, 24, 2, 2, 16, dropout=0.5))
    rows = [
        (torch.randint(50, (x,)).tolist(), torch.randint(50, (y,)).tolist())
        for x, y in [(3, 5), (1, 1), (10, 14), (2, 9), (6, 1)]
    ]
    got = evaluate.response_logprobs(model, rows, batch_size=2, temperature=temperature)
    assert model.training  # dropout is back on
    model.eval()
    for (x, y), value in zip(rows, got, strict=True):
        logp = (model(torch.tensor([x + y])) / temperature).log_softmax(-1)[0]
        assert value == pytest.approx(sum(logp[len(x) - 1 + i, t].item() for i, t in enumerate(y)), abs=1e-4)


def test_scores_are_what_the_last_token_says():
    torch.manual_seed(0)
    model = ScalarGPT(GPT(GPTConfig(50, 24, 2, 2, 16, dropout=0.5)), 2)
    rows = [(torch.randint(50, (x,)).tolist(), torch.randint(50, (y,)).tolist()) for x, y in [(3, 5), (1, 1), (9, 14)]]
    got = evaluate.response_scores(model, rows, batch_size=2)
    assert model.training
    model.eval()
    for (x, y), scores in zip(rows, got, strict=True):
        torch.testing.assert_close(scores, model(torch.tensor([x + y]))[0, -1], atol=1e-5, rtol=1e-5)


rewards = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=60)


@given(rewards)
def test_win_rate_is_symmetric_counts_ties_half_and_lies_in_its_interval(pairs):
    policy, reference = zip(*pairs, strict=True)
    rate, (low, high) = evaluate.win_rate(policy, reference)
    assert rate == pytest.approx(sum((p > r) + 0.5 * (p == r) for p, r in pairs) / len(pairs))
    other, (_, other_high) = evaluate.win_rate(reference, policy)
    assert rate + other == pytest.approx(1) and low == pytest.approx(1 - other_high)
    assert 0 <= low <= rate + 1e-9 and rate <= high + 1e-9 and high <= 1 + 1e-9


def test_wilsons_interval_is_the_published_one():
    # Newcombe 1998, table I: 81 of 263 has the 95% Wilson interval 0.2553 to 0.3662
    rate, (low, high) = evaluate.win_rate([1] * 81 + [0] * 182, [0] * 81 + [1] * 182)
    assert (rate, low, high) == pytest.approx((81 / 263, 0.2553, 0.3662), abs=5e-5)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        wins = rng.random(200) < 0.9
        _, (low, high) = evaluate.win_rate(wins, ~wins)
        covered += low <= 0.9 <= high
    assert 0.93 < covered / 2000 < 0.97


def test_compare_measures_the_kl_of_two_models_that_can_be_enumerated(sft_folder):
    """One new token: KL(π_θ, π_ref) can be summed over the vocabulary. A model has none to itself."""
    policy, tokenizer = load_pretrained(sft_folder)
    reference, _ = load_pretrained(sft_folder)
    with torch.no_grad():
        policy.ln_f.weight *= 0.5
    prompts = [f"The film {i}" for i in range(400)]
    report, rows = evaluate.compare(policy, reference, tokenizer, prompts, 1, 0, true_reward=len)
    exact = 0.0
    for prompt in prompts:
        tokens = torch.tensor([tokenizer.encode(prompt)])
        with torch.no_grad():
            p, q = (model(tokens)[0, -1].double().log_softmax(-1) for model in (policy, reference))
        exact += (p.exp() * (p - q)).sum().item() / len(prompts)
    assert exact > 0.05 and abs(report["kl"] - exact) < 4 * report["kl_standard_error"] < exact
    assert report["response_length"] == {"policy": 1.0, "reference": 1.0}
    assert report["true_reward"]["policy"] == np.mean([len(row["policy"]) for row in rows])
    assert report["true_reward"]["reference_std"] == np.std([len(row["reference"]) for row in rows])
    same, _ = evaluate.compare(reference, reference, tokenizer, prompts[:20], 4, 0)
    assert same["kl"] == 0 and "true_reward" not in same and "win_rate" not in same


def test_a_score_says_who_wins_where_there_is_no_true_reward(sft_folder):
    policy, tokenizer = load_pretrained(sft_folder)
    prompts = [f"The film {i}" for i in range(30)]
    scores = []

    def score(rows):
        scores.append([float(sum(response)) for _, response in rows])
        return scores[-1]

    report, _ = evaluate.compare(policy, policy, tokenizer, prompts, 8, 0, score=score)
    wins = [(p > r) + 0.5 * (p == r) for p, r in zip(*scores, strict=True)]
    assert report["win_rate"] == np.mean(wins) and "win rate by score" in evaluate.comparison_table(report)
    both, _ = evaluate.compare(policy, policy, tokenizer, prompts, 8, 0, score=score, true_reward=lambda text: 0.0)
    assert both["win_rate"] == 0.5 and "win rate by true reward" in evaluate.comparison_table(both)


@settings(deadline=None)
@given(st.text(max_size=300), st.text(max_size=300), st.integers(30, 120))
def test_side_by_side_shows_any_two_answers_within_the_width(left, right, width):
    text = evaluate.side_by_side({"prompt": "x", "reference": left, "policy": right}, width)
    assert all(len(line) <= width for line in text.split("\n")) and "│" in text.split("\n")[1]
    for word in left.split()[:1]:
        assert word[:10] in text


def test_a_table_lines_up():
    lines = evaluate.table([("a", "1"), ("long name", "12.5")], ("", "value")).split("\n")
    assert len({len(line) for line in lines}) == 1 and lines[3].endswith("12.5")


def test_a_picture_with_one_point_and_no_spread_is_drawn(tmp_path):
    panels = [
        evaluate.curves([{"step": 1, "loss": 1.0}], {"loss": "training", "held_out_loss": "held out"}, "loss"),
        evaluate.histograms({"before": [0.0, 0.0], "after": [0.0]}, "reward", "reward"),
    ]
    evaluate.plot(panels, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
