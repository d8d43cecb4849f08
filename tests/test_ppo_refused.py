"""train_ppo.py fed with nonsense, and runs of it that go wrong: one sentence and exit code 2."""

import by_hand
import pytest
import torch
from helpers import lines, refused, stopped

import train_ppo
from nanopref import models
from nanopref.data.tokenizer import Tokenizer
from nanopref.evaluation import compare
from nanopref.feedback import rollout
from nanopref.models.gpt2 import GPT, GPTConfig
from nanopref.models.scalar import ScalarModel
from nanopref.running import flags

SMALL = {"iterations": 4, "batch_size": 8, "minibatch": 8, "eval_prompts": 2, "max_new_tokens": 8, "device": "cpu"}
SMALL |= {"save_seconds": 0.0, "max_kl": 1e4, "value_warmup": 0, "epochs": 1}


@pytest.fixture(scope="module")
def init(tmp_path_factory) -> str:
    return by_hand.tiny_model(tmp_path_factory.mktemp("init") / "run" / "model")


@pytest.fixture(scope="module")
def judge(init, tmp_path_factory) -> str:
    return by_hand.tiny_judge(tmp_path_factory.mktemp("judge") / "rm", init, heads=1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"reward": ("*0.5",)}, "--reward '*0.5': names nobody"),
        ({"reward": ("true*two",)}, "--reward true*two: what stands behind * must be a finite number"),
        ({"reward": ("true*nan",)}, "--reward true*nan: what stands behind * must be a finite number"),
        ({"reward": ("true",), "data": "x.jsonl"}, "only the built-in task"),
        ({"advantage": "rloo", "group": 1}, "--group must be at least 2"),
        ({"advantage": "vtrace"}, "--advantage must be one of gae, rloo, grpo, reinforce"),
        ({"update": "sgd"}, "--update must be one of ppo, trpo"),
        (
            {"update": "trpo", "critic": "head"},
            "--critic head: its steps would leave the trust region of --update trpo",
        ),
        ({"update": "trpo", "early_stop_kl": 0.1}, "--early-stop-kl has no use with --update trpo"),
        ({"update": "trpo", "clip": 0.1}, "--clip has no use with --update trpo"),
        ({"update": "trpo", "entropy": 0.1}, "--entropy has no use with --update trpo"),
        ({"update": "trpo", "lr": 0.1}, "--lr has no use with --update trpo"),
        ({"trust_region": 0.1}, "--trust-region has no use with --update ppo"),
        ({"cg_steps": 5}, "--cg-steps has no use with --update ppo"),
        ({"trust_region": 0.0}, "--trust-region must be above 0"),
        ({"replay": 0}, "--replay must be at least 1"),
        ({"advantage": "reinforce", "value_warmup": 1}, "--value-warmup is for --advantage gae"),
        ({"critic": "tail"}, "--critic must be one of network, head"),
        ({"group": 3}, "--batch-size must be a multiple of --group 3"),
        ({"value_warmup": 40}, "--value-warmup leaves none of the --iterations"),
        ({"advantage": "rloo", "value_warmup": 5}, "--value-warmup is for --advantage gae"),
        ({"beta": 0.0, "kl_target": 5.0}, "--kl-target multiplies --beta"),
        ({"doubt": 1.0}, "--doubt needs a --reward with several heads"),
        ({"temperature": 0.0}, "--temperature must be at least 1e-06"),
        ({"beta": -0.1}, "--beta must be at least 0"),
        ({"lam": 1.5}, "--lam must be at most 1"),
        ({"gamma": 0.0}, "--gamma must be above 0"),
        ({"clip": 0.0}, "--clip must be above 0"),
        ({"clip": 1.5}, "--clip must be below 1"),
        ({"reward": ()}, "--reward: name at least one"),
        ({"iterations": 0}, "--iterations must be at least 1"),
        ({"prompts": 5}, "--prompts must be at least 20"),
        ({"annotators": 2}, "must be odd"),
        ({"data": "nowhere.jsonl"}, "no such file"),
        ({"init": "out/nowhere"}, "no model folder there"),
        ({"reward": ("out/nowhere",)}, "no model folder there"),
    ],
)
def test_bad_flags_are_refused(options, message, tmp_path, capsys):
    refused(train_ppo.train, train_ppo.Config(out=str(tmp_path / "out"), **options), message, capsys)


