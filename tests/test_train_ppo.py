"""train_ppo.py as its users meet it: its optimum on a bandit, what a round is, killed and resumed, from nothing."""

import copy
import gzip
import json
import random
import signal
import time
from pathlib import Path

import by_hand
import pytest
import torch
import torch.nn.functional as F
from helpers import Fork, flags, results
from matplotlib.figure import Figure

import kernels
import train_ppo
from nanopref import models
from nanopref.data import reviews
from nanopref.data.groups import Encoded
from nanopref.data.tokenizer import Tokenizer
from nanopref.evaluation import report
from nanopref.models.actor_critic import Learner, new_critic
from nanopref.models.gpt2 import GPT, GPTConfig
from nanopref.models.scalar import ScalarModel
from nanopref.running.flags import ModelFlags

SMALL = {"iterations": 6, "batch_size": 16, "minibatch": 8, "micro_batch": 4, "eval_prompts": 8, "save_seconds": 0.0}
SMALL |= {"device": "cpu", "value_warmup": 1, "max_new_tokens": 48}


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> dict:
    """Flags of a run of a tiny policy and a reward model, which know nothing."""
    folder = tmp_path_factory.mktemp("started")
    init = by_hand.tiny_model(folder / "init")
    judge = by_hand.tiny_judge(folder / "rm", init, heads=1)
    return SMALL | {"init": init, "reward": judge, "kl_target": 1.0, "max_new_tokens": 24, "iterations": 9}


@pytest.fixture(scope="module")
def left_alone(started, tmp_path_factory) -> Path:
    """A small run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("ppo")
    Fork(folder / "log", "train_ppo.py", *flags(out=folder / "run", **started)).succeed()
    return folder / "run"


# ---- the optimum -----------------------------------------------------------------------------------------------------

LETTERS = "abc"
PROMPT = "a"  # a letter itself: the rows of all others shrink to one vector, which LayerNorm would blow up
REWARDS = {"": -0.5, "a": 0.0, "b": 1.0, "c": 0.3, "aa": 0.6, "ab": -1.0, "bc": 1.2, "cb": -0.4, "cc": 0.9}


def bandit_reward(text: str) -> float:
    return REWARDS.get(text, 0.2)


@pytest.fixture(scope="module")
def bandit(tmp_path_factory) -> Path:
    """A GPT that answers with at most two of three letters, each with a probability of its own."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train([""], 257)
    model = GPT(GPTConfig(257, 8, 1, 2, 16, from_scratch=True))
    tokens = torch.tensor([tokenizer.encode(letter)[0] for letter in LETTERS] + [tokenizer.end_of_text])
    wanted = torch.zeros(257).index_copy(0, tokens, torch.tensor([0.3, 0.2, 0.3, 0.2]))
    contexts = torch.tensor([[ord(PROMPT), int(token)] for token in tokens[:3]])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(400):
        loss = F.cross_entropy(model.logits(contexts).flatten(0, 1), wanted.expand(6, -1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("bandit") / "init"
    models.save(model, tokenizer, folder)
    return folder


def all_responses(model: GPT, tokenizer: Tokenizer) -> tuple[list[str], torch.Tensor]:
    """Each response of at most two tokens to the prompt and its log-prob, in float64."""
    model = model.double()
    end = tokenizer.end_of_text
    with torch.no_grad():
        first = model.logits(torch.tensor([[ord(PROMPT)]]))[0, -1].log_softmax(-1)
        contexts = torch.tensor([[ord(PROMPT), token] for token in range(end)])
        second = model.logits(contexts)[:, -1].log_softmax(-1)
    texts = [""] + [
        tokenizer.decode([a]) + (tokenizer.decode([b]) if b != end else "") for a in range(end) for b in range(end + 1)
    ]
    return texts, torch.cat([first[end:], (first[:end, None] + second).flatten()])


@pytest.mark.parametrize("settings", [{}, {"critic": "head"}, {"advantage": "rloo"}], ids=["gae", "head", "rloo"])
def test_ppo_finds_the_closed_form_optimum_of_a_bandit(bandit, settings, tmp_path, monkeypatch, no_picture):
    """π* ∝ π_ref exp(r/β), over every response there is."""
    monkeypatch.setattr(reviews, "true_reward", bandit_reward)
    monkeypatch.setattr(reviews, "sample_prompt", lambda rng: PROMPT)
    beta = 0.5
    config = train_ppo.Config(
        out=str(tmp_path / "ppo"), init=str(bandit), reward=("true",), beta=beta, missing_end=0.0, max_new_tokens=2,
        iterations=70, batch_size=256, minibatch=128, micro_batch=256, epochs=2, lr=5e-3, eval_prompts=4,
        device="cpu", value_clip=10.0, **settings,
    )  # fmt: skip
    train_ppo.train(config)
    texts, reference = all_responses(*models.load(bandit))
    _, found = all_responses(*models.load(tmp_path / "ppo"))
    best = (reference + torch.tensor([bandit_reward(text) for text in texts]) / beta).log_softmax(0)
    distance = (found.exp() * (found - best)).sum().item()
    assert (reference.exp() * (reference - best)).sum() > 0.5  # there was a way to go
    assert 0 <= distance < 0.02


# ---- the run ---------------------------------------------------------------------------------------------------------


def test_the_run_folder_holds_what_the_design_promises(left_alone):
    names = {path.name for path in left_alone.iterdir()}
    assert {"config.json", "metrics.jsonl", "report.json", "report.png", "model", "critic", "state"} <= names
    metrics, report = results(left_alone)
    assert [row["step"] for row in metrics] == list(range(1, 10))
    expected = {"score", "true_reward", "kl", "kl_k3", "entropy", "clip_fraction", "value_clip_fraction", "value_loss"}
    expected |= {"explained_variance", "response_length", "unended", "beta", "approx_kl", "grad_norm"}
    assert expected | {"critic_grad_norm"} <= metrics[0].keys()
    rows = [json.loads(line) for line in (left_alone / "metrics.jsonl").read_text().splitlines()]
    assert all(row["rollout_tokens_per_second"] > 0 and row["learning_tokens_per_second"] > 0 for row in rows)
    assert {"reference", "policy", "reference_std"} <= report["true_reward"].keys()
    assert {"win_rate", "kl", "response_length", "score"} <= report.keys()
    assert models.load_scalar(left_alone / "critic")[0].heads == 1


def test_the_first_round_starts_at_the_reference(left_alone):
    """Before any step π_θ is π_ref: both KL estimates are 0, nothing is clipped, and during the warm-up it stays so."""
    metrics, _ = results(left_alone)
    for row in metrics[:2]:
        assert row["kl"] == pytest.approx(0, abs=1e-4) and row["kl_k3"] == pytest.approx(0, abs=1e-4)
    assert metrics[0]["clip_fraction"] == 0 and metrics[0]["approx_kl"] == pytest.approx(0, abs=1e-7)
    assert metrics[2]["kl_k3"] > 1e-3 and metrics[1]["approx_kl"] > 0


def test_killed_and_resumed_it_ends_the_same(started, left_alone, tmp_path):
    words = flags(out=tmp_path / "run", resume=True, **started)
    metrics, moments = tmp_path / "run" / "metrics.jsonl", random.Random(0)
    for kill in range(3):
        script = Fork(tmp_path / "log", "train_ppo.py", *words)
        while script.is_alive() and (not metrics.exists() or metrics.read_text().count("\n") < 2 * kill):
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.1))
        assert script.kill() == -signal.SIGKILL
    Fork(tmp_path / "log", "train_ppo.py", *words).succeed()
    assert results(tmp_path / "run") == results(left_alone)


