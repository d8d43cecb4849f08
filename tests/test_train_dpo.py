"""train_dpo.py as its users meet it: from nothing, killed and resumed, on several processes, with any judge."""

import hashlib
import json
import os
import random
import re
import signal
import time
from pathlib import Path

import by_hand
import pytest
import torch
from helpers import Fork, flags, lines, refused, results, saved_state, stopped, two_processes

import train_dpo
from nanopref import models
from nanopref.data import formats, groups, reviews
from nanopref.feedback import rewards
from nanopref.models.inference import response_scores
from nanopref.models.scalar import ScalarModel
from nanopref.running import flags as command_flags

SMALL = {"prompts": 96, "batch_size": 16, "micro_batch": 4, "eval_prompts": 8, "eval_every": 5, "save_seconds": 0.0}
SMALL |= {"epochs": 3, "max_new_tokens": 48, "device": "cpu"}


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> dict:
    """Flags of a run on answers of a tiny model to the built-in task, which differ and end, whatever they say."""
    init = by_hand.tiny_model(tmp_path_factory.mktemp("init") / "init")
    return SMALL | {"init": init, "max_new_tokens": 24, "epochs": 8}


@pytest.fixture(scope="module")
def left_alone(started, tmp_path_factory) -> Path:
    """A small run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("dpo")
    Fork(folder / "log", "train_dpo.py", *flags(out=folder / "run", **started)).succeed()
    return folder / "run"


def test_the_run_folder_holds_what_the_design_promises(left_alone):
    names = {path.name for path in left_alone.iterdir()}
    assert {"config.json", "metrics.jsonl", "report.json", "report.png", "model", "state", "feedback.jsonl"} <= names
    assert not [name for name in names if "partial" in name]
    config = json.loads((left_alone / "config.json").read_text())
    assert config["flags"]["beta"] == 0.5 and config["flags"]["seed"] == 0
    assert config["versions"]["torch"] == torch.__version__
    metrics, report = results(left_alone)
    assert [row["step"] for row in metrics] == list(range(1, len(metrics) + 1))
    assert {"reference", "policy", "reference_std"} <= report["true_reward"].keys()
    assert {"win_rate", "win_rate_95", "kl", "response_length", "held_out"} <= report.keys()
    assert {"accuracy", "loss", "margin", "best_accuracy"} == report["held_out"].keys()
    assert (left_alone / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_last_look_is_at_all_that_is_held_out_the_others_at_a_part(tmp_path, monkeypatch, no_picture):
    """Also where more is held out than trained on: a tenth of the prompts may have most of the answers."""
    first, second = sorted(("a", "b"), key=lambda x: hashlib.sha256(x.encode()).digest())
    prompts = [first] * 300 + [second] * 4
    rows = [{"prompt": x, "chosen": f" good {i}", "rejected": " bad"} for i, x in enumerate(prompts)]
    looks, ordinary = [], train_dpo.held_out_metrics
    monkeypatch.setattr(train_dpo, "held_out_metrics", lambda *args: looks.append(args[3]) or ordinary(*args))
    settings = SMALL | {"epochs": 1, "batch_size": 2, "eval_every": 1, "eval_prompts": 2, "micro_batch": 100}
    settings |= {"max_new_tokens": 4}
    settings |= {"data": by_hand.write(tmp_path / "pairs.jsonl", rows), "init": by_hand.tiny_model(tmp_path / "init")}
    train_dpo.train(train_dpo.Config(out=str(tmp_path / "out"), **settings))
    assert looks == [256, 300]


def test_killed_at_random_moments_and_resumed_it_ends_the_same(started, left_alone, tmp_path):
    """Once before it has logged anything, then further and further on, each time somewhere in a step or a save."""
    words = flags(out=tmp_path / "run", resume=True, **started)
    metrics, moments = tmp_path / "run" / "metrics.jsonl", random.Random(0)
    for kill in range(4):
        script = Fork(tmp_path / "log", "train_dpo.py", *words)
        while kill and script.is_alive() and (not metrics.exists() or metrics.read_text().count("\n") < 8 * kill):
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.03 if kill else 0.5))
        assert script.kill() == -signal.SIGKILL
    Fork(tmp_path / "log", "train_dpo.py", *words).succeed()
    assert results(tmp_path / "run") == results(left_alone)


def test_ctrl_c_saves_and_says_how_to_continue(started, left_alone, tmp_path):
    words = flags(out=tmp_path / "run", **(started | {"save_seconds": 1000}))
    script = Fork(tmp_path / "log", "train_dpo.py", *words)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while script.is_alive() and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        time.sleep(0.002)
    os.kill(script.pid, signal.SIGINT)
    code, errors = script.finish()
    assert code == 130 and "--resume" in errors and "Traceback" not in errors
    done = saved_state(tmp_path / "run")["step"]
    assert 3 <= done and f"{done} of" in errors
    Fork(tmp_path / "log", "train_dpo.py", *words, "--resume").succeed()
    assert results(tmp_path / "run") == results(left_alone)


def test_two_processes_give_the_losses_of_one(started, left_alone, tmp_path):
    for script in two_processes(tmp_path, "train_dpo.py", *flags(out=tmp_path / "run", **started)):
        script.succeed()
    one, two = results(left_alone)[0], results(tmp_path / "run")[0]
    one[0]["accuracy"] = two[0]["accuracy"]  # where π_θ is π_ref rounding decides
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)  # float32 sums in another order, through 16 steps


@pytest.fixture(scope="module")
def judge(sft_folder, tmp_path_factory) -> Path:
    """A reward model that, before it has learnt anything, says something of every response."""
    policy, tokenizer = models.load(sft_folder)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("judge")
    models.save(ScalarModel(policy, 2), tokenizer, folder / "model")
    return folder


@pytest.mark.parametrize("file", ["", "texts.jsonl", "pairs.jsonl"])
def test_a_reward_model_compares_the_answers(file, sft_folder, judge, tmp_path, capsys, no_picture):
    """Of two answers the one that scores higher is chosen; the prompts are those of the file, or the task's."""
    rng = random.Random(0)
    texts = [" ".join(reviews.sample_response(rng, reviews.sample_prompt(rng)) for _ in range(5)) for _ in range(30)]
    (tmp_path / "texts.jsonl").write_bytes(lines(*({"text": text, "label": i % 2} for i, text in enumerate(texts))))
    rows = [{"prompt": reviews.sample_prompt(rng), "chosen": "this", "rejected": "that"} for _ in range(60)]
    (tmp_path / "pairs.jsonl").write_bytes(lines(*rows))
    settings = SMALL | {"init": sft_folder, "reward": (str(judge),), "epochs": 1, "eval_every": 99, "save_seconds": 99}
    data_file = str(tmp_path / file) if file else ""
    train_dpo.train(train_dpo.Config(out=str(tmp_path / "run"), data=data_file, **settings))
    model, tokenizer = models.load_scalar(judge)
    _, pairs, _ = formats.read(tmp_path / "run" / "feedback.jsonl")
    encoded, _ = groups.encode(pairs, tokenizer, 96)
    chosen, rejected = response_scores(model, encoded).mean(1).view(-1, 2).unbind(1)
    assert len(pairs) > 40 and (chosen > rejected - 1e-5).all() and (chosen > rejected).float().mean() > 0.98
    _, report = results(tmp_path / "run")
    assert ("true_reward" in report) == (not file)
    judges = ["score"] if file else ["score", "true_reward"]
    for figures in (report[name] for name in judges):
        assert {"reference", "policy", "reference_std", "policy_std", "win_rate", "win_rate_95"} == figures.keys()
    assert report["win_rate_by"] == "score" and report["win_rate"] == report["score"]["win_rate"]
    if file:
        training, held_out = formats.read_prompts(data_file)
        assert {pair.prompt for pair in pairs} <= set(training)
        assert {answer["prompt"] for answer in report["samples"]} <= set(held_out)
    output = capsys.readouterr().out
    assert "win rate by score" in output and ("win rate by true reward" in output) == (not file)


