"""The flags of a model in the scripts: adapters, precision, activations that are computed again, a shorter context."""

import os
import random
import signal
from pathlib import Path

import by_hand
import pytest
import torch
from helpers import results, saved_state

import train_dpo
import train_ppo
import train_rm
from nanopref import models, sft
from nanopref.models import lora
from nanopref.running import flags, folder

SCRIPTS = {"dpo": train_dpo, "rm": train_rm, "ppo": train_ppo, "sft": sft}
SMALL = {"batch_size": 8, "micro_batch": 4, "lr": 1e-3, "device": "cpu", "save_seconds": 0.0}
SAMPLED = {"max_new_tokens": 8, "eval_prompts": 4}
OWN = {
    "dpo": SAMPLED | {"epochs": 2},
    "rm": SAMPLED | {"epochs": 2},
    "ppo": SAMPLED | {"iterations": 4, "minibatch": 8, "max_kl": 1e4, "value_warmup": 0},
    "sft": {"steps": 6},
}


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> dict[str, str]:
    """A model, a judge and pairs."""
    path, rng = tmp_path_factory.mktemp("start"), random.Random(0)
    init = by_hand.tiny_model(path / "model")
    rows = [
        {"prompt": f"{i}{by_hand.text(rng, 1, 3)}", "chosen": f" good{by_hand.text(rng, 1, 3)}", "rejected": " bad"}
        for i in range(40)
    ]
    data = by_hand.write(path / "pairs.jsonl", rows)
    return {"init": init, "data": data, "judge": by_hand.tiny_judge(path / "rm", init, heads=1)}


def run(name: str, out: Path, start: dict, **more) -> tuple[list[dict], dict]:
    settings = SMALL | OWN[name] | {"out": str(out), "data": start["data"], "init": start["init"]}
    settings |= {"reward": (start["judge"],)} if name == "ppo" else {}
    SCRIPTS[name].train(SCRIPTS[name].Config(**settings | more))
    return results(out)


def figures(rows: list[dict]) -> list[dict]:
    """What does not depend on the clock."""
    return [{name: x for name, x in row.items() if not name.endswith("per_second")} for row in rows]


