"""Rounds of train_ppo.py recomputed by hand, every flag off its default: from the tokens that were sampled, which are
observed, to the figures and the weights of policy and critic."""

import copy
import random
from types import SimpleNamespace

import by_hand
import pytest
import torch

import train_ppo
from nanopref import models
from nanopref.data import reviews
from nanopref.feedback import rollout
from nanopref.running import parallel
from nanopref.running.optim import batches

FLAGS = {"iterations": 3, "batch_size": 12, "group": 2, "epochs": 2, "minibatch": 5, "micro_batch": 2, "seed": 3}
FLAGS |= {"doubt": 0.5, "missing_end": 0.6, "beta": 0.3, "kl_target": 0.5}
FLAGS |= {"kl_horizon": 40, "temperature": 0.8, "gamma": 0.9, "lam": 0.7, "clip": 0.1, "value_clip": 0.05}
FLAGS |= {"value_weight": 0.3, "value_warmup": 1, "entropy": 0.05, "lr": 0.01, "critic_lr": 0.02, "grad_clip": 0.1}
FLAGS |= {"whiten_rewards": True, "whiten_advantages": True, "sample_batch": 5, "max_new_tokens": 12}
WEIGHTS = 0.7, -0.4  # of the reward model and of the true reward
VARIANTS = {
    "network": {"critic": "network"},
    "head": {"critic": "head", "early_stop_kl": 0.002, "epochs": 3},
    "rloo": {"advantage": "rloo", "group": 3, "value_warmup": 0, "whiten_advantages": False},
    "grpo": {"advantage": "grpo", "group": 3, "value_warmup": 0, "lr": 0.003},
    "replay": {"critic": "network", "replay": 2, "lr": 0.003},
    "reinforce": {"advantage": "reinforce", "group": 1, "value_warmup": 0, "replay": 3},
}


