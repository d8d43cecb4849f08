"""Preferences as in the textbook: sample two responses to each prompt, let somebody judge, note who is preferred."""

import itertools
import random
from collections import Counter

import numpy as np

from nanopref.data import reviews
from nanopref.data.formats import read, read_prompts
from nanopref.data.groups import Group, write_groups
from nanopref.data.tokenizer import Tokenizer
from nanopref.feedback.rewards import Reward, as_answers
from nanopref.feedback.voting import annotate
from nanopref.generate import respond
from nanopref.models.gpt2 import GPT
from nanopref.running.flags import require
from nanopref.running.folder import Run, write_atomic
from nanopref.running.parallel import barrier, rank


def training_prompts(file: str, n: int, stream: str) -> list[str]:
    """The prompts that a file has for training, or n of the built-in task, drawn from a random stream of this name."""
    if file:
        return read_prompts(file)[0]
    rng = random.Random(stream)
    return [reviews.sample_prompt(rng) for _ in range(n)]


def collect(
    policy: GPT,
    tokenizer: Tokenizer,
    prompts: list[str],
    reward: Reward,
    *,
    noise: float,
    annotators: int,
    max_new_tokens: int,
    sample_batch: int,
    seed: int,
) -> list[Group]:
    """Pairs: two responses of the policy to each prompt, and first the one that the annotators prefer.

    `reward` gives what they see. Pairs whose answers are equal, or of which one is empty or has no end, are left out.
    UserError if few remain.
    """
    setting = {"max_new_tokens": max_new_tokens, "batch_size": sample_batch, "seed": seed}
    answers = respond(policy, tokenizer, prompts * 2, stream="sampling pairs", **setting)
    # an answer without an end is no answer: as text it would be given one
    texts = [answer.text if answer.ended else "" for answer in answers]
    groups = [
        Group(x, tuple(pair)) for x, *pair in zip(prompts, texts[: len(prompts)], texts[len(prompts) :], strict=True)
    ]
    rewards = reward(as_answers(groups, tokenizer, policy.config.block_size)).double().numpy().reshape(-1, 2).T
    first_is_better = annotate(*rewards, noise=noise, annotators=annotators, rng=np.random.default_rng(seed))
    found = [
        group._replace(responses=group.responses if first else group.responses[::-1])
        for group, first in zip(groups, first_is_better, strict=True)
        if all(text.strip() for text in group.responses) and group.responses[0] != group.responses[1]
    ]
    require(len(found) >= 20, f"only {len(found)} of {len(prompts)} pairs of answers end: raise --max-new-tokens")
    return found


def ensure_pairs(run: Run, policy: GPT, tokenizer: Tokenizer, reward: Reward) -> tuple[list[Group], Counter]:
    """`collect`, kept in OUT/pairs.jsonl so that a resumed run goes on with the same; and notes of what is missing.

    The prompts are those that --data has for training, or new ones of the built-in task. The run's config has the flags
    of FeedbackFlags and SamplingFlags.
    """
    config, path = run.config, run.folder / "pairs.jsonl"
    if not path.exists() and rank() == 0:
        stream = f"pairs {config.seed}"
        prompts = training_prompts(config.data, config.pairs, stream)
        if config.data:
            shuffled = random.Random(stream).sample(prompts, len(prompts))
            prompts = list(itertools.islice(itertools.cycle(shuffled), config.pairs))
        names = ("noise", "annotators", "max_new_tokens", "sample_batch", "seed")
        with run.stage("pairs"):
            found = collect(policy, tokenizer, prompts, reward, **{name: getattr(config, name) for name in names})
            write_atomic(path, write_groups(found))
    barrier()
    _, pairs, notes = read(path)
    if len(pairs) < config.pairs:
        notes["pairs dropped: answers equal, empty or without an end"] = config.pairs - len(pairs)
    return pairs, notes
