"""Supervised fine-tuning: what counts, what it starts from, and what it refuses."""

import gzip
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanopref import data, run, sft
from nanopref.model import GPT, GPTConfig, load_pretrained, save_pretrained
from nanopref.tokenizer import Tokenizer

ROOT = Path(sft.__file__).parent.parent


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_reports(sft_folder):
    rows = rows_of(sft_folder)
    assert rows[0]["loss"] == pytest.approx(math.log(1024), rel=0.05)  # from nothing: uniform over the vocabulary
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    report = json.loads((Path(sft_folder) / "report.json").read_text())
    assert report["perplexity"] == pytest.approx(math.exp(rows[-1]["held_out_loss"]))
    assert (Path(sft_folder) / "report.png").exists() and len(report["samples"]) == 3


@pytest.fixture
def small_model(tmp_path):
    torch.manual_seed(1)
    tokenizer = Tokenizer.train(["the prompt and the response of a row"], 280)
    save_pretrained(GPT(GPTConfig(tokenizer.vocab_size, 32, 1, 2, 16)), tokenizer, tmp_path / "init")
    return str(tmp_path / "init")


def test_only_response_tokens_count_where_there_is_a_prompt(small_model, tmp_path):
    content = [{"prompt": f"the prompt {i}", "response": f" and {i * 'a '}row"} for i in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    config = sft.Config(
        out=str(tmp_path / "out"), data=str(tmp_path / "rows.jsonl"), init=small_model, steps=1, batch_size=9,
        micro_batch=4, device="cpu",
    )  # fmt: skip
    sft.train(config)
    model, tokenizer = load_pretrained(small_model)
    rows, _ = data.split(data.read_responses(config.data)[0])
    total = count = 0
    for prompt, response, *_ in rows:
        x, y = tokenizer.encode(prompt), [*tokenizer.encode(response), tokenizer.end_of_text]
        logp = model(torch.tensor([x + y])).log_softmax(-1)[0]
        total += sum(logp[len(x) - 1 + i, t].item() for i, t in enumerate(y))
        count += len(y)
    assert rows_of(tmp_path / "out")[0]["loss"] == pytest.approx(-total / count, abs=1e-5)


def test_text_trains_and_the_same_seed_gives_the_same_numbers(small_model, tmp_path):
    texts = [{"text": f"the response of row {i} and the prompt " * 5} for i in range(20)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        sft.train(
            sft.Config(out=str(tmp_path / name), data=str(tmp_path / "text.jsonl"), init=small_model, steps=6,
                       batch_size=4, lr=1e-2, seed=seed, device="cpu")
        )  # fmt: skip
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b") != rows_of(tmp_path / "c")
    assert rows_of(tmp_path / "a")[-1]["loss"] < rows_of(tmp_path / "a")[0]["loss"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"preset": "huge"}, "--preset huge: choose one of tiny"),
        ({"steps": 0}, "--steps must be at least 1"),
        ({"vocab_size": 100}, "--vocab-size must be at least 257"),
        ({"dropout": 1.0}, "--dropout"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"init": "./nowhere"}, "no model folder there"),
    ],
)
def test_bad_input_is_refused_and_nothing_written(settings, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(sft.train, sft.Config(out=str(tmp_path / "out"), device="cpu", **settings))
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and message in errors and errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_file_of_empty_texts_is_refused(tmp_path, capsys):
    (tmp_path / "text.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(SystemExit) as stop:
        run.main(sft.train, sft.Config(out=str(tmp_path / "out"), data=str(tmp_path / "text.jsonl")))
    assert stop.value.code == 2 and "holds no text" in capsys.readouterr().err


def test_real_prose_trains_from_the_command_line(real_data, tmp_path):
    with gzip.open(real_data / "movie_reviews.jsonl.gz") as f, (tmp_path / "reviews.jsonl").open("wb") as out:
        out.writelines(line for line, _ in zip(f, range(40), strict=False))
    words = (
        f"--data {tmp_path}/reviews.jsonl --out {tmp_path}/out --steps 3 --batch-size 4 --vocab-size 500 --device cpu"
    )
    done = subprocess.run(
        [sys.executable, "-m", "nanopref.sft", *words.split()], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "held-out loss" in done.stdout and done.stderr == ""  # quiet where there is no terminal