def test_rankings_are_refused_before_anything_is_trained(tmp_path, capsys):
    """They would reach the reward model only after SFT."""
    rows = [{"prompt": f"p{i}", "responses": ["a", "b", "c"]} for i in range(30)]
    (tmp_path / "rankings.jsonl").write_bytes(lines(*rows))
    config = train_ppo.Config(out=str(tmp_path / "out"), data=str(tmp_path / "rankings.jsonl"), device="cpu")
    refused(
        train_ppo.train, config, "rankings.jsonl: rankings: give a --reward of train_rm.py --loss plackett-luce", capsys
    )


def test_reward_models_that_do_not_fit_are_refused(init, judge, tmp_path, capsys):
    def refuse(folder, message, init=init, **more):
        config = train_ppo.Config(out=str(tmp_path / "out"), init=init, reward=(str(folder),), **more)
        refused(train_ppo.train, config, message, capsys)

    refuse(init, "has no scalar head")
    refuse(tmp_path / "nowhere", "no model folder there")
    other = Tokenizer.train(["other words"], 300)
    models.save(ScalarModel(GPT(GPTConfig(other.vocab_size, 96, 1, 1, 8))), other, tmp_path / "other")
    refuse(tmp_path / "other", "its tokenizer is not the policy's")
    refuse(tmp_path / "other", "name the policy that it was trained for", init="")
    model, tokenizer = models.load_scalar(judge)
    short = ScalarModel(GPT(GPTConfig(tokenizer.vocab_size, 20, 1, 1, 8)))
    models.save(short, tokenizer, tmp_path / "short")
    refuse(tmp_path / "short", "its context of 20 is less than the policy's 48")
    model.score.weight.data[:] = float("nan")
    models.save(model, tokenizer, tmp_path / "nan")
    refuse(tmp_path / "nan", "score.weight holds numbers that are not finite")
    model.score.weight.data[:] = model.transformer.ln_f.weight.data[:] = 3e38  # finite, but the score overflows
    models.save(model, tokenizer, tmp_path / "huge")
    refuse(tmp_path / "huge", "gives a score that is no finite number")
    refuse(judge, "which writes no text", init=judge)
    refuse(judge, "--doubt needs a --reward with several heads", doubt=1.0)


def test_a_reward_flag_without_a_value_is_not_an_absent_one():
    assert flags.parse(train_ppo.Config, []).reward is None
    assert flags.parse(train_ppo.Config, ["--reward"]).reward == ()
    assert flags.parse(train_ppo.Config, ["--reward", "true"]).reward == ("true",)


@pytest.mark.parametrize("iterations, warmup", [(1, 0), (2, 1), (3, 2), (40, 2)])
def test_the_warm_up_leaves_rounds_for_the_policy_unless_asked(iterations, warmup):
    assert train_ppo.resolve(train_ppo.Config(iterations=iterations), "").value_warmup == warmup


@pytest.mark.parametrize("advantage, group", [("rloo", 4), ("grpo", 4), ("reinforce", 1)])
def test_only_gae_is_whitened_over_the_round_unless_asked(advantage, group):
    """Over the round, each response's own return would come into RLOO's baseline."""
    assert train_ppo.resolve(train_ppo.Config(), "").whiten_advantages
    config = train_ppo.resolve(train_ppo.Config(advantage=advantage), "")
    assert not config.whiten_advantages and config.group == group and config.value_warmup == 0
    assert train_ppo.resolve(train_ppo.Config(advantage=advantage, whiten_advantages=True), "").whiten_advantages