# ---- on a tiny model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict:
    """A short run of a policy and a reward model that know nothing."""
    folder = tmp_path_factory.mktemp("tiny")
    init = by_hand.tiny_model(folder / "init")
    judge = by_hand.tiny_judge(folder / "rm", init, heads=1)
    options = SMALL | {"init": init, "reward": (judge,), "iterations": 3, "max_new_tokens": 8, "eval_prompts": 2}
    return options | {"max_kl": 1e4}


def test_the_picture_counts_rounds(tiny, tmp_path, monkeypatch):
    axis = Figure().subplots()
    monkeypatch.setattr(report, "plot", lambda panels, path: panels[0](axis))
    train_ppo.train(train_ppo.Config(out=str(tmp_path / "ppo"), **tiny | {"iterations": 2}))
    assert axis.get_xlabel() == "round"


def test_a_look_at_the_reference_computes_no_entropy(tiny, monkeypatch):
    policy, tokenizer = models.load(tiny["init"])
    asked, ordinary = [], kernels.token_logprobs
    monkeypatch.setattr(
        kernels, "token_logprobs", lambda *a, **more: asked.append(more.get("entropy", False)) or ordinary(*a, **more)
    )
    learner = Learner(policy, None, 0.1)
    config = train_ppo.Config(max_new_tokens=4)
    rollout = train_ppo.roll_out(learner, policy, tokenizer, ["A film"] * 3, 0, config)
    learner(rollout.batch, 1.0)
    assert asked == [False, True]


