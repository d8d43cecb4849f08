"""Whoever judges gives numbers to answers, higher is better; and one notation for all of them:

    true, specificity          what the built-in task pays, and its second attribute
    out/rm                     a reward model, by its folder; with --doubt less the spread of its heads
    rules, rules:mine.toml     written rules (feedback/rules.py), a number each: -1 where it is broken
    asks:FOLDER, rates:FOLDER  a chat model that is asked which of two answers is better, or whether one is good; with
                               :principles.toml behind it by each of these (feedback/asking.py)
    implicit:out/dpo           β log π/π_ref of a policy (Rafailov et al. 2023, eq. 5); `implicit`: of the one in hand
    mine.py:score              a Python function of yours, (prompt, response) -> number

`*0.7` behind one is its weight; the weighted numbers of several are added.
"""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanopref import models
from nanopref.data import chat, reviews
from nanopref.data.groups import Encoded, Group, encode
from nanopref.data.tokenizer import Tokenizer
from nanopref.feedback import asking, rules
from nanopref.models.inference import response_logprobs, response_scores
from nanopref.models.language import LM
from nanopref.models.sampling import Answer, pack, response_text
from nanopref.models.scalar import ScalarModel
from nanopref.running import functions, parallel
from nanopref.running.flags import RewardError, UserError, is_code, require
from nanopref.running.folder import read_metrics

Reward = Callable[[Sequence[Answer]], Tensor]  # N answers -> [N] float32


def true_reward(answers: Sequence[Answer]) -> Tensor:
    """What the built-in task pays for each answer."""
    return torch.tensor([reviews.true_reward(answer.text) for answer in answers])


def true_rewards(groups: Sequence[Group]) -> np.ndarray:
    """What it pays for each response of these groups, one after the other: [N]."""
    return np.array([reviews.true_reward(text) for group in groups for text in group.responses])


def specificity(answers: Sequence[Answer]) -> Tensor:
    """The built-in task's second attribute of each answer."""
    return torch.tensor([reviews.specificity(answer.text) for answer in answers])


def model_reward(model: ScalarModel, doubt: float = 0.0, batch_size: int = 64) -> Reward:
    """What a reward model says: the mean of its heads, less `doubt` times their spread (Coste et al. 2024)."""

    def reward(answers: Sequence[Answer]) -> Tensor:
        heads = response_scores(model, pack(answers), batch_size=batch_size)
        return heads.mean(1) - doubt * heads.std(1, correction=0)

    return reward


def implicit_reward(policy: LM, reference: LM, beta: float, batch_size: int = 64) -> Reward:
    """β log π(y|x)/π_ref(y|x) (Rafailov et al. 2023, eq. 5), of the policy as it is when it is asked."""

    def reward(answers: Sequence[Answer]) -> Tensor:
        logprobs = [response_logprobs(model, pack(answers), batch_size=batch_size) for model in (policy, reference)]
        return beta * (logprobs[0] - logprobs[1])

    return reward


def rule_reward(rule: rules.Rule, answers: Sequence[Answer]) -> Tensor:
    """-1 for each answer that breaks the rule."""
    return torch.tensor([rule.kept(answer.text) - 1.0 for answer in answers])


def function_reward(name: str, function: Callable, tokenizer: Tokenizer, batch_size: int, answers) -> Tensor:
    """What a user's function says. It is called with a prompt and a response; or, if it names its arguments `prompts`
    and `responses`, with lists of them, for which it gives a list. UserError, with what was asked, where it fails."""
    say = partial(_numbers, name, function, tokenizer, batch_size)
    return torch.tensor(parallel.shared(say, answers), dtype=torch.float32)


