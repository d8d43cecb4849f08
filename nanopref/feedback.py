"""Annotators: simulated people, or a reward model, who say which of two responses is better.

They answer by the model of Bradley and Terry (Biometrika 39, 1952): P(a preferred over b) = σ((r_a - r_b) / noise),
with the noise in units of reward; without any, the annotator is never wrong. Each of k annotators votes on their own
and the majority decides, so k is odd.
"""

import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np

from nanopref import data, evaluate, reviews, run
from nanopref.data import Pair, Response
from nanopref.generate import response_text
from nanopref.model import GPT, ScalarGPT
from nanopref.run import require
from nanopref.tokenizer import Tokenizer


def _check_annotators(annotators: int) -> None:
    if annotators < 1 or annotators % 2 == 0:
        raise ValueError(
            f"the number of annotators must be odd and at least 1, so that a majority exists: {annotators}"
        )


def bradley_terry_probability(reward_a, reward_b, *, noise: float) -> np.ndarray:
    """P(a preferred over b) [N] for rewards [N] and [N]. With noise 0 it is 0 or 1, or 1/2 where rewards are equal."""
    a, b = np.asarray(reward_a, dtype=np.float64), np.asarray(reward_b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"reward_a and reward_b must have the same shape, not {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("rewards must be finite numbers")
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be a finite number of at least 0: {noise}")
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        logit = np.where(a == b, 0.0, (a - b) / np.float64(noise))
    return 0.5 * (1 + np.tanh(logit / 2))  # σ, in the form that cannot overflow


def majority_probability(p, k: int) -> np.ndarray:
    """The probability that more than half of k independent votes say yes, when each does with probability p."""
    _check_annotators(k)
    p = np.asarray(p, dtype=np.float64)
    return sum(math.comb(k, yes) * p**yes * (1 - p) ** (k - yes) for yes in range(k // 2 + 1, k + 1))


def annotate(reward_a, reward_b, *, noise: float = 1.0, annotators: int = 1, rng: np.random.Generator) -> np.ndarray:
    """Labels [N], True where the majority of the annotators prefers a, for true rewards [N] and [N]."""
    _check_annotators(annotators)
    p = bradley_terry_probability(reward_a, reward_b, noise=noise)
    return 2 * rng.binomial(annotators, p) > annotators


def best_accuracy(reward_a, reward_b, *, noise: float = 1.0, annotators: int = 1) -> float:
    """The share of such labels that one who knows the true reward gets right, on average; no model can expect more."""
    p = majority_probability(bradley_terry_probability(reward_a, reward_b, noise=noise), annotators)
    return float(np.maximum(p, 1 - p).mean())


def true_rewards(answers: Sequence[Response]) -> list[float]:
    """What the built-in task pays for each answer."""
    return [reviews.true_reward(answer.response) for answer in answers]


def scores(model: ScalarGPT, tokenizer: Tokenizer, answers: Sequence[Response]) -> list[float]:
    """What a reward model says of each answer, its heads on average."""
    rows, _ = data.encode_responses(answers, tokenizer, model.config.block_size)
    return evaluate.mean_scores(model, rows)


def made_from(reward_model: str) -> str:
    """The policy from which a run of train_rm.py made a reward model, where its folder says so; else nothing."""
    if not reward_model:  # which as a path would be the folder one stands in
        return ""
    with suppress(OSError, ValueError, KeyError, TypeError):
        flags = json.loads((Path(reward_model) / "config.json").read_text())["flags"]
        init = Path(flags["init"] or Path(reward_model) / "sft")
        if (init / "config.json").is_file():
            return str(init)
    return ""


def collect(
    policy: GPT,
    tokenizer: Tokenizer,
    prompts: list[str],
    judge: Callable[[Sequence[Response]], Sequence[float]],
    *,
    noise: float,
    annotators: int,
    max_new_tokens: int,
    seed: int,
) -> list[Pair]:
    """Preferences as in the textbook: two responses of the policy to each prompt, and which one the annotators prefer.

    `judge` gives the rewards that they see. Pairs whose answers are equal, or of which one is empty or has no end, are
    left out. UserError if few remain.
    """
    answers = evaluate.respond(policy, tokenizer, prompts * 2, max_new_tokens, seed, "sampling pairs")
    # an answer without an end is no answer: as text it would be given one
    texts = [response_text(y, tokenizer) if y[-1] == tokenizer.end_of_text else "" for _, y in answers]
    rewards = np.array(judge(list(map(Response, prompts * 2, texts)))).reshape(2, -1)
    first_is_better = annotate(*rewards, noise=noise, annotators=annotators, rng=np.random.default_rng(seed))
    found = [
        Pair(x, a, b) if first else Pair(x, b, a)
        for x, a, b, first in zip(prompts, texts[: len(prompts)], texts[len(prompts) :], first_is_better, strict=True)
        if a.strip() and b.strip() and a != b
    ]
    require(len(found) >= 20, f"only {len(found)} of {len(prompts)} pairs of answers end: raise --max-new-tokens")
    return found


def collected(
    config: run.Options, this: run.Run, policy: GPT, tokenizer: Tokenizer, reward_model: ScalarGPT | None = None
) -> tuple[list[Pair], Counter]:
    """`collect`, kept in OUT/pairs.jsonl so that a resumed run goes on with the same; and notes of what is missing.

    The prompts are those that `config.data` has for training, or new ones of the built-in task; without a reward model
    people judge. `config` has the fields data, pairs, noise, annotators, max_new_tokens and seed.
    """
    path = this.folder / "pairs.jsonl"
    if not path.exists() and run.rank() == 0:
        rng = random.Random(f"pairs {config.seed}")
        if config.data:
            there = data.read_prompts(config.data)[0]
            prompts = list(itertools.islice(itertools.cycle(rng.sample(there, len(there))), config.pairs))
        else:
            prompts = [reviews.sample_prompt(rng) for _ in range(config.pairs)]
        judge = true_rewards if reward_model is None else partial(scores, reward_model, tokenizer)
        with this.stage("pairs"):
            names = ("noise", "annotators", "max_new_tokens", "seed")
            found = collect(policy, tokenizer, prompts, judge, **{name: getattr(config, name) for name in names})
            run.write_atomic(path, data.write_pairs(found))
    run.barrier()
    pairs, notes = data.read_pairs(path)
    if len(pairs) < config.pairs:
        notes["pairs dropped: answers equal, empty or without an end"] = config.pairs - len(pairs)
    return pairs, notes