@pytest.mark.parametrize("kind", ["network", "head"])
def test_a_prompts_padding_changes_nothing(tiny, kind):
    """A row says the same beside a much longer one, and in a batch with columns that it does not need."""
    policy, tokenizer = models.load(tiny["init"])
    transformer = policy if kind == "head" else copy.deepcopy(policy)
    learner = Learner(policy, by_hand.lively(ScalarModel(transformer), 2), 0.1)
    short = (tokenizer.encode(" the film"), tokenizer.encode(" and scenes"))
    long = (tokenizer.encode(" the plot and its actors are slow"), short[1] * 8)
    encoded = Encoded.pack([[short], [long]])
    with torch.no_grad():
        alone, together = learner(encoded.collate([0]), 1.0), learner(encoded.collate([0, 1]), 1.0)
    mask = encoded.collate([0]).mask[0].bool()
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a[0][mask], b[0, : len(mask)][mask], atol=1e-5, rtol=1e-5)


def test_what_micro_batches_accumulate_is_the_minibatchs_gradient(tiny, tmp_path, no_picture):
    """The first rounds' figures do not depend on how many responses are in memory at once."""
    rows = []
    for micro in (1, 3, 16):
        config = train_ppo.Config(out=str(tmp_path / str(micro)), **tiny | {"micro_batch": micro, "minibatch": 16})
        train_ppo.train(config)
        rows.append(results(tmp_path / str(micro))[0][:2])
    for other in rows[1:]:
        for a, b in zip(rows[0], other, strict=True):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def test_a_critic_starts_from_the_reward_model(tiny):
    policy, _ = models.load(tiny["init"])
    reward_model = by_hand.lively(ScalarModel(copy.deepcopy(policy), 3), 2)
    tokens = torch.randint(200, (2, 9), generator=torch.Generator().manual_seed(0))
    critic = new_critic("network", policy, [reward_model], ModelFlags())
    torch.testing.assert_close(critic(tokens)[..., 0], reward_model(tokens).mean(-1), atol=1e-5, rtol=1e-5)
    assert critic.transformer is not reward_model.transformer and critic.score.weight.requires_grad
    from_policy = new_critic("network", policy, [], ModelFlags())
    assert (from_policy(tokens) == 0).all() and from_policy.transformer is not policy
    assert new_critic("head", policy, [reward_model], ModelFlags()).transformer is policy


def test_the_triton_path_gives_the_same_curve(tiny, tmp_path, no_picture):
    """Without a GPU through Triton's interpreter, which is slow: few steps of a very small model."""
    for backend in ("torch", "triton"):
        words = tiny | {"iterations": 2, "batch_size": 4, "minibatch": 4, "micro_batch": 4, "epochs": 1}
        words |= {"value_warmup": 0, "max_new_tokens": 3, "kernels": backend}
        train_ppo.train(train_ppo.Config(out=str(tmp_path / backend), **words))
    for a, b in zip(results(tmp_path / "torch")[0], results(tmp_path / "triton")[0], strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


# ---- from nothing ----------------------------------------------------------------------------------------------------


def test_from_nothing_it_trains_everything_it_needs(tmp_path, capsys, no_picture):
    words = SMALL | {"prompts": 64, "sft_steps": 30, "iterations": 2, "eval_prompts": 4}
    train_ppo.train(train_ppo.Config(out=str(tmp_path / "ppo"), **words))
    output = capsys.readouterr().out
    assert "supervised fine-tuning first" in output and "a reward model first" in output and "true reward" in output
    seconds = json.loads((tmp_path / "ppo" / "report.json").read_text())["seconds"]
    assert {"sft", "reward model", "ppo", "evaluation"} <= seconds.keys()
    # and the reward model's folder is enough to begin another run from the same policy
    train_ppo.train(train_ppo.Config(out=str(tmp_path / "again"), reward=(str(tmp_path / "ppo" / "rm"),), **words))
    again, _ = results(tmp_path / "again")
    assert again == results(tmp_path / "ppo")[0]


def test_real_prompts_are_answered_and_cut(real_data, tmp_path, capsys, no_picture):
    rows = gzip.open(real_data / "hh_harmless.jsonl.gz", "rb").read().splitlines(keepends=True)[:40]
    (tmp_path / "hh.jsonl").write_bytes(b"".join(rows))
    words = SMALL | {"data": str(tmp_path / "hh.jsonl"), "sft_steps": 1, "iterations": 2, "max_new_tokens": 4}
    train_ppo.train(train_ppo.Config(out=str(tmp_path / "ppo"), **words | {"batch_size": 4, "minibatch": 4}))
    _, report = results(tmp_path / "ppo")
    assert "true_reward" not in report and {"kl", "score", "response_length"} <= report.keys()
    assert "prompts cut on the left" in capsys.readouterr().out
