"""What the scripts share: whole batches, looks at the held-out part, learning rates by origin, memory, the end."""

import json
import os
import random
import re
import signal
from pathlib import Path

import by_hand
import pytest
import torch
from helpers import board, results, stopped

import train_dpo
import train_ppo
import train_rm
from nanopref import models, sft
from nanopref.data.formats import read_feedback, read_prompts
from nanopref.feedback import rollout
from nanopref.learning.objectives import OBJECTIVES, resolve
from nanopref.learning.objectives import knobs as objectives_knobs
from nanopref.models.gpt2 import GPT
from nanopref.running import files, folder, parallel
from nanopref.running import flags as command_flags

SCRIPTS = {"dpo": train_dpo, "rm": train_rm, "ppo": train_ppo, "sft": sft}
LEARNERS = {"dpo": train_dpo, "rm": train_rm, "sft": sft}  # which go through rows of a file in batches
SMALL = {"batch_size": 8, "micro_batch": 4, "lr": 1e-3, "device": "cpu", "save_seconds": 0.0}
OWN = {
    "dpo": {"epochs": 1, "max_new_tokens": 8, "eval_prompts": 4},
    "rm": {"epochs": 1, "max_new_tokens": 8, "eval_prompts": 4},
    "ppo": {"iterations": 3, "minibatch": 8, "max_new_tokens": 8, "eval_prompts": 4, "max_kl": 1e4, "value_warmup": 0},
    "sft": {"steps": 4},
}


@pytest.fixture(scope="module")
def init(tmp_path_factory) -> str:
    return by_hand.tiny_model(tmp_path_factory.mktemp("init") / "model")


@pytest.fixture(scope="module")
def judge(init, tmp_path_factory) -> str:
    return by_hand.tiny_judge(tmp_path_factory.mktemp("judge") / "rm", init, heads=1)


def pairs(path: Path, n: int) -> str:
    """A file of n pairs, each with a prompt of its own."""
    rng = random.Random(0)
    rows = [
        {"prompt": f"{i}{by_hand.text(rng, 1, 3)}", "chosen": f" good{by_hand.text(rng, 1, 3)}", "rejected": " bad"}
        for i in range(n)
    ]
    return by_hand.write(path, rows)


def config_of(name: str, out: Path, data: str, init: str, judge: str, **more):
    """A short run of a script on a file."""
    settings = SMALL | OWN[name] | {"out": str(out), "data": data, "init": init}
    settings |= {"reward": (judge,)} if name == "ppo" else {}
    return SCRIPTS[name].Config(**settings | more)


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEARNERS)
def test_every_step_has_a_whole_batch(name, init, tmp_path, monkeypatch, no_picture):
    """129 pairs in batches of 64 make two steps of 64, and no third of one; 387 of them, in three epochs, make six. No
    more of them are in memory at once than was asked for."""
    script, sizes = SCRIPTS[name], []
    ordinary = script.micro_batches

    def cut_and_note(groups, *args, **more):
        pieces = ordinary(groups, *args, **more)
        if torch.is_grad_enabled():
            sizes.append(len(groups))
            assert [len(piece) for piece in pieces] == [30, 30, 4]
        return pieces

    monkeypatch.setattr(script, "micro_batches", cut_and_note)
    data = pairs(tmp_path / "pairs.jsonl", 143)  # of which 14 are held out
    for epochs, steps in ((1, 2), (3, 6)):
        length = {"steps": steps} if name == "sft" else {"epochs": epochs}
        config = config_of(name, tmp_path / str(epochs), data, init, "", batch_size=64, micro_batch=30, **length)
        script.train(config)
        assert sizes == [64] * steps == [64] * len(by_hand.metrics(config.out))
        sizes.clear()


