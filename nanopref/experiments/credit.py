"""Which words does a policy credit? `python -m nanopref.experiments.credit`

A policy is a token-level Q-function (Rafailov et al. 2024, "From r to Q*"), a critic a token-level value, and nobody
knows what the tokens of an answer are worth. Here the true reward tells: S of reviews.py is a sum over opinion words.
So the credit of each token, see evaluation/credit.py, is added up over words, clauses, sentences and responses, and set
beside what the true reward pays there. The token that ends an answer is of no word: its credit counts for the response
alone, where a policy's is then its implicit reward and a critic's the score less what was expected at first. A third
kind of credit is the change of the reward model's score from one prefix to the next; and of what is no credit, the list
of opinion words, read without what stands around them, says how much of the truth needs no context.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from nanopref import models
from nanopref.data import reviews
from nanopref.evaluation import credit
from nanopref.evaluation.metrics import auc, correlation, rank_correlation
from nanopref.experiments import figures, runs
from nanopref.experiments.figures import with_error
from nanopref.experiments.runs import ExperimentFlags, Variant
from nanopref.experiments.words import ROLES, by_word, words
from nanopref.feedback import rewards
from nanopref.models.inference import token_scores
from nanopref.models.sampling import Answer, pack
from nanopref.running import flags
from nanopref.running.files import read_object, write_atomic
from nanopref.running.flags import flag, require
from nanopref.running.parallel import start

NAMES = {"true": "true reward", "alone": "opinion words alone", "rm": "reward model: by prefix"} | {
    f"{run} {signal}": f"{name}: {label}"
    for run, name in {
        "dpo 0.15": "DPO β 0.15", "dpo 0.5": "DPO β 0.5", "ppo": "PPO, learned reward", "ppo-true": "PPO, true reward"
    }.items()
    for signal, label in {"log-ratio": "log-ratio", "value": "critic", "advantage": "GAE"}.items()
}  # fmt: skip
# the columns of the tables, and where in what was measured each is
AGREEMENT = {
    "word ρ": ("word", "spearman"), "word r": ("word", "pearson"), "clause ρ": ("clause", "spearman"),
    "sentence ρ": ("sentence", "spearman"), "response ρ, its end too": ("response", "spearman"),
    "AUC: praise or blame, words": ("word", "praise"), "AUC: praise or blame, clauses": ("clause", "praise"),
    "AUC: paid or not, words": ("word", "paid"), "AUC: paid or said again, clauses": ("clause", "again"),
    "word ρ, own answers": ("own", "word", "spearman"),
}  # fmt: skip
PLACES = {
    f"{kind}: {role}": ("where", kind, role)
    for kind in ("plain", "negated") for role in ROLES if (kind, role) != ("plain", "negator")
}  # fmt: skip


@dataclass
class Config(ExperimentFlags):
    """How well the credit of each token agrees, word by word, with what the true reward pays.

    Example: python -m nanopref.experiments.credit --seeds 1
    """

    out: str = "out/credit"
    prompts: int = 1280
    iterations: int = flag(24, "rounds of PPO", least=1)


def variants(config: Config) -> dict[str, Variant]:
    """Every run after the reward model's."""
    found = {f"dpo {beta:g}": Variant([*runs.FEW, "--loss", "dpo", "--beta", f"{beta:g}"]) for beta in (0.15, 0.5)}
    for name, reward in (("ppo", "SEED/rm"), ("ppo-true", "true")):
        words = [*runs.FEW, "--reward", reward, "--iterations", str(config.iterations), "--beta", "0.1"]
        found[name] = Variant(words, kind="", script="train_ppo.py")
    return found


# ---- how credit goes with what is paid -------------------------------------------------------------------------------


