"""The experiments with a chat model, on one that knows nothing: their figures by hand, and what they refuse."""

import json
import random

import by_hand
import numpy as np
import pytest
import torch
from helpers import stopped

from nanopref.data import formats
from nanopref.evaluation.metrics import wilson
from nanopref.experiments import asks, revisions
from nanopref.feedback import asking

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
PRINCIPLES = "".join(
    f'[[rule]]\nname = "{x}"\nprinciple = "Be {x}."\nweight = {w}\n' for x, w in (("kind", 2), ("new", 1))
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("asked")
    by_hand.tiny_model(folder / "judge", 512, seed=3)
    (folder / "judge" / "chat_template.jinja").write_text(TEMPLATE)
    by_hand.tiny_model(folder / "init")
    rng = random.Random(0)
    answers = [(by_hand.text(rng, 1, 3), by_hand.text(rng, 3, 5)) for _ in range(30)]
    rows = [{"prompt": f"the film {i}", "chosen": a, "rejected": b} for i, (a, b) in enumerate(answers)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.jsonl").write_text('{"prompt": "the film"}\n{"prompt": "the plot"}\n')
    (folder / "rules.toml").write_text(PRINCIPLES)
    (folder / "tests.toml").write_text('[[rule]]\nname = "short"\nat_most_words = 3\n')
    return folder


def flags_of(folder, out, data="pairs.jsonl", **more) -> dict:
    return {"model": f"{folder}/judge", "data": f"{folder}/{data}", "out": str(out), "device": "cpu"} | more


def test_how_often_a_model_that_is_asked_agrees_with_people(folder, tmp_path, monkeypatch):
    """The model is replaced by one that says A at a log-odds of 1, to which it adds what it says of the two answers:
    the number of their words, and of the principle's letters."""

    def log_odds(self, words, cases, batch_size):
        def says(case):
            by = len(case["question"]) / 100
            return by * (len(case["a"].split()) - len(case["b"].split()))

        return torch.tensor([[1 + says(case), 1 - says(case)] for case in cases])

    monkeypatch.setattr(asking.Judge, "log_odds", log_odds)
    config = asks.Config(**flags_of(folder, tmp_path, pairs=20, rules=f"{folder}/rules.toml"))
    asks.main(config)
    found = json.loads((tmp_path / "results.json").read_text())
    groups = random.Random(0).sample(formats.read(config.data)[1], 20)
    gap = np.array([len(a.split()) - len(b.split()) for _, (a, b) in (group[:2] for group in groups)])
    letters = np.array([np.sign(len(a.strip()) - len(b.strip())) for _, (a, b) in (group[:2] for group in groups)])
    right = np.mean((gap > 0) + 0.5 * (gap == 0))
    assert 0 < right < 0.3 and 0 < np.mean(letters != np.sign(gap)) < 1
    for name in ("which is better", "kind", "new", "all principles"):
        assert found[name]["right"] == [right, 20]
        agrees = np.sign(gap) * letters
        assert found[name]["longer"][0] == np.mean(((agrees > 0) + 0.5 * (agrees == 0))[letters != 0])
    question = "Which answer follows this principle better? Be kind."
    by = len(question) / 100
    assert found["kind"]["says_a"] == [np.mean([1 + by * gap > 0, 1 - by * gap > 0]), 40]
    assert found["all principles"]["size"] == pytest.approx(np.abs(by * gap * 2 + (by - 0.01) * gap).mean())
    first = np.array([random.Random(f"order 0 {i}").random() < 0.5 for i in range(20)])
    assert 0 < first.sum() < 20 and found["kind"]["once"][0] == np.mean(
        np.where(first, 1 + by * gap > 0, 1 - by * gap < 0)
    )
    low, high = wilson(right, 20)
    assert f"| kind | {right:.1%} | {low:.1%} to {high:.1%} |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_revisions_are_a_file_to_learn_from(folder, tmp_path, capsys):
    config = flags_of(folder, tmp_path, "prompts.jsonl", rules=f"{folder}/rules.toml", max_new_tokens=60)
    revisions.main(revisions.Config(**config, temperature=1.0, seed=1))
    output = capsys.readouterr().out
    kind, groups, notes = formats.read(tmp_path / "revisions.jsonl")
    assert kind == "responses" and not notes and 1 <= len(groups) <= 2
    assert {group.prompt.messages for group in groups} <= {(("user", f"the {x}"),) for x in ("film", "plot")}
    assert "revisions of 2 drafts; the model itself finds" in output and "nanopref.sft --data" in output
    assert "critique: " in output


@pytest.mark.parametrize("experiment", [asks, revisions])
def test_what_cannot_be_asked_is_a_sentence(experiment, folder, tmp_path, capsys):
    base = flags_of(folder, tmp_path / "out")
    for change, message in {
        ("model", ""): "--model and --data: name a chat model",
        ("model", f"{folder}/init"): "has no chat template",
        ("data", f"{folder}/none.jsonl"): "no such file",
        ("rules", f"{folder}/tests.toml"): "has a test" if experiment is asks else "has no principle",
    }.items():
        assert message in stopped(experiment.main, experiment.Config(**base | dict([change])), capsys)
    if experiment is asks:
        base |= {"data": f"{folder}/prompts.jsonl"}
        assert "holds prompts and no pairs" in stopped(asks.main, asks.Config(**base), capsys)
    assert not (tmp_path / "out").exists()
