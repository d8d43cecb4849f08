"""What a policy says while it learns."""

from dataclasses import dataclass

import by_hand
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanopref import models
from nanopref.evaluation.samples import columns, one_line, samples_table, watch
from nanopref.running.flags import RunFlags, SamplingFlags
from nanopref.running.folder import Run

PROMPTS = ["The film", "is", "x " * 200, "and never asked"]  # the third is longer than the context


@dataclass
class Config(SamplingFlags, RunFlags):
    pass


@pytest.fixture
def watched(tmp_path):
    """A run, and a policy with its tokenizer, of which nothing has been learnt."""
    policy, tokenizer = models.load(by_hand.tiny_model(tmp_path / "model"))
    run = Run(Config(out=str(tmp_path / "run"), max_new_tokens=8))
    run.begin()
    return run, policy, tokenizer


def move(policy) -> None:
    """As if it had learnt."""
    with torch.no_grad():
        policy.wte.weight.add_(torch.randn(policy.wte.weight.shape, generator=torch.Generator().manual_seed(1)))


def test_answers_change_only_where_the_policy_does(watched, capsys):
    run, policy, tokenizer = watched
    show_samples = watch(run, policy, tokenizer, PROMPTS)
    run._step = 4
    show_samples()
    rows = run.logs.rows("samples.jsonl")
    assert [(row["step"], row["prompt"]) for row in rows] == [(5, prompt) for prompt in PROMPTS[:3]]
    assert all(row["policy"] == row["reference"] for row in rows) and rows[0]["policy"]
    move(policy)
    run._step = 9
    show_samples()
    assert run.logs.rows("samples.jsonl")[:3] == rows
    later = run.logs.rows("samples.jsonl")[3:]
    assert [row["reference"] for row in later] == [row["reference"] for row in rows]
    assert all(row["policy"] != row["reference"] and row["step"] == 10 for row in later)
    said = capsys.readouterr().out
    assert "after 5 steps" in said and "after 10 steps" in said and "The film" in said and "asked" not in said


def test_the_random_numbers_of_training_and_dropout_are_left_alone(watched):
    run, policy, tokenizer = watched
    policy.train()
    before = torch.get_rng_state()
    watch(run, policy, tokenizer, PROMPTS)()
    assert torch.equal(before, torch.get_rng_state()) and policy.training


def test_a_policy_without_a_reference_is_shown_alone(watched, capsys):
    run, policy, tokenizer = watched
    watch(run, policy, tokenizer, ["", "x"], max_new_tokens=3, beside_first=False)()
    assert [row.keys() for row in run.logs.rows("samples.jsonl")] == [{"step", "prompt", "policy"}] * 2
    assert "│" not in capsys.readouterr().out


@given(st.lists(st.text(max_size=400), min_size=1, max_size=2), st.integers(50, 120))
def test_columns_stay_within_the_width_and_three_lines(texts, width):
    lines = columns(texts, width)
    assert 1 <= len(lines) <= 3 and all(len(line) <= width for line in lines)
    assert all(c.isprintable() for line in lines for c in line)
    for text in texts:
        assert one_line(text)[:10].strip() in " ".join(lines)


def test_a_watcher_sees_prompts_and_answers_side_by_side(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    rows = [
        {"step": 40, "prompt": "A film.", "reference": "It is dull.", "policy": "It is a delight.\n\nGo and see it!"},
        {"step": 40, "prompt": "first " * 20 + "last", "reference": "", "policy": "so " * 80},
    ]
    assert samples_table(rows).split("\n") == [
        "  before                      │ after 40 steps",
        "A film.",
        "  It is dull.                 │ It is a delight. Go and see",
        "                              │ it!",
        "…" + ("first " * 20 + "last")[-59:],
        "  (empty)                     │ so so so so so so so so so",
        "                              │ so so so so so so so so so",
        "                              │ so so so so so so so so …",
    ]