@pytest.mark.parametrize("name", LEARNERS)
def test_fewer_rows_than_a_batch_are_said(name, init, tmp_path, capsys, no_picture):
    """Seven passes over 18 rows in batches of 64: seven steps, each of all 18."""
    length = {"steps": 7} if name == "sft" else {"epochs": 7}
    config = config_of(name, tmp_path / "out", pairs(tmp_path / "pairs.jsonl", 20), init, "", batch_size=64, **length)
    SCRIPTS[name].train(config)
    assert "batches of 18 and not 64" in capsys.readouterr().out
    assert len(by_hand.metrics(config.out)) == 7


@pytest.mark.parametrize("prompts, said", [(10, "6 prompts a round more than there are"), (40, "")])
def test_every_round_of_ppo_has_as_many_responses_as_were_asked_for(
    prompts, said, init, judge, tmp_path, monkeypatch, capsys, no_picture
):
    rounds, ordinary = [], rollout.respond
    monkeypatch.setattr(rollout, "respond", lambda *a, **k: rounds.append(len(a[2])) or ordinary(*a, **k))
    data = pairs(tmp_path / "pairs.jsonl", round(prompts / 0.9))
    train_ppo.train(config_of("ppo", tmp_path / "out", data, init, judge, batch_size=16, iterations=3))
    assert rounds == [16] * 3
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("name, loss", [("dpo", "kto"), ("dpo", "dpo"), ("rm", "bradley-terry"), ("rm", "binary")])
def test_what_people_said_in_another_run_is_taken_as_it_is(name, loss, init, tmp_path, monkeypatch, no_picture):
    """No answer is sampled to be judged; for all else the run is one on film reviews."""
    judged = pairs(tmp_path / "feedback.jsonl", 40)
    monkeypatch.setattr(SCRIPTS[name], "ensure_feedback", None)
    config = config_of(name, tmp_path / "out", "", init, "", judged=judged, loss=loss, batch_size=10)
    SCRIPTS[name].train(config)
    rows, report = results(tmp_path / "out")
    steps = 7 if loss in ("kto", "binary") else 3
    assert len(rows) == steps and not (tmp_path / "out" / "feedback.jsonl").exists()
    assert "best_accuracy" not in report["held_out"]  # how those people erred is not known here
    assert ("true_reward" if name == "dpo" else "rank_correlation") in report


# ---- looks at the held-out part --------------------------------------------------------------------------------------

SAYS = {
    "dpo": "preference_losses",
    "rm": "group_scores",
    "sft": "summed_logprobs",
}  # what a micro-batch goes through


@pytest.mark.parametrize("name", LEARNERS)
def test_a_look_on_the_way_is_at_256_groups_and_the_last_at_all(name, init, tmp_path, monkeypatch, no_picture):
    script, looks = SCRIPTS[name], []
    ordinary = getattr(script, SAYS[name])

    def note(model, data, *args):
        if torch.is_grad_enabled():
            looks.append([])  # a step, after which a look begins
        else:
            looks[-1] += args[1] if name == "dpo" else args[0]
        return ordinary(model, data, *args)

    monkeypatch.setattr(script, SAYS[name], note)
    length = {"steps": 2} if name == "sft" else {"epochs": 2}
    more = {"batch_size": 2700, "micro_batch": 2700, "eval_every": 1, "grad_clip": 1e-6} | length
    script.train(config_of(name, tmp_path / "out", pairs(tmp_path / "pairs.jsonl", 3000), init, "", **more))
    assert [sorted(look) for look in looks] == [list(range(256)), list(range(300))]
    assert all("held_out_loss" in row for row in by_hand.metrics(tmp_path / "out"))