class Hand:
    """Policy, critic and what they are judged by, in float64; and what they say of a prompt x and an answer y."""

    def __init__(self, init: str, judge: str, critic: str | None, flags: SimpleNamespace):
        self.flags, self.beta, self.name = flags, flags.beta, judge
        self.baseline, self.kept = 0.0, []
        self.policy, self.tokenizer = by_hand.in_float64(init)
        self.reference, _ = by_hand.in_float64(init)
        self.judge = models.load_scalar(judge)[0].double()
        self.trunk, self.head = None, None
        if critic == "network":
            self.trunk = copy.deepcopy(self.judge.transformer)
            self.head = torch.nn.Parameter(self.judge.score.weight.detach().mean(0))
        elif critic == "head":
            self.trunk, self.head = self.policy, torch.nn.Parameter(torch.zeros(16, dtype=torch.float64))
        shared = list(self.policy.parameters())
        self.parts = [shared]
        if critic:
            own = [] if critic == "head" else list(self.trunk.parameters())
            self.parts.append([*own, self.head])
        self.adam = by_hand.Adam(0.9, 0.999, epsilon=1e-5)

    def token(self, model, x, y):
        """log π of y's tokens [T], and the entropy where they stand [T]."""
        logp = by_hand.token_logprobs(model, x, y, self.flags.temperature)
        return logp.gather(1, torch.tensor(y)[:, None])[:, 0], -(logp.exp() * logp).sum(1)

    def values(self, x, y):
        """V before each token of y [T]."""
        if self.trunk is None:
            return torch.zeros(len(y), dtype=torch.float64)
        return self.trunk.hidden(torch.tensor([x + y]))[0, len(x) - 1 : -1] @ self.head

    def score(self, answer) -> float:
        hidden = self.judge.transformer.hidden(torch.tensor([answer.prompt + answer.tokens]))[0, -1]
        heads = self.judge.score.weight @ hidden
        said = heads.mean() - self.flags.doubt * ((heads - heads.mean()) ** 2).mean().sqrt()
        self.said.append((said.item(), reviews.true_reward(answer.text)))
        return WEIGHTS[0] * said.item() + WEIGHTS[1] * reviews.true_reward(answer.text)

    @torch.no_grad()
    def prepare(self, answers) -> list[SimpleNamespace]:
        """Each answer, and each that is kept, with what is known before anything is learnt."""
        flags, rows = self.flags, []
        for i, a in enumerate(answers + self.kept):
            row = SimpleNamespace(x=a.prompt, y=a.tokens, score=self.score(a), value=self.values(a.prompt, a.tokens))
            row.now, row.ref = (self.token(model, row.x, row.y)[0] for model in (self.policy, self.reference))
            row.old = row.now if i < len(answers) else torch.tensor(a.logprobs).double()
            if i < len(answers):
                assert a.logprobs == pytest.approx(row.old.tolist(), abs=1e-4)  # as the sampler knew them
            row.weight = (row.now - row.old).exp().clamp(max=1)
            row.unended = a.tokens[-1] != self.tokenizer.end_of_text
            row.reward = -self.beta * (row.now - row.ref)
            row.reward[-1] += row.score - flags.missing_end * row.unended
            rows.append(row)
        if flags.whiten_rewards:
            together = torch.cat([row.reward for row in rows])
            for row in rows:
                row.reward = row.reward / (together.var(correction=0) + 1e-8).sqrt()
        advantages = getattr(flags, "advantage", "gae")
        if advantages == "gae":
            for row in rows:
                following = torch.cat([row.value[1:], torch.zeros(1)])
                delta, steps = row.reward + flags.gamma * following - row.value, range(len(row.y))
                decay = flags.gamma * flags.lam
                far = [
                    [decay ** (s - t) * row.weight[t + 1 : s + 1].prod() * delta[s] for s in steps[t:]] for t in steps
                ]
                row.advantage = torch.stack([sum(terms) for terms in far])
                row.target = row.value + row.weight * row.advantage
        for row in rows if advantages == "reinforce" else ():
            later = torch.stack([row.weight[t + 1 :].prod() for t in range(len(row.y))])
            row.advantage, row.target = (row.reward.sum() - self.baseline) * later, torch.zeros(len(row.y))
        self.baseline = (self.baseline + sum(row.reward.sum() for row in rows[: len(answers)]) / len(answers)) / 2
        for i in range(0, len(rows), flags.group) if advantages in ("rloo", "grpo") else ():
            group = rows[i : i + flags.group]
            returns = torch.stack([row.reward.sum() for row in group])
            for j, row in enumerate(group):
                others = torch.cat([returns[:j], returns[j + 1 :]])
                better = returns[j] - (others if advantages == "rloo" else returns).mean()
                if advantages == "grpo":
                    better = better / (returns.std() + 1e-4)
                row.advantage, row.target = better.expand(len(row.y)), torch.zeros(len(row.y))
        if flags.whiten_advantages:
            together = torch.cat([row.advantage for row in rows])
            for row in rows:
                row.advantage = (row.advantage - together.mean()) / (together.var(correction=0) + 1e-8).sqrt()
        return rows

    def update(self, rows, decay: float, warming: bool) -> list[float]:
        """An optimiser step on a minibatch; its figures."""
        flags, sums = self.flags, torch.zeros(6, dtype=torch.float64)
        count = sum(len(row.y) for row in rows)
        for row in rows:
            logp, entropy = self.token(self.policy, row.x, row.y)
            value = self.values(row.x, row.y)
            ratio = (logp - row.old).exp()
            plain = ratio * row.advantage
            clipped = ratio.clamp(1 - flags.clip, 1 + flags.clip) * row.advantage
            near = row.value + (value - row.value).clamp(-flags.value_clip, flags.value_clip)
            errors = (value - row.target) ** 2, (near - row.target) ** 2
            policy_loss, value_loss = -torch.minimum(plain, clipped).sum(), torch.maximum(*errors).sum() / 2
            loss = policy_loss + flags.value_weight * value_loss - flags.entropy * entropy.sum()
            (loss / count).backward()
            sums[:3] += torch.stack([policy_loss, value_loss, entropy.sum()]).detach() / count
            sums[3] += (clipped < plain).sum() / count
            sums[4] += ((near != value) & (errors[1] > errors[0])).sum() / count
            sums[5] += (ratio - 1 - (logp - row.old)).sum().detach() / count
        if warming:
            for p in self.policy.parameters():
                p.grad = None
        norms = [by_hand.clip(part, flags.grad_clip) for part in self.parts]
        for part, lr in zip(self.parts, (flags.lr, flags.critic_lr), strict=False):
            self.adam.step(part, lr * decay)
        return [*sums.tolist(), *norms]

    def round(self, step: int, answers) -> dict[str, float]:
        self.said = []
        flags, rows, done = self.flags, self.prepare(answers), []
        self.kept = (answers + self.kept)[: len(answers) * (getattr(flags, "replay", 1) - 1)]
        shuffle = parallel.generator(flags.seed, f"minibatches {step}")
        order = [torch.randperm(len(rows), generator=shuffle).tolist() for _ in range(flags.epochs)]
        size = flags.minibatch
        for minibatch in [epoch[i : i + size] for epoch in order for i in range(0, len(epoch), size)]:
            decay, warming = 1 - step / flags.iterations, step < flags.value_warmup
            done.append(self.update([rows[i] for i in minibatch], decay, warming))
            if done[-1][5] > getattr(flags, "early_stop_kl", 1e9):
                break
        names = ("policy_loss", "value_loss", "entropy", "clip_fraction", "value_clip_fraction", "approx_kl")
        names += ("grad_norm", "critic_grad_norm")
        figures = {name: sum(x) / len(done) for name, x in zip(names, zip(*done, strict=True), strict=False)}
        returns, values = (torch.cat([getattr(row, name) for row in rows]) for name in ("target", "value"))
        rows = rows[: len(answers)]
        log_ratios = [row.old - row.ref for row in rows]
        kl = sum(x.sum().item() for x in log_ratios) / len(rows)
        figures |= {"kl": kl, "kl_k3": sum(((-x).exp() - 1 + x).sum().item() for x in log_ratios) / len(rows)}
        explained = 1 - ((returns - values).var() / returns.var()).item() if self.trunk else 0.0
        figures |= {"score": sum(row.score for row in rows) / len(rows), "explained_variance": explained}
        figures |= {"unended": sum(row.unended for row in rows) / len(rows), "minibatches": len(done)}
        figures |= {"response_length": sum(len(row.y) for row in rows) / len(rows), "beta": self.beta}
        figures["true_reward"] = sum(reviews.true_reward(answer.text) for answer in answers) / len(rows)
        for name, said in zip((self.name, "true"), zip(*self.said[: len(rows)], strict=True), strict=True):
            figures[f"score {name}"] = sum(said) / len(rows)
        error = max(-0.2, min(0.2, kl / flags.kl_target - 1))
        self.beta *= 1 + error * len(rows) / flags.kl_horizon
        return figures


