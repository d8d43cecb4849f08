"""Four steps of train_dpo.py recomputed by hand, every flag off its default: figures, held-out figures and weights."""

import json
import random

import by_hand
import pytest
import torch
import torch.nn.functional as F

import train_dpo
from nanopref import models
from nanopref.data.groups import Group, unrelated
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


def kto(r, good: bool, worth: dict[bool, float]):
    """λ_y - v (Ethayarajh et al. 2024, eq. 7)."""
    return worth[good] - worth[good] * torch.sigmoid(r[0] if good else -r[0])


def ranked_right(r, good: bool = True) -> float:
    """Of pairs of answers, or of a label, K = 1."""
    if len(r) == 1:
        return float(r[0] > 0) if good else float(r[0] < 0)
    pairs = [(r[i], r[j]) for i in range(len(r)) for j in range(i + 1, len(r))]
    return sum((a > b) + 0.5 * (a == b) for a, b in pairs).item() / len(pairs)


@pytest.mark.parametrize(
    "loss, optimizer",
    [(sigmoid, "muon"), (sigmoid, "adamw"), (hinge, "adamw"), (ipo, "muon"), (plackett_luce, "muon"), (kto, "adamw")],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_four_steps_of_dpo_are_those_by_hand(loss, optimizer, tmp_path, no_picture):
    rng = random.Random(2 if loss is kto else 1)  # with which z₀ is sometimes 0
    rows = []
    for i in range(30):  # the last prompt is longer than the context
        prompt = by_hand.text(rng, 1, 9) if i < 29 else by_hand.text(rng, 60, 60)
        size = 1 if loss is kto else rng.choice([2, 3, 4]) if loss is plackett_luce else 2
        rows.append({"prompt": prompt, "responses": [by_hand.text(rng, 1, 9) for _ in range(size)]})
        if loss is kto:  # two good ones to a bad one, and two answers to one of the prompts
            rows[-1] |= {"completion": rows[-1].pop("responses")[0], "label": i % 3 > 0}
    if loss is kto:
        rows.append(rows[0] | {"completion": by_hand.text(rng, 1, 9), "label": True})
    data = by_hand.write(tmp_path / "rows.jsonl", rows)
    init = by_hand.tiny_model(tmp_path / "init")
    name = loss.__name__.replace("_", "-")
    more = {
        "loss": name,
        "label_smoothing": SMOOTHING if loss is sigmoid else 0.0,
        "device": "cpu",
        "init": init,
        "optimizer": optimizer,
    } | ({"good_weight": 1.3} if loss is kto else {})
    train_dpo.train(train_dpo.Config(out=str(tmp_path / "out"), data=data, **FLAGS, **more))

    policy, tokenizer = by_hand.in_float64(init)
    reference, _ = by_hand.in_float64(init)

    def log_ratios(row):
        texts = row["responses"] if "responses" in row else [row["completion"]]
        answers = [[*tokenizer.encode(text), tokenizer.end_of_text] for text in texts]
        x, room = tokenizer.encode(row["prompt"]), 48 - max(map(len, answers))
        x = x[-room:]
        with torch.no_grad():
            baseline = torch.stack([by_hand.logprob(reference, x, y) for y in answers])
        return torch.stack([by_hand.logprob(policy, x, y) for y in answers]) - baseline

    @torch.no_grad()
    def reference_point(rows, chosen) -> float:
        """KTO's z₀ of a batch: with the answers to other prompts."""
        if loss is not kto:
            return 0.0
        strangers = unrelated([Group(row["prompt"], (row["completion"],)) for row in rows])
        found = [log_ratios({"prompt": strangers[i].prompt, "responses": strangers[i].responses}) for i in chosen]
        return max(0.0, torch.cat(found).mean().item())

    def rewards(rows, chosen) -> list:
        z0 = reference_point(rows, chosen)
        points.append(z0)
        return [BETA * (log_ratios(rows[i]) - z0) for i in chosen]

    def means(found, rows) -> tuple[float, float, float, float]:
        """Loss, accuracy, and the reward of the best and of the worst, or of the good and of the bad."""
        losses, right, best, worst = [], [], [], []
        for r, row in zip(found, rows, strict=True):
            label = (row["label"],) if loss is kto else ()
            losses.append(loss(r, *label, worth) if loss is kto else loss(r))
            right.append(ranked_right(r, *label))
            best += [r[0]] if label != (False,) else []
            worst += [r[-1]] if label != (True,) else []
        return torch.stack(losses).mean(), sum(right) / len(right), *(sum(x) / max(1, len(x)) for x in (best, worst))

    training, held_out = by_hand.split(rows)
    n_good, points = sum(row.get("label", False) for row in training), []
    worth = {True: 1.3, False: n_good / (len(training) - n_good)}  # the bad are rarer: together they weigh as much
    steps, size = 2 * len(training) // 13, 13
    assert steps == 4 and len(held_out) == 3
    descend, expected, beyond = by_hand.optimizer(optimizer, policy, 0.9, 0.99, decay=0.3), [], 0
    for step, batch in batches(len(training), size, steps, seed=3):
        found = rewards(training, batch)
        mean, accuracy, best, worst = means(found, [training[i] for i in batch])
        mean.backward()
        parameters, lr = list(policy.parameters()), 0.02 * by_hand.triangle(step, steps, 2)
        figures = {"loss": mean.item(), "accuracy": accuracy, "margin": (best - worst).item()}
        figures |= {"chosen_reward": best.item(), "rejected_reward": worst.item()}
        figures |= {"grad_norm": by_hand.clip(parameters, 0.2), "lr": lr}
        assert figures["grad_norm"] > 0.2
        descend.step(parameters, lr)
        beyond += sum((r[0] - r[-1] > 1).item() for r in found)
        if step in (1, 3):
            with torch.no_grad():
                mean, accuracy, best, worst = means(rewards(held_out, range(len(held_out))), held_out)
            figures |= {"held_out_loss": mean.item(), "held_out_accuracy": accuracy}
            if loss is not kto or {row["label"] for row in held_out} == {True, False}:  # else there is no margin
                figures["held_out_margin"] = float(best - worst)
        expected.append(figures)
    found = by_hand.metrics(tmp_path / "out")
    found[0]["accuracy"] = expected[0]["accuracy"]  # where π_θ is π_ref rounding decides
    by_hand.same_figures(found, expected)
    by_hand.same_weights(models.load(tmp_path / "out")[0], policy, reference)
    assert beyond > 0 or loss is kto  # hinge has its kink there
    assert loss is not kto or (points[0] == 0 and sum(z0 > 0.01 for z0 in points) > 2 and worth[False] > 1.3)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["held_out"] == pytest.approx({k: expected[-1][f"held_out_{k}"] for k in report["held_out"]}, rel=1e-4)
    assert abs(report["kl"]) > 0.01  # to the model that it began with
    assert report["data"] == {"prompts cut on the left to fit the context": 1}
