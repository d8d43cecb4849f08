"""Learning by hand, in plain PyTorch and float64: what the scripts' figures and weights are held against.

Of nanopref it takes models and tokenizers alone, which have tests of their own.
"""

import hashlib
import json
import math
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nanopref import models
from nanopref.data.tokenizer import Tokenizer
from nanopref.models.gpt2 import GPT, GPTConfig
from nanopref.models.scalar import ScalarModel

WORDS = "the film and its plot are good bad slow bright long dull new actors scenes end".split()


def text(rng: random.Random, least: int, most: int) -> str:
    return "".join(" " + rng.choice(WORDS) for _ in range(rng.randint(least, most)))


def lively(model: nn.Module, seed: int) -> nn.Module:
    """Weights of a size at which answers differ by nats and steps move something."""
    draw = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        centre = 1.0 if name.endswith("weight") and p.dim() == 1 else 0.0
        p.data = centre + 0.2 * torch.randn(p.shape, generator=draw)
    return model


def tiny_model(folder: Path, block_size: int = 48, seed: int = 0) -> str:
    """A GPT of one layer that knows nothing but to end an answer soon, and its tokenizer, in a folder."""
    tokenizer = Tokenizer.train([" ".join(["", *WORDS])], 330)
    model = lively(GPT(GPTConfig(tokenizer.vocab_size, block_size, 1, 2, 16, from_scratch=True)), seed)
    model.ln_f.bias.data[0] = model.wte.weight.data[tokenizer.end_of_text, 0] = 1.5
    models.save(model, tokenizer, folder)
    return str(folder)


def tiny_judge(folder: Path, init: str, heads: int, seed: int = 1) -> str:
    """A reward model for the policy in `init` that knows nothing either."""
    policy, tokenizer = models.load(init)
    models.save(lively(ScalarModel(policy, heads), seed), tokenizer, folder)
    return str(folder)


def in_float64(folder: str | Path) -> tuple[GPT, Tokenizer]:
    model, tokenizer = models.load(folder)
    return model.double(), tokenizer


def split(rows: list[dict], key: str = "prompt") -> tuple[list[dict], list[dict]]:
    """(for training, held out): the tenth of the prompts whose SHA-256 comes first is held out."""

    def digest(row: dict) -> str:
        return hashlib.sha256(row[key].encode()).hexdigest()

    ordered = sorted({digest(row) for row in rows})
    held_out = ordered[: round(len(ordered) / 10)]
    return [row for row in rows if digest(row) not in held_out], [row for row in rows if digest(row) in held_out]


def token_logprobs(model: GPT, x: list[int], y: list[int], temperature: float = 1.0) -> Tensor:
    """log π of all tokens where those of y stand [len(y), V]."""
    hidden = model.hidden(torch.tensor([x + y]))[0, len(x) - 1 : -1]
    return (hidden @ model.wte.weight.T / temperature).log_softmax(-1)


def logprob(model: GPT, x: list[int], y: list[int]) -> Tensor:
    """log π(y|x)."""
    return token_logprobs(model, x, y).gather(1, torch.tensor(y)[:, None]).sum()


def triangle(step: int, steps: int, warmup: int) -> float:
    """The learning rate as a share of its peak: linearly up, and down to 0."""
    return (step + 1) / warmup if step < warmup else (steps - step) / (steps - warmup)


def clip(parameters: list[nn.Parameter], limit: float) -> float:
    """Bring the gradient to a norm of at most `limit`; what the norm was."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = math.sqrt(sum((g**2).sum().item() for g in gradients))
    for g in gradients:
        g *= min(1.0, limit / (norm + 1e-6))
    return norm


class Adam:
    """Kingma & Ba 2015, algorithm 1; matrices decay as in AdamW (Loshchilov & Hutter 2019, algorithm 2)."""

    def __init__(self, beta1: float, beta2: float, epsilon: float = 1e-8, decay: float = 0.0):
        self.beta1, self.beta2, self.epsilon, self.decay = beta1, beta2, epsilon, decay
        self.moments = {}

    @torch.no_grad()
    def step(self, parameters: list[nn.Parameter], lr: float) -> None:
        for p in parameters:
            if p.grad is None:
                continue
            t, m, v = self.moments.get(p, (0, 0.0, 0.0))
            t, g = t + 1, p.grad
            m, v = self.beta1 * m + (1 - self.beta1) * g, self.beta2 * v + (1 - self.beta2) * g**2
            self.moments[p] = t, m, v
            if p.dim() == 2:
                p -= lr * self.decay * p
            p -= lr * (m / (1 - self.beta1**t)) / ((v / (1 - self.beta2**t)).sqrt() + self.epsilon)
            p.grad = None


MOMENTUM, ROUNDS, LARGER = 0.8, 4, 2.0  # Muon's, and how much larger its learning rate is than Adam's beside it


class MuonAndAdam(Adam):
    """Jordan et al. 2024 for `matrices`, by their gradients' singular values; Adam for the rest."""

    def __init__(self, matrices: list[nn.Parameter], *betas: float, decay: float):
        super().__init__(*betas, decay=decay)
        self.matrices = matrices

    @torch.no_grad()
    def step(self, parameters: list[nn.Parameter], lr: float) -> None:
        for p in self.matrices:
            m = self.moments[p] = MOMENTUM * self.moments.get(p, 0.0) + (1 - MOMENTUM) * p.grad
            u, s, v = torch.linalg.svd((1 - MOMENTUM) * p.grad + MOMENTUM * m, full_matrices=False)
            s = s / s.norm()
            for _ in range(ROUNDS):
                s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
            p -= LARGER * lr * self.decay * p
            p -= LARGER * lr * 0.2 * max(p.shape) ** 0.5 * (u * s) @ v
            p.grad = None
        super().step(parameters, lr)


def optimizer(name: str, model: GPT, *betas: float, decay: float) -> Adam:
    """The one that a flag names, for a model with these blocks."""
    matrices = [p for p in model.h.parameters() if p.dim() == 2]
    return MuonAndAdam(matrices, *betas, decay=decay) if name == "muon" else Adam(*betas, decay=decay)


def same_weights(
    found: nn.Module, expected: nn.Module, start: nn.Module, tolerance: float = 5e-4, free: str | None = None
) -> None:
    """Each tensor of `found` but `free` is where that of `expected` is, to this share of the way there from `start`."""
    found, start = dict(found.named_parameters()), dict(start.named_parameters())
    for name, p in expected.named_parameters():
        if name == free:
            continue
        moved, off = p.detach() - start[name].detach(), found[name].detach().double() - p.detach()
        if name.endswith("c_attn.bias"):  # that of the keys changes nothing: its gradient is rounding
            D = len(p) // 3
            moved, off = (torch.cat([x[:D], x[2 * D :]]) for x in (moved, off))
        assert off.norm() <= tolerance * moved.norm() + 1e-7, (name, off.norm().item(), moved.norm().item())
        assert moved.norm() > 0 or off.abs().max() == 0


def same_figures(found: list[dict], expected: list[dict], rel: float = 2e-5, absolute: float = 1e-5) -> None:
    """Each row has all the figures of the other, no more, and their values; what depends on the clock is left out."""
    timings = {"tokens_per_second", "rollout_tokens_per_second", "learning_tokens_per_second", "step"}
    found = [{name: value for name, value in row.items() if name not in timings} for row in found]
    assert len(found) == len(expected)
    for row, other in zip(found, expected, strict=True):
        assert row == pytest.approx(other, rel=rel, abs=absolute)


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def metrics(folder: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
