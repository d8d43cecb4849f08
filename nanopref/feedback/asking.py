"""A chat model that is asked what it thinks of answers, and replies with a letter (Lee et al. 2023, RLAIF).

    asks:FOLDER                which of two answers to a prompt is better
    rates:FOLDER               whether an answer is good
    asks:FOLDER:FILE.toml      which of two follows a principle better, for each principle of a file of rules (rules.py)
    rates:FOLDER:FILE.toml     whether an answer follows it

It says log p(A) - log p(B), where its reply begins. Each question is put twice, with what A and B stand for exchanged,
and half the difference counts: a leaning towards a letter or a place that adds to the log-odds is gone from it. The
mean of the two probabilities, as in the paper's section 3.1, would drown in such a leaning what is said besides.
"""

import os
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from nanopref import models
from nanopref.data import chat
from nanopref.data.dialogues import TURN, Dialogue
from nanopref.data.groups import Encoded
from nanopref.data.tokenizer import Tokenizer
from nanopref.feedback import rules
from nanopref.feedback.rules import Rule
from nanopref.models.inference import choice_logits
from nanopref.models.language import LM
from nanopref.models.sampling import Answer, response_text
from nanopref.running.flags import UserError, require

# What it reads: `a` and `b` are answers here,
WHICH = """Below are a prompt and two answers to it.

The prompt:
{prompt}

Answer A:
{a}

Answer B:
{b}

{question} Reply with A or B alone."""
BETTER, FOLLOWS_BETTER = "Which answer is better?", "Which answer follows this principle better? {principle}"

# and "Yes" and "No" here.
WHETHER = """Below are a prompt and an answer to it.

The prompt:
{prompt}

The answer:
{answer}

{question}
A: {a}
B: {b}
Reply with A or B alone."""
GOOD, FOLLOWS = "Is this a good answer?", "Does the answer follow this principle? {principle}"


class Judge(NamedTuple):
    """A chat model, and how it would begin to reply with a letter: what stands before it, and the two letters."""

    model: LM
    tokenizer: Tokenizer
    opening: list[int]
    letters: list[int]

    def log_odds(self, words: str, cases: Sequence[dict[str, str]], batch_size: int = 64) -> Tensor:
        """log p(A) - log p(B) for each case as it is, and with what A and B stand for exchanged [M, 2]."""
        asked = [case | turned for case in cases for turned in ({}, {"a": case["b"], "b": case["a"]})]
        rows = [[([*self.question(words, case), *self.opening], [])] for case in asked]
        logits = choice_logits(self.model, Encoded.pack(rows), self.letters, "asking", batch_size)
        return (logits[:, 0] - logits[:, 1]).view(-1, 2)

    def question(self, words: str, case: dict[str, str]) -> list[int]:
        """The tokens of a question. A prompt for which there is no room loses its oldest turns, or its beginning."""
        room, case = self.model.context - len(self.opening), dict(case)
        while True:
            tokens = chat.encode_prompt(self.tokenizer, Dialogue([("user", words.format(**case))]))
            if len(tokens) <= room:
                return tokens
            kept = self.tokenizer.encode(case["prompt"])[len(tokens) - room :]
            need = (
                f"the model that is asked has a context of {room}, and without the prompt a question of {len(tokens)}"
            )
            require(bool(case["prompt"]), need)
            text = self.tokenizer.decode_bytes(kept).decode("utf-8", "ignore")
            case["prompt"] = text[max(0, text.find("\n\nHuman:")) :].lstrip("\n")


def margins(log_odds: Tensor) -> Tensor:
    """What is said for the first of two, log-odds [M], whichever letter it had, from those of both orders [M, 2]."""
    return (log_odds[:, 0] - log_odds[:, 1]) / 2


