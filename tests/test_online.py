"""A policy whose answers can be counted: where online DPO and the imitation of the best end, by their closed forms."""

import random
from pathlib import Path

import by_hand
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_dpo
from nanopref import models
from nanopref.data import reviews
from nanopref.data.tokenizer import Tokenizer
from nanopref.feedback.rewards import true_reward
from nanopref.models.gpt2 import GPT, GPTConfig

TEXTS = [*"abcdefghijkl"]  # all that is answered
REWARD = dict(zip(TEXTS, (0.0, 1.0, 0.3, 0.6, -1.0, 0.15, -0.2, 0.45, 1.2, -0.6, -0.4, 0.9), strict=True))
BETA = 0.5
PROMPT, OTHER = "a", "b"  # the one that is learnt from; and one that is held out, as is the first by SHA-256 of two
SMALL = {"batch_size": 128, "micro_batch": 128, "eval_prompts": 2, "eval_every": 1000, "max_new_tokens": 2, "warmup": 2}
SMALL |= {"device": "cpu", "optimizer": "adamw", "save_seconds": 1000.0, "sample_batch": 8192}


def sample_prompt(rng: random.Random) -> str:
    return OTHER if rng.random() < 0.05 else PROMPT


@pytest.fixture(autouse=True)
def world(monkeypatch, no_picture) -> None:
    """The built-in task is to answer so."""
    monkeypatch.setattr(reviews, "true_reward", lambda text: REWARD.get(text, 0.0))
    monkeypatch.setattr(reviews, "sample_prompt", sample_prompt)


@pytest.fixture(scope="module")
def bandit(tmp_path_factory) -> str:
    """A GPT that answers either prompt with a letter, each with a probability of its own."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train([""], 257)
    model, end = GPT(GPTConfig(257, 8, 1, 2, 16, from_scratch=True)), tokenizer.end_of_text
    rows = torch.tensor([[ord(prompt), ord(x)] for prompt in (PROMPT, OTHER) for x in TEXTS])
    wanted = torch.zeros(2, 257)
    wanted[0, [*map(ord, TEXTS)]] = torch.tensor([2.0, 3, 2, 1, 2, 2, 1, 3, 1, 2, 2, 1]) / 22
    wanted[1, end] = 1.0
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(300):
        F.cross_entropy(model.logits(rows).flatten(0, 1), wanted.repeat(len(rows), 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("bandit") / "init"
    models.save(model, tokenizer, folder)
    return str(folder)


def distribution(folder: str | Path) -> torch.Tensor:
    """log π(y|x) of TEXTS."""
    model, tokenizer = by_hand.in_float64(folder)
    with torch.no_grad():
        return torch.stack([by_hand.logprob(model, [ord(PROMPT)], [ord(y), tokenizer.end_of_text]) for y in TEXTS])


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """KL(p, q) of log-probs, among TEXTS."""
    p, q = p.log_softmax(0), q.log_softmax(0)
    return (p.exp() * (p - q)).sum().item()


def optimum(reference: torch.Tensor) -> torch.Tensor:
    """log π* ∝ log π_ref + r/β."""
    return (reference + torch.tensor(list(REWARD.values()), dtype=torch.float64) / BETA).log_softmax(0)


def trained(bandit: str, out: Path, **settings) -> torch.Tensor:
    train_dpo.train(train_dpo.Config(out=str(out), init=bandit, **SMALL | settings))
    return distribution(out)


PEOPLE = {"reward": ("true",), "noise": 1.0, "annotators": 1, "beta": BETA, "lr": 4e-3}


def test_online_dpo_finds_the_closed_form_optimum(bandit, tmp_path):
    """π* ∝ π_ref e^{r/β} (Rafailov et al. 2023, eq. 4), the reference being the first policy in all rounds. That takes
    people who answer by Bradley and Terry with σ(Δr): one who never errs has no optimum, and a majority another."""
    reference = distribution(bandit)
    assert reference.exp().sum() > 0.95 and divergence(reference, optimum(reference)) > 0.5
    found = trained(bandit, tmp_path / "run", rounds=3, prompts=2100, answers=4, **PEOPLE)
    assert divergence(found, optimum(reference)) < 0.05


@pytest.mark.parametrize("known", [TEXTS, ["a", "d", "g", "l"]], ids=["wide", "narrow"])
def test_offline_dpo_finds_it_where_the_data_reach(known, bandit, tmp_path):
    """Pairs of all answers will do; of a few, nothing is said of the others, and training longer does not help."""
    rng, rows = random.Random(0), []
    for _ in range(5000):
        a, b = rng.sample(known, 2)
        first = rng.random() < 1 / (1 + np.exp(REWARD[b] - REWARD[a]))
        chosen, rejected = (a, b) if first else (b, a)
        rows.append({"prompt": sample_prompt(rng), "chosen": chosen, "rejected": rejected})
    data = by_hand.write(tmp_path / "pairs.jsonl", rows)
    found = trained(bandit, tmp_path / "run", data=data, beta=BETA, lr=4e-3, epochs=3)
    reference = distribution(bandit)
    far = divergence(found, optimum(reference))
    assert far < 0.05 if len(known) == len(TEXTS) else far > 0.3


def test_imitating_the_best_of_n_comes_as_near_to_its_distribution_as_likelihood_does(bandit, tmp_path):
    """Of n answers the best is y with F(y)ⁿ - F(<y)ⁿ, F counting what is worth no more; what cannot be used is never
    it. Of these the likelihood is greatest where the policy is their distribution."""
    n, reference = 16, distribution(bandit)
    order = sorted(range(len(TEXTS)), key=lambda i: REWARD[TEXTS[i]])
    p, best, below = reference.exp(), torch.zeros(len(TEXTS), dtype=torch.float64), 1 - reference.exp().sum()
    for i in order:
        best[i], below = (below + p[i]) ** n - below**n, below + p[i]
    assert below == pytest.approx(1)
    assert divergence(best.log(), reference) > 1
    settings = {"loss": "preferred", "select": "best", "answers": n, "reward": ("true",), "prompts": 1500, "lr": 6e-3}
    found = trained(bandit, tmp_path / "run", epochs=6, **settings)
    assert divergence(best.log(), found) < 0.05


def test_the_worlds_reward_is_the_one_that_judges(bandit):
    assert true_reward([type("Answer", (), {"text": text})() for text in TEXTS]).tolist() == pytest.approx(
        list(REWARD.values())
    )