@pytest.mark.parametrize("collapse", ["kl", "empty"])
def test_a_collapse_is_said_and_leaves_the_last_good_policy(collapse, init, judge, tmp_path, capsys, monkeypatch):
    options = SMALL | {"init": init, "reward": (judge,)}
    if collapse == "kl":
        options |= {"max_kl": 0.01, "lr": 5e-3}
    else:
        ordinary = rollout.respond
        calls = []

        def falls_silent(policy, tokenizer, *args, **more):
            calls.append(1)
            answers, end = ordinary(policy, tokenizer, *args, **more), [tokenizer.end_of_text]
            silent = [a._replace(tokens=end, logprobs=[-1.0], text="", ended=True) for a in answers]
            return answers if len(calls) < 2 else silent

        monkeypatch.setattr(rollout, "respond", falls_silent)
    errors = stopped(train_ppo.train, train_ppo.Config(out=str(tmp_path / "out"), **options), capsys)
    assert "the policy has collapsed" in errors and "the last good policy is in" in errors
    policy, reference = (models.load(folder)[0].state_dict() for folder in (tmp_path / "out", init))
    torch.testing.assert_close(policy, reference)  # round 1 was the last good one
    assert not (tmp_path / "out" / "report.json").exists()


def test_a_collapse_in_the_last_round_is_noticed_too(init, judge, tmp_path, capsys):
    options = SMALL | {"init": init, "reward": (judge,), "iterations": 1, "max_kl": 1e-4, "lr": 3e-3}
    options["eval_prompts"] = 64
    errors = stopped(train_ppo.train, train_ppo.Config(out=str(tmp_path / "out"), **options), capsys)
    assert "beyond --max-kl" in errors
    policy, reference = (models.load(folder)[0].state_dict() for folder in (tmp_path / "out", init))
    torch.testing.assert_close(policy, reference)


@pytest.mark.parametrize("prompts, collapsed", [(1, False), (2, True)])
def test_of_a_single_answer_that_is_empty_nothing_follows(
    prompts, collapsed, init, judge, tmp_path, capsys, monkeypatch, no_picture
):
    """Of all of several it does."""

    def silent(*args, **setting):
        result, answers = compare.compare(*args, **setting)
        return result, [row | {"policy": ""} for row in answers]

    monkeypatch.setattr(train_ppo, "compare", silent)
    options = SMALL | {"init": init, "reward": (judge,), "iterations": 1, "eval_prompts": prompts, "max_kl": 1e4}
    config = train_ppo.Config(out=str(tmp_path / "out"), **options)
    if collapsed:
        assert "every response is empty" in stopped(train_ppo.train, config, capsys)
    else:
        train_ppo.train(config)
    assert (tmp_path / "out" / "report.json").exists() != collapsed


def test_the_last_good_policy_is_written_when_the_state_is(init, judge, tmp_path, monkeypatch, no_picture):
    """Not each round: of a large model that takes as long as the round."""
    written, ordinary = [], models.save
    monkeypatch.setattr(models, "save", lambda model, *a, **k: written.append(type(model)) or ordinary(model, *a, **k))
    options = SMALL | {"init": init, "reward": (judge,), "save_seconds": 1000.0}
    train_ppo.train(train_ppo.Config(out=str(tmp_path / "out"), **options))
    assert written == [GPT, GPT, ScalarModel]  # before the first round; policy and critic at the end


def test_overwrite_spares_the_reward_model(init, judge, tmp_path, capsys, no_picture):
    out = tmp_path / "out"
    options = SMALL | {"out": str(out), "init": init, "iterations": 1}
    train_ppo.train(train_ppo.Config(reward=(judge,), **options))
    by_hand.tiny_judge(out / "rm", init, heads=1)
    config = train_ppo.Config(overwrite=True, reward=(str(out / "rm"),), **options)
    assert "--overwrite would remove" in stopped(train_ppo.train, config, capsys)
    assert (out / "rm" / "config.json").exists() and (out / "report.json").exists()


def test_labels_of_one_kind_are_refused_before_anything_is_trained(tmp_path, capsys):
    rows = [{"text": f"w{i} " * 40 + "end.", "label": 1} for i in range(30)]
    config = train_ppo.Config(out=str(tmp_path / "out"), data=by_hand.write(tmp_path / "texts.jsonl", rows))
    refused(train_ppo.train, config, "needs good and bad answers (label 1 and 0)", capsys)


def test_a_context_that_is_too_short_for_an_answer_keeps_half_for_the_prompt(init, judge, tmp_path, no_picture):
    options = SMALL | {"init": init, "reward": (judge,), "iterations": 1, "max_new_tokens": 48}
    train_ppo.train(train_ppo.Config(out=str(tmp_path / "out"), **options))
    assert by_hand.metrics(tmp_path / "out")[0]["response_length"] <= 24