def compare(judge: Judge, question: str, tokenizer: Tokenizer, batch_size: int, answers: Sequence[Answer]) -> Tensor:
    """Of each answer the mean of its log-odds against all answers to its prompt, itself included, for which they are 0.

    So two answers differ by their log-odds, and of more the numbers are those, with sum 0, whose differences come
    closest to what is said of the pairs. K answers to a prompt make K (K - 1) questions. Raises UserError where no
    prompt has two.
    """
    by_prompt: dict[str, list[int]] = {}
    for i, answer in enumerate(answers):
        by_prompt.setdefault(prompt_text(_asked(answer, tokenizer)), []).append(i)
    alone = bool(answers) and all(len(rows) == 1 for rows in by_prompt.values())
    require(not alone, "asks:FOLDER compares the answers to a prompt, and here each prompt has but one: rates:FOLDER "
            "takes them singly")  # fmt: skip
    texts = [answer.text.strip() for answer in answers]
    pairs = [
        (prompt, a, b)
        for prompt, rows in by_prompt.items()
        for a, b in combinations(dict.fromkeys(texts[i] for i in rows), 2)
    ]
    cases = [{"prompt": prompt, "a": a, "b": b, "question": question} for prompt, a, b in pairs]
    said = dict(zip(pairs, margins(judge.log_odds(WHICH, cases, batch_size)).tolist(), strict=True))
    said |= {(prompt, b, a): -margin for (prompt, a, b), margin in said.items()}
    numbers = torch.zeros(len(answers))
    for prompt, rows in by_prompt.items():
        for i in rows:
            numbers[i] = sum(said.get((prompt, texts[i], texts[j]), 0.0) for j in rows) / len(rows)
    return numbers


def rate(judge: Judge, question: str, tokenizer: Tokenizer, batch_size: int, answers: Sequence[Answer]) -> Tensor:
    """The log-odds that an answer is good [N], each asked of alone."""
    case = {"question": question, "a": "Yes", "b": "No"}
    cases = [case | {"prompt": prompt_text(_asked(x, tokenizer)), "answer": x.text.strip()} for x in answers]
    return margins(judge.log_odds(WHETHER, cases, batch_size))


def _asked(answer: Answer, tokenizer: Tokenizer) -> str:
    return answer.asked or response_text(answer.prompt, tokenizer)


def prompt_text(prompt: str) -> str:
    """A prompt, as the judge reads it."""
    return prompt.removesuffix(TURN).strip()


# name: what is asked, of an answer as such and by a principle, and who turns what is said into numbers
WAYS: dict[str, tuple[str, str, Callable]] = {
    "asks": (BETTER, FOLLOWS_BETTER, compare),
    "rates": (GOOD, FOLLOWS, rate),
}


def load(
    name: str, policy: LM | None, tokenizer: Tokenizer | None, batch_size: int
) -> list[tuple[Rule, Callable[[Sequence[Answer]], Tensor] | None]]:
    """What a word of --reward asks: rules and who judges by each; nobody where a rule has a test.

    The model goes to the policy's device. Raises UserError for what cannot be found, or cannot be asked.
    """
    way, _, rest = name.partition(":")
    folder, _, file = rest.rpartition(":") if rest.endswith(".toml") else (rest, "", "")
    require(bool(folder), f"--reward {name}: names no chat model: {way}:FOLDER or {way}:FOLDER:FILE.toml")
    asked = rules.load(file, sentences=True) if file else [Rule(name, "", "", None, 1.0)]
    judge = load_judge(folder)
    if policy is not None:
        models.frozen(judge.model, policy.device)
    question, by_principle, answer = WAYS[way]

    def reward(rule: Rule) -> Callable[[Sequence[Answer]], Tensor] | None:
        words = by_principle.format(principle=rule.principle) if rule.principle else question
        return None if rule.test else partial(answer, judge, words, tokenizer, batch_size)

    return [(rule, reward(rule)) for rule in asked]


@lru_cache(maxsize=4)  # several words may name it, and it is looked at before a run begins
def load_judge(folder: str) -> Judge:
    """The chat model in a folder. Raises UserError where it has no chat template, or would write A or B in pieces."""
    model, tokenizer = models.load(folder)
    require(bool(tokenizer.template), f"{folder}: has no chat template, so it cannot be asked: name a chat model")
    probe = Dialogue([("user", "?")])
    try:
        chat.encode_prompt(tokenizer, probe)
        replies = [chat.encode_answer(tokenizer, probe, letter) for letter in "AB"]
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    opening = os.path.commonprefix(replies)  # noqa: RUF071, of lists: what a template writes before any answer
    letters = [reply[len(opening)] if len(reply) > len(opening) else -1 for reply in replies]
    whole = [tokenizer.decode([letter]).strip() for letter in letters] == ["A", "B"]
    require(whole, f"{folder}: A and B are no tokens of its own, so it cannot be asked for one of them")
    return Judge(model.eval(), tokenizer, opening, letters)
