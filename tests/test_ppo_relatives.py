"""PPO's relatives as their users meet them: TRPO, replayed responses, REINFORCE; on the bandit, and resumed."""

import copy

import by_hand
import pytest
import test_train_ppo as ordinary
import torch
import torch.nn.functional as F
from helpers import results, saved_state

import train_ppo
from nanopref import models
from nanopref.data import reviews
from nanopref.feedback import rewards, rollout
from nanopref.learning import advantages as estimate
from nanopref.learning import trust_region
from nanopref.models.actor_critic import Learner

bandit = ordinary.bandit  # the fixture
BETA = 0.5
BANDIT = {"reward": ("true",), "beta": BETA, "missing_end": 0.0, "max_new_tokens": 2, "batch_size": 256}
BANDIT |= {"minibatch": 128, "micro_batch": 256, "epochs": 1, "eval_prompts": 4, "device": "cpu", "value_clip": 10.0}
TRPO = {"update": "trpo", "advantage": "rloo", "iterations": 15, "cg_steps": 5, "trust_region": 0.05, "minibatch": 256}
DELTA = TRPO["trust_region"]


@pytest.fixture
def on_the_bandit(bandit, tmp_path, monkeypatch, no_picture):
    """Train on it with these flags; how far from π* ∝ π_ref exp(r/β) that comes, over every response, in nats."""
    monkeypatch.setattr(reviews, "true_reward", ordinary.bandit_reward)
    monkeypatch.setattr(reviews, "sample_prompt", lambda rng: ordinary.PROMPT)

    def train(**settings) -> float:
        train_ppo.train(train_ppo.Config(out=str(tmp_path / "out"), init=str(bandit), **BANDIT | settings))
        texts, reference = ordinary.all_responses(*models.load(bandit))
        _, found = ordinary.all_responses(*models.load(tmp_path / "out"))
        best = (reference + torch.tensor([ordinary.bandit_reward(text) for text in texts]) / BETA).log_softmax(0)
        return (found.exp() * (found - best)).sum().item()

    return train


# ---- TRPO ------------------------------------------------------------------------------------------------------------


def test_trpo_finds_the_optimum_and_never_leaves_the_trust_region(on_the_bandit, tmp_path, monkeypatch):
    """The KL of each round's step is that over the whole vocabulary, at the contexts that the round has been in."""
    rounds, step = [], train_ppo.trpo

    def watched(run, learner, parts, rolled, *more):
        before, batch = copy.deepcopy(learner.policy).double(), rolled.batch
        found = step(run, learner, parts, rolled, *more)
        p, q = (m.logits(batch.inputs).log_softmax(-1) for m in (before, copy.deepcopy(learner.policy).double()))
        kl = (p.exp() * (p - q)).sum(-1)[batch.mask.bool()].mean().item()
        rounds.append((kl, found))
        return found

    monkeypatch.setitem(train_ppo.UPDATES, "trpo", watched)
    assert 0 <= on_the_bandit(**TRPO) < 0.02
    assert len(rounds) == 15
    for i, (kl, found) in enumerate(rounds):
        assert 0 < kl <= DELTA * (1 - i / 15) ** 2 and found["improvement"] > 0
        assert found["approx_kl"] == pytest.approx(kl, rel=1e-3, abs=1e-7)
    assert max(kl for kl, _ in rounds) > DELTA / 5  # and uses what it may
    logged, _ = results(tmp_path / "out")
    assert [row["halvings"] for row in logged] == [found["halvings"] for _, found in rounds]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict:
    """A short run of a policy and a reward model that know nothing."""
    folder = tmp_path_factory.mktemp("tiny")
    init = by_hand.tiny_model(folder / "init")
    judge = by_hand.tiny_judge(folder / "rm", init, heads=1)
    options = ordinary.SMALL | {"init": init, "reward": (judge,), "iterations": 3, "max_new_tokens": 8}
    return options | {"eval_prompts": 2, "max_kl": 1e4, "value_warmup": 0}