class Truth:
    """What the true reward pays in some responses, whose words stand one after the other: arrays of [words]."""

    def __init__(self, answers: Sequence[Answer], texts: Sequence[Sequence[str]]):
        """`texts` are those of each answer's tokens but the one that ends it. Answers without words are dropped."""
        self.answers, self.texts, self.words = zip(
            *((a, t, found) for a, t in zip(answers, texts, strict=True) if (found := words(a.text))), strict=True
        )
        flat = [word for found in self.words for word in found]
        self.value, self.paid, self.roles, clause, sentence = (
            np.array([getattr(word, name) for word in flat]) for name in ("value", "paid", "role", "clause", "sentence")
        )
        response = np.repeat(np.arange(len(self.words)), [len(found) for found in self.words])
        begins = np.diff(response, prepend=0) > 0
        clause, sentence = (np.cumsum(begins | (np.diff(x, prepend=0) > 0)) for x in (clause, sentence))
        # at each level, which group each word is of
        self.groups = {"word": np.arange(len(flat)), "clause": clause, "sentence": sentence, "response": response}

    def aligned(self, numbers: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
        """Credit of the tokens of each answer -> of all words, and of what ends each answer, 0 where nothing does."""
        each = list(zip(numbers, self.texts, self.words, strict=True))
        of_words = np.concatenate([by_word(n[: len(texts)], texts, found) for n, texts, found in each])
        return of_words, np.array([sum(n[len(texts) :]) for n, texts, _ in each])

    def counts(self) -> dict[str, int]:
        """Of what there is how much."""
        found = {"responses": len(self.words), "words": len(self.value), "clauses": self.groups["clause"].max() + 1}
        found |= {"paid": (self.paid != 0).sum(), "said again": ((self.value != 0) & (self.paid == 0)).sum()}
        return {name: int(n) for name, n in found.items()} | {"negators": int((self.roles == "negator").sum())}

    def alone(self) -> np.ndarray:
        """What each word would say if nothing stood around it."""
        texts = [
            a.text[w.start : w.end].lower() for a, found in zip(self.answers, self.words, strict=True) for w in found
        ]
        return np.array([(reviews.OPINIONS | reviews.VERDICTS).get(text, 0.0) for text in texts])

    def agreement(self, signal: np.ndarray, ends: np.ndarray | float = 0.0) -> dict[str, Any]:
        """At each level, how well a signal [words] goes with what is paid, and how well it tells apart praise that is
        paid from blame, what is paid from what is not (by its size), and what is paid from what is said again. `ends`
        [answers] is what of the signal is of no word, and is added for responses."""
        found: dict[str, Any] = {}
        for level, group in self.groups.items():
            credit, paid, value = (np.bincount(group, x) for x in (signal, self.paid, self.value))
            credit = credit + ends if level == "response" else credit
            towards, size = credit * np.sign(value), np.abs(credit)
            found[level] = {
                "spearman": rank_correlation(credit, paid),
                "pearson": correlation(credit, paid),
                "praise": auc(credit[paid > 0], credit[paid < 0]),
                "paid": auc(size[paid != 0], size[paid == 0]),
                "again": auc(towards[paid != 0], towards[(paid == 0) & (value != 0)]),
            }
        return found | {"where": self.where(signal)}

    def where(self, signal: np.ndarray) -> dict[str, dict[str, float]]:
        """Which words of a clause with one opinion, which is paid, have the credit for it: what words of each role have
        towards it, less what they have against it, as a share of all credit there by its size. For clauses with a
        negator and for those without."""
        group, found = self.groups["clause"], {}
        paid, said = np.bincount(group, self.paid), np.bincount(group, self.value != 0)
        negated = np.bincount(group, self.roles == "negator") > 0
        for name, which in (("plain", ~negated), ("negated", negated)):
            credit = np.where((which & (said == 1))[group], signal * np.sign(paid)[group], 0.0)
            size = np.abs(credit).sum() or 1.0
            found[name] = {role: float(credit[self.roles == role].sum() / size) for role in ROLES}
        return found


# ---- the runs --------------------------------------------------------------------------------------------------------


def measure(config: Config) -> dict:
    """{"signals": {name: [agreement, one a seed]}, "example": …, "counts": …}. In an agreement "own" is on the answers
    of the policy that the signal comes from, all else on those of the reference, the same for all signals."""
    (rms,) = runs.results(config, {"rm": Variant(runs.FEW_PAIRS, script="train_rm.py")}).values()
    folders = runs.results(config, variants(config))
    signals: dict[str, list[dict]] = {}
    example, counts = {}, []
    for rm in rms:
        common, own = truth_of(rm.parent / "sft", runs.seed_of(rm)), {}
        everything = {"alone": (common.alone(), 0.0)}  # what of each signal is of words, and of ends
        for folder in (rm.parent / name for name, done in folders.items() if rm.parent / name in done):
            theirs = truth_of(folder, runs.seed_of(rm))
            for signal, numbers in by_run(folder, common.answers).items():
                everything[f"{folder.name} {signal}"] = common.aligned(numbers)
            for signal, numbers in by_run(folder, theirs.answers).items():
                own[f"{folder.name} {signal}"] = theirs.agreement(*theirs.aligned(numbers))
        everything["rm"] = common.aligned(by_reward_model(rm, common.answers))
        for name, signal in everything.items():
            signals.setdefault(name, []).append(common.agreement(*signal) | {"own": own.get(name)})
        example = example or example_of(common, {name: of_words for name, (of_words, _) in everything.items()})
        counts.append(common.counts())
    require(bool(signals), f"--out {config.out}: no seed has a finished reward model")
    return {"signals": signals, "example": example, "counts": counts}


def truth_of(folder: Path, seed: int) -> Truth:
    """Of the answers of the model in a folder to prompts that none has seen."""
    answers, (_, tokenizer) = runs.answers(folder, seed), models.load(folder)
    said = [answer.tokens[: len(answer.tokens) - answer.ended] for answer in answers]
    return Truth(answers, [credit.token_texts(tokens, tokenizer) for tokens in said])


def by_run(folder: Path, answers: Sequence[Answer]) -> dict[str, list[list[float]]]:
    """How a run credits the tokens of each answer, with the judge that it was trained with."""
    policy, tokenizer = models.load(folder)
    policy.to(start("auto", 0))
    judge = credit.judge_of(str(folder), policy, tokenizer) if credit.critic_of(str(folder)) else None
    return credit.load(str(folder), policy, tokenizer, judge)(answers)


def by_reward_model(rm: Path, answers: Sequence[Answer]) -> list[list[float]]:
    """By how much each token changes what a reward model says of the text so far."""
    policy, tokenizer = models.load(rm.parent / "sft")
    encoded = pack(answers)
    scores = token_scores(rewards.load_model(rm, policy.to(start("auto", 0)), tokenizer), encoded)
    mask = encoded.collate(range(len(answers))).mask.bool()
    return [row[keep].tolist() for row, keep in zip(scores.diff(dim=1), mask, strict=True)]


def example_of(truth: Truth, everything: dict[str, np.ndarray]) -> dict:
    """The response in which most is to be seen: opinions that are negated, said again, praise and blame; among
    those of usual length the first."""
    first = np.cumsum([0, *map(len, truth.words)])

    def interest(i: int) -> tuple:
        found = truth.words[i]
        opinions = [word for word in found if word.value]
        signs = {np.sign(word.paid) for word in opinions}  # praise, blame, and 0 where nothing is paid
        return len(found) < 45, len(signs) + any(word.role == "negator" for word in found), len(opinions)

    i = max(range(len(truth.words)), key=interest)
    at, text = slice(first[i], first[i + 1]), truth.answers[i].text
    rows = {"true": truth.paid[at].tolist()} | {name: x[at].tolist() for name, x in everything.items()}
    return {"words": [text[w.start : w.end] for w in truth.words[i]], "rows": rows}


# ---- what was found --------------------------------------------------------------------------------------------------


def show(found: dict) -> tuple[str, list]:
    """Two tables, and each as a picture: how well each signal agrees, and which words of a clause have its credit."""
    titles = {"credit beside what the true reward pays": AGREEMENT, "which words of a clause have it": PLACES}
    tables, panels = [], []
    for title, columns in titles.items():
        read = [[figures_of(seeds, keys) for keys in columns.values()] for seeds in found["signals"].values()]
        names = [NAMES[signal] for signal in found["signals"]]
        cells = ([with_error(figure) if figure else "" for figure in row] for row in read)
        tables.append(runs.markdown([["", *columns], *([name, *row] for name, row in zip(names, cells, strict=True))]))
        panels.append(partial(draw, title, columns, names, read))
    return "\n".join(tables), panels


def figures_of(seeds: list[dict], keys: tuple[str, ...]) -> list[float]:
    """What stands there for each seed that has it."""
    for key in keys:
        seeds = [seed[key] for seed in seeds if seed[key] is not None]
    return seeds


def draw(title: str, columns: dict[str, tuple], names: list[str], read: list[list[list[float]]], axis) -> None:
    means = np.array([[np.mean(figure) if figure else np.nan for figure in row] for row in read])
    texts = [["" if np.isnan(mean) else f"{mean:z.2f}" for mean in row] for row in means]
    areas = [keys[-1] in ("praise", "paid", "again") for keys in columns.values()]  # which say nothing at 1/2
    figures.heat(axis, np.where(areas, 2 * means - 1, means), texts, list(columns), names)
    axis.tick_params("x", rotation=90)
    axis.set_title(title)


def draw_example(example: dict, path: Path) -> None:
    """One response, a column a word and a row a signal, each coloured by its share of the row's largest, which is said
    unless it is next to nothing; in lines of words, as a text is."""
    names = [NAMES[name] for name in example["rows"]]
    numbers, texts = np.array(list(example["rows"].values())), np.array(example["words"])
    shares = numbers / np.abs(numbers).max(1, keepdims=True).clip(min=1e-12)
    said = np.where(np.abs(shares) < 0.1, "", [[f"{number:.2f}" for number in row] for row in numbers])
    lines = np.array_split(np.arange(len(texts)), -(-len(texts) // 24))
    size = 2.6 + 0.31 * len(lines[0]), (1.2 + 0.25 * len(names)) * len(lines)
    figure, axes = plt.subplots(len(lines), figsize=size, layout="constrained", squeeze=False)
    for axis, line in zip(axes.flat, lines, strict=True):
        figures.heat(axis, shares[:, line], said[:, line], texts[line], names)
        axis.tick_params("x", rotation=90, labelsize=8, top=True, labeltop=True, bottom=False, labelbottom=False)
    figure.suptitle("credit of words: dark, a large share of the row's largest; blank, under a tenth of it", fontsize=9)
    write_atomic(path, lambda partial: figure.savefig(partial, dpi=130, format="png"))
    plt.close(figure)


def main(config: Config) -> None:
    runs.experiment(measure, show)(config)
    draw_example(read_object(Path(config.out) / "results.json")["example"], Path(config.out) / "example.png")


if __name__ == "__main__":
    flags.main(main, Config)
