"""Four steps of train_dpo.py recomputed by hand, every flag off its default: figures, held-out figures and weights."""

import json
import random

import by_hand
import pytest
import torch
import torch.nn.functional as F

import train_dpo
from nanopref import models
from nanopref.running.optim import batches

BETA, SMOOTHING = 0.3, 0.15
FLAGS = {"beta": BETA, "lr": 0.02, "warmup": 2, "weight_decay": 0.3, "grad_clip": 0.2, "batch_size": 13}
FLAGS |= {"micro_batch": 5, "epochs": 2, "eval_every": 2, "seed": 3, "max_new_tokens": 4, "eval_prompts": 2}


def sigmoid(r):
    return -(1 - SMOOTHING) * F.logsigmoid(r[0] - r[1]) - SMOOTHING * F.logsigmoid(r[1] - r[0])


def hinge(r):
    return (1 - (r[0] - r[1])).clamp(min=0)


def ipo(r):
    return ((r[0] - r[1]) / BETA - 1 / (2 * BETA)) ** 2


def plackett_luce(r):
    return -sum(r[k:].log_softmax(0)[0] for k in range(len(r)))


def ranked_right(r) -> float:
    pairs = [(r[i], r[j]) for i in range(len(r)) for j in range(i + 1, len(r))]
    return sum((a > b) + 0.5 * (a == b) for a, b in pairs).item() / len(pairs)


@pytest.mark.parametrize(
    "loss, optimizer",
    [(sigmoid, "muon"), (sigmoid, "adamw"), (hinge, "adamw"), (ipo, "muon"), (plackett_luce, "muon")],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_four_steps_of_dpo_are_those_by_hand(loss, optimizer, tmp_path, no_picture):
    rng = random.Random(1)
    rows = []
    for i in range(30):  # the last prompt is longer than the context
        prompt = by_hand.text(rng, 1, 9) if i < 29 else by_hand.text(rng, 60, 60)
        size = rng.choice([2, 3, 4]) if loss is plackett_luce else 2
        rows.append({"prompt": prompt, "responses": [by_hand.text(rng, 1, 9) for _ in range(size)]})
    data = by_hand.write(tmp_path / "rows.jsonl", rows)
    init = by_hand.tiny_model(tmp_path / "init")
    name = loss.__name__.replace("_", "-")
    more = {
        "loss": name,
        "label_smoothing": SMOOTHING if loss is sigmoid else 0.0,
        "device": "cpu",
        "init": init,
        "optimizer": optimizer,
    }
    train_dpo.train(train_dpo.Config(out=str(tmp_path / "out"), data=data, **FLAGS, **more))

    policy, tokenizer = by_hand.in_float64(init)
    reference, _ = by_hand.in_float64(init)

    def rewards(row):
        answers = [[*tokenizer.encode(text), tokenizer.end_of_text] for text in row["responses"]]
        x, room = tokenizer.encode(row["prompt"]), 48 - max(map(len, answers))
        x = x[-room:]
        with torch.no_grad():
            baseline = torch.stack([by_hand.logprob(reference, x, y) for y in answers])
        return BETA * (torch.stack([by_hand.logprob(policy, x, y) for y in answers]) - baseline)

    training, held_out = by_hand.split(rows)
    steps, size = 2 * len(training) // 13, 13
    assert steps == 4 and len(held_out) == 3
    descend, expected, beyond = by_hand.optimizer(optimizer, policy, 0.9, 0.99, decay=0.3), [], 0
    for step, batch in batches(len(training), size, steps, seed=3):
        found = [rewards(training[i]) for i in batch]
        losses = torch.stack([loss(r) for r in found])
        losses.mean().backward()
        parameters, lr = list(policy.parameters()), 0.02 * by_hand.triangle(step, steps, 2)
        figures = {"loss": losses.mean().item(), "accuracy": sum(map(ranked_right, found)) / size}
        figures |= {"chosen_reward": sum(r[0] for r in found).item() / size}
        figures |= {"rejected_reward": sum(r[-1] for r in found).item() / size}
        figures |= {"margin": figures["chosen_reward"] - figures["rejected_reward"]}
        figures |= {"grad_norm": by_hand.clip(parameters, 0.2), "lr": lr}
        assert figures["grad_norm"] > 0.2
        descend.step(parameters, lr)
        beyond += sum((r[0] - r[1] > 1).item() for r in found)
        if step in (1, 3):
            with torch.no_grad():
                found = [rewards(row) for row in held_out]
            figures["held_out_loss"] = sum(loss(r) for r in found).item() / 3
            figures["held_out_accuracy"] = sum(map(ranked_right, found)) / 3
            figures["held_out_margin"] = sum(r[0] - r[-1] for r in found).item() / 3
        expected.append(figures)
    found = by_hand.metrics(tmp_path / "out")
    found[0]["accuracy"] = expected[0]["accuracy"]  # where π_θ is π_ref rounding decides
    by_hand.same_figures(found, expected)
    by_hand.same_weights(models.load(tmp_path / "out")[0], policy, reference)
    assert beyond > 0  # hinge has its kink there
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["held_out"] == pytest.approx({k: expected[-1][f"held_out_{k}"] for k in report["held_out"]}, rel=1e-4)
    assert abs(report["kl"]) > 0.01  # to the model that it began with
    assert report["data"] == {"prompts cut on the left to fit the context": 1}
