"""Groups of different sizes in one batch: rankings of two, three and four answers, and of one, which says nothing."""

import random
import signal
import time

import by_hand
import pytest
import torch
from helpers import Fork, beginning, flags, results, two_processes

import train_dpo
from nanopref import models
from nanopref.data.formats import read_feedback
from nanopref.data.groups import Group, encode, micro_batches
from nanopref.learning import objectives
from nanopref.models.inference import reference_logprobs
from nanopref.running import parallel

SETTINGS = {"loss": "plackett-luce", "beta": 0.3, "batch_size": 7, "micro_batch": 3, "epochs": 3, "eval_every": 2}
SETTINGS |= {"lr": 1e-2, "warmup": 0, "max_new_tokens": 4, "eval_prompts": 2, "device": "cpu", "save_seconds": 0.0}


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> dict:
    """Flags of a run on rankings of two (which are pairs), three and four answers."""
    folder, rng = tmp_path_factory.mktemp("mixed"), random.Random(0)
    rows = [
        {"prompt": f"{i}{by_hand.text(rng, 1, 6)}", "responses": [by_hand.text(rng, 1, 6) + f" {j}" for j in range(k)]}
        for i, k in enumerate([2, 3, 4] * 14)
    ]
    data, init = by_hand.write(folder / "rankings.jsonl", rows), by_hand.tiny_model(folder / "init")
    return SETTINGS | {"data": data, "init": init}


@pytest.fixture(scope="module")
def left_alone(started, tmp_path_factory):
    folder = tmp_path_factory.mktemp("left alone")
    Fork(folder / "log", "train_dpo.py", *flags(out=folder / "run", **started)).succeed()
    return results(folder / "run")


def test_it_trains(left_alone):
    rows, report = left_alone
    assert len(rows) == 3 * 38 // 7 and rows[-1]["loss"] < rows[0]["loss"]
    # at π_ref every order is as likely: log K! of each group, of which there are two, three or four answers
    assert 0.69 < rows[0]["loss"] < 3.18 and rows[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert report["held_out"]["loss"] == rows[-1]["held_out_loss"]


def test_killed_and_resumed_it_ends_the_same(started, left_alone, tmp_path):
    words = flags(out=tmp_path / "run", resume=True, **started)
    metrics, moments = tmp_path / "run" / "metrics.jsonl", random.Random(0)
    for kill in range(3):
        script = Fork(tmp_path / "log", "train_dpo.py", *words)
        while script.is_alive() and (not metrics.exists() or metrics.read_text().count("\n") < 4 * kill + 1):
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.03))
        assert script.kill() in (-signal.SIGKILL, 0)
    Fork(tmp_path / "log", "train_dpo.py", *words).succeed()
    assert results(tmp_path / "run") == left_alone


def first_and_held_out(rows: list[dict]) -> list[dict]:
    """The first step's figures (but what rounding decides where π_θ is π_ref), and the looks at the held-out part."""
    looks = [{k: v for k, v in row.items() if k.startswith("held_out")} for row in rows]
    return [rows[0] | {"accuracy": 0.5}, *looks]


