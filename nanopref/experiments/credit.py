"""Which words does a policy credit? `python -m nanopref.experiments.credit`

A policy is a token-level Q-function (Rafailov et al. 2024, "From r to Q*"), a critic a token-level value, and nobody
knows what the tokens of an answer are worth. Here the true reward tells: S of reviews.py is a sum over opinion words.
So the credit of each token, see evaluation/credit.py, is added up over words, clauses, sentences and responses, and set
beside what the true reward pays there. A third kind of credit is the change of the reward model's score from one
prefix to the next; and of what is no credit, the list of opinion words, read without what stands around them, says how
much of the truth needs no context.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap

from nanopref import models
from nanopref.data import reviews
from nanopref.evaluation import credit
from nanopref.evaluation.metrics import auc, correlation, rank_correlation
from nanopref.experiments import figures, runs
from nanopref.experiments.figures import Look, mean_error, with_error
from nanopref.experiments.runs import ExperimentFlags, Variant
from nanopref.feedback import rewards
from nanopref.models.inference import token_scores
from nanopref.models.sampling import Answer, pack
from nanopref.running import flags
from nanopref.running.files import read_object, write_atomic
from nanopref.running.flags import RewardFlags, flag, require
from nanopref.running.parallel import start

LEVELS = ("word", "clause", "sentence", "response")
ROLES = ("negator", "opinion", "degree", "aspect", "rest")
LOOKS = {  # of each signal
    "true": Look("true reward", "", ""),
    "alone": Look("opinion words alone", "#999999", "x", ":"),
    "rm": Look("reward model: by prefix", "#009E73", "D", "-."),
}
for _run, (_name, _colour) in {
    "dpo 0.15": ("DPO β 0.15", "#56B4E9"), "dpo 0.5": ("DPO β 0.5", "#0072B2"),
    "ppo": ("PPO, learned reward", "#D55E00"), "ppo-true": ("PPO, true reward", "#000000"),
}.items():  # fmt: skip
    LOOKS[f"{_run} log-ratio"] = Look(f"{_name}: log-ratio", _colour, "o")
    LOOKS[f"{_run} value"] = Look(f"{_name}: critic", _colour, "s", "--")
    LOOKS[f"{_run} advantage"] = Look(f"{_name}: GAE", _colour, "^", ":")
COLUMNS = {  # of the table: the level and figure of each
    "word ρ": ("word", "spearman"), "word r": ("word", "pearson"), "clause ρ": ("clause", "spearman"),
    "sentence ρ": ("sentence", "spearman"), "response ρ": ("response", "spearman"),
    "AUC: praise or blame, words": ("word", "praise"), "clauses": ("clause", "praise"),
    "paid or not, words": ("word", "paid"), "paid or said again, clauses": ("clause", "again"),
}  # fmt: skip
PLACES = [(kind, role) for kind in ("plain", "negated") for role in ROLES if (kind, role) != ("plain", "negator")]


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


# ---- what the true reward pays, word by word -------------------------------------------------------------------------


class Word(NamedTuple):
    """A word of a response, a phrase that is read as one ("skip it", "far from"), or a mark."""

    start: int
    end: int
    value: float  # what an opinion word says, 0 elsewhere
    paid: float  # and what of that is paid
    clause: int  # in which clause and sentence it stands, from 0
    sentence: int
    role: str  # one of ROLES


_WORD = re.compile(rf"\b(?:{'|'.join([*reviews.VERDICTS, 'far from'])})\b|[\w'’]+|[^\w\s]", re.I)
_BEGINS = {"and", *reviews.TURNS, *reviews.CONCESSIONS}  # a clause, as in reviews.py


def words(response: str) -> list[Word]:
    """All words and marks of a response; a word that begins a clause is of it, a mark of the clause that it ends."""
    found: list[Word] = []
    opinions, ended, clause, sentence = {o.start: o for o in reviews.opinions(response)}, "", 0, 0
    for match in _WORD.finditer(response):
        word = match[0].lower().replace("’", "'")
        ended += "\n" * bool(found and re.search(r"[\r\n]", response[found[-1].end : match.start()]))
        sentence += bool(found and set(ended) & set(".!?\n"))
        clause += bool(found and (ended or word in _BEGINS))
        ended = word if word in reviews.PAUSES or word in ".!?" else ""
        inside = [opinions[i] for i in range(*match.span()) if i in opinions]
        value, paid = sum(o.value for o in inside), sum(o.paid for o in inside)
        found.append(Word(*match.span(), value, paid, clause, sentence, role(word, value)))
    return found


def role(word: str, value: float) -> str:
    """What a word does in its clause."""
    if value:
        return "opinion"
    if word in reviews.NEGATORS or word.endswith("n't"):
        return "negator"
    return "degree" if word in reviews.DEGREES else "aspect" if word in reviews.ASPECT_OF else "rest"


def by_word(numbers: Sequence[float], texts: Sequence[str], found: Sequence[Word]) -> np.ndarray:
    """The credit of each token added up over each word: [words]. A token is of the word in which it ends, spaces behind
    it left aside; what stands behind all words is of the last one."""
    sums, ends, at = np.zeros(len(found)), [word.end for word in found], 0
    for number, text in zip(numbers, texts, strict=True):
        last = at + max(len(text.rstrip()), 1) - 1
        at += len(text)
        sums[min(bisect_right(ends, last), len(ends) - 1)] += number
    return sums


class Truth:
    """What the true reward pays in some responses, whose words stand one after the other: arrays of [words]."""

    def __init__(self, answers: Sequence[Answer], texts: Sequence[Sequence[str]]):
        """`texts` are those of each answer's tokens but the one that ends it. Answers without words are dropped."""
        self.answers, self.texts, self.words = zip(
            *((a, t, found) for a, t in zip(answers, texts, strict=True) if (found := words(a.text))), strict=True
        )
        flat = [word for found in self.words for word in found]
        self.value, self.paid = (np.array([getattr(word, name) for word in flat]) for name in ("value", "paid"))
        of = [i for i, found in enumerate(self.words) for _ in found]
        keys = {"word": range(len(flat)), "response": of}
        keys |= {
            level: [(i, getattr(w, level)) for i, w in zip(of, flat, strict=True)] for level in ("clause", "sentence")
        }
        self.groups = {}  # at each level, which group each word is of
        for level, of_each in keys.items():
            number: dict[Any, int] = {}
            self.groups[level] = np.array([number.setdefault(key, len(number)) for key in of_each])
        self.roles = np.array([word.role for word in flat])

    def of_words(self, numbers: Sequence[Sequence[float]]) -> np.ndarray:
        """Credit of the tokens of each answer -> of all words."""
        each = zip(numbers, self.texts, self.words, strict=True)
        return np.concatenate([by_word(n[: len(t)], t, found) for n, t, found in each])

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

    def agreement(self, signal: np.ndarray) -> dict[str, Any]:
        """At each level, how well a signal [words] goes with what is paid, and how well it tells apart praise that is
        paid from blame, what is paid from what is not (by its size), and what is paid from what is said again."""
        found: dict[str, Any] = {}
        for level in LEVELS:
            group = self.groups[level]
            credit, paid, value = (np.bincount(group, x) for x in (signal, self.paid, self.value))
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
        of_seed = {name: rm.parent / name for name, done in folders.items() if rm.parent / name in done}
        common = truth_of(rm.parent / "sft", runs.seed_of(rm))
        everything = {"alone": common.alone()}
        own: dict[str, dict] = {}
        for name, folder in of_seed.items():
            theirs, say = truth_of(folder, runs.seed_of(rm)), creditor(folder)
            for signal, numbers in say(common.answers).items():
                everything[f"{name} {signal}"] = common.of_words(numbers)
            own |= {f"{name} {s}": theirs.agreement(theirs.of_words(n)) for s, n in say(theirs.answers).items()}
        everything["rm"] = common.of_words(by_reward_model(rm, common.answers))
        for name, signal in everything.items():
            signals.setdefault(name, []).append(common.agreement(signal) | {"own": own.get(name)})
        example = example or example_of(common, everything)
        counts.append(common.counts())
    require(bool(signals), f"--out {config.out}: no seed has a finished reward model")
    return {"signals": signals, "example": example, "counts": counts}