def _numbers(name: str, function: Callable, tokenizer: Tokenizer, batch_size: int, answers) -> list[float]:
    together = {"prompts", "responses"} <= functions.parameters(function)
    asked = [(answer.asked or response_text(answer.prompt, tokenizer), answer.text) for answer in answers]
    found: list[float] = []
    for i in range(0, len(asked), size := batch_size if together else 1):
        prompts, responses = map(list, zip(*asked[i : i + size], strict=True))
        try:
            said = function(prompts=prompts, responses=responses) if together else [function(prompts[0], responses[0])]
            if isinstance(said, str | bytes):
                raise TypeError("gives text and no list of numbers")
            numbers = [float(number) for number in said]
        except (Exception, SystemExit) as error:  # which may be any, since the code is not ours
            if len(prompts) > 1:  # one of them did it: the first that does so alone
                for answer in answers[i : i + size]:
                    _numbers(name, function, tokenizer, 1, [answer])
            raise UserError(
                f"--reward {name}: {functions.in_a_line(error)}; {_asked(prompts[0], responses[0])}"
            ) from None
        require(
            len(numbers) == len(prompts), f"--reward {name}: gives {len(numbers)} numbers for {len(prompts)} answers"
        )
        found += numbers
    return found


def _asked(prompt: str, response: str) -> str:
    """Prompt and response, in a sentence."""
    short = (text if len(text) <= 200 else f"{text[:97]} … {text[-100:]}" for text in (prompt, response))
    return "it was asked for the prompt {!r} and the response {!r}".format(*short)


class Rewards(NamedTuple):
    """Whoever was named with --reward."""

    parts: dict[str, Reward]
    weights: Tensor  # of each part [J]
    models: list[ScalarModel]  # the reward models among them

    def each(self, answers: Sequence[Answer]) -> Tensor:
        """What each part says of each answer [J, N]. Raises UserError for what is no finite number."""
        try:
            found = torch.stack([part(answers).float() for part in self.parts.values()])
        except UserError as error:
            raise RewardError(str(error)) from None
        for name, row in zip(self.parts, found, strict=True):
            if bad := (~row.isfinite()).nonzero().flatten().tolist():
                answer = f"an answer of {len(answers[bad[0]].tokens)} tokens, {answers[bad[0]].text[:200]!r}"
                raise RewardError(
                    f"--reward {name}: gives {row[bad[0]].item()}, which is no finite number, to {answer}"
                )
        return found

    def __call__(self, answers: Sequence[Answer]) -> Tensor:
        """The weighted sum of what they say [N]."""
        return self.total(self.each(answers))

    def total(self, each: Tensor) -> Tensor:
        """Of what each part says [J, N] the weighted sum [N]."""
        total = self.weights @ each
        if not total.isfinite().all():
            raise RewardError("the weighted scores of --reward are no finite numbers")
        return total

    def heads(self, answers: Sequence[Answer]) -> Tensor:
        """What each head of each reward model says [N, heads]."""
        return torch.cat([response_scores(model, pack(answers)) for model in self.models], 1)

    def means(self, each: Tensor) -> dict[str, float]:
        """For a log: the mean score and, where there are several, of each part, for what they say [J, N]."""
        parts = {f"score {name}": mean for name, mean in zip(self.parts, each.mean(1).tolist(), strict=True)}
        return {"score": self.total(each).mean().item(), **(parts if len(parts) > 1 else {})}


def alone(reward: Reward, name: str = "true") -> Rewards:
    """One reward as the only judge."""
    return Rewards({name: reward}, torch.ones(1), [])


# ---- the notation ----------------------------------------------------------------------------------------------------


def parse(word: str) -> tuple[str, float]:
    """A word of --reward -> who, and the weight. Raises UserError for a weight that is none."""
    name, star, weight = word.rpartition("*")
    try:
        found = (name, float(weight)) if star else (word, 1.0)
    except ValueError:
        found = word, math.nan
    require(math.isfinite(found[1]), f"--reward {word}: what stands behind * must be a finite number")
    require(bool(found[0]), f"--reward {word!r}: names nobody")
    return found