WATCHED = {  # flags, the steps after which answers are shown, and names in TensorBoard
    "dpo": ({"eval_every": 3}, [3, 4], {"train/loss", "train/rewards/chosen", "eval/rewards/accuracies"}),
    "rm": ({"eval_every": 3}, [], {"train/accuracy", "train/margin", "eval/accuracy", "train/learning_rate"}),
    "ppo": ({"iterations": 8}, [2, 4, 5, 7, 8], {"train/objective/kl", "train/loss/value_avg", "train/beta"}),
    "sft": ({"eval_every": 3}, [3, 4], {"train/loss", "eval/loss", "train/learning_rate"}),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_can_be_watched(name, init, judge, tmp_path, no_picture):
    """Three prompts that are held out are answered at each look; curves have the names that they have in TRL."""
    more, steps, tags = WATCHED[name]
    data = pairs(tmp_path / "pairs.jsonl", 40)
    SCRIPTS[name].train(config_of(name, tmp_path / "out", data, init, judge, tensorboard=True, **more))
    rows = files.read_lines(tmp_path / "out" / "samples.jsonl")
    held_out = read_prompts(data)[1][:3]
    assert [(row["step"], row["prompt"]) for row in rows] == [(step, x) for step in steps for x in held_out]
    assert all(("reference" in row) == (name != "sft") for row in rows)
    assert name != "dpo" or len({row["reference"] for row in rows}) < len({row["policy"] for row in rows})
    assert tags <= board(tmp_path / "out").keys()


@pytest.mark.parametrize("name", LEARNERS)
def test_processes_share_a_look(name, init, tmp_path, monkeypatch):
    """Each of two does half, and together they say what one would."""
    script, looks = SCRIPTS[name], []
    ordinary = getattr(script, SAYS[name])

    def note(model, data, *args):
        looks.append(list(args[1] if name == "dpo" else args[0]))
        return ordinary(model, data, *args)

    monkeypatch.setattr(script, SAYS[name], note)
    policy, tokenizer = models.load(init)
    groups, _, _ = read_feedback(pairs(tmp_path / "pairs.jsonl", 300), {"dpo": ("pairs",)}, "dpo")
    groups = [group._replace(responses=group.responses[:1]) for group in groups] if name == "sft" else groups
    data, _ = sft.encode(groups, tokenizer, 48)
    config, rm = (resolve(script.Config(micro_batch=16), OBJECTIVES["dpo"]) for script in (train_dpo, train_rm))
    knobs, part = objectives_knobs(config, groups), train_dpo.Part(data, torch.zeros(2 * len(data)))

    def look() -> dict | float:
        looks.clear()
        if name == "dpo":
            return train_dpo.held_out_metrics(policy, part, torch.zeros(()), 256, config, knobs)
        if name == "rm":
            torch.manual_seed(0)
            return train_rm.held_out_metrics(train_rm.ScalarModel(policy, 2), data, 256, rm, knobs)
        return {"held_out_loss": sft.held_out_loss(policy, data, 256, 4)}

    alone, totals, seen = look(), [], []
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(parallel, "sum_processes", lambda x: totals.append(x.clone()) or x)
    for rank in (0, 1):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        look()
        seen.append([group for piece in looks for group in piece])
        assert len(seen[-1]) == 128
    assert sorted(seen[0] + seen[1]) == list(range(256))
    first, second = totals
    monkeypatch.setattr(parallel, "sum_processes", lambda x: first + second)
    assert look() == pytest.approx(alone, rel=1e-5)


# ---- learning rates --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained(init, tmp_path_factory) -> str:
    """A GPT-2 as `transformers` saves it, with a tokenizer that fits."""
    transformers = pytest.importorskip("transformers")
    path, (_, tokenizer) = tmp_path_factory.mktemp("pretrained"), models.load(init)
    sizes = {"vocab_size": tokenizer.vocab_size, "n_positions": 48, "n_embd": 16, "n_layer": 1, "n_head": 2}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(path)
    tokenizer.save(path)
    return str(path)


@pytest.mark.parametrize("name, pretrained_rate", [("dpo", 5e-6), ("rm", 1e-5), ("ppo", 1e-5)])
def test_the_learning_rate_follows_from_what_init_is(
    name, pretrained_rate, init, judge, pretrained, tmp_path, monkeypatch
):
    """Small for a pretrained model, on the built-in task as on a file; for one that was made here as from nothing."""
    begin = folder.Run.begin

    def begin_and_stop(run) -> None:
        begin(run)
        raise KeyboardInterrupt("the flags are written")

    monkeypatch.setattr(folder.Run, "begin", begin_and_stop)
    file, reward, rates = pairs(tmp_path / "pairs.jsonl", 30), {"reward": (judge,)} if name == "ppo" else {}, {}
    for start in (pretrained, init, ""):
        for data in ("", file):
            out, more = tmp_path / str(len(rates)), reward if start else {}
            with pytest.raises(KeyboardInterrupt):
                SCRIPTS[name].train(SCRIPTS[name].Config(out=str(out), init=start, data=data, device="cpu", **more))
            found = json.loads((out / "config.json").read_text())["flags"]
            rates[start, data] = found["lr"]
            assert found.get("critic_lr", found["lr"]) == found["lr"]
    assert rates[pretrained, ""] == rates[pretrained, file] == pretrained_rate
    assert rates[init, ""] == rates["", ""] > rates[init, file] == rates["", file] >= 10 * pretrained_rate


def test_sft_takes_small_steps_from_a_pretrained_model_alone(init, pretrained, tmp_path, no_picture):
    data = pairs(tmp_path / "pairs.jsonl", 30)
    for start, rates, optimizer in ((pretrained, (5e-5, 5e-5), "adamw"), (init, (1e-3, 1e-2), "muon")):
        out = tmp_path / optimizer
        sft.train(sft.Config(out=str(out), data=data, init=start, steps=1, device="cpu"))
        found = json.loads((out / "config.json").read_text())["flags"]
        assert rates[0] <= found["lr"] <= rates[1] and found["optimizer"] == optimizer
        assert models.load(out)[0].config.from_scratch == (start == init)  # which the next stage asks


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_resume_accepts_smaller_pieces_and_ends_the_same(name, init, judge, tmp_path, monkeypatch, no_picture):
    """A run that was stopped goes on with fewer rows in memory, and ends with the numbers that it would have had."""
    data = pairs(tmp_path / "pairs.jsonl", 40)
    more = {} if name == "sft" else {"sample_batch": 16}
    more |= {"steps": 6} if name == "sft" else {"iterations": 4} if name == "ppo" else {"epochs": 2}
    SCRIPTS[name].train(config_of(name, tmp_path / "whole", data, init, judge, micro_batch=8, **more))
    log, steps = folder.Run.log, []

    def log_and_stop(run, metrics) -> None:
        log(run, metrics)
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(folder.Run, "log", log_and_stop)
    with pytest.raises(KeyboardInterrupt):
        SCRIPTS[name].train(config_of(name, tmp_path / "run", data, init, judge, micro_batch=8, **more))
    smaller = {"micro_batch": 3, "resume": True} | ({} if name == "sft" else {"sample_batch": 5})
    SCRIPTS[name].train(config_of(name, tmp_path / "run", data, init, judge, **more | smaller))
    (rows, report), (other_rows, other_report) = results(tmp_path / "whole"), results(tmp_path / "run")
    assert len(rows) > 3
    for a, b in zip(rows, other_rows, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    assert report.keys() == other_report.keys()
    for figure in {"kl", "held_out_loss", "win_rate"} & report.keys():
        assert report[figure] == pytest.approx(other_report[figure], rel=1e-3, abs=1e-5)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried …"),
]


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["gpu", "cpu"])
@pytest.mark.parametrize("training", [True, False], ids=["in a step", "before the first"])
def test_out_of_memory_is_a_sentence(name, error, training, init, judge, tmp_path, monkeypatch, capsys):
    hidden, calls = GPT.hidden, []

    def run_out(self, *args, **more):
        calls.append(1)
        if torch.is_grad_enabled() == training and len(calls) > 1:
            raise error
        return hidden(self, *args, **more)

    monkeypatch.setattr(GPT, "hidden", run_out)
    data = pairs(tmp_path / "pairs.jsonl", 40)
    said = stopped(SCRIPTS[name].train, config_of(name, tmp_path / "out", data, init, judge), capsys)
    assert said.startswith("error: out of memory: lower --micro-batch (now 4)")
    assert ("or --sample-batch (now " in said) == (name != "sft") and "--resume" in said


