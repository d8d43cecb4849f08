"""Supervised fine-tuning: what it starts from, killed and resumed, on several processes, and what it refuses."""

import gzip
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import by_hand
import pytest
from helpers import ROOT, Fork, flags, refused, results, two_processes

from nanopref import models, sft


def test_it_learns_and_reports(sft_folder):
    rows = by_hand.metrics(sft_folder)
    assert rows[0]["loss"] == pytest.approx(math.log(1024), rel=0.05)  # from nothing: uniform over the vocabulary
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    report = json.loads((Path(sft_folder) / "report.json").read_text())
    assert report["perplexity"] == pytest.approx(math.exp(rows[-1]["held_out_loss"]))
    assert (Path(sft_folder) / "report.png").exists() and len(report["samples"]) == 3
    assert models.load(sft_folder)[0].config.from_scratch


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict:
    """Flags of a short run of a tiny model on texts, with dropout, which draws from the state that is saved."""
    folder = tmp_path_factory.mktemp("tiny")
    rng = random.Random(0)
    data = by_hand.write(folder / "text.jsonl", [{"text": by_hand.text(rng, 20, 40)} for _ in range(30)])
    settings = {"data": data, "init": by_hand.tiny_model(folder / "init"), "batch_size": 4, "micro_batch": 2}
    return settings | {"device": "cpu", "save_seconds": 0.0, "eval_every": 5, "lr": 1e-2, "warmup": 2, "dropout": 0.2}


def test_texts_train_and_the_same_seed_gives_the_same_numbers(tiny, tmp_path, no_picture):
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        sft.train(sft.Config(out=str(tmp_path / name), seed=seed, steps=12, **tiny | {"dropout": 0.0}))
        found.append(by_hand.metrics(tmp_path / name))
    assert found[0] == found[1] != found[2]
    assert found[0][-1]["held_out_loss"] < found[0][4]["held_out_loss"] < found[0][0]["loss"]


def test_killed_and_resumed_it_ends_the_same(tiny, tmp_path):
    Fork(tmp_path / "log", "nanopref.sft", *flags(out=tmp_path / "left alone", steps=60, **tiny)).succeed()
    words = flags(out=tmp_path / "run", resume=True, steps=60, **tiny)
    metrics, moments = tmp_path / "run" / "metrics.jsonl", random.Random(0)
    for kill in range(3):
        script = Fork(tmp_path / "log", "nanopref.sft", *words)
        while script.is_alive() and (not metrics.exists() or metrics.read_text().count("\n") < 15 * kill + 1):
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.05))
        assert script.kill() == -signal.SIGKILL
    Fork(tmp_path / "log", "nanopref.sft", *words).succeed()
    assert results(tmp_path / "run") == results(tmp_path / "left alone")


def test_two_processes_give_the_losses_of_one(tiny, tmp_path, no_picture):
    settings = tiny | {"dropout": 0.0, "batch_size": 5}
    for script in two_processes(tmp_path, "nanopref.sft", *flags(out=tmp_path / "two", steps=5, **settings)):
        script.succeed()
    sft.train(sft.Config(out=str(tmp_path / "one"), steps=5, **settings))
    for a, b in zip(results(tmp_path / "one")[0], results(tmp_path / "two")[0], strict=True):
        assert a == pytest.approx(b, rel=1e-3)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"preset": "huge"}, "--preset must be one of nano"),
        ({"steps": 0}, "--steps must be at least 1"),
        ({"vocab_size": 100}, "--vocab-size must be at least 257"),
        ({"dropout": 1.0}, "--dropout must be below 1"),
        ({"optimizer": "sgd"}, "--optimizer must be one of muon, adamw"),
        ({"optimizer": "adafactor", "parallel": "fsdp"}, "--optimizer adafactor: rows and columns of a weight need"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"init": "./nowhere"}, "no model folder there"),
        ({"init": "./nowhere", "vocab_size": 300}, "for a model that starts from nothing"),
    ],
)
def test_bad_input_is_refused_and_nothing_written(settings, message, tmp_path, capsys):
    refused(sft.train, sft.Config(out=str(tmp_path / "out"), device="cpu", **settings), message, capsys)


def test_a_block_beyond_the_context_is_refused(tiny, tmp_path, capsys):
    config = sft.Config(out=str(tmp_path / "out"), block_size=49, **tiny)
    refused(sft.train, config, "--block-size 49 is more than the context", capsys)


def test_a_file_of_empty_texts_is_refused(tmp_path, capsys):
    data = by_hand.write(tmp_path / "text.jsonl", [{"text": " "}])
    refused(sft.train, sft.Config(out=str(tmp_path / "out"), data=data), "holds no text", capsys)


def test_real_prose_trains_from_the_command_line(real_data, tmp_path):
    with gzip.open(real_data / "movie_reviews.jsonl.gz") as f, (tmp_path / "reviews.jsonl").open("wb") as out:
        out.writelines(line for line, _ in zip(f, range(20), strict=False))
    words = flags(
        data=tmp_path / "reviews.jsonl", out=tmp_path / "out", steps=2, batch_size=4, vocab_size=300, block_size=64,
        device="cpu",
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "nanopref.sft", *words], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "held-out loss" in done.stdout and done.stderr == ""  # quiet where there is no terminal