@pytest.mark.parametrize("variant", VARIANTS)
def test_rounds_of_ppo_are_those_by_hand(variant, tmp_path, monkeypatch, no_picture):
    rounds, ordinary = [], rollout.respond
    monkeypatch.setattr(
        rollout, "respond", lambda *a, **k: rounds.append((a[2], k, ordinary(*a, **k))) or rounds[-1][2]
    )
    monkeypatch.setattr(reviews, "true_reward", lambda text: len(text) / 20)  # which no film review is needed for
    options = FLAGS | VARIANTS[variant]
    init = by_hand.tiny_model(tmp_path / "init")
    judge = by_hand.tiny_judge(tmp_path / "rm", init, heads=3)
    more = {
        "reward": (f"{judge}*{WEIGHTS[0]}", f"true*{WEIGHTS[1]}"),
        "eval_prompts": 2,
        "max_kl": 1e4,
        "device": "cpu",
    }
    train_ppo.train(train_ppo.Config(out=str(tmp_path / "out"), init=init, **options, **more))

    flags = SimpleNamespace(**options)
    hand = Hand(init, judge, options.get("critic"), flags)
    start = copy.deepcopy((hand.policy, hand.trunk, hand.head))
    rng, asked = random.Random("ppo 3"), 12 // flags.group
    prompts = [reviews.sample_prompt(rng) for _ in range(3 * asked)]
    room, expected = 48 - 12, []
    for (step, rows), (queries, said, answers) in zip(batches(len(prompts), asked, 3, seed=3), rounds, strict=True):
        assert queries == [prompts[i] for i in rows for _ in range(flags.group)]
        assert [a.prompt for a in answers] == [hand.tokenizer.encode(prompt)[-room:] for prompt in queries]
        assert said["temperature"] == 0.8 and said["max_new_tokens"] == 12 and said["stream"] == f"round {step}"
        expected.append(hand.round(step, answers))
    by_hand.same_figures(by_hand.metrics(tmp_path / "out"), expected, rel=1e-4, absolute=1e-5)
    by_hand.same_weights(models.load(tmp_path / "out")[0], hand.policy, start[0])
    last = expected[-1]
    assert 0 < last["unended"] < 1 and 0 < last["clip_fraction"] < 1 and last["grad_norm"] > 0.1 < last["kl"]
    assert len({row["beta"] for row in expected}) == 3
    assert (tmp_path / "out" / "critic").exists() == bool(hand.trunk)
    if hand.trunk:
        critic, _ = models.load_scalar(tmp_path / "out" / "critic")
        moved = (hand.head - start[2]).norm()
        assert (critic.score.weight[0].double() - hand.head).norm() < 1e-3 * moved
        by_hand.same_weights(critic.transformer, hand.trunk, start[1])
        assert 0 < last["value_clip_fraction"] < 1 and last["critic_grad_norm"] > 0.1
    if variant == "head":
        assert len({row["minibatches"] for row in expected}) > 1  # it stopped early, and not always