def test_the_reward_models_own_policy_is_where_to_begin(sft_folder, judge, tmp_path, capsys, monkeypatch):
    for reward, message in [
        ("out/nowhere", "nowhere: no model folder there"),
        (str(judge), "name the policy that it was trained for with --init"),
    ]:
        refused(train_dpo.train, train_dpo.Config(out=str(tmp_path / "out"), reward=(reward,)), message, capsys)
    (judge / "config.json").write_text(json.dumps({"flags": {"init": sft_folder}}))  # as train_rm.py leaves it
    assert rewards.made_from([str(judge)]) == rewards.made_from(["true", f"{judge}*0.5"]) == sft_folder
    monkeypatch.chdir(judge)  # and only where a reward model was named
    assert rewards.made_from([""]) == rewards.made_from([]) == ""
    settings = command_flags.resolve(train_dpo.Config(reward=(str(judge),)))
    assert (settings.annotators, settings.noise) == (1, 0.0)


def test_the_triton_path_gives_the_same_curve(tmp_path, no_picture):
    """Without a GPU through Triton's interpreter, which is slow: few steps of a very small model."""
    init, rng = by_hand.tiny_model(tmp_path / "init"), random.Random(0)
    rows = [{"prompt": by_hand.text(rng, 2, 5), "chosen": f" good {i}", "rejected": f" bad {i}"} for i in range(10)]
    data = by_hand.write(tmp_path / "pairs.jsonl", rows)
    settings = SMALL | {"batch_size": 3, "epochs": 1, "max_new_tokens": 2, "eval_prompts": 1, "init": init}
    for backend in ("torch", "triton"):
        train_dpo.train(train_dpo.Config(out=str(tmp_path / backend), kernels=backend, data=data, **settings))
    one, two = results(tmp_path / "torch")[0], results(tmp_path / "triton")[0]
    one[0]["accuracy"] = two[0]["accuracy"]
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)  # float32 sums in another order, through 3 steps


def test_from_nothing_it_trains_an_sft_model_and_learns(tmp_path, capsys):
    settings = SMALL | {"prompts": 256, "eval_prompts": 96, "epochs": 2, "eval_every": 50}
    settings |= {"noise": 0.0, "beta": 0.1, "lr": 1e-3, "micro_batch": 16, "save_seconds": 99}
    train_dpo.train(train_dpo.Config(out=str(tmp_path / "dpo"), sft_steps=60, **settings))
    output = capsys.readouterr().out
    assert "supervised fine-tuning first" in output and "win rate" in output and "before" in output
    report = json.loads((tmp_path / "dpo" / "report.json").read_text())
    assert report["true_reward"]["policy"] > report["true_reward"]["reference"] + 0.2
    assert report["kl"] > 0.5
    assert {"sft", "feedback", "reference", "dpo", "evaluation"} <= report["seconds"].keys()


def test_a_nan_stops_the_run_and_leaves_no_weights_that_led_there(sft_folder, tmp_path, capsys):
    """Those after the first step are finite, but 1e30."""
    settings = SMALL | {"init": sft_folder, "lr": 1e30, "warmup": 0}
    errors = stopped(train_dpo.train, train_dpo.Config(out=str(tmp_path / "run"), **settings), capsys)
    assert re.search(r"became (nan|inf) at step 2; no state had been saved before; lower --lr", errors)
    assert not (tmp_path / "run" / "model").exists() and not list((tmp_path / "run").glob("*.pt"))