def truth_of(folder: Path, seed: int) -> Truth:
    """Of the answers of the model in a folder to prompts that none has seen."""
    answers, (_, tokenizer) = runs.answers(folder, seed), models.load(folder)
    said = [answer.tokens[: len(answer.tokens) - answer.ended] for answer in answers]
    return Truth(answers, [credit.token_texts(tokens, tokenizer) for tokens in said])


def creditor(folder: Path) -> Callable[[Sequence[Answer]], dict[str, list[list[float]]]]:
    """How a run credits tokens, with the judge that it was trained with."""
    policy, tokenizer = models.load(folder)
    policy.to(start("auto", 0))
    words = credit.judges_of(str(folder)) if credit.critic_of(str(folder)) else ()
    judge = rewards.load(words, policy, tokenizer, RewardFlags()) if words else None
    return credit.load(str(folder), policy, tokenizer, judge)


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
    signals = found["signals"]
    lines, where = [["", *COLUMNS, "word ρ, own answers"]], [["", *(f"{kind}: {role}" for kind, role in PLACES)]]
    for name, seeds in signals.items():
        cells = [with_error([seed[level][figure] for seed in seeds]) for level, figure in COLUMNS.values()]
        own = [seed["own"]["word"]["spearman"] for seed in seeds if seed["own"]]
        lines.append([LOOKS[name].label, *cells, with_error(own) if own else ""])
        shares = [[seed["where"][kind][role] for seed in seeds] for kind, role in PLACES]
        where.append([LOOKS[name].label, *(with_error(share) for share in shares)])
    panels = [partial(draw, signals) for draw in (draw_levels, draw_auc, draw_negations)]
    return f"{runs.markdown(lines)}\n{runs.markdown(where)}", panels


