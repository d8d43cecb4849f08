"""train_rm.py as its users meet it: what it learns, what it saves, killed and resumed, and fed with nonsense."""

import gzip
import json
import math
import random
import time
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from helpers import Fork, finish, flags, lines, results, start, two_processes

import train_rm
from nanopref import data, evaluate, reviews, run
from nanopref.model import GPT, GPTConfig, ScalarGPT, load_pretrained, save_pretrained
from nanopref.run import UserError
from nanopref.tokenizer import Tokenizer

SMALL = {"pairs": 96, "batch_size": 16, "micro_batch": 4, "eval_prompts": 32, "eval_every": 2, "save_every": 2}
SMALL |= {"epochs": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def left_alone(sft_folder, tmp_path_factory) -> Path:
    """A small run that nobody disturbed."""
    out = tmp_path_factory.mktemp("rm") / "left alone"
    finish(start("train_rm.py", *flags(out=out, init=sft_folder, **SMALL)))
    return out


def test_the_run_folder_holds_what_a_reader_expects(left_alone):
    names = {path.name for path in left_alone.iterdir()}
    assert {"config.json", "metrics.jsonl", "report.json", "report.png", "model", "state.pt", "pairs.jsonl"} <= names
    _, report = results(left_alone)
    assert {"accuracy", "loss", "best_accuracy", "pairs"} <= report["held_out"].keys()
    assert {"calibration", "rank_correlation", "length", "score_shift", "score_scale"} <= report.keys()
    assert sum(row["pairs"] for row in report["calibration"]) == report["held_out"]["pairs"]


def test_the_first_loss_is_bradley_terry_by_hand(sft_folder, left_alone):
    """Before any step the model is SFT's with the head that seed 0 draws."""
    reference, tokenizer = load_pretrained(sft_folder)
    pairs, _ = data.split(data.read_pairs(left_alone / "pairs.jsonl")[0])
    torch.manual_seed(0)
    model = ScalarGPT(reference)

    def score(prompt, answer):
        tokens = [*tokenizer.encode(prompt), *tokenizer.encode(answer), tokenizer.end_of_text]
        return (reference.hidden(torch.tensor([tokens]))[0, -1] @ model.score.weight[0]).item()

    (_, rows), *_ = run.batches(len(pairs), SMALL["batch_size"], 1, 0)
    loss = 0.0
    for i in rows:
        x, y_w, y_l, *_ = pairs[i]
        loss += math.log1p(math.exp(score(x, y_l) - score(x, y_w))) / len(rows)
    assert results(left_alone)[0][0]["loss"] == pytest.approx(loss, abs=1e-5)


def test_scores_have_mean_0_and_deviation_1_on_the_references_responses(sft_folder, left_alone):
    model, tokenizer = load_pretrained(left_alone, kind=ScalarGPT)
    reference, _ = load_pretrained(sft_folder)
    pairs, _ = data.split(data.read_pairs(left_alone / "pairs.jsonl")[0])
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))[: SMALL["eval_prompts"]]
    rows = evaluate.respond(reference, tokenizer, prompts, 64, 0, "reference")
    scores = evaluate.response_scores(model, rows)
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_transformers_opens_it_and_gives_the_same_scores(left_alone):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2ForSequenceClassification.from_pretrained(left_alone / "model").eval()
    assert theirs.config.num_labels == 1
    model, tokenizer = load_pretrained(left_alone, kind=ScalarGPT)
    reader = transformers.AutoTokenizer.from_pretrained(left_alone / "model")
    pairs = data.read_pairs(left_alone / "pairs.jsonl")[0][:8]
    rows = [(tokenizer.encode(p.prompt), [*tokenizer.encode(p.chosen), tokenizer.end_of_text]) for p in pairs]
    ours = evaluate.response_scores(model, rows)[:, 0]
    padded = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(reader(p.prompt + p.chosen + reader.eos_token)["input_ids"]) for p in pairs],
        batch_first=True,
        padding_value=theirs.config.pad_token_id,
    )
    with torch.no_grad():
        torch.testing.assert_close(theirs(padded).logits[:, 0], ours, atol=1e-4, rtol=1e-4)


def test_rescaling_is_exact_for_several_heads():
    torch.manual_seed(0)
    model = ScalarGPT(GPT(GPTConfig(11, 8, 2, 2, 16)), 3)
    tokens = torch.randint(11, (4, 8))
    before, shift, scale = model(tokens), torch.tensor([1.0, -2.0, 30.0]), torch.tensor([2.0, 0.5, 4.0])
    model.rescale(shift, scale)
    torch.testing.assert_close(model(tokens), (before - shift) / scale, atol=1e-4, rtol=1e-4)


