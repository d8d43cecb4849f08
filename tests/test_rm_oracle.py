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
from nanopref.generate import respond
from nanopref.models.scalar import ScalarModel
from nanopref.running import parallel
from nanopref.running.optim import batches

FLAGS = {"margin": 0.7, "heads": 3, "lr": 0.02, "warmup": 2, "weight_decay": 0.3, "grad_clip": 0.2, "batch_size": 13}
FLAGS |= {"micro_batch": 5, "epochs": 2, "eval_every": 2, "seed": 3, "max_new_tokens": 6, "eval_prompts": 9}
FLAGS |= {"sample_batch": 4, "device": "cpu"}


def tie_counts_half(gap) -> float:
    return ((gap > 0) + 0.5 * (gap == 0)).item()


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_four_steps_of_a_reward_model_are_those_by_hand(optimizer, tmp_path, no_picture):
    rng = random.Random(1)
    rows = []
    for i in range(30):  # the last prompt is longer than the context
        prompt = by_hand.text(rng, 1, 9) if i < 29 else by_hand.text(rng, 60, 60)
        rows.append({"prompt": prompt, "chosen": by_hand.text(rng, 1, 9), "rejected": by_hand.text(rng, 1, 9)})
        rows[i] |= {"margin": i % 3} if i % 2 else {}
    data, init = by_hand.write(tmp_path / "rows.jsonl", rows), by_hand.tiny_model(tmp_path / "init")
    train_rm.train(train_rm.Config(out=str(tmp_path / "out"), data=data, init=init, optimizer=optimizer, **FLAGS))

    training, held_out = by_hand.split(rows)
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
        chosen, rejected = ([*tokenizer.encode(row[k]), tokenizer.end_of_text] for k in ("chosen", "rejected"))
        x = tokenizer.encode(row["prompt"])[-(48 - max(len(chosen), len(rejected))) :]
        return torch.stack([said(x, chosen), said(x, rejected)])

    descend, expected = by_hand.optimizer(optimizer, transformer, 0.9, 0.99, decay=0.3), []
    for step, batch in batches(n, size, steps, seed=3):
        found = torch.stack([scores(training[i]) for i in batch])  # [13, 2, heads]
        margins = 0.7 * torch.tensor([training[i].get("margin", 1.0) for i in batch])[:, None]
        losses = -F.logsigmoid(found[:, 0] - found[:, 1] - margins) * counts[batch]
        losses.mean().backward()
        gaps = (found[:, 0] - found[:, 1]).mean(1)
        parameters, lr = list(model.parameters()), 0.02 * by_hand.triangle(step, steps, 2)
        figures = {"loss": losses.mean().item(), "accuracy": sum(map(tie_counts_half, gaps)) / size}
        figures |= {"score_gap": gaps.mean().item(), "grad_norm": by_hand.clip(parameters, 0.2), "lr": lr}
        assert figures["grad_norm"] > 0.2
        descend.step(parameters, lr)
        if step in (1, 3):
            with torch.no_grad():
                gaps = torch.stack([scores(row)[0] - scores(row)[1] for row in held_out]).mean(1)
            figures["held_out_loss"] = -F.logsigmoid(gaps).mean().item()
            figures["held_out_accuracy"] = sum(map(tie_counts_half, gaps)) / 3
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
        truth = (torch.stack([scores(row) for row in held_out]) * scale - shift) / scale  # [3, 2, heads]
    # the loss is of differences, and so the last bias, into which the shift goes, moves by rounding alone
    by_hand.same_weights(found, model, start, free="transformer.ln_f.bias")
    check_report(
        json.loads((tmp_path / "out" / "report.json").read_text()), expected[-1], truth, scale, held_out, tokenizer
    )


def check_report(report: dict, last: dict, scores: torch.Tensor, scale: float, rows: list[dict], tokenizer) -> None:
    """Against the rescaled scores [pairs, 2, heads] of the held-out rows."""
    assert report["score_scale"] == pytest.approx([scale.item()] * 3, rel=1e-4)
    wanted = {"accuracy": last["held_out_accuracy"], "loss": last["held_out_loss"], "pairs": len(rows)}
    assert report["held_out"] == pytest.approx(wanted, rel=2e-5)
    flat = scores.flatten(0, 1)  # chosen, rejected, chosen …
    lengths = [len(tokenizer.encode(row[name])) + 1 for row in rows for name in ("chosen", "rejected")]
    slope = np.polyfit(lengths, flat.mean(1).numpy(), 1)[0]
    assert report["length"]["score_per_token"] == pytest.approx(slope, rel=1e-3)
    assert report["doubt"] == pytest.approx(flat.std(1, correction=0).mean().item(), rel=1e-4)
    gaps = (scores[:, 0] - scores[:, 1]).mean(1) * scale  # as sure as it was before the scale
    for found, gap in zip(report["calibration"], sorted(gaps, key=abs), strict=True):
        says = gap.abs().sigmoid().item()
        assert found == {"says": pytest.approx(says, rel=1e-4), "right": tie_counts_half(gap), "pairs": 1}
