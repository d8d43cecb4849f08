"""Four steps of SFT recomputed by hand, every flag off its default: figures, held-out figures and weights."""

import copy
import json
import math
import random

import by_hand
import pytest
import torch

from nanopref import models, sft
from nanopref.models.gpt2 import GPT, GPTConfig
from nanopref.running.optim import batches

FLAGS = {"lr": 0.02, "warmup": 2, "weight_decay": 0.3, "grad_clip": 0.2, "micro_batch": 2, "eval_every": 2, "steps": 4}
FLAGS |= {"seed": 3, "device": "cpu"}


def by_steps(model: GPT, training: list, held_out: list, size: int, optimizer: str) -> list[dict]:
    """Train on rows (x, y) with FLAGS; what should have been logged."""
    descend, expected = by_hand.optimizer(optimizer, model, 0.9, 0.95, decay=0.3), []
    lengths = [len(x) + len(y) for x, y in training]
    for step, batch in batches(len(training), size, 4, seed=3, lengths=lengths):
        count = sum(len(training[i][1]) for i in batch)
        loss = -sum(by_hand.logprob(model, *training[i]) for i in batch) / count
        loss.backward()
        parameters, lr = list(model.parameters()), 0.02 * by_hand.triangle(step, 4, 2)
        figures = {"loss": loss.item(), "grad_norm": by_hand.clip(parameters, 0.2), "lr": lr}
        assert figures["grad_norm"] > 0.2
        descend.step(parameters, lr)
        if step in (1, 3):
            with torch.no_grad():
                total = -sum(by_hand.logprob(model, x, y).item() for x, y in held_out)
            figures["held_out_loss"] = total / sum(len(y) for _, y in held_out)
        expected.append(figures)
    return expected


def test_four_steps_from_a_model_on_responses_are_those_by_hand(tmp_path, no_picture):
    """Only the tokens of responses count, a mean over those of the whole batch."""
    rng = random.Random(1)
    rows = [{"prompt": by_hand.text(rng, 1, 9), "response": by_hand.text(rng, 1, 20)} for _ in range(30)]
    rows[0]["prompt"] = by_hand.text(rng, 60, 60)  # longer than the context, which the flag makes shorter
    data, init = by_hand.write(tmp_path / "rows.jsonl", rows), by_hand.tiny_model(tmp_path / "init")
    more = {"batch_size": 7, "block_size": 24, "optimizer": "adamw"}
    sft.train(sft.Config(out=str(tmp_path / "out"), data=data, init=init, **more, **FLAGS))

    model, tokenizer = by_hand.in_float64(init)
    start = copy.deepcopy(model)

    def encoded(row):
        y = [*tokenizer.encode(row["response"]), tokenizer.end_of_text]
        return tokenizer.encode(row["prompt"])[-(24 - len(y)) :], y

    training, held_out = ([encoded(row) for row in part] for part in by_hand.split(rows))
    expected = by_steps(model, training, held_out, 7, "adamw")
    by_hand.same_figures(by_hand.metrics(tmp_path / "out"), expected)
    by_hand.same_weights(models.load(tmp_path / "out")[0], model, start)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["held_out_loss"] == pytest.approx(expected[-1]["held_out_loss"], rel=2e-5)
    assert report["perplexity"] == pytest.approx(math.exp(expected[-1]["held_out_loss"]), rel=1e-4)


def test_four_steps_from_nothing_on_texts_are_those_by_hand(tmp_path, no_picture):
    """Texts are one stream that is cut into blocks, in which all but the first token count."""
    rng = random.Random(1)
    rows = [{"text": by_hand.text(rng, 5, 30)} for _ in range(30)]
    data = by_hand.write(tmp_path / "rows.jsonl", rows)
    more = {"vocab_size": 300, "block_size": 24, "preset": "tiny", "batch_size": 5, "optimizer": "muon"}
    sft.train(sft.Config(out=str(tmp_path / "out"), data=data, **more, **FLAGS))

    tokenizer = models.load(tmp_path / "out")[1]
    assert tokenizer.vocab_size == 300
    torch.manual_seed(3)
    start = GPT(GPTConfig(300, 24, 4, 4, 128)).double()
    model = copy.deepcopy(start)
    parts = []
    for part in by_hand.split(rows, "text"):
        stream = [token for row in part for token in [*tokenizer.encode(row["text"]), tokenizer.end_of_text]]
        blocks = [stream[i : i + 24] for i in range(0, len(stream) - 1, 23)]
        parts.append([(block[:1], block[1:]) for block in blocks])
    expected = by_steps(model, *parts, 5, "muon")
    by_hand.same_figures(by_hand.metrics(tmp_path / "out"), expected)
    by_hand.same_weights(models.load(tmp_path / "out")[0], model, start)


def test_dropout_is_in_training_and_nowhere_else(tmp_path, no_picture):
    """At weights that do not move, the held-out loss is that by hand, and the training loss is another."""
    rng = random.Random(1)
    rows = [{"prompt": by_hand.text(rng, 1, 9), "response": by_hand.text(rng, 1, 20)} for _ in range(30)]
    data, init = by_hand.write(tmp_path / "rows.jsonl", rows), by_hand.tiny_model(tmp_path / "init")
    more = {"lr": 1e-12, "dropout": 0.5, "steps": 1, "batch_size": 27, "weight_decay": 0.0, "optimizer": "adamw"}
    sft.train(sft.Config(out=str(tmp_path / "out"), data=data, init=init, **FLAGS | more))
    model, tokenizer = by_hand.in_float64(init)
    parts = []
    for part in by_hand.split(rows):
        encoded = [
            (tokenizer.encode(r["prompt"]), [*tokenizer.encode(r["response"]), tokenizer.end_of_text]) for r in part
        ]
        with torch.no_grad():
            total = sum(by_hand.logprob(model, x, y).item() for x, y in encoded)
        parts.append(-total / sum(len(y) for _, y in encoded))
    (row,) = by_hand.metrics(tmp_path / "out")
    assert row["held_out_loss"] == pytest.approx(parts[1], rel=1e-5)
    assert abs(row["loss"] - parts[0]) > 0.01