def test_it_learns_what_people_reward(sft_folder, tmp_path):
    """Without noise, from few pairs that differ much: better than chance by far, on pairs it has not seen."""
    rng = random.Random(0)
    prompts = [reviews.sample_prompt(rng) for _ in range(400)]
    rows = []
    for x in prompts:
        worst, *_, best = sorted((reviews.sample_response(rng, x) for _ in range(8)), key=reviews.true_reward)
        rows.append({"prompt": x, "chosen": best, "rejected": worst})
    (tmp_path / "pairs.jsonl").write_bytes(lines(*rows))
    settings = SMALL | {"data": str(tmp_path / "pairs.jsonl"), "lr": 1e-3, "init": sft_folder, "micro_batch": 16}
    settings |= {"eval_every": 100, "save_every": 100}
    train_rm.train(train_rm.Config(out=str(tmp_path / "rm"), **settings))
    _, report = results(tmp_path / "rm")
    assert report["held_out"]["accuracy"] > 0.75
    assert "rank_correlation" not in report  # the file's true reward is not ours to know


def test_it_learns_from_texts_with_labels(sft_folder, tmp_path, no_picture):
    """Texts of good reviews and of bad ones: passages it has not seen are told apart."""
    rng = random.Random(0)
    rows = []
    for good in [True, False] * 50:
        answers = [reviews.sample_response(rng, reviews.sample_prompt(rng)) for _ in range(40)]
        answers.sort(key=reviews.true_reward, reverse=good)
        rows.append({"text": " ".join(answers[:10]), "label": int(good)})
    (tmp_path / "texts.jsonl").write_bytes(lines(*rows))
    settings = SMALL | {"data": str(tmp_path / "texts.jsonl"), "lr": 1e-3, "init": sft_folder, "micro_batch": 16}
    settings |= {"eval_every": 99, "save_every": 99}
    train_rm.train(train_rm.Config(out=str(tmp_path / "rm"), **settings))
    _, report = results(tmp_path / "rm")
    assert report["held_out"]["pairs"] >= 16 and report["held_out"]["accuracy"] > 0.75


def test_scores_that_are_all_alike_are_not_blown_up(sft_folder, tmp_path):
    """One training prompt and few tokens: the reference's responses may all score the same."""
    rows = [{"prompt": f"film {i}", "chosen": " good", "rejected": " bad"} for i in range(2)]
    (tmp_path / "pairs.jsonl").write_bytes(lines(*rows))
    settings = SMALL | {"data": str(tmp_path / "pairs.jsonl"), "init": sft_folder, "epochs": 1, "max_new_tokens": 4}
    train_rm.train(train_rm.Config(out=str(tmp_path / "rm"), **settings))
    _, report = results(tmp_path / "rm")
    assert report["score_scale"] == [1.0]


def test_several_heads_differ_and_say_how_much(sft_folder, tmp_path, capsys):
    train_rm.train(train_rm.Config(out=str(tmp_path / "rm"), init=sft_folder, heads=3, **SMALL | {"epochs": 1}))
    model, _ = load_pretrained(tmp_path / "rm", kind=ScalarGPT)
    assert len(model.score.weight) == 3
    _, report = results(tmp_path / "rm")
    assert report["doubt"] > 0.01 and "doubt" in capsys.readouterr().out


def test_a_margin_is_asked_for(sft_folder, tmp_path, no_picture):
    """The first loss, at equal weights, is that of r_w - r_l - m."""
    rows = [{"prompt": f"film {i}", "chosen": f" good {i}", "rejected": " bad", "margin": i % 3} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_bytes(lines(*rows))
    settings = SMALL | {"data": str(tmp_path / "pairs.jsonl"), "init": sft_folder, "epochs": 1, "batch_size": 64}
    first = {}
    for margin in (0.0, 2.0):
        train_rm.train(train_rm.Config(out=str(tmp_path / f"rm {margin}"), margin=margin, **settings))
        first[margin] = results(tmp_path / f"rm {margin}")[0][0]
    pairs, _ = data.split(data.read_pairs(tmp_path / "pairs.jsonl")[0])
    torch.manual_seed(0)
    reference, tokenizer = load_pretrained(sft_folder)
    model = ScalarGPT(reference)
    encoded, _ = data.encode_pairs(pairs, tokenizer, reference.config.block_size)
    with torch.no_grad():
        chosen, rejected = train_rm.pair_scores(model, encoded)
    for margin, found in first.items():
        asked = torch.tensor([margin * pair.margin for pair in pairs])
        expected = torch.log1p(torch.exp(-(chosen - rejected)[:, 0] + asked)).mean().item()
        assert found["loss"] == pytest.approx(expected, abs=1e-4)


def test_killed_and_resumed_it_ends_the_same(sft_folder, left_alone, tmp_path):
    words = flags(out=tmp_path / "run", init=sft_folder, resume=True, **SMALL)
    metrics, moments = tmp_path / "run" / "metrics.jsonl", random.Random(0)
    for kill in range(3):
        script = Fork(tmp_path / "log", "train_rm.py", *words)
        while script.is_alive() and (not metrics.exists() or metrics.read_text().count("\n") < 5 * kill + 1):
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.2))
        script.kill()
    Fork(tmp_path / "log", "train_rm.py", *words).succeed()
    assert results(tmp_path / "run") == results(left_alone)


