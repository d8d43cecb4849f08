"""train_dpo.py as its users meet it: from nothing, killed and resumed, on several processes, and fed with nonsense."""

import gzip
import json
import math
import os
import random
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import helpers
import pytest
import torch
from helpers import Fork, flags, lines, results, start
from safetensors.torch import load_file, save_file

import train_dpo
from nanopref import data, evaluate, reviews, run
from nanopref.model import GPT, GPTConfig, ScalarGPT, load_pretrained, save_pretrained
from nanopref.tokenizer import Tokenizer

SMALL = {"pairs": 96, "batch_size": 16, "micro_batch": 4, "eval_prompts": 16, "eval_every": 2, "save_every": 2}
SMALL |= {"epochs": 6, "max_new_tokens": 64, "device": "cpu"}


@pytest.fixture(scope="session")
def left_alone(sft_folder, tmp_path_factory) -> Path:
    """A small run that nobody disturbed."""
    out = tmp_path_factory.mktemp("dpo") / "left alone"
    process = start("train_dpo.py", *flags(out=out, init=sft_folder, **SMALL))
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return out


def test_the_run_folder_holds_what_the_design_promises(left_alone):
    names = {path.name for path in left_alone.iterdir()}
    assert {"config.json", "metrics.jsonl", "report.json", "report.png", "model", "state.pt", "pairs.jsonl"} <= names
    assert not [name for name in names if "partial" in name]
    config = json.loads((left_alone / "config.json").read_text())
    assert config["flags"]["beta"] == 0.5 and config["flags"]["seed"] == 0
    assert config["versions"]["torch"] == torch.__version__
    metrics, report = results(left_alone)
    assert [row["step"] for row in metrics] == list(range(1, len(metrics) + 1))
    assert {"reference", "policy", "reference_std"} <= report["true_reward"].keys()
    assert {"win_rate", "win_rate_95", "kl", "response_length", "held_out"} <= report.keys()
    assert (left_alone / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_first_steps_are_dpo_by_hand(sft_folder, left_alone):
    """Step 1 starts at π_ref: the loss is log 2. Step 2's loss is recomputed here, without any of the script."""
    metrics, _ = results(left_alone)
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics[0]["margin"] == pytest.approx(0, abs=1e-5)
    policy, tokenizer = load_pretrained(sft_folder)
    reference, _ = load_pretrained(sft_folder)
    pairs = [json.loads(line) for line in (left_alone / "pairs.jsonl").read_text().splitlines()]
    pairs, _ = data.split([data.Pair(**pair) for pair in pairs])
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1.0, betas=(0.9, 0.99), weight_decay=0.0)

    def log_prob(model, prompt, answer):
        x, y = tokenizer.encode(prompt), [*tokenizer.encode(answer), tokenizer.end_of_text]
        logp = model(torch.tensor([x + y])[:, :-1]).log_softmax(-1)[0]
        return sum(logp[len(x) - 1 + i, token] for i, token in enumerate(y))

    settings = train_dpo.Config().resolved()
    for step, rows in run.batches(len(pairs), SMALL["batch_size"], 2, 0):
        loss = 0.0
        for i in rows:
            x, y_w, y_l, *_ = pairs[i]
            with torch.no_grad():
                reference_ratio = log_prob(reference, x, y_w) - log_prob(reference, x, y_l)
            h = log_prob(policy, x, y_w) - log_prob(policy, x, y_l) - reference_ratio
            loss = loss + torch.log1p(torch.exp(-settings.beta * h)) / len(rows)
        assert metrics[step]["loss"] == pytest.approx(loss.item(), abs=2e-5)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.grad_clip)
        optimizer.param_groups[0]["lr"] = settings.lr * (step + 1) / settings.warmup
        optimizer.step()
        optimizer.zero_grad()
    assert metrics[1]["loss"] != metrics[0]["loss"]


def test_killed_at_random_moments_and_resumed_it_ends_the_same(sft_folder, left_alone, tmp_path):
    """Once before it has logged anything, then further and further on, each time somewhere in a step or a save."""
    words = flags(out=tmp_path / "run", init=sft_folder, resume=True, **SMALL)
    metrics, moments = tmp_path / "run" / "metrics.jsonl", random.Random(0)
    for kill in range(5):
        script = Fork(tmp_path / "log", "train_dpo.py", *words)
        while kill and script.is_alive() and (not metrics.exists() or metrics.read_text().count("\n") < 6 * kill):
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.2 if kill else 1.0))
        assert script.kill() == -signal.SIGKILL
    Fork(tmp_path / "log", "train_dpo.py", *words).succeed()
    assert results(tmp_path / "run") == results(left_alone)