def test_the_critic_of_trpo_learns_and_leaves_the_policy_alone(tiny, tmp_path, monkeypatch, no_picture):
    """And where no step is found, the policy stays as it is, bit for bit."""
    policies = []

    def refuse(surrogate, kl, parameters, *, delta, cg_steps):
        with torch.no_grad():
            assert sum(kl()).item() == pytest.approx(0, abs=1e-6)
        policies.append(copy.deepcopy(parameters))
        return {"improvement": 0.0, "approx_kl": 0.0, "halvings": 10, "grad_norm": 1.0}

    monkeypatch.setattr(trust_region, "improve", refuse)
    train_ppo.train(train_ppo.Config(out=str(tmp_path / "out"), **tiny | {"update": "trpo"}))
    start, end = (dict(models.load(folder)[0].named_parameters()) for folder in (tiny["init"], tmp_path / "out"))
    assert len(policies) == 3 and all(torch.equal(start[name], end[name]) for name in start)
    rows, _ = results(tmp_path / "out")
    assert all(row["critic_grad_norm"] > 0 and row["clip_fraction"] == 0 for row in rows)
    assert rows[-1]["value_loss"] < rows[0]["value_loss"]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_closures_of_trpo_are_the_round_they_are_of(temperature, tiny, tmp_path, monkeypatch, no_picture):
    """mean ρA and the exact KL of another policy, from the round's tokens, one response after the other; whatever the
    micro-batch."""
    seen = []

    def look(surrogate, kl, parameters, **_):
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in parameters:
                p += 0.05 * torch.randn(p.shape, generator=generator)
            seen.append((sum(surrogate()).item(), sum(kl()).item(), copy.deepcopy(parameters)))
        return {}

    ordinary_update = train_ppo.trpo
    rolled = []
    monkeypatch.setattr(trust_region, "improve", look)
    monkeypatch.setitem(train_ppo.UPDATES, "trpo", lambda *a: rolled.append(a[3:5]) or ordinary_update(*a))
    options = tiny | {"update": "trpo", "iterations": 1, "temperature": temperature, "micro_batch": 3}
    train_ppo.train(train_ppo.Config(out=str(tmp_path / "out"), **options))
    ((of_round, advantages),), ((surrogate, kl, _),) = rolled, seen
    old, new = (by_hand.in_float64(folder)[0] for folder in (tiny["init"], tmp_path / "out"))
    expected = torch.zeros(2, dtype=torch.float64)
    for answer, row, keep in zip(of_round.answers, advantages, of_round.batch.mask.bool(), strict=True):
        p, q = (by_hand.token_logprobs(m, answer.prompt, answer.tokens, temperature).detach() for m in (old, new))
        drawn = torch.tensor(answer.tokens)[:, None]
        expected[0] += ((q - p).gather(1, drawn)[:, 0].exp() * row[keep]).sum()
        expected[1] += (p.exp() * (p - q)).sum()
    expected /= sum(len(answer.tokens) for answer in of_round.answers)
    assert (surrogate, kl) == pytest.approx(tuple(expected.tolist()), rel=1e-4, abs=1e-5) and kl > 1e-3


# ---- replay ----------------------------------------------------------------------------------------------------------


def gae_of_ppo(rewards, values, mask, *, gamma, lam, **_):
    """GAE as PPO has it, which knows of no ratio."""
    values = torch.where(mask.bool(), values, 0.0)
    following = F.pad(values[:, 1:], (0, 1))
    deltas = torch.where(mask.bool(), rewards + gamma * following - values, 0.0)
    advantages = torch.zeros(deltas.shape[0], deltas.shape[1] + 1)
    for t in reversed(range(deltas.shape[1])):
        advantages[:, t] = deltas[:, t] + gamma * lam * advantages[:, t + 1]
    advantages = torch.where(mask.bool(), advantages[:, :-1], 0.0)
    return advantages, advantages + values


