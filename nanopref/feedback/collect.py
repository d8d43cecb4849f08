"""Preferences as in the textbook: sample responses to each prompt, let somebody judge, note what is said of them."""

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from nanopref.data import reviews
from nanopref.data.formats import read_feedback, read_prompts, read_rows
from nanopref.data.groups import Group, write_groups
from nanopref.data.tokenizer import Tokenizer
from nanopref.feedback import voting
from nanopref.feedback.rewards import Reward, as_answers, true_rewards
from nanopref.models.gpt2 import GPT
from nanopref.models.sampling import respond
from nanopref.running.flags import require
from nanopref.running.folder import Run, write_atomic
from nanopref.running.parallel import barrier, rank


def training_prompts(file: str, n: int, stream: str) -> list[str]:
    """The prompts that a file has for training, or n of the built-in task, drawn from a random stream of this name."""
    if file:
        return read_prompts(file)[0]
    rng = random.Random(stream)
    return [reviews.sample_prompt(rng) for _ in range(n)]


# What people say: (answers to a prompt as groups [G] of K, rewards [G, K], how they err) -> groups of this kind.


def _pairs(groups: list[Group], rewards: np.ndarray, **people) -> list[Group]:
    first_is_better = voting.annotate(*rewards.T, **people)
    return [
        group._replace(responses=group.responses if first else group.responses[::-1])
        for group, first in zip(groups, first_is_better, strict=True)
    ]


def _rankings(groups: list[Group], rewards: np.ndarray, **people) -> list[Group]:
    return [
        group._replace(responses=tuple(group.responses[k] for k in order))
        for group, order in zip(groups, voting.rank(rewards, **people), strict=True)
    ]


def _ratings(groups: list[Group], rewards: np.ndarray, **people) -> list[Group]:
    rated = voting.rate(rewards, **people)
    return [
        Group(group.prompt, tuple(group.responses[k] for k in order), scores=tuple(row[order].tolist()))
        for group, row, order in zip(groups, rated, np.argsort(-rated, axis=1, kind="stable"), strict=True)
    ]


def _labels(groups: list[Group], rewards: np.ndarray, **people) -> list[Group]:
    """Good is what people prefer to an answer of the middle."""
    good = voting.annotate(rewards, np.full_like(rewards, np.median(rewards)), **people)
    return [
        Group(group.prompt, (text,), scores=(float(label),))
        for group, labels in zip(groups, good, strict=True)
        for text, label in zip(group.responses, labels, strict=True)
    ]


FEEDBACK = {"pairs": _pairs, "labels": _labels, "rankings": _rankings, "ratings": _ratings}


def collect(
    policy: GPT,
    tokenizer: Tokenizer,
    prompts: list[str],
    reward: Reward,
    *,
    feedback: str = "pairs",
    answers: int = 2,
    noise: float,
    annotators: int,
    max_new_tokens: int,
    sample_batch: int,
    seed: int,
) -> list[Group]:
    """So many responses of the policy to each prompt, and what the annotators say of them: a kind of feedback.

    `reward` gives what they see. Groups that hold two equal answers, or one that is empty or has no end, are left out.
    UserError if few remain.
    """
    setting = {"max_new_tokens": max_new_tokens, "batch_size": sample_batch, "seed": seed}
    found = respond(policy, tokenizer, prompts * answers, stream="sampling pairs", **setting)
    # an answer without an end is no answer: as text it would be given one
    texts = [answer.text if answer.ended else "" for answer in found]
    groups = [Group(x, tuple(texts[i :: len(prompts)])) for i, x in enumerate(prompts)]
    rewards = reward(as_answers(groups, tokenizer, policy.config.block_size)).double().numpy().reshape(-1, answers)
    people = {"noise": noise, "annotators": annotators, "rng": np.random.default_rng(seed)}
    kept = [
        group
        for group in FEEDBACK[feedback](groups, rewards, **people)
        if all(text.strip() for text in group.responses) and len(set(group.responses)) == len(group.responses)
    ]
    asked = len(prompts) * (answers if feedback == "labels" else 1)
    hint = "start again with --overwrite and a higher --max-new-tokens"
    require(len(kept) >= 20, f"only {len(kept)} of {asked} {feedback} can be used: {hint}")
    return kept


def ensure_feedback(
    run: Run, policy: GPT, tokenizer: Tokenizer, reward: Reward, kinds: dict[str, Sequence[str]]
) -> tuple[list[Group], list[Group], Counter]:
    """`collect`, kept in OUT/feedback.jsonl so that a resumed run goes on with the same; as `read_feedback` reads it.

    The prompts are those that --data has for training, or new ones of the built-in task. The run's config has the flags
    of FeedbackFlags, ObjectiveFlags and SamplingFlags.
    """
    config, path = run.config, run.folder / "feedback.jsonl"
    if not path.exists() and rank() == 0:
        stream = f"pairs {config.seed}"
        prompts = training_prompts(config.data, config.prompts, stream)
        if config.data:
            shuffled = random.Random(stream).sample(prompts, len(prompts))
            prompts = list(itertools.islice(itertools.cycle(shuffled), config.prompts))
        names = ("feedback", "answers", "noise", "annotators", "max_new_tokens", "sample_batch", "seed")
        with run.stage("feedback"):
            found = collect(policy, tokenizer, prompts, reward, **{name: getattr(config, name) for name in names})
            write_atomic(path, write_groups(found))
    barrier()
    groups, held_out, notes = read_feedback(path, kinds, config.loss)
    asked = config.prompts * (config.answers if config.feedback == "labels" else 1)
    if missing := asked - sum(1 for _ in read_rows(path)):
        notes[f"{config.feedback} dropped: answers equal, empty or without an end"] = missing
    return groups, held_out, notes


def best_possible(config: Any, groups: Sequence[Group]) -> float | None:
    """How often one who knows the true reward agrees with the people of this run on these pairs: the best that can be
    expected. None where it cannot be known, as of other feedback, or of people who were asked elsewhere."""
    asked = not (config.data or config.judged or getattr(config, "reward", ""))
    if not asked or config.feedback != "pairs" or any(len(g.responses) != 2 or g.scores or g.prompts for g in groups):
        return None
    return voting.best_accuracy(
        *true_rewards(groups).reshape(-1, 2).T, noise=config.noise, annotators=config.annotators
    )