def test_ctrl_c_saves_and_says_how_to_continue(sft_folder, left_alone, tmp_path):
    words = flags(out=tmp_path / "run", init=sft_folder, **(SMALL | {"save_every": 1000}))
    script = Fork(tmp_path / "log", "train_dpo.py", *words)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while script.is_alive() and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        time.sleep(0.02)
    os.kill(script.pid, signal.SIGINT)
    code, errors = script.finish()
    assert code == 130 and "--resume" in errors and "Traceback" not in errors
    done = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"]
    assert 3 <= done and f"{done} of" in errors
    Fork(tmp_path / "log", "train_dpo.py", *words, "--resume").succeed()
    assert results(tmp_path / "run") == results(left_alone)


def test_two_processes_give_the_losses_of_one(sft_folder, left_alone, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    process = start("train_dpo.py", *flags(out=tmp_path / "run", init=sft_folder, **SMALL), launcher=launcher)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    one, two = results(left_alone)[0], results(tmp_path / "run")[0]
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)  # float32 sums in another order, through 12 steps of AdamW


@pytest.fixture(scope="module")
def judge(sft_folder, tmp_path_factory) -> Path:
    """A reward model that, before it has learnt anything, says something of every response."""
    policy, tokenizer = load_pretrained(sft_folder)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("judge")
    save_pretrained(ScalarGPT(policy, 2), tokenizer, folder / "model")
    return folder


@pytest.mark.parametrize("file", ["", "texts.jsonl", "pairs.jsonl"])
def test_a_reward_model_compares_the_answers(file, sft_folder, judge, tmp_path, capsys, no_picture):
    """Of two answers the one that scores higher is chosen; the prompts are those of the file, or the task's."""
    rng = random.Random(0)
    texts = [" ".join(reviews.sample_response(rng, reviews.sample_prompt(rng)) for _ in range(5)) for _ in range(30)]
    (tmp_path / "texts.jsonl").write_bytes(lines(*({"text": text, "label": i % 2} for i, text in enumerate(texts))))
    rows = [{"prompt": reviews.sample_prompt(rng), "chosen": "this", "rejected": "that"} for _ in range(60)]
    (tmp_path / "pairs.jsonl").write_bytes(lines(*rows))
    settings = SMALL | {"init": sft_folder, "reward": str(judge), "epochs": 1, "eval_every": 99, "save_every": 99}
    data_file = str(tmp_path / file) if file else ""
    train_dpo.train(train_dpo.Config(out=str(tmp_path / "run"), data=data_file, **settings))
    model, tokenizer = load_pretrained(judge, kind=ScalarGPT)
    pairs, _ = data.read_pairs(tmp_path / "run" / "pairs.jsonl")
    encoded, _ = data.encode_pairs(pairs, tokenizer, 96)
    chosen, rejected = (evaluate.response_scores(model, rows).mean(1) for rows in zip(*encoded, strict=True))
    assert len(pairs) > 40 and (chosen > rejected - 1e-5).all() and (chosen > rejected).float().mean() > 0.98
    _, report = results(tmp_path / "run")
    assert {"reference", "policy"} == report["score"].keys() and ("true_reward" in report) == (not file)
    if file:
        training, held_out = data.read_prompts(data_file)
        assert {pair.prompt for pair in pairs} <= set(training)
        assert {answer["prompt"] for answer in report["samples"]} <= set(held_out)
    assert "score" in capsys.readouterr().out


def test_the_reward_models_own_policy_is_where_to_begin(sft_folder, judge, tmp_path, capsys, monkeypatch):
    refused(capsys, tmp_path / "out", "nowhere: no model folder there", reward="out/nowhere")
    refused(capsys, tmp_path / "out", "name the policy that it was trained for with --init", reward=str(judge))
    (judge / "config.json").write_text(json.dumps({"flags": {"init": sft_folder}}))  # as train_rm.py leaves it
    settings = train_dpo.Config(reward=str(judge)).resolved()
    assert settings.init == sft_folder and (settings.annotators, settings.noise) == (1, 0.0)
    monkeypatch.chdir(judge)  # and only where a reward model was named
    assert train_dpo.Config().resolved().init == ""