def test_without_replay_it_is_ppo_bit_for_bit(tiny, tmp_path, monkeypatch, no_picture):
    """Nothing is kept, and no ratio has a say; whereas what is replayed has one from the second round on."""
    rows = {}
    for name, more in {"plain": {}, "ratios": {}, "replay": {"replay": 2}}.items():
        if name == "plain":
            monkeypatch.setitem(estimate.ADVANTAGES, "gae", gae_of_ppo)
        train_ppo.train(train_ppo.Config(out=str(tmp_path / name), **tiny | more))
        monkeypatch.undo() if name == "plain" else None
        rows[name] = results(tmp_path / name)[0]
    plain, ratios = (models.load(tmp_path / name)[0].state_dict() for name in ("plain", "ratios"))
    assert rows["plain"] == rows["ratios"] and all(torch.equal(plain[name], ratios[name]) for name in plain)
    assert rows["replay"][0] == rows["plain"][0] and rows["replay"][1] != rows["plain"][1]
    assert [row["minibatches"] for row in rows["replay"]] == [4, 8, 8]


def test_what_is_replayed_is_looked_at_again(tiny, monkeypatch):
    """The policy that drew it, the one of now, the reference; the last rounds' answers stand behind the new ones."""
    policy, tokenizer = models.load(tiny["init"])
    learner, reference = Learner(policy, None, 0.1), copy.deepcopy(policy)
    config = train_ppo.Config(max_new_tokens=6, replay=3)
    first = rollout.roll_out(learner, reference, tokenizer, [" the film"] * 3, 0, config)
    assert torch.equal(first.now, first.logprobs)
    learner.remember(first.answers, torch.tensor([1.0, 3.0]))
    by_hand.lively(policy, 5)
    again = rollout.roll_out(learner, reference, tokenizer, [" and scenes are"] * 2, 1, config)
    assert again.answers[2:] == first.answers and len(again.answers) == 5
    assert torch.equal(again.now[:2], again.logprobs[:2])
    for i, answer in enumerate(first.answers):
        keep, y = again.batch.mask[2 + i].bool(), torch.tensor(answer.tokens)[:, None]
        now, ref = (
            by_hand.token_logprobs(m, answer.prompt, answer.tokens).gather(1, y)[:, 0] for m in (policy, reference)
        )
        torch.testing.assert_close(again.logprobs[2 + i][keep], torch.tensor(answer.logprobs))
        torch.testing.assert_close(again.now[2 + i][keep], now.detach(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(again.ref_logprobs[2 + i][keep], ref.detach(), atol=1e-4, rtol=1e-4)
    assert (again.now[2:] - again.logprobs[2:]).abs().max() > 0.1


def test_interrupted_and_resumed_it_ends_the_same(tiny, tmp_path, monkeypatch, no_picture):
    """What earlier rounds left, replayed answers and REINFORCE's baseline, is part of the state."""
    options = tiny | {"iterations": 4, "reward": ("true",), "advantage": "reinforce", "replay": 3}
    asked, lengths = [], lambda answers: torch.tensor([len(a.text) / 20 for a in answers])
    monkeypatch.setattr(rewards, "true_reward", lengths)
    monkeypatch.setitem(rewards.TASK, "true", lengths)
    train_ppo.train(train_ppo.Config(out=str(tmp_path / "whole"), **options))

    def fails(answers):
        asked.append(len(answers))
        if len(asked) == 3:
            raise InterruptedError
        return lengths(answers)

    monkeypatch.setitem(rewards.TASK, "true", fails)
    with pytest.raises(InterruptedError):
        train_ppo.train(train_ppo.Config(out=str(tmp_path / "cut"), **options))
    train_ppo.train(train_ppo.Config(out=str(tmp_path / "cut"), resume=True, **options))
    assert results(tmp_path / "cut") == results(tmp_path / "whole")
    assert asked[:3] == [16, 32, 48]
    state = saved_state(tmp_path / "cut")
    assert len(state["extra"][""]) == 32 and state["model"]["baseline"] != 0


REPLAY = {"replay": 2, "iterations": 40, "lr": 5e-3}
REINFORCE = {"advantage": "reinforce", "iterations": 50, "lr": 1e-2, "minibatch": 64}


@pytest.mark.parametrize("settings", [REPLAY, REINFORCE], ids=["replay", "reinforce"])
def test_the_others_find_the_optimum_too(settings, on_the_bandit):
    assert 0 <= on_the_bandit(**settings) < 0.03