def load(words: Sequence[str], policy: LM | None, tokenizer: Tokenizer | None, config: Any) -> Rewards | None:
    """Whoever `words` name, on the policy's device; None where there is no policy yet, for which all is checked that
    can be. The config has the flag doubt and perhaps data, init and micro_batch.

    Raises UserError for what cannot be found, or cannot judge what the policy writes.
    """
    require(bool(words), "--reward: name at least one, or leave the flag out")
    weights, found, scalar = [], {}, []
    batch_size = 4 * getattr(config, "micro_batch", 16)
    for word in words:
        name, weight = parse(word)
        parts: dict[str, tuple[float, Reward | None]] = {}
        if name in TASK:
            require(
                not getattr(config, "data", ""), f"--reward {name}: only the built-in task knows that of its answers"
            )
            parts[name] = 1.0, TASK[name]
        elif (kind := name.partition(":")[0]) == "rules":
            for rule in rules.load(name.partition(":")[2]):
                parts[rule.name] = rule.weight, partial(rule_reward, rule)
        elif kind in asking.WAYS:
            several = 1 not in (getattr(config, "group", 0), getattr(config, "answers", 0))
            require(kind == "rates" or several, f"--reward {name}: compares the answers to a prompt, and there is but "
                    "one: rates: takes them singly, --group and --answers make more")  # fmt: skip
            for rule, asked in asking.load(name, policy, tokenizer, batch_size):
                parts[rule.name] = rule.weight, asked or partial(rule_reward, rule)
        elif kind == "implicit":
            parts[name] = 1.0, _implicit(name, policy, tokenizer, getattr(config, "init", ""), batch_size)
        elif is_code(name):
            parts[name] = 1.0, partial(function_reward, name, functions.load("--reward", name), tokenizer, batch_size)
        elif policy is None:
            models.find(name)  # so that a missing folder is called that
            raise UserError(f"--reward {name}: name the policy that it was trained for with --init")
        else:
            scalar.append(load_model(name, policy, tokenizer))
            parts[name] = 1.0, model_reward(scalar[-1], config.doubt, batch_size)
        for part in parts:
            require(part not in found, f"--reward: {part} is named twice; give it one weight")
        found |= {part: reward for part, (_, reward) in parts.items()}
        weights += [weight * own for own, _ in parts.values()]
    several = any(model.heads > 1 for model in scalar)
    require(not config.doubt or several, "--doubt needs a --reward with several heads (train_rm.py --heads)")
    return None if policy is None else Rewards(found, torch.tensor(weights), scalar)


def who(config: Any, policy: LM | None, tokenizer: Tokenizer | None) -> tuple[Rewards | None, Rewards | None]:
    """Who judges, by --reward, or else with the built-in task's true reward in mind; and who selects, by --chooser."""
    people = () if config.data or config.judged else ("true",)  # what they said elsewhere is read and not asked
    words = people if config.reward is None else config.reward
    judge = load(words, policy, tokenizer, config) if words or config.reward == () else None
    chooser = load(config.chooser, policy, tokenizer, config) if config.chooser is not None else None
    require(not config.doubt or bool(config.reward or config.chooser), "--doubt: there is no --reward that has any")
    if config.select == "doubt":
        several = policy is not None and any(model.heads > 1 for model in (chooser or judge).models)
        require(several, "--select doubt needs a --chooser or --reward with several heads (train_rm.py --heads)")
    return judge, chooser


TASK = {"true": true_reward, "specificity": specificity}  # what only the built-in task has


def load_model(name: str | Path, policy: LM, tokenizer: Tokenizer) -> ScalarModel:
    """The reward model of a folder, on the policy's device. Raises UserError where it cannot judge what that writes."""
    model, other = models.load_scalar(name)
    _check_fit(f"--reward {name}", model, other, policy, tokenizer)
    models.frozen(model, policy.device)
    said = response_scores(model, Encoded.pack([[([tokenizer.end_of_text], [tokenizer.end_of_text])]]))
    require(bool(said.isfinite().all()), f"--reward {name}: gives a score that is no finite number")
    return model


