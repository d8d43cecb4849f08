"""A response space so small that all of it can be asked: policies as tables, optima in closed form, expected losses.

X prompts, N responses: up to four of four letters, and the token that ends them, which the last place does not need.
"""

import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanopref import models
from nanopref.data.formats import read_prompts
from nanopref.data.tokenizer import Tokenizer
from nanopref.learning.objectives import LOSSES, Knobs
from nanopref.models.gpt2 import GPT, GPTConfig
from nanopref.running.files import write_atomic

LETTERS, STEPS = "abcd", 4
END = len(LETTERS)
BEGINNINGS = [list(c) for n in range(STEPS) for c in itertools.product(range(END), repeat=n)]
RESPONSES = [c + [END] for c in BEGINNINGS] + [list(c) for c in itertools.product(range(END), repeat=STEPS)]
N = len(RESPONSES)
TOKENS = torch.tensor([y + [0] * (STEPS - len(y)) for y in RESPONSES])  # [N, T]
MASK = torch.tensor([[float(t < len(y)) for t in range(STEPS)] for y in RESPONSES], dtype=torch.float64)
BEHIND = torch.tensor([[BEGINNINGS.index(y[: min(t, len(y) - 1)]) for t in range(STEPS)] for y in RESPONSES])


class World(NamedTuple):
    start: Tensor  # log π_ref of each token behind each beginning [X, beginnings, tokens]
    reference: Tensor  # log π_ref(y|x) [X, N]
    rewards: Tensor  # r(x, y) [X, N]


# ---- policies --------------------------------------------------------------------------------------------------------


def table_of(policy: GPT, prompts: list[list[int]]) -> Tensor:
    """log π of each token behind each prompt, a token, and each beginning [X, beginnings, tokens], in float64."""
    rows = [[x + c + [0] * (STEPS - 1 - len(c)) for c in BEGINNINGS] for x in prompts]
    lengths = torch.tensor([len(c) for c in BEGINNINGS])
    with torch.no_grad():
        logits = policy.double().logits(torch.tensor(rows).flatten(0, 1)).unflatten(0, (len(prompts), -1))
    return logits[:, torch.arange(len(BEGINNINGS)), lengths].log_softmax(-1)


def logprobs(table: Tensor) -> Tensor:
    """log π(y|x) of every response [X, N], from the logits of each token behind each beginning."""
    return (table.log_softmax(-1)[:, BEHIND, TOKENS] * MASK).sum(-1)


def kl(p: Tensor, q: Tensor) -> float:
    """KL(p‖q) of log-probs [X, N], in nats, a mean over prompts."""
    return torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(1).mean().item()


