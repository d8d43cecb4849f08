"""Four steps of train_rm.py recomputed by hand, every flag off its default: figures, held-out figures and weights."""

import json
import random

import by_hand
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_rm
from nanopref import models
from nanopref.evaluation.metrics import rank_correlation
from nanopref.models.sampling import respond
from nanopref.models.scalar import ScalarModel
from nanopref.running import parallel
from nanopref.running.optim import batches

FLAGS = {"heads": 3, "lr": 0.02, "warmup": 2, "weight_decay": 0.3, "grad_clip": 0.2, "batch_size": 13}
FLAGS |= {"micro_batch": 5, "epochs": 2, "eval_every": 2, "seed": 3, "max_new_tokens": 6, "eval_prompts": 9}
FLAGS |= {"sample_batch": 4, "device": "cpu"}


def tie_counts_half(gap) -> float:
    return ((gap > 0) + 0.5 * (gap == 0)).item()


# ---- objectives on the scores [K, heads] of a row's answers, each head by itself -------------------------------------


def bradley_terry(scores, row, margin=0.7):
    return -F.logsigmoid(scores[0] - scores[1] - margin * row.get("margin", 1.0))


def plackett_luce(scores, row):
    return -sum(scores[k:].log_softmax(0)[0] for k in range(len(scores)))


def regression(scores, row):
    return ((scores - torch.tensor(row["ratings"])[:, None]) ** 2).mean(0)


def binary(scores, row):
    return -row["weight"] * F.logsigmoid(scores[0] if row["label"] else -scores[0])


def row_of(loss, rng: random.Random, i: int) -> dict:
    """A row of the file that this loss learns from; the last prompt is longer than the context."""
    prompt = by_hand.text(rng, 1, 9) if i < 29 else by_hand.text(rng, 60, 60)
    answers = [by_hand.text(rng, 1, 9) for _ in range(2 if loss is bradley_terry else rng.choice([2, 3, 4]))]
    if loss is bradley_terry:
        return {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]} | ({"margin": i % 3} if i % 2 else {})
    if loss is binary:
        return {"prompt": prompt, "response": answers[0], "label": i % 3 > 0}
    scores = [rng.gauss(3, 2) for _ in answers]
    return {"prompt": prompt, "responses": answers} | ({"scores": scores} if loss is regression else {})


def understood(rows: list[dict], training: list[dict]) -> list[dict]:
    """With the answers by one name, the best first; ratings on a scale of 0 and 1, and the weights of labels."""
    every = [score for row in training for score in row.get("scores", ())]
    good, found = sum(row.get("label", False) for row in training), []
    for row in rows:
        texts = row.get("responses") or [row.get("response") or row.get("chosen"), row.get("rejected")]
        row = row | {"answers": [text for text in texts if text]}
        if every:
            order = sorted(range(len(texts)), key=lambda k: -row["scores"][k])
            row["answers"] = [texts[k] for k in order]
            row["ratings"] = [(row["scores"][k] - np.mean(every)) / np.std(every) for k in order]
        if "label" in row:  # the rarer weighs as much in all
            row["weight"] = 1.0 if row["label"] else good / (len(training) - good)
        found.append(row)
    return found


def gaps_of(scores, row) -> list:
    """Of each pair, the better one's lead; of a label, how far its score is on the right side."""
    if "label" in row:
        return [scores[0] if row["label"] else -scores[0]]
    return [scores[i] - scores[j] for i in range(len(scores)) for j in range(i + 1, len(scores))]


# ---- four steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss, optimizer",
    [(bradley_terry, "muon"), (bradley_terry, "adamw"), (plackett_luce, "muon"), (regression, "adamw"),
     (binary, "adamw")],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)  # fmt: skip