def _check_fit(asked: str, model: LM | ScalarModel, other: Tokenizer, policy: LM, tokenizer: Tokenizer) -> None:
    require(other == tokenizer, f"{asked}: its tokenizer is not the policy's, so it would misread it")
    longest, needed = model.context, policy.context
    require(longest >= needed, f"{asked}: its context of {longest} is less than the policy's {needed}")


def _implicit(name: str, policy: LM | None, tokenizer: Tokenizer, init: str, batch_size: int) -> Reward | None:
    """The implicit reward of a run's policy, or of the one in hand, whose folder --init names."""
    folder = name.partition(":")[2]
    start, found = held_against(folder or init, f"--reward {name}")
    if policy is None:
        return None
    pair = [load_policy(path, policy, tokenizer, f"--reward {name}") if path else policy for path in (folder, start)]
    return implicit_reward(*pair, found["beta"], batch_size)


def held_against(folder: str, asked: str) -> tuple[str, dict[str, Any]]:
    """Of the run in a folder, whose policy is a reward β log π/π_ref: π_ref, by its folder or its name on the hub, and
    its flags, among them the β with which it ended. UserError, which begins with what was `asked`, where it says
    neither, or was fitted to another reward."""
    start = made_from([folder])
    found = _flags_of(folder) if start else {}
    beta, usual = found.get("beta"), {"reference": "model", "logprobs": "sum"}
    alike = all(found.get(name, value) == value for name, value in usual.items())
    require(alike, f"{asked}: trained by --loss {found.get('loss')}, whose reward is not β log π/π_ref")
    hint = "no run of train_dpo.py or train_ppo.py, which would say its β and which policy it is held against"
    require(isinstance(beta, int | float), f"{asked}: {folder or 'no folder is named, so'}: {hint}")
    rows = read_metrics(Path(folder)) if found.get("kl_target") else []  # to which β was brought, round by round
    return start, found | {"beta": rows[-1].get("beta", beta) if rows else beta}


def load_policy(path: str, policy: LM, tokenizer: Tokenizer, asked: str) -> LM:
    """The policy in a folder, frozen, on the device of the one in hand. UserError where it would misread that one."""
    model, other = models.load(path)
    _check_fit(asked, model, other, policy, tokenizer)
    return models.frozen(model, policy.device)


def _flags_of(folder: str) -> dict[str, Any]:
    """The flags of the run in a folder; KeyError or the like where it holds none."""
    return json.loads((Path(folder) / "config.json").read_text())["flags"]


def made_from(words: Sequence[str]) -> str:
    """The policy from which the runs that --reward names were made, by its folder or its name on the hub: the first of
    which a folder speaks, or nothing."""
    for word in words:
        name = word and parse(word)[0].removeprefix("implicit:")  # an empty path would be the folder one stands in
        if not name:
            continue
        with suppress(OSError, ValueError, KeyError, TypeError):
            init, own = _flags_of(name)["init"], Path(name) / "sft"
            if init or (own / "config.json").is_file():
                return str(init or own)
    return ""


def as_answers(groups: Sequence[Group], tokenizer: Tokenizer, block_size: int) -> list[Answer]:
    """The responses of groups, as if a policy had just given them; they end."""
    encoded, _ = encode(groups, tokenizer, block_size)
    rows = [x.tolist() for x in encoded.tokens.split(encoded.row_lengths.tolist())]
    texts = [
        (text, chat.asked(tokenizer, prompt))
        for group in groups
        for text, prompt in zip(group.responses, group.asked(), strict=True)
    ]
    return [
        Answer(row[:n], row[n:], [], text, True, asked)
        for row, n, (text, asked) in zip(rows, encoded.prompt_lengths.tolist(), texts, strict=True)
    ]
