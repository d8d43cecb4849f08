"""train_rm.py as its users meet it: what it learns, what it saves, killed and resumed, and fed with nonsense."""

import gzip
import json
import random
import signal
import time
from pathlib import Path

import by_hand
import pytest
from helpers import Fork, flags, lines, refused, results, two_processes

import train_rm
from nanopref import models
from nanopref.data import reviews

SMALL = {"prompts": 96, "batch_size": 16, "micro_batch": 4, "eval_prompts": 32, "eval_every": 2, "save_seconds": 0.0}
SMALL |= {"epochs": 2, "device": "cpu", "max_new_tokens": 48}


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> dict:
    """Flags of a run on answers of a tiny model to the built-in task, which differ and end, whatever they say."""
    return SMALL | {"init": by_hand.tiny_model(tmp_path_factory.mktemp("init") / "init"), "max_new_tokens": 24}


@pytest.fixture(scope="module")
def left_alone(started, tmp_path_factory) -> Path:
    """A small run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("rm")
    Fork(folder / "log", "train_rm.py", *flags(out=folder / "run", **started)).succeed()
    return folder / "run"


def test_the_run_folder_holds_what_a_reader_expects(left_alone):
    names = {path.name for path in left_alone.iterdir()}
    assert {"config.json", "metrics.jsonl", "report.json", "report.png", "model", "state", "feedback.jsonl"} <= names
    _, report = results(left_alone)
    assert {"accuracy", "loss", "best_accuracy", "groups"} <= report["held_out"].keys()
    assert {"calibration", "rank_correlation", "length", "score_shift", "score_scale"} <= report.keys()
    assert sum(row["pairs"] for row in report["calibration"]) == report["held_out"]["groups"]


def test_it_learns_what_people_reward(sft_folder, tmp_path, no_picture):
    """Without noise, from few pairs that differ much: better than chance by far, on pairs it has not seen."""
    rng = random.Random(0)
    prompts = [reviews.sample_prompt(rng) for _ in range(220)]
    rows = []
    for x in prompts:
        worst, *_, best = sorted((reviews.sample_response(rng, x) for _ in range(6)), key=reviews.true_reward)
        rows.append({"prompt": x, "chosen": best, "rejected": worst})
    settings = SMALL | {"data": by_hand.write(tmp_path / "pairs.jsonl", rows), "lr": 1e-3, "init": sft_folder}
    settings |= {"eval_every": 100, "save_seconds": 100, "micro_batch": 16, "eval_prompts": 2}
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
    settings = SMALL | {"data": by_hand.write(tmp_path / "texts.jsonl", rows), "lr": 1e-3, "init": sft_folder}
    settings |= {"eval_every": 99, "save_seconds": 99, "micro_batch": 16, "eval_prompts": 2, "epochs": 1}
    train_rm.train(train_rm.Config(out=str(tmp_path / "rm"), **settings))
    _, report = results(tmp_path / "rm")
    assert report["held_out"]["groups"] >= 16 and report["held_out"]["accuracy"] > 0.75


def small_run(folder: Path, rows: list[dict], **settings) -> dict:
    """The report of a short run of a tiny model on a file."""
    data, init = by_hand.write(folder / "pairs.jsonl", rows), by_hand.tiny_model(folder / "init")
    settings = SMALL | {"epochs": 1, "max_new_tokens": 4} | settings
    train_rm.train(train_rm.Config(out=str(folder / "rm"), data=data, init=init, **settings))
    return results(folder / "rm")[1]


def test_scores_that_are_all_alike_are_not_blown_up(tmp_path, no_picture):
    """One training prompt: the one response of the reference has no spread."""
    rows = [{"prompt": f"film {i}", "chosen": " good", "rejected": " bad"} for i in range(2)]
    assert small_run(tmp_path, rows)["score_scale"] == [1.0]


def test_several_heads_differ_and_say_how_much(tmp_path, capsys, no_picture):
    rows = [{"prompt": f"film {i}", "chosen": f" good {i}", "rejected": " bad"} for i in range(40)]
    report = small_run(tmp_path, rows, heads=3)
    assert models.load_scalar(tmp_path / "rm")[0].heads == 3
    assert report["doubt"] > 0.01 and "doubt" in capsys.readouterr().out


def test_killed_and_resumed_it_ends_the_same(started, left_alone, tmp_path):
    words = flags(out=tmp_path / "run", resume=True, **started)
    metrics, moments = tmp_path / "run" / "metrics.jsonl", random.Random(0)
    for kill in range(3):
        script = Fork(tmp_path / "log", "train_rm.py", *words)
        while script.is_alive() and (not metrics.exists() or metrics.read_text().count("\n") < 4 * kill + 1):
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.03))
        assert script.kill() in (-signal.SIGKILL, 0)
    Fork(tmp_path / "log", "train_rm.py", *words).succeed()
    assert results(tmp_path / "run") == results(left_alone)


def test_two_processes_give_the_losses_of_one(started, left_alone, tmp_path):
    for script in two_processes(tmp_path, "train_rm.py", *flags(out=tmp_path / "run", **started)):
        script.succeed()
    one, two = results(left_alone)[0], results(tmp_path / "run")[0]
    assert one[0] == pytest.approx(two[0], rel=1e-4, abs=1e-5)
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-2, abs=1e-3)  # float32 sums in another order, through 10 steps of Muon


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"heads": 0}, "--heads must be at least 1"),
        ({"heads": 65}, "--heads must be at most 64"),
        ({"eval_prompts": 1}, "--eval-prompts must be at least 2"),
        ({"margin": float("nan")}, "--margin must be a finite number"),
        ({"margin": -0.5}, "--margin must be at least 0"),
        ({"annotators": 4}, "must be odd"),
        ({"loss": "kto"}, "--loss must be one of bradley-terry, plackett-luce, regression, binary, infonca, nca"),
        ({"loss": "regression", "feedback": "pairs"}, "--feedback pairs: --loss regression learns from ratings"),
        ({"loss": "binary", "margin": 1.0}, "--loss binary has no use for --margin"),
        ({"answers": 1}, "--answers 1 make no pairs"),
        ({"lr": 0.0}, "--lr must be above 0"),
        ({"prompts": 3}, "--prompts must be at least 20"),
        ({"data": "nowhere.jsonl"}, "no such file"),
        ({"init": "out/nowhere"}, "no model folder there"),
    ],
)
def test_bad_flags_are_refused(settings, message, tmp_path, capsys):
    refused(train_rm.train, train_rm.Config(out=str(tmp_path / "out"), **settings), message, capsys)


@pytest.mark.parametrize("margin", [[-1], "2", True, 1e300, float("nan")])
def test_a_margin_that_is_no_number_is_refused(margin, tmp_path, capsys):
    (tmp_path / "pairs.jsonl").write_bytes(lines({"prompt": "a", "chosen": "b", "rejected": "c", "margin": margin}))
    config = train_rm.Config(out=str(tmp_path / "out"), data=str(tmp_path / "pairs.jsonl"))
    refused(train_rm.train, config, "line 1: 'margin' must be a number", capsys)


@pytest.mark.parametrize(
    "row, loss, message",
    [
        ({"responses": ["a", "b", "c"]}, "bradley-terry", "rankings: use --loss plackett-luce"),
        ({"responses": ["a", "b"], "scores": [1, 2]}, "bradley-terry", "ratings: use --loss regression or infonca"),
        ({"completion": "a", "label": 1}, "plackett-luce", "needs good and bad answers (label 1 and 0)"),
        ({"completion": "a", "label": 1}, "regression", "labels: use --loss binary"),
        ({"chosen": "a", "rejected": "b"}, "regression", "pairs: use --loss bradley-terry"),
        ({"completion": "a"}, "binary", "responses: they do not say which answer is better"),
        ({}, "bradley-terry", "prompts: they do not say which answer is better"),
    ],
)
def test_a_file_of_the_wrong_kind_is_refused(row, loss, message, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_bytes(lines(*({"prompt": x, **row} for x in "pq")))
    config = train_rm.Config(out=str(tmp_path / "out"), data=str(tmp_path / "rows.jsonl"), loss=loss)
    refused(train_rm.train, config, message, capsys)


def test_a_reward_model_is_no_policy(tmp_path, capsys):
    judge = by_hand.tiny_judge(tmp_path / "rm", by_hand.tiny_model(tmp_path / "init"), heads=1)
    config = train_rm.Config(out=str(tmp_path / "out"), init=judge)
    refused(train_rm.train, config, "a reward model or a critic, which writes no text", capsys)


def test_real_human_preferences_train_a_reward_model(real_data, tmp_path, no_picture):
    """A few steps on HH, from nothing."""
    rows = gzip.open(real_data / "hh_harmless.jsonl.gz", "rb").read().splitlines(keepends=True)[:40]
    (tmp_path / "hh.jsonl").write_bytes(b"".join(rows))
    settings = SMALL | {"data": str(tmp_path / "hh.jsonl"), "epochs": 1, "max_new_tokens": 4, "sft_steps": 1}
    train_rm.train(train_rm.Config(out=str(tmp_path / "rm"), **settings | {"eval_prompts": 4, "eval_every": 99}))
    report = json.loads((tmp_path / "rm" / "report.json").read_text())
    assert 0 <= report["held_out"]["accuracy"] <= 1 and "best_accuracy" not in report["held_out"]
    assert {"sft", "reward model"} <= report["seconds"].keys()