def optimum(reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """log π* [X, N], π* ∝ π_ref e^{r/β}."""
    return (reference + rewards / beta).log_softmax(1)


def soft_value(reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """β log Z(x) [X, 1] = β log Σ_y π_ref e^{r/β}: the most that `objective` can be."""
    return beta * (reference + rewards / beta).logsumexp(1, keepdim=True)


def objective(policy: Tensor, reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """J = E_π[r] - β KL(π‖π_ref) of log-probs [X, N], a mean over prompts, 0-dim."""
    return (policy.exp() * (rewards - beta * (policy - reference))).sum(1).mean()


def fit(start: Tensor, loss: Callable[[Tensor], Tensor], steps: int = 60) -> tuple[Tensor, list[tuple[int, Tensor]]]:
    """Descend a loss of a table by L-BFGS; the table, and every so often the gradients until then and the table."""
    table, asked, path = start.clone().requires_grad_(), 0, []
    search = {"line_search_fn": "strong_wolfe", "tolerance_grad": 1e-12, "tolerance_change": 1e-15}
    optimizer = torch.optim.LBFGS([table], max_iter=10, history_size=100, **search)

    def closure() -> Tensor:
        nonlocal asked
        asked += 1
        optimizer.zero_grad()
        found = loss(table)
        found.backward()
        return found

    before = float("inf")
    for _ in range(steps):
        now = optimizer.step(closure).item()
        path.append((asked, table.detach().clone()))
        if before - now < 1e-8:
            break
        before = now
    return table.detach(), path


def fit_slowly(start: Tensor, loss: Callable[[Tensor], Tensor], n: int = 1000) -> tuple[Tensor, list]:
    """The same by Adam in small steps, for a loss that is flat where long steps lead: KTO's, with rare responses."""
    table, path = start.clone().requires_grad_(), []
    optimizer = torch.optim.Adam([table], lr=0.05)
    for step in range(n):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / n)
        optimizer.zero_grad()
        loss(table).backward()
        optimizer.step()
        if (step + 1) % 20 == 0:
            path.append((step + 1, table.detach().clone()))
    return table.detach(), path


# ---- losses, as expectations over all that can be said ---------------------------------------------------------------


class Feedback(NamedTuple):
    """Every group that there is, with its probability."""

    answers: Tensor  # [C, K], which responses, the best first
    weights: Tensor  # [X, C]
    said: Tensor | None = None  # [X, C, K]


def expected_loss(name: str, values: Tensor, baseline: Tensor, feedback: Feedback, knobs: Knobs) -> Tensor:
    """The mean of a row of LOSSES over everything that is said of the responses, of values [X, N]."""
    values, baseline = (x[:, feedback.answers].flatten(0, 1) for x in (values, baseline))
    said = torch.zeros_like(values) if feedback.said is None else feedback.said.flatten(0, 1)
    losses = LOSSES[name].losses(values, baseline, torch.ones_like(values, dtype=torch.bool), said, knobs)
    return (losses.view_as(feedback.weights) * feedback.weights).sum(1).mean()


def pairs(drawn: Tensor, better: Tensor) -> Feedback:
    """Of two responses drawn with log-probs [X, N] i is better than j with probability [X, N, N]."""
    i, j = (x.flatten() for x in torch.meshgrid(torch.arange(N), torch.arange(N), indexing="ij"))
    return Feedback(torch.stack([i, j], 1), (drawn[:, i] + drawn[:, j]).exp() * better[:, i, j])


def triples(rewards: Tensor, n: int = 2000) -> tuple[Tensor, Tensor]:
    """Some threes of responses in every order [C, 3], and the probability of each by Plackett and Luce [X, C]. Which
    three are compared does not move the optimum as long as all hang together."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([torch.randperm(N, generator=generator)[:3] for _ in range(n)])
    answers = torch.cat([drawn[:, list(order)] for order in itertools.permutations(range(3))])
    r = rewards[:, answers]
    ranked = (r[..., 0] - r.logsumexp(-1) + F.logsigmoid(r[..., 1] - r[..., 2])).exp()
    return answers, ranked / n


def labels(drawn: Tensor, good: Tensor) -> Feedback:
    """Of a response drawn with log-probs [X, N] people say that it is good with probability [X, N]."""
    said = torch.cat([torch.ones_like(good), torch.zeros_like(good)], 1)[..., None]
    weights = torch.cat([drawn.exp() * good, drawn.exp() * (1 - good)], 1)
    return Feedback(torch.arange(N).repeat(2)[:, None], weights, said)


def kto_optimum(reference: Tensor, good: Tensor, beta: float, z0: float) -> Tensor:
    """log π [X, N] of KTO's least expected loss at a reference point, of labels of responses from π_ref, β ≤ 1.

    With ρ = π/π_ref the loss is E_ref[(1 - 2 P(good)) σ(β (log ρ - z₀))] and a constant, on E_ref[ρ] = 1. So what is
    bad more often than good gets nothing, and for the rest (2 P(good) - 1) ∂σ/∂ρ is the same.
    """
    gain = (2 * good - 1).clamp(min=0)

    def ratios(price: Tensor) -> Tensor:
        low, high = torch.full_like(gain, -60.0), torch.full_like(gain, 60.0)
        for _ in range(45):
            middle = (low + high) / 2
            s = torch.sigmoid(beta * (middle - z0))
            worth = gain * beta * s * (1 - s) * (-middle).exp() > price
            low, high = middle.where(worth, low), high.where(worth, middle)
        return low.masked_fill(gain == 0, -torch.inf)

    low, high = (torch.full_like(gain[:, :1], e) for e in (-60.0, 60.0))
    for _ in range(45):
        middle = (low + high) / 2
        much = (ratios(middle.exp()) + reference).logsumexp(1, keepdim=True) > 0
        low, high = middle.where(much, low), high.where(much, middle)
    return (reference + ratios(high.exp())).log_softmax(1)


class Case(NamedTuple):
    """A loss whose optimum is known, and that."""

    loss: str
    feedback: Feedback
    best: Tensor
    knobs: Knobs
    z0: float = 0.0


def cases(world: World, beta: float) -> dict[str, Case]:
    """Each on what it learns from, answers of π_ref, judged as its authors assume."""
    _, reference, r = world
    best, value, knobs = optimum(reference, r, beta), soft_value(reference, r, beta), Knobs(beta=beta)
    better, flipped = torch.sigmoid(r[:, :, None] - r[:, None, :]), 0.2
    noisy = (1 - flipped) * better + flipped * (1 - better)
    wins = (better * reference.exp()[:, None, :]).sum(2)
    threes, ranked = triples(r)
    of_threes = Feedback(threes, torch.full_like(ranked, 1 / len(threes)), r[:, threes])
    good, z0 = torch.sigmoid(r), 0.0
    for _ in range(8):  # z₀ is the policy's own KL
        z0 = kl(kto_optimum(reference, good, beta, z0), reference)
    each = Feedback(torch.arange(N)[:, None], reference.exp(), (r - value)[..., None])
    return {
        "dpo": Case("sigmoid", pairs(reference, better), best, knobs),
        "robust": Case("robust", pairs(reference, noisy), best, knobs._replace(label_smoothing=flipped)),
        "plackett-luce": Case("plackett-luce", Feedback(threes, ranked), best, knobs),
        "infonca": Case("infonca", of_threes, best, knobs),
        "binary": Case("binary", labels(reference, torch.sigmoid(r - value)), best, knobs),
        "regression": Case("regression", each, best, knobs),
        "exponential": Case("exponential", pairs(reference, better), optimum(reference, r, 2 * beta), knobs),
        "ipo": Case("ipo", pairs(reference, better), optimum(reference, wins, beta), knobs),
        "kto": Case("kto", labels(reference, good), kto_optimum(reference, good, beta, z0), knobs, z0),
    }


# ---- worlds ----------------------------------------------------------------------------------------------------------


def make_world(folder: Path, seed: int) -> World:
    """A GPT that knows nothing, prompts, and a reward of numbers drawn for each token at its place and for each pair of
    neighbours; as files, for train_ppo.py."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator)
    if not (folder / "rewards.json").exists():
        policy = GPT(GPTConfig(END + 1, 2 * STEPS, 1, 2, 64, from_scratch=True))
        for name, p in policy.named_parameters():
            if p.dim() == 2:  # so large that beginnings differ, and that log π_ref has a deviation of about a nat
                p.data = {"wte.weight": 0.1, "wpe.weight": 0.3}.get(name, p.shape[1] ** -0.5) * draw(p.shape)
        models.save(policy, Tokenizer({letter.encode(): i for i, letter in enumerate(LETTERS)}), folder / "init")
        write_atomic(folder / "prompts.jsonl", "".join(f'{{"prompt": "{x}"}}\n' for x in LETTERS))
        texts = ["".join(LETTERS[t] for t in y if t != END) for y in RESPONSES]
        table = {}
        for x in LETTERS:  # a tenth, one, is held out
            placed, next_to = draw(STEPS, END + 1), draw(END + 1, END + 1)
            r = placed[torch.arange(STEPS), TOKENS] * MASK
            r[:, 1:] += next_to[TOKENS[:, :-1], TOKENS[:, 1:]] * MASK[:, 1:]
            r = r.sum(1)
            table[x] = dict(zip(texts, ((r - r.mean()) / r.std()).tolist(), strict=True))
        write_atomic(folder / "reward.py", REWARD)
        write_atomic(folder / "rewards.json", json.dumps(table) + "\n")
    policy, tokenizer = models.load(folder / "init")
    table = json.loads((folder / "rewards.json").read_text())
    prompts = read_prompts(folder / "prompts.jsonl")[0]
    start = table_of(policy, [tokenizer.encode(x) for x in prompts])
    rewards = torch.tensor([list(table[x].values()) for x in prompts], dtype=torch.float64)
    return World(start, logprobs(start), rewards)


REWARD = '''"""A number for each response to each prompt."""

import json
from pathlib import Path

TABLE = json.loads(Path(__file__).with_name("rewards.json").read_text())


def score(prompts, responses):
    return [TABLE[prompt][response] for prompt, response in zip(prompts, responses)]
'''