def test_another_error_of_torch_keeps_its_traceback(init, tmp_path, monkeypatch):
    def break_down(self, *args):
        raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")

    monkeypatch.setattr(GPT, "hidden", break_down)
    config = config_of("dpo", tmp_path / "out", pairs(tmp_path / "pairs.jsonl", 40), init, "")
    with pytest.raises(RuntimeError, match="size of tensor a"):
        command_flags.execute(train_dpo.train, config)


def test_the_stages_before_take_the_micro_batch_too(tmp_path, monkeypatch, no_picture):
    """Or who ran out of memory in them could lower it for ever."""
    monkeypatch.setattr(models, "reference", None)  # the run ends where what is before it is done
    settings = {"data": pairs(tmp_path / "pairs.jsonl", 40), "sft_steps": 1, "max_new_tokens": 4, "micro_batch": 3}
    with pytest.raises(TypeError):
        train_ppo.train(train_ppo.Config(out=str(tmp_path / "ppo"), device="cpu", **settings))
    for stage in ("sft", "rm"):
        assert json.loads((tmp_path / "ppo" / stage / "config.json").read_text())["flags"]["micro_batch"] == 3


# ---- the data, and the end -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dpo", "rm"])
def test_a_row_with_equal_answers_is_dropped_counted_and_said(name, init, tmp_path, capsys, no_picture):
    path = Path(pairs(tmp_path / "pairs.jsonl", 40))
    with path.open("a") as f:
        f.write(json.dumps({"prompt": "once", "chosen": " same", "rejected": " same"}) + "\n")
    SCRIPTS[name].train(config_of(name, tmp_path / "out", str(path), init, ""))
    assert "1 rows dropped: two answers are equal" in capsys.readouterr().out
    assert results(tmp_path / "out")[1]["data"] == {"rows dropped: two answers are equal": 1}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_last_lines_name_the_folder_that_transformers_opens(name, init, judge, tmp_path, capsys, no_picture):
    transformers = pytest.importorskip("transformers")
    data = pairs(tmp_path / "pairs.jsonl", 40)
    SCRIPTS[name].train(config_of(name, tmp_path / "out", data, init, judge))
    last = capsys.readouterr().out.splitlines()[-2:]
    (path,) = re.findall(r"`transformers` opens the model in ([^;\s]+)", "\n".join(last))
    kind = "AutoModelForSequenceClassification" if name == "rm" else "AutoModelForCausalLM"
    theirs = getattr(transformers, kind).from_pretrained(path)
    ours = models.load_scalar(path)[0].transformer if name == "rm" else models.load(path)[0]
    torch.testing.assert_close(theirs.transformer.wte.weight, ours.wte.weight)
    assert Path(path) == tmp_path / "out" / "model" and transformers.AutoTokenizer.from_pretrained(path)


# ---- numbers that are none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("training", [True, False], ids=["in a step", "everywhere else"])
def test_hidden_states_that_are_nan_stop_a_run(name, backend, training, init, judge, tmp_path, monkeypatch, capsys):
    """With hinge loss too, whose max(0, …) may lose a NaN."""
    hidden, calls = GPT.hidden, []

    def spoil(self, *args, **packed):
        calls.append(1)
        found = hidden(self, *args, **packed)
        spoilt = torch.is_grad_enabled() == training and len(calls) > 1
        return torch.where(torch.tensor(not spoilt), found, torch.nan)  # of which no gradient becomes NaN

    data = pairs(tmp_path / "pairs.jsonl", 30)
    more = {"dpo": {"loss": "hinge"}, "ppo": {"batch_size": 4, "minibatch": 4, "max_new_tokens": 3}}.get(name, {})
    config = config_of(name, tmp_path / "out", data, init, judge, kernels=backend, **more)
    monkeypatch.setattr(GPT, "hidden", spoil)
    said = stopped(SCRIPTS[name].train, config, capsys)
    assert re.search(r"became nan|no finite number|collapsed: its KL of nan", said), said
    assert not (tmp_path / "out" / "report.json").exists()