def draw_levels(signals: dict[str, list[dict]], axis) -> None:
    for name, seeds in signals.items():
        label, colour, marker, line = LOOKS[name]
        y, dy = np.array([mean_error([seed[level]["spearman"] for seed in seeds]) for level in LEVELS]).T
        drawn = {"marker": marker, "linestyle": line, "color": colour, "markersize": 4, "linewidth": 1.2}
        axis.errorbar(range(len(LEVELS)), y, np.nan_to_num(dy), label=label, **drawn)
    axis.axhline(0, color="grey", linewidth=0.5)
    axis.set_xticks(range(len(LEVELS)), [f"{level}s" for level in LEVELS])
    axis.set(title="credit, and what the true reward pays", ylabel="Spearman's ρ")
    axis.legend(frameon=False, fontsize=6, ncols=2, loc="upper center", bbox_to_anchor=(0.45, -0.1))


def draw_auc(signals: dict[str, list[dict]], axis) -> None:
    kinds = {
        "praise from blame, clauses": ("clause", "praise"),
        "paid from not paid, words": ("word", "paid"),
        "paid from said again, clauses": ("clause", "again"),
    }
    for (label, (level, figure)), other in zip(kinds.items(), figures.OTHERS, strict=False):
        x, dx = np.array([mean_error([seed[level][figure] for seed in seeds]) for seeds in signals.values()]).T
        drawn = {"marker": other.marker, "color": other.color, "linestyle": "none", "markersize": 5}
        axis.errorbar(x, range(len(x)), xerr=np.nan_to_num(dx), label=label, **drawn)
    axis.axvline(0.5, color="grey", linestyle=":")
    axis.set_yticks(range(len(signals)), [LOOKS[name].label for name in signals], fontsize=7)
    axis.invert_yaxis()
    axis.set(title="what credit tells apart", xlabel="area under the ROC curve")
    axis.legend(frameon=False, fontsize=6, ncols=2, loc="upper center", bbox_to_anchor=(0.3, -0.17))


def draw_negations(signals: dict[str, list[dict]], axis) -> None:
    shares = [[np.mean([seed["where"]["negated"][r] for seed in seeds]) for r in ROLES] for seeds in signals.values()]
    heat(axis, np.array(shares), [LOOKS[name].label for name in signals], ROLES, 0.5)
    axis.set_title("whose is the credit of a negated judgement?", fontsize=11)


# dark for below 0 and of middling lightness for above, so that the two differ in grey
DIVERGING = LinearSegmentedColormap.from_list("credit", ["#A50F15", "#FFFFFF", "#6BAED6"])


def heat(axis, numbers: np.ndarray, rows: Sequence[str], columns: Sequence[str], most: float | np.ndarray) -> None:
    """Numbers [rows, columns] as colours, by their share of `most`, and in figures unless next to nothing."""
    shares = numbers / most
    axis.pcolormesh(shares, cmap=DIVERGING, vmin=-1, vmax=1, edgecolors="white", linewidth=0.5)
    for (y, x), share in np.ndenumerate(shares):
        if abs(share) >= 0.1:
            white = "white" if share < -0.6 else "black"
            axis.text(x + 0.5, y + 0.5, f"{numbers[y, x]:.2f}", ha="center", va="center", fontsize=6, color=white)
    axis.set_yticks(np.arange(len(rows)) + 0.5, rows, fontsize=7)
    axis.set_xticks(np.arange(len(columns)) + 0.5, columns, fontsize=7)
    axis.invert_yaxis()


def draw_example(example: dict, path: Path) -> None:
    """One response, a column a word and a row a signal, each coloured by its share of the row's largest."""
    texts, rows = example["words"], {LOOKS[name].label: numbers for name, numbers in example["rows"].items()}
    figure, axis = plt.subplots(figsize=(2.6 + 0.31 * len(texts), 1.2 + 0.3 * len(rows)), layout="constrained")
    numbers = np.array(list(rows.values()))
    heat(axis, numbers, list(rows), texts, np.abs(numbers).max(1, keepdims=True).clip(min=1e-12))
    axis.tick_params("x", rotation=90, labelsize=8, top=True, labeltop=True, bottom=False, labelbottom=False)
    write_atomic(path, lambda partial: figure.savefig(partial, dpi=130, format="png"))
    plt.close(figure)


def main(config: Config) -> None:
    flags.check(config)
    runs.present(config, lambda: measure(config), show)
    draw_example(read_object(Path(config.out) / "results.json")["example"], Path(config.out) / "example.png")


if __name__ == "__main__":
    flags.main(main, Config)