def test_the_triton_path_gives_the_same_curve(tmp_path, no_picture):
    """Without a GPU through Triton's interpreter, which is slow: few steps of a very small model."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["a film and its plot"], 270)
    save_pretrained(GPT(GPTConfig(tokenizer.vocab_size, 32, 1, 2, 16)), tokenizer, tmp_path / "init")
    rows = [{"prompt": f"a film {i}", "chosen": f" and {i}", "rejected": f" plot {i}{i}"} for i in range(10)]
    (tmp_path / "pairs.jsonl").write_bytes(lines(*rows))
    for backend in ("torch", "triton"):
        settings = SMALL | {"epochs": 2, "batch_size": 3, "kernels": backend, "data": str(tmp_path / "pairs.jsonl")}
        settings |= {"init": str(tmp_path / "init"), "max_new_tokens": 2, "eval_prompts": 1}
        train_dpo.train(train_dpo.Config(out=str(tmp_path / backend), **settings))
    for a, b in zip(results(tmp_path / "torch")[0], results(tmp_path / "triton")[0], strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)  # float32 sums in another order, through 6 steps of AdamW


def test_from_nothing_it_trains_an_sft_model_and_learns(tmp_path, capsys):
    settings = SMALL | {"pairs": 512, "eval_prompts": 128, "epochs": 2, "max_new_tokens": 48, "eval_every": 50}
    settings |= {"noise": 0.0, "beta": 0.1, "lr": 1e-3, "micro_batch": 16, "save_every": 100}
    train_dpo.train(train_dpo.Config(out=str(tmp_path / "dpo"), sft_steps=200, **settings))
    output = capsys.readouterr().out
    assert "supervised fine-tuning first" in output and "win rate" in output and "before" in output
    _, report = results(tmp_path / "dpo")
    assert report["true_reward"]["policy"] > report["true_reward"]["reference"] + 0.2
    assert {"sft", "pairs", "dpo", "evaluation"} <= json.loads((tmp_path / "dpo" / "report.json").read_text())[
        "seconds"
    ].keys()


def test_a_nan_stops_the_run_and_leaves_the_last_good_weights(sft_folder, tmp_path, capsys):
    config = train_dpo.Config(out=str(tmp_path / "run"), init=sft_folder, **SMALL)
    with pytest.raises(SystemExit) as stop:
        run.main(train_dpo.train, replace(config, lr=1e30, warmup=0))
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(r"became (nan|inf) at step 2", errors)
    assert not (tmp_path / "run" / "model").exists()
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["step"] == 1 and all(x.isfinite().all() for x in state["model"].values())


# ---- bad input: one sentence, exit code 2, nothing written -----------------------------------------------------------

GOOD = {"prompt": "a", "chosen": " b", "rejected": " c"}


BAD_FILES = {
    "not JSON": (b"{}x\n", "line 1: not JSON"),
    "not an object": (b"[1]\n", "must be an object"),
    "lacks a field": (lines(GOOD, {"prompt": "a", "chosen": "b"}), "line 2: has no field 'rejected'"),
    "wrong type": (lines({**GOOD, "chosen": 3}), "'chosen' must be text, found a int"),
    "empty chosen": (lines({**GOOD, "chosen": " "}), "'chosen' is empty"),
    "both equal": (lines({**GOOD, "rejected": " b"}), "are equal"),
    "invalid UTF-8": (lines(GOOD) + b'{"prompt": "\xff"}\n', "line 2: not valid UTF-8"),
    "no pair": (b"\n\n", "holds no row"),
    "one prompt": (lines(GOOD, {**GOOD, "chosen": "d"}), "hold only one prompt"),
}


def refused(capsys, out: Path, message: str, **settings) -> None:
    config = train_dpo.Config(out=str(out), **{"device": "cpu", **settings})
    helpers.refused(train_dpo.train, config, message, capsys)


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused(case, tmp_path, capsys):
    content, message = BAD_FILES[case]
    (tmp_path / "pairs.jsonl").write_bytes(content)
    refused(capsys, tmp_path / "out", message, data=str(tmp_path / "pairs.jsonl"))


def test_a_truncated_gz_is_refused(tmp_path, capsys):
    rows = lines(*[{**GOOD, "prompt": str(random.Random(i).random())} for i in range(200)])
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress(rows)[:-40])
    refused(capsys, tmp_path / "out", "damaged or cut off", data=str(tmp_path / "pairs.jsonl.gz"))


def test_a_missing_file_or_folder_is_refused(tmp_path, capsys):
    refused(capsys, tmp_path / "out", "no such file", data=str(tmp_path / "none.jsonl"))
    refused(capsys, tmp_path / "out", "a folder, not a file", data=str(tmp_path))
    refused(capsys, tmp_path / "out", "no model folder there", init=str(tmp_path / "none"))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"beta": 0.0}, "--beta must be above 0"),
        ({"beta": float("nan")}, "--beta must be above 0"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"device": "gpu9"}, "no such device"),
        ({"device": "meta"}, "only cpu and cuda"),
        ({"annotators": 2}, "must be odd"),
        ({"label_smoothing": 0.6}, "--label-smoothing"),
        ({"label_smoothing": 0.1, "loss": "ipo"}, "belongs to --loss sigmoid"),
        ({"lr": -1.0}, "--lr must be above 0"),
        ({"seed": -1}, "--seed"),
        ({"sft_steps": 0}, "--sft-steps must be at least 1"),
        ({"noise": float("inf")}, "--noise must be 0 or above"),
        ({"warmup": -1}, "--warmup must be 0 or above"),
        ({"pairs": 1}, "--pairs must be at least 20"),
        ({"resume": True, "overwrite": True}, "give one of them"),
    ],
)
def test_bad_flags_are_refused(settings, message, tmp_path, capsys):
    refused(capsys, tmp_path / "out", message, **settings)


def test_a_vocabulary_that_does_not_fit_the_model_is_refused(tmp_path, capsys):
    tokenizer = Tokenizer.train(["some text to learn from"], 260)
    save_pretrained(GPT(GPTConfig(300, 32, 1, 1, 8)), tokenizer, tmp_path / "model")
    refused(capsys, tmp_path / "out", "do not belong together", init=str(tmp_path / "model"))


def test_an_out_that_holds_another_run_is_left_alone(left_alone, sft_folder, capsys):
    before = {path: path.stat().st_mtime_ns for path in left_alone.rglob("*")}
    settings = SMALL | {"init": sft_folder}
    for changed, message in [
        ({}, "add --resume to continue it, --overwrite to replace it"),
        ({"resume": True, "beta": 0.3}, "was started with --beta 0.5"),
    ]:
        with pytest.raises(SystemExit) as stop:
            run.main(train_dpo.train, train_dpo.Config(out=str(left_alone), **settings, **changed))
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in left_alone.rglob("*")}


def broken(folder: Path, drop=(), **more) -> None:
    """Rewrite the weights of a model folder without some tensors and with others."""
    kept = {k: v for k, v in load_file(folder / "model.safetensors").items() if k not in drop}
    save_file({**kept, **more}, folder / "model.safetensors")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: broken(f, drop=["transformer.ln_f.bias"]), "1 tensors are missing, the first is ln_f.bias"),
        (lambda f: broken(f, extra=torch.zeros(1)), "do not belong to a GPT-2, the first is extra"),
        (lambda f: broken(f, **{"transformer.ln_f.bias": torch.zeros(3)}), "ln_f.bias is [3]"),
        (lambda f: torch.save({}, f / "pickle") or (f / "pickle").replace(f / "model.safetensors"), "a pickle"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "is a pickle and is never loaded"),
    ],
)
def test_a_broken_checkpoint_is_refused(spoil, message, tmp_path, capsys):
    tokenizer = Tokenizer.train(["some text to learn from"], 260)
    save_pretrained(GPT(GPTConfig(tokenizer.vocab_size, 32, 1, 1, 8)), tokenizer, tmp_path / "model")
    spoil(tmp_path / "model")
    refused(capsys, tmp_path / "out", message, init=str(tmp_path / "model"))


def test_a_prompt_longer_than_the_context_is_cut_and_counted(tmp_path, capsys):
    tokenizer = Tokenizer.train(["a film and its plot"], 270)
    save_pretrained(GPT(GPTConfig(tokenizer.vocab_size, 32, 1, 2, 16)), tokenizer, tmp_path / "init")
    rows = [{"prompt": f"{i} " + "film " * 9 * i, "chosen": " good", "rejected": " bad"} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_bytes(lines(*rows))
    settings = SMALL | {"data": str(tmp_path / "pairs.jsonl"), "init": str(tmp_path / "init"), "max_new_tokens": 4}
    train_dpo.train(train_dpo.Config(out=str(tmp_path / "out"), **settings))
    count = results(tmp_path / "out")[1]["data"]["prompts cut on the left to fit the context"]
    assert count >= 9 and f"{count} prompts cut on the left" in capsys.readouterr().out


def test_data_that_changed_are_noticed_on_resume(tmp_path, capsys, no_picture):
    tokenizer = Tokenizer.train(["a film and its plot"], 270)
    save_pretrained(GPT(GPTConfig(tokenizer.vocab_size, 32, 1, 2, 16)), tokenizer, tmp_path / "init")
    rows = [{"prompt": f"film {i}", "chosen": " good", "rejected": " bad"} for i in range(12)]
    settings = SMALL | {"data": str(tmp_path / "pairs.jsonl"), "init": str(tmp_path / "init"), "max_new_tokens": 4}
    (tmp_path / "pairs.jsonl").write_bytes(lines(*rows))
    train_dpo.train(train_dpo.Config(out=str(tmp_path / "out"), **settings))
    (tmp_path / "pairs.jsonl").write_bytes(lines(*rows[:-1], {**rows[-1], "chosen": " new"}))
    with pytest.raises(SystemExit) as stop:
        run.main(train_dpo.train, train_dpo.Config(out=str(tmp_path / "out"), resume=True, **settings))
    assert stop.value.code == 2 and "not those that this run began with" in capsys.readouterr().err


def test_overwrite_spares_what_the_run_wants_to_read(left_alone, capsys):
    for settings in ({"data": str(left_alone / "pairs.jsonl")}, {"init": str(left_alone)}):
        with pytest.raises(SystemExit) as stop:
            run.main(train_dpo.train, train_dpo.Config(out=str(left_alone), overwrite=True, **settings))
        assert stop.value.code == 2 and "--overwrite would remove" in capsys.readouterr().err
    assert (left_alone / "pairs.jsonl").exists()


@pytest.mark.parametrize("config", [None, "{}", '{"flags": [], "versions": {}}', "not JSON"])
def test_a_folder_that_is_no_run_is_never_overwritten(config, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    if config:
        (tmp_path / "config.json").write_text(config)
    for settings in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(SystemExit) as stop:
            run.main(train_dpo.train, train_dpo.Config(out=str(tmp_path), device="cpu", **settings))
        assert stop.value.code == 2
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_the_command_line_exits_with_2_and_one_line(tmp_path):
    process = start("train_dpo.py", "--data", "nowhere.jsonl", "--out", str(tmp_path / "out"))
    output, errors = process.communicate()
    assert process.returncode == 2 and errors == "error: nowhere.jsonl: no such file\n" and output == ""


def test_real_human_preferences_are_read_trained_on_and_reported(real_data, tmp_path, capsys):
    """A few steps on HH: every quirk of the file is met, and what was dropped or cut is said."""
    rows = gzip.open(real_data / "hh_harmless.jsonl.gz", "rb").read().splitlines(keepends=True)
    quirks = [i for i in (86, 516, 925, 1103, 1254) if i < len(rows)]
    (tmp_path / "hh.jsonl").write_bytes(b"".join(rows[i] for i in [*range(60), *quirks]))
    settings = SMALL | {"data": str(tmp_path / "hh.jsonl"), "epochs": 1, "max_new_tokens": 8}
    train_dpo.train(train_dpo.Config(out=str(tmp_path / "out"), sft_steps=3, **settings))
    output = capsys.readouterr().out
    assert "4 pairs dropped: the chosen answer is empty" in output and "prompts cut on the left" in output
    _, report = results(tmp_path / "out")
    assert report["data"]["pairs dropped: the chosen answer is empty"] == 4
    assert {"kl", "response_length", "held_out"} <= report.keys() and "true_reward" not in report
