"""Preferences as in the textbook: sample responses to each prompt, let somebody judge, note what is said of them."""

import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from nanopref.data import reviews
from nanopref.data.files import read_rows
from nanopref.data.formats import read_feedback, read_prompts
from nanopref.data.groups import Group, write_groups
from nanopref.data.tokenizer import Tokenizer
from nanopref.data.votes import AGGREGATES
from nanopref.feedback import voting
from nanopref.feedback.rewards import Rewards, as_answers, true_reward, true_rewards
from nanopref.models.language import LM
from nanopref.models.sampling import respond
from nanopref.running.files import read_object
from nanopref.running.flags import require
from nanopref.running.folder import Run
from nanopref.running.parallel import say


def training_prompts(file: str, n: int, stream: str, tokenizer: Tokenizer | None = None) -> list[str]:
    """The prompts that a file has for training, or n of the built-in task, drawn from a random stream of this name."""
    if file:
        return read_prompts(file, tokenizer)[0]
    rng = random.Random(stream)
    return [reviews.sample_prompt(rng) for _ in range(n)]


# ---- which answers are judged: (scores [K], heads' scores [K, H], those that can be used, β, rng) -> some of them ----


def best_worst(scores: np.ndarray, heads: np.ndarray, usable: list[int], beta: float, rng) -> tuple[int, ...]:
    """The best and the worst of K."""
    ordered = sorted(usable, key=lambda k: -scores[k])
    return ordered[0], ordered[-1]


def most_doubtful(scores: np.ndarray, heads: np.ndarray, usable: list[int], beta: float, rng) -> tuple[int, ...]:
    """The two whose difference the heads of a reward model disagree about most (Gleave & Irving 2022)."""
    return max(itertools.combinations(usable, 2), key=lambda pair: np.std(heads[pair[0]] - heads[pair[1]]))


def rejection_sampled(scores: np.ndarray, heads: np.ndarray, usable: list[int], beta: float, rng) -> tuple[int, ...]:
    """Two drawn as from π* ∝ π_ref e^{r/β}: of the candidates in turn each is taken with probability e^{(r - max r)/β},
    the largest reward of those not yet taken, until two are (RSO: Liu et al. 2023, algorithm 1)."""
    left, taken = list(usable), []
    while len(taken) < 2:
        most = max(scores[k] for k in left)
        for k in list(left):
            if len(taken) < 2 and rng.random() < np.exp((scores[k] - most) / beta):
                taken.append(k)
                left.remove(k)
    return tuple(taken)


def best(scores: np.ndarray, heads: np.ndarray, usable: list[int], beta: float, rng) -> tuple[int, ...]:
    """The best of K alone, to be imitated."""
    return (max(usable, key=lambda k: scores[k]),)


SELECTIONS = {"best-worst": best_worst, "doubt": most_doubtful, "rso": rejection_sampled, "best": best}


def _selected(
    how: str, feedback: str, scores: np.ndarray, heads: np.ndarray, texts: list[list[str]],
    beta: float, rng: np.random.Generator,
) -> Iterator[tuple[int, tuple[int, ...]]]:  # fmt: skip
    """(prompt's number, numbers of the answers that are judged together), for scores [G, K] and heads' [G, K, H]. `all`
    takes each pair, or the K at once; the others pass over a prompt with fewer than two answers that can be used."""
    for g, answers in enumerate(texts):
        usable = [k for k, text in enumerate(answers) if text.strip()]
        if how == "all":
            K = range(len(answers))
            yield from ((g, chosen) for chosen in (itertools.combinations(K, 2) if feedback == "pairs" else [tuple(K)]))
        elif len(usable) >= 2:
            yield g, SELECTIONS[how](scores[g], heads[g], usable, beta, rng)


# ---- what people say: (answers to a prompt as groups [G] of K, rewards [G, K], how they err) -> groups, figures ------


def _pairs(groups: list[Group], rewards: np.ndarray, *, votes: str, **people) -> tuple[list[Group], dict]:
    """Two that are alike to people who never err are no pair."""
    rows, said, figures = np.arange(len(groups)), None, {}
    if votes == "majority" and np.ndim(people["noise"]) == 0:  # alike people need not be told apart
        first = voting.annotate(*rewards.T, **people)
    else:
        there = [all(map(str.strip, group.responses)) for group in groups]  # the others would tell of nobody's skill
        groups, rewards = list(itertools.compress(groups, there)), rewards[there]
        if not groups:
            return [], {}
        noise = np.broadcast_to(people["noise"], people["annotators"])
        said = voting.votes(*rewards.T, noise=noise, rng=people["rng"])
        rows, first = AGGREGATES[votes](said)
        figures = {"voters": voting.estimates(said, rewards[:, 0] - rewards[:, 1], noise)}
    differ = (rewards[:, 0] != rewards[:, 1]) | (np.max(people["noise"]) > 0)
    found = []
    for row, is_first in zip(rows, first, strict=True):
        if differ[row]:
            # in the file, who voted for the answer that comes first there
            about = () if said is None else (("votes", [int(vote == is_first) for vote in said[:, row]]),)
            found.append(groups[row]._replace(responses=groups[row].responses[:: 1 if is_first else -1], about=about))
    return found, figures


