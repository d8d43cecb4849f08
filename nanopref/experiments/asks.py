"""Does a chat model prefer what people prefer? `python -m nanopref.experiments.asks --model FOLDER --data pairs.jsonl`

It is asked which answer of a pair is better, in both orders (feedback/asking.py), and by the principles of a file, each
for itself and all together. Beside how often it agrees stands what else moves it: the place of an answer, its length.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanopref.data.formats import read
from nanopref.evaluation.metrics import wilson
from nanopref.experiments import runs
from nanopref.feedback import asking, rules
from nanopref.learning.objectives import is_right
from nanopref.running import flags
from nanopref.running.flags import flag, require
from nanopref.running.parallel import say, start


@dataclass
class Config(runs.FigureFlags):
    """How often a chat model that is asked which of two answers is better agrees with the people who were.

    Example: python -m nanopref.experiments.asks --model SmolLM2-1.7B-Instruct --data hh_harmless.jsonl.gz
    """

    out: str = "out/asks"
    model: str = flag("", "the chat model: a run folder, a Hugging Face folder, or a hub name")
    data: str = flag("", "pairs (README)")
    pairs: int = flag(200, "how many of them, drawn at random", least=1)
    rules: str = flag("", "also by the principles of this TOML file, as nanopref/feedback/harmless.toml")
    batch_size: int = flag(16, "questions that are read at once", least=1)
    seed: int = flag(0, "another seed, other pairs", least=0, below=2**32)
    device: str = flag("auto", "auto, cpu or cuda")


def measure(config: Config) -> dict:
    """{question: shares of pairs, and of how many}"""
    require(bool(config.model and config.data), "--model and --data: name a chat model and a file of pairs")
    kind, groups, _ = read(config.data)
    require(kind == "pairs", f"--data {config.data}: holds {kind} and no pairs")
    questions = {"which is better": (1.0, asking.BETTER)}
    for rule in rules.load(config.rules, sentences=True) if config.rules else ():
        require(not rule.test, f"--rules {config.rules}: {rule.name!r} has a test, so nobody need be asked")
        questions[rule.name] = rule.weight, asking.FOLLOWS_BETTER.format(principle=rule.principle)
    judge = asking.load_judge(config.model)
    judge.model.to(start(config.device, config.seed))
    Path(config.out).mkdir(parents=True, exist_ok=True)
    groups = random.Random(config.seed).sample(groups, min(config.pairs, len(groups)))
    pairs = [(asking.prompt_text(group.prompt), *(text.strip() for text in group.responses)) for group in groups]
    longer = np.array([np.sign(len(a) - len(b)) for _, a, b in pairs])
    chosen_first = np.array([random.Random(f"order {config.seed} {i}").random() < 0.5 for i in range(len(pairs))])

    found, principles = {}, np.zeros(len(pairs))
    for name, (weight, question) in questions.items():
        say(f"{name}: {len(pairs)} pairs, each in both orders")
        cases = [{"prompt": prompt, "a": a, "b": b, "question": question} for prompt, a, b in pairs]
        both = judge.log_odds(asking.WHICH, cases, config.batch_size)  # the chosen answer is A, and B
        lead = asking.margins(both).double().numpy()
        require(bool(np.isfinite(lead).all()), f"--model {config.model}: says what is no finite number")
        once = np.where(chosen_first, both[:, 0], -both[:, 1])
        found[name] = agreement(lead, longer) | {"once": share(once), "says_a": share(both.numpy().ravel())}
        if name != "which is better":
            principles += weight * lead
    if len(questions) > 2:
        found["all principles"] = agreement(principles, longer)
    found["the longer one"] = {"right": share(longer)}

    return found


def show(found: dict) -> tuple[str, list]:
    header = ["", "agrees", "95%", "asked once", "says A", "for the longer one", "mean log-odds, absolute"]
    lines = [header]
    for name, figures in found.items():
        rate, of = figures["right"]
        cells = [f"{figures[key][0]:.1%}" if key in figures else "" for key in ("once", "says_a", "longer")]
        interval = "{:.1%} to {:.1%}".format(*wilson(rate, of))
        lines.append([name, f"{rate:.1%}", interval, *cells, f"{figures['size']:.2f}" if "size" in figures else ""])

    def draw(axis) -> None:
        names = list(found)[::-1]
        for y, name in enumerate(names):
            low, high = wilson(*found[name]["right"])
            axis.plot([low, high], [y, y], "-", color="C0")
            axis.plot(found[name]["right"][0], y, "o", color="C0")
        axis.axvline(0.5, color="grey", linestyle=":")
        axis.set_yticks(range(len(names)), names)
        axis.set(title="agrees with people: share of pairs, 95%", xlim=(0, 1))

    return runs.markdown(lines), [draw]


main = runs.experiment(measure, show)


def share(lead: np.ndarray) -> tuple[float, int]:
    """How often numbers are above 0, which itself counts half, and of how many."""
    return float(np.mean(is_right(np.asarray(lead, dtype=np.float64)))), len(lead)


def agreement(lead: np.ndarray, longer: np.ndarray) -> dict:
    """Of log-odds for the chosen answers [M]: how often they are right and are for the longer answer, and how large."""
    return {"right": share(lead), "longer": share((lead * longer)[longer != 0]), "size": float(np.abs(lead).mean())}


if __name__ == "__main__":
    flags.main(main, Config)
