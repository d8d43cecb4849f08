"""Whoever judges gives numbers to answers: the built-in task's true reward, or a reward model. Higher is better."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanopref import models
from nanopref.data import reviews
from nanopref.data.groups import Encoded, Group, encode
from nanopref.data.tokenizer import Tokenizer
from nanopref.models.gpt2 import GPT
from nanopref.models.inference import response_scores
from nanopref.models.sampling import Answer, pack
from nanopref.models.scalar import ScalarModel
from nanopref.running.flags import require

Reward = Callable[[Sequence[Answer]], Tensor]  # N answers -> [N] float32


def true_reward(answers: Sequence[Answer]) -> Tensor:
    """What the built-in task pays for each answer."""
    return torch.tensor([reviews.true_reward(answer.text) for answer in answers])


def true_rewards(groups: Sequence[Group]) -> np.ndarray:
    """What it pays for each response of these groups, one after the other: [N]."""
    return np.array([reviews.true_reward(text) for group in groups for text in group.responses])


def model_reward(model: ScalarModel, doubt: float = 0.0, batch_size: int = 64) -> Reward:
    """What a reward model says: the mean of its heads, less `doubt` times their spread (Coste et al. 2024)."""

    def reward(answers: Sequence[Answer]) -> Tensor:
        heads = response_scores(model, pack(answers), batch_size=batch_size)
        return heads.mean(1) - doubt * heads.std(1, correction=0)

    return reward


def weighted(rewards: Sequence[Reward], weights: Sequence[float]) -> Reward:
    """Their weighted sum. Raises UserError where a score is not finite."""

    def reward(answers: Sequence[Answer]) -> Tensor:
        total = sum(weight * one(answers) for one, weight in zip(rewards, weights, strict=True))
        require(bool(total.isfinite().all()), "the weighted scores of --reward are no finite numbers")
        return total

    return reward


def load(
    names: Sequence[str],
    weights: Sequence[float],
    doubt: float,
    policy: GPT,
    tokenizer: Tokenizer,
    batch_size: int = 64,
) -> tuple[Reward, list[ScalarModel]]:
    """The weighted sum of what `true` and the reward models in folders say, and those models.

    Raises UserError where one does not fit the policy, or where there is doubt to subtract and none has any.
    """
    found = {name: load_model(name, policy, tokenizer) for name in names if name != "true"}
    several = any(model.heads > 1 for model in found.values())
    require(not doubt or several, "--doubt needs a --reward with several heads (train_rm.py --heads)")
    rewards = [model_reward(found[name], doubt, batch_size) if name in found else true_reward for name in names]
    return weighted(rewards, weights), list(found.values())


def load_model(name: str | Path, policy: GPT, tokenizer: Tokenizer) -> ScalarModel:
    """The reward model of a folder, on the policy's device. Raises UserError where it cannot judge what that writes."""
    model, other = models.load_scalar(name)
    require(other == tokenizer, f"--reward {name}: its tokenizer is not the policy's, so it would misread it")
    model.to(policy.device).eval()
    longest, needed = model.config.block_size, policy.config.block_size
    require(longest >= needed, f"--reward {name}: its context of {longest} is less than the policy's {needed}")
    said = response_scores(model, Encoded.pack([[([tokenizer.end_of_text], [tokenizer.end_of_text])]]))
    require(bool(said.isfinite().all()), f"--reward {name}: gives a score that is no finite number")
    return model


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


def as_answers(groups: Sequence[Group], tokenizer: Tokenizer, block_size: int) -> list[Answer]:
    """The responses of groups, as if a policy had just given them; they end."""
    encoded, _ = encode(groups, tokenizer, block_size)
    rows = [x.tolist() for x in encoded.tokens.split(encoded.row_lengths.tolist())]
    texts = [text for group in groups for text in group.responses]
    return [
        Answer(row[:n], row[n:], [], text, True)
        for row, n, text in zip(rows, encoded.prompt_lengths.tolist(), texts, strict=True)
    ]