def _rankings(groups: list[Group], rewards: np.ndarray, *, votes: str, **people) -> tuple[list[Group], dict]:
    return [
        group._replace(responses=tuple(group.responses[k] for k in order))
        for group, order in zip(groups, voting.rank(rewards, **people), strict=True)
    ], {}


def _ratings(groups: list[Group], rewards: np.ndarray, *, votes: str, **people) -> tuple[list[Group], dict]:
    rated = voting.rate(rewards, **people)
    return [
        Group(group.prompt, tuple(group.responses[k] for k in order), scores=tuple(row[order].tolist()))
        for group, row, order in zip(groups, rated, np.argsort(-rated, axis=1, kind="stable"), strict=True)
    ], {}


def _labels(groups: list[Group], rewards: np.ndarray, *, votes: str, **people) -> tuple[list[Group], dict]:
    """Good is what people prefer to an answer of the middle."""
    good = voting.annotate(rewards, np.full_like(rewards, np.median(rewards)), **people)
    return [
        Group(group.prompt, (text,), scores=(float(label),))
        for group, labels in zip(groups, good, strict=True)
        for text, label in zip(group.responses, labels, strict=True)
    ], {}


def _responses(groups: list[Group], rewards: np.ndarray, **people) -> tuple[list[Group], dict]:
    """Nothing: an answer that was chosen is there to be imitated."""
    return groups, {}


FEEDBACK = {"pairs": _pairs, "labels": _labels, "rankings": _rankings, "ratings": _ratings, "responses": _responses}


# ---- all of it -------------------------------------------------------------------------------------------------------


def collect(
    policy: LM,
    tokenizer: Tokenizer,
    prompts: list[str],
    judge: Rewards,
    chooser: Rewards | None = None,
    *,
    feedback: str = "pairs",
    answers: int = 2,
    select: str = "all",
    beta: float = 1.0,
    noise: float,
    annotators: int,
    voters: Sequence[float] = (),
    votes: str = "majority",
    max_new_tokens: int,
    sample_batch: int,
    seed: int,
    round: int = 0,
    true: bool = True,
) -> tuple[list[Group], dict[str, Any]]:
    """So many responses of the policy to each prompt, some of them selected, and what the annotators say of these: a
    kind of feedback. And what is thought of all responses, on average, also by the task's own reward if it is `true`.

    `judge` gives what annotators see, `chooser` (default: the judge) what is selected by. Groups that hold two equal
    answers, or one that is empty or has no end, are left out. UserError if few remain.
    """
    number = f" {round}" if round else ""
    setting = {"max_new_tokens": max_new_tokens, "batch_size": sample_batch, "seed": seed}
    found = respond(policy, tokenizer, prompts * answers, stream=f"sampling pairs{number}", **setting)
    # an answer without an end is no answer: as text it would be given one
    texts = [[answer.text if answer.ended else "" for answer in found[i :: len(prompts)]] for i in range(len(prompts))]
    there = np.array([[bool(text.strip()) for text in row] for row in texts])
    asked = [Group(x, tuple(filter(str.strip, row))) for x, row in zip(prompts, texts, strict=True)]
    asked = [group for group in asked if group.responses]
    said = as_answers(asked, tokenizer, policy.context)

    def check(left: int) -> None:
        of = len(prompts) * groups_of(answers, feedback, select, len(voters) or annotators, votes)
        hint = "others are empty, have no end, are equal or of equal reward: start again with --overwrite and "
        hint += "a higher --max-new-tokens, more --prompts, or another --reward"
        require(left >= 20, f"only {left} of {of} {feedback} can be used: {hint}")

    def spread(numbers: Tensor) -> np.ndarray:
        """[N, …] of the answers that are there -> [G, K, …], 0 for the others."""
        whole = np.zeros((*there.shape, *numbers.shape[1:]))
        whole[there] = numbers.numpy()
        return whole

    check(len(said))
    each = judge.each(said)
    rewards = spread(judge.total(each))
    scores = spread(chooser(said)) if chooser else rewards
    heads = spread((chooser or judge).heads(said)) if select == "doubt" else scores[..., None]
    rng = np.random.default_rng(seed if not round else [seed, round])
    picked = list(_selected(select, feedback, scores, heads, texts, beta, rng))
    groups = [Group(prompts[g], tuple(texts[g][k] for k in chosen)) for g, chosen in picked]
    rewards = np.array([[rewards[g, k] for k in chosen] for g, chosen in picked])
    people = {"noise": voters or noise, "annotators": len(voters) or annotators, "votes": votes, "rng": rng}
    judged, figures = FEEDBACK[feedback](groups, rewards, **people) if groups else ([], {})
    kept = [
        group
        for group in judged
        if all(text.strip() for text in group.responses) and len(set(group.responses)) == len(group.responses)
    ]
    check(len(kept))
    if len(judge.parts) > 1:
        named = [(group.prompt, text) for group in asked for text in group.responses]
        spoken = dict(zip(named, each.T, strict=True))
        kept = [_with_reason(group, judge, spoken) for group in kept]
    means = {"answers": len(found), **judge.means(each)}
    means |= {"true_reward": float(true_reward(said).mean())} if true else {}
    return kept, means | figures