@pytest.mark.parametrize("size", [1, 7])
def test_micro_batches_change_nothing(size, started, left_alone, tmp_path, no_picture):
    train_dpo.train(train_dpo.Config(out=str(tmp_path / "run"), **started | {"micro_batch": size}))
    rows, _ = results(tmp_path / "run")
    for a, b in zip(first_and_held_out(rows), first_and_held_out(left_alone[0]), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def test_two_processes_change_nothing(started, left_alone, tmp_path):
    for script in two_processes(tmp_path, "train_dpo.py", *flags(out=tmp_path / "run", **started)):
        script.succeed()
    rows, _ = results(tmp_path / "run")
    for a, b in zip(first_and_held_out(rows), first_and_held_out(left_alone[0]), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def test_two_processes_count_from_the_same_reference_point(started, tmp_path, monkeypatch, no_picture):
    """KTO's z₀ is of the whole batch, whichever process had the answers, and however they were cut."""
    rng, points, ordinary = random.Random(2), [], train_dpo.reference_point
    rows = [{"prompt": f"{i}{by_hand.text(rng, 1, 6)}", "label": rng.random() < 0.6} for i in range(42)]
    rows = [row | {"completion": by_hand.text(rng, 1, 6)} for row in rows]
    settings = started | {"data": by_hand.write(tmp_path / "labels.jsonl", rows), "loss": "kto", "epochs": 1}
    both = two_processes(tmp_path, "train_dpo.py", *flags(out=tmp_path / "two", **settings))
    monkeypatch.setattr(train_dpo, "reference_point", lambda *args: points.append(ordinary(*args)) or points[-1])
    train_dpo.train(train_dpo.Config(out=str(tmp_path / "one"), **settings | {"micro_batch": 1}))
    for script in both:
        script.succeed()
    (one, _), (two, _) = results(tmp_path / "one"), results(tmp_path / "two")
    assert len(one) == 5 and sum(z0.item() > 0.01 for z0 in points) > 3
    one[0]["accuracy"] = two[0]["accuracy"]  # where π_θ is π_ref rounding decides
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


def test_groups_of_one_two_and_four_sum_to_the_same_losses_however_they_are_cut(started, monkeypatch):
    """Micro-batches of one, three and all, and the shares of two processes: losses, figures and gradients."""
    policy, tokenizer = models.load(started["init"])
    rng = random.Random(1)
    groups = [
        Group(by_hand.text(rng, 1, 5), tuple(by_hand.text(rng, 1, 8) for _ in range(k))) for k in [1, 2, 4, 2, 1, 4, 4]
    ]
    data, _ = encode(groups, tokenizer, 48)
    assert (data.margins != 0).sum() == 7
    reference = -10 + torch.randn(18, generator=torch.Generator().manual_seed(0))

    def whole(size: int, share: bool = False) -> torch.Tensor:
        config = train_dpo.Config(loss="plackett-luce", beta=0.3)
        config = objectives.resolve(config, objectives.OBJECTIVES["plackett-luce"])
        part, knobs = train_dpo.Part(data, reference), objectives.knobs(config, groups)
        totals, losses = torch.zeros(7), torch.zeros(7)
        policy.zero_grad()
        for rank in range(2 if share else 1):
            monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
            monkeypatch.setattr(parallel, "world_size", lambda: 2 if share else 1)
            for piece in micro_batches(range(7), data.lengths(), size, share=True):
                found, sums = train_dpo.preference_losses(policy, part, torch.zeros(()), piece, config, knobs)
                assert (losses[piece] == 0).all()
                losses[piece] = found.detach()
                totals += sums
                (found.sum() / 7).backward()
        assert totals[0].item() == pytest.approx(losses.sum().item(), rel=1e-5)
        return torch.cat([losses, totals, *(p.grad.flatten() for p in policy.parameters() if p.grad is not None)])

    expected = by_the_formula(policy, tokenizer, groups, reference)
    for found in (whole(7), whole(3), whole(1), whole(3, share=True), whole(7, share=True)):
        torch.testing.assert_close(found[:7], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found, whole(7), rtol=1e-3, atol=1e-5)


def by_the_formula(policy, tokenizer, groups: list[Group], reference: torch.Tensor) -> torch.Tensor:
    """-log Π_k softmax(rewards from k on)_k of each group [G]; 0 for a group of one."""
    losses, row = [], 0
    for group in groups:
        answers = [[*tokenizer.encode(text), tokenizer.end_of_text] for text in group.responses]
        with torch.no_grad():
            said = torch.stack([by_hand.logprob(policy, tokenizer.encode(group.prompt), y) for y in answers])
        r = 0.3 * (said - reference[row : row + len(answers)])
        losses.append(-sum(r[k:].log_softmax(0)[0] for k in range(len(r))))
        row += len(answers)
    return torch.stack(losses)


def test_reference_rows_belong_to_their_answers_where_groups_differ(started, tmp_path):
    """Each row's log π_ref is that of its own prompt and answer, in the order in which they stand."""
    policy, tokenizer = models.load(started["init"])
    groups, held_out, _ = read_feedback(started["data"], objectives.kinds(objectives.OBJECTIVES), "plackett-luce")
    parts = [encode(part, tokenizer, 48)[0] for part in (groups, held_out)]
    found = reference_logprobs(beginning(tmp_path / "run"), policy, *parts)
    for part, data, logprobs in zip((groups, held_out), parts, found, strict=True):
        assert len(logprobs) == len(data.row_lengths)
        rows = [(group.prompt, response) for group in part for response in group.responses]
        for (prompt, response), said in zip(rows, logprobs, strict=True):
            with torch.no_grad():
                y = [*tokenizer.encode(response), tokenizer.end_of_text]
                assert said.item() == pytest.approx(
                    by_hand.logprob(policy, tokenizer.encode(prompt), y).item(), abs=1e-4
                )