def weights(path: Path | str) -> dict[str, torch.Tensor]:
    """Of a model's folder, whatever it is."""
    return models.checkpoint._read(models.find(path), 0.0)[0].state_dict()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_with_adapters_that_was_stopped_ends_the_same(name, dtype, start, tmp_path, monkeypatch, no_picture):
    """Its state holds what learns alone, and what is saved differs from the start where there are adapters alone."""
    flags = {"lora": 2, "dtype": dtype}
    rows, report = run(name, tmp_path / "whole", start, **flags)
    log, steps = folder.Run.log, []

    def log_and_stop(run, metrics) -> None:
        log(run, metrics)
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(folder.Run, "log", log_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run(name, tmp_path / "run", start, **flags)
    state = saved_state(tmp_path / "run")
    beside = {"score.weight", "bias", "beta", "baseline", "critic.score.weight", "critic.bias"}
    for held in (state["model"], {key.rpartition(".")[0] for key in state["optimizer"]}):
        assert any(".lora_" in key for key in held) and all(".lora_" in key or key in beside for key in held)
    again, other_report = run(name, tmp_path / "run", start, resume=True, **flags)
    assert figures(again) == figures(rows)
    for figure in {"kl", "held_out_loss", "win_rate"} & report.keys():
        assert report[figure] == other_report[figure]
    ended, began = weights(tmp_path / "run"), weights(start["init"])
    assert all(torch.equal(x, weights(tmp_path / "whole")[key]) for key, x in ended.items())
    changed = {key for key, x in ended.items() if not torch.equal(x, began[key])}
    adapted = {f"h.0.{x}.weight" for x in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    assert changed == adapted
    assert (tmp_path / "run" / "model" / "adapter" / "adapter_config.json").is_file()


def test_a_reward_model_and_a_critic_learn_their_heads_beside_the_adapters(start, tmp_path, no_picture):
    run("ppo", tmp_path / "ppo", start, lora=2)
    run("rm", tmp_path / "rm", start, lora=2)
    judge, critic = (models.load_scalar(path)[0].score.weight for path in (start["judge"], tmp_path / "ppo" / "critic"))
    assert not torch.equal(judge, critic)
    assert saved_state(tmp_path / "rm")["model"]["score.weight"].shape == (1, 16)


@pytest.mark.parametrize("name", SCRIPTS)
def test_activations_computed_again_change_no_number(name, start, tmp_path, no_picture):
    rows, _ = run(name, tmp_path / "plain", start)
    again, _ = run(name, tmp_path / "again", start, checkpoint_activations=True)
    assert figures(again) == figures(rows)


@pytest.mark.parametrize("name", SCRIPTS)
def test_products_in_bfloat16_are_other_numbers_and_nearly_the_same(name, start, tmp_path, no_picture):
    (rows, _), (half, _) = (run(name, tmp_path / dtype, start, dtype=dtype) for dtype in ("float32", "bfloat16"))
    figure = "policy_loss" if name == "ppo" else "loss"
    assert rows[-1][figure] != half[-1][figure]
    if name != "ppo":  # whose samples differ
        assert rows[0][figure] == pytest.approx(half[0][figure], rel=0.05)
    if name == "dpo":  # the reference is as the policy is, to the last bit
        assert abs(half[0]["loss"] - 0.6931472) < 1e-6 and half[0]["accuracy"] == 0.5


def test_a_shorter_context_cuts_what_is_longer_everywhere(start, tmp_path, no_picture):
    """For the policy, and for the reference that is read again for the report."""
    _, report = run("dpo", tmp_path / "run", start, block_size=9)
    assert report["data"] and max(report["response_length"].values()) <= 8
    for block_size in (49, 9999):
        with pytest.raises(flags.UserError, match=f"--block-size {block_size} is more than the context of"):
            run("dpo", tmp_path / "more", start, block_size=block_size)
    config = train_dpo.Config(init=start["init"], block_size=9)
    assert (
        models.load_init(config)[0].context == 9
        and models.load_init(train_dpo.Config(init=start["init"]))[0].context == 48
    )


def test_what_changes_numbers_may_not_change_on_resume(start, tmp_path, no_picture):
    run("dpo", tmp_path / "run", start)
    for changed in ({"lora": 2}, {"dtype": "bfloat16"}, {"block_size": 20}):
        with pytest.raises(flags.UserError, match="--resume: the run in"):
            run("dpo", tmp_path / "run", start, resume=True, **changed)
    run("dpo", tmp_path / "run", start, resume=True, checkpoint_activations=True)


def test_adapters_take_adamw_and_larger_steps():
    config = flags.resolve(train_dpo.Config(lora=16), "pretrained")
    assert (config.lr, config.optimizer) == (5e-5, "adamw")
    assert flags.resolve(train_dpo.Config(), "pretrained").lr == 5e-6
    assert flags.resolve(train_dpo.Config(lora=16)).optimizer == "adamw"


def test_sft_from_nothing_has_nothing_to_adapt(start, tmp_path):
    with pytest.raises(flags.UserError, match="--lora: adapters are for a model that has learnt something"):
        run("sft", tmp_path / "run", start | {"init": ""}, lora=2)


def test_online_rounds_keep_one_reference_with_adapters(start, tmp_path, monkeypatch, no_picture):
    """From the second round on π_ref is the trunk, without what the adapters have learnt."""
    word = f"{tmp_path}/length.py:f"
    (tmp_path / "length.py").write_text("def f(prompt, response):\n    return len(response)\n")
    asked, ordinary = [], train_dpo.reference_logprobs

    def note(run, reference, *rows, **more):
        asked.append((reference, any(lora.adapters(reference))))
        return ordinary(run, reference, *rows, **more)

    monkeypatch.setattr(train_dpo, "reference_logprobs", note)
    run("dpo", tmp_path / "run", start, lora=2, rounds=2, prompts=400, data="", epochs=1, reward=(word,))
    (first, adapted), (second, left) = asked
    assert adapted and not left
    by_name = dict(first.named_parameters())
    assert all(p is by_name[name] for name, p in second.named_parameters())


def test_trpo_moves_adapters_in_float32(start, tmp_path, no_picture):
    with pytest.raises(flags.UserError, match="give --dtype float32"):
        run("ppo", tmp_path / "refused", start, update="trpo", lora=2, lr=None)
    more = {"update": "trpo", "lora": 2, "lr": None, "dtype": "float32", "iterations": 2}
    rows, _ = run("ppo", tmp_path / "run", start, **more)
    ended, began = weights(tmp_path / "run"), weights(start["init"])
    assert len(rows) == 2 and not torch.equal(ended["h.0.mlp.c_fc.weight"], began["h.0.mlp.c_fc.weight"])
    assert torch.equal(ended["wte.weight"], began["wte.weight"])