def groups_of(answers: int, feedback: str, select: str, annotators: int, votes: str) -> int:
    """How many groups a prompt makes, if all of its answers are of use."""
    alone = {"labels": answers, "pairs": math.comb(answers, 2) if select == "all" else 1}.get(feedback, 1)
    return alone * (annotators if votes == "count" else 1)


def _with_reason(group: Group, judge: Rewards, spoken: dict[tuple[str, str], Tensor]) -> Group:
    """The group with whose number, of several, spoke most for the first answer against the last."""
    lead = judge.weights * (spoken[group.prompt, group.responses[0]] - spoken[group.prompt, group.responses[-1]])
    why = (("why", list(judge.parts)[int(lead.argmax())]),) if lead.max() > 0 else ()
    return group._replace(about=group.about + why)


def ensure_feedback(
    run: Run,
    policy: LM,
    tokenizer: Tokenizer,
    judge: Rewards,
    chooser: Rewards | None,
    kinds: dict[str, Sequence[str]],
    round: int = 0,
    rounds: int = 1,
) -> tuple[list[Group], list[Group], Counter]:
    """`collect`, kept in OUT/feedback.jsonl so that a resumed run goes on with the same, and its figures in round.json;
    as `read_feedback` reads it.

    The prompts, of which each round has its share, are those that --data has for training, or new ones of the built-in
    task. The run's config has the flags of FeedbackFlags, ObjectiveFlags and SamplingFlags.
    """
    config = run.config
    n = config.prompts // rounds

    def make() -> tuple[str | bytes, str]:
        stream = f"pairs {config.seed}"
        prompts = training_prompts(config.data, n * rounds, stream, tokenizer)
        if config.data:
            shuffled = random.Random(stream).sample(prompts, len(prompts))
            prompts = list(itertools.islice(itertools.cycle(shuffled), n * rounds))
        names = ("feedback", "answers", "select", "noise", "annotators", "voters", "votes", "max_new_tokens")
        setting = {name: getattr(config, name) for name in (*names, "sample_batch", "seed")}
        with run.stage("feedback"):
            asked = prompts[round * n : (round + 1) * n]
            found, means = collect(
                policy, tokenizer, asked, judge, chooser, beta=getattr(config, "beta", 1.0), round=round,
                true=not config.data, **setting,
            )  # fmt: skip
            for voter in means.get("voters", ()):
                words = (
                    "  a voter of noise {noise:g}: by all votes right in {accuracy:.0%}, as of {estimated_noise:.2g}"
                )
                say(words.format(**voter))
        return write_groups(found), json.dumps({"round": round + 1, **means}) + "\n"

    path, _ = run.keep(make, "feedback.jsonl", "round.json")
    groups, held_out, notes = read_feedback(path, kinds, config.loss)
    k = len(config.voters) or config.annotators
    asked = n * groups_of(config.answers, config.feedback, config.select, k, config.votes)
    if (missing := asked - sum(1 for _ in read_rows(path))) > 0:
        notes[f"{config.feedback} dropped: answers equal, alike in reward, empty or without an end"] = missing
    return groups, held_out, notes


def asked_in_rounds(run: Run) -> list[dict[str, Any]]:
    """What was thought of the answers that each round of a run sampled."""
    found = (read_object(run.path("round.json", round)) for round in range(run.config.rounds))
    return [row for row in found if row]


def best_possible(config: Any, groups: Sequence[Group]) -> float | None:
    """How often one who knows the true reward agrees with the people of this run on these pairs: the best that can be
    expected. None where it cannot be known, as of other feedback, or of people who were asked elsewhere."""
    asked = not (config.data or config.judged or config.reward or config.voters or config.votes != "majority")
    if not asked or config.feedback != "pairs" or any(len(g.responses) != 2 or g.scores or g.prompts for g in groups):
        return None
    return voting.best_accuracy(
        *true_rewards(groups).reshape(-1, 2).T, noise=config.noise, annotators=config.annotators
    )