def test_two_processes_give_the_losses_of_one(sft_folder, left_alone, tmp_path):
    for script in two_processes(tmp_path, "train_rm.py", *flags(out=tmp_path / "run", init=sft_folder, **SMALL)):
        script.succeed()
    one, two = results(left_alone)[0], results(tmp_path / "run")[0]
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-2, abs=1e-3)  # float32 sums in another order, through 12 steps of AdamW


# ---- figures of the report -------------------------------------------------------------------------------------------


def test_rank_correlation_by_hand():
    assert evaluate.rank_correlation([1, 2, 3, 4], [10, 20, 30, 1000]) == pytest.approx(1)
    assert evaluate.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # ranks 1, 2½, 2½, 4 against 1, 2, 3, 4: 4.5 / √(4.5 · 5)
    assert evaluate.rank_correlation([1, 5, 5, 7], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert evaluate.rank_correlation([1, 1, 1], [1, 2, 3]) == 0


def test_calibration_by_hand():
    gap = np.array([0.0, math.log(3), -math.log(3), math.log(9)])
    sure = evaluate.calibration(gap, bins=2)
    assert [row["pairs"] for row in sure] == [2, 2]
    assert sure[0]["says"] == pytest.approx((0.5 + 0.75) / 2) and sure[1]["says"] == pytest.approx((0.75 + 0.9) / 2)
    assert sorted(row["right"] for row in sure) == [0.5, 0.75]


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"heads": 0}, "--heads must be at least 1"),
        ({"heads": 65}, "--heads must be at most 64"),
        ({"eval_prompts": 1}, "--eval-prompts must be at least 2"),
        ({"margin": -1.0}, "--margin must be 0 or above"),
        ({"margin": float("nan")}, "--margin must be 0 or above"),
        ({"annotators": 4}, "must be odd"),
        ({"lr": 0.0}, "--lr must be above 0"),
        ({"pairs": 3}, "--pairs must be at least 20"),
        ({"data": "nowhere.jsonl"}, "no such file"),
        ({"init": "out/nowhere"}, "no model folder there"),
    ],
)
def test_bad_flags_are_refused(settings, message, tmp_path, capsys):
    helpers.refused(train_rm.train, train_rm.Config(out=str(tmp_path / "out"), **settings), message, capsys)


@pytest.mark.parametrize("margin", [-1, "2", True, 1e300, float("nan")])
def test_a_margin_that_is_no_number_is_refused(margin, tmp_path, capsys):
    (tmp_path / "pairs.jsonl").write_bytes(lines({"prompt": "a", "chosen": "b", "rejected": "c", "margin": margin}))
    config = train_rm.Config(out=str(tmp_path / "out"), data=str(tmp_path / "pairs.jsonl"))
    helpers.refused(train_rm.train, config, "line 1: 'margin' must be a number", capsys)


def test_a_reward_model_is_no_policy(left_alone, tmp_path, capsys):
    config = train_rm.Config(out=str(tmp_path / "out"), init=str(left_alone))
    helpers.refused(train_rm.train, config, "a reward model or a critic, which writes no text", capsys)


def test_a_head_that_does_not_fit_is_refused(tmp_path):
    tokenizer = Tokenizer.train(["some text to learn from"], 260)
    model = ScalarGPT(GPT(GPTConfig(tokenizer.vocab_size, 32, 1, 1, 8)))
    model.score.weight = torch.nn.Parameter(torch.zeros(1, 9))
    save_pretrained(model, tokenizer, tmp_path / "model")
    with pytest.raises(UserError, match=r"score.weight is \[1, 9\], not \[heads, 8\]"):
        load_pretrained(tmp_path / "model", kind=ScalarGPT)


def test_real_human_preferences_train_a_reward_model(real_data, sft_folder, tmp_path):
    """A few steps on HH, from nothing."""
    rows = gzip.open(real_data / "hh_harmless.jsonl.gz", "rb").read().splitlines(keepends=True)[:80]
    (tmp_path / "hh.jsonl").write_bytes(b"".join(rows))
    settings = SMALL | {"data": str(tmp_path / "hh.jsonl"), "epochs": 1, "max_new_tokens": 8, "sft_steps": 2}
    train_rm.train(train_rm.Config(out=str(tmp_path / "rm"), **settings))
    report = json.loads((tmp_path / "rm" / "report.json").read_text())
    assert 0 <= report["held_out"]["accuracy"] <= 1 and "best_accuracy" not in report["held_out"]
    assert {"sft", "reward model"} <= report["seconds"].keys()