def test_four_steps_of_a_reward_model_are_those_by_hand(loss, optimizer, tmp_path, no_picture):
    rng = random.Random(1)
    rows = [row_of(loss, rng, i) for i in range(30)]
    data, init = by_hand.write(tmp_path / "rows.jsonl", rows), by_hand.tiny_model(tmp_path / "init")
    more = {"loss": loss.__name__.replace("_", "-"), "optimizer": optimizer}
    more |= {"margin": 0.7} if loss is bradley_terry else {}
    train_rm.train(train_rm.Config(out=str(tmp_path / "out"), data=data, init=init, **FLAGS, **more))

    training, held_out = (understood(part, by_hand.split(rows)[0]) for part in by_hand.split(rows))
    size, steps, n = 13, 2 * len(training) // 13, len(training)
    assert steps == 4 and len(held_out) == 3
    torch.manual_seed(3)
    model = ScalarModel(models.load(init)[0], 3).double()  # with the heads that the seed draws
    start = ScalarModel(models.load(init)[0], 3).double()
    start.load_state_dict(model.state_dict())
    transformer, tokenizer = model.transformer, models.load(init)[1]
    counts = torch.poisson(torch.ones(n, 3), parallel.generator(3, "heads"))
    assert counts.unique().tolist()[:3] == [0, 1, 2]

    def said(x, y):
        """What each head says at the last token."""
        return transformer.hidden(torch.tensor([x + y]))[0, -1] @ model.score.weight.T

    def scores(row):
        answers = [[*tokenizer.encode(text), tokenizer.end_of_text] for text in row["answers"]]
        x = tokenizer.encode(row["prompt"])[-(48 - max(map(len, answers))) :]
        return torch.stack([said(x, y) for y in answers])

    def right(found, rows) -> float:
        """Of the mean score: the share of each group's pairs, or of the labels."""
        each = [gaps_of(one.mean(1), row) for one, row in zip(found, rows, strict=True)]
        return sum(sum(map(tie_counts_half, gaps)) / len(gaps) for gaps in each) / len(rows)

    def lead(found, rows) -> float:
        """Of the best over the worst of a group, or of the good over the bad."""
        best = [one[0].mean() for one, row in zip(found, rows, strict=True) if row.get("label", True)]
        worst = [one[-1].mean() for one, row in zip(found, rows, strict=True) if not row.get("label", False)]
        return (sum(best) / len(best) - sum(worst) / len(worst)).item()

    descend, expected = by_hand.optimizer(optimizer, transformer, 0.9, 0.99, decay=0.3), []
    for step, batch in batches(n, size, steps, seed=3):
        chosen = [training[i] for i in batch]
        found = [scores(row) for row in chosen]  # of each [K, heads]
        losses = torch.stack(list(map(loss, found, chosen))) * counts[batch]
        losses.mean().backward()
        parameters, lr = list(model.parameters()), 0.02 * by_hand.triangle(step, steps, 2)
        figures = {"loss": losses.mean().item(), "accuracy": right(found, chosen)}
        figures |= {"score_gap": lead(found, chosen), "grad_norm": by_hand.clip(parameters, 0.2), "lr": lr}
        assert figures["grad_norm"] > 0.2
        descend.step(parameters, lr)
        if step in (1, 3):
            with torch.no_grad():
                found, without = [scores(row) for row in held_out], {"margin": 0.0} if loss is bradley_terry else {}
            losses = [loss(one.mean(1, keepdim=True), row, **without) for one, row in zip(found, held_out, strict=True)]
            figures["held_out_loss"] = torch.stack(losses).mean().item()
            figures["held_out_accuracy"] = right(found, held_out)
        expected.append(figures)
    by_hand.same_figures(by_hand.metrics(tmp_path / "out"), expected)

    # the scale: mean 0 for each head, and deviation 1 for their mean, on responses of the reference
    reference, found = models.load(init)[0], models.load_scalar(tmp_path / "out")[0]
    prompts = [row["prompt"] for row in training][:9]
    options = {"max_new_tokens": 6, "seed": 3, "batch_size": 4}
    baseline = respond(reference, tokenizer, prompts, stream="reference", **options)
    with torch.no_grad():
        theirs = torch.stack([found(torch.tensor([a.prompt + a.tokens]))[0, -1] for a in baseline])
        mine = torch.stack([said(a.prompt, a.tokens) for a in baseline])
        shift, scale = mine.mean(0), mine.mean(1).std(correction=0)
        torch.testing.assert_close(theirs.double(), (mine - shift) / scale, rtol=0, atol=1e-4)
        model.score.weight /= scale
        truth = [(scores(row) * scale - shift) / scale for row in held_out]  # of each [K, heads]
    # where the loss is of differences the last bias moves by rounding alone
    by_hand.same_weights(found, model, start, free="transformer.ln_f.bias")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    check_report(report, expected[-1], truth, shift, scale, held_out, tokenizer)


def check_report(report: dict, last: dict, scores: list, shift, scale, rows: list[dict], tokenizer) -> None:
    """Against the rescaled scores of each held-out row [K, heads]."""
    assert report["score_scale"] == pytest.approx([scale.item()] * 3, rel=1e-4)
    wanted = {"accuracy": last["held_out_accuracy"], "loss": last["held_out_loss"], "groups": len(rows)}
    assert report["held_out"] == pytest.approx(wanted, rel=2e-5)
    flat = torch.cat(scores)  # chosen, rejected, chosen …
    lengths = [len(tokenizer.encode(text)) + 1 for row in rows for text in row["answers"]]
    slope = np.polyfit(lengths, flat.mean(1).numpy(), 1)[0]
    assert report["length"]["score_per_token"] == pytest.approx(slope, rel=1e-3)
    assert report["doubt"] == pytest.approx(flat.std(1, correction=0).mean().item(), rel=1e-4)
    if "ratings" in rows[0]:
        ratings = [rating for row in rows for rating in row["ratings"]]
        assert report["rating_correlation"] == rank_correlation(ratings, flat.mean(1)) and "calibration" not in report
        return
    before = [one.mean(1) * scale + shift.mean() for one in scores]  # as sure as it was before the scale
    gaps = sorted((gap.item() for one, row in zip(before, rows, strict=True) for gap in gaps_of(one, row)), key=abs)
    parts = np.array_split(np.array(gaps), min(10, len(gaps)))
    for found, part in zip(report["calibration"], parts, strict=True):
        says, right = (1 / (1 + np.exp(-abs(part)))).mean(), ((part > 0) + 0.5 * (part == 0)).mean()
        assert found == {"says": pytest.approx(says, rel=1e-4), "right": right, "pairs": len(part)}
