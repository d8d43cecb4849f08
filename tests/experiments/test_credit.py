"""Credit of tokens beside what the true reward pays: by hand, and of signals of which the answer is known."""

import json
import random
import re
from functools import cache
from itertools import pairwise
from pathlib import Path

import by_hand
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import message_of

from nanopref import models
from nanopref.data import reviews
from nanopref.experiments import credit, runs
from nanopref.experiments.credit import Truth
from nanopref.experiments.words import by_word, words
from nanopref.models.sampling import Answer

TEXT = " Sadly, the plot is never dull, but the cast is wooden. It is far from bad!\nThe story isn’t dull. Skip it"
READ = [  # word, value, paid, clause, sentence, role
    ("Sadly", 0, 0, 0, 0, "rest"), (",", 0, 0, 0, 0, "rest"), ("the", 0, 0, 1, 0, "rest"),
    ("plot", 0, 0, 1, 0, "aspect"), ("is", 0, 0, 1, 0, "rest"),
    ("never", 0, 0, 1, 0, "negator"), ("dull", 0.25, 0.25, 1, 0, "opinion"),
    (",", 0, 0, 1, 0, "rest"), ("but", 0, 0, 2, 0, "rest"), ("the", 0, 0, 2, 0, "rest"), ("cast", 0, 0, 2, 0, "aspect"),
    ("is", 0, 0, 2, 0, "rest"), ("wooden", -1, -1, 2, 0, "opinion"), (".", 0, 0, 2, 0, "rest"),
    ("It", 0, 0, 3, 1, "aspect"), ("is", 0, 0, 3, 1, "rest"), ("far from", 0, 0, 3, 1, "negator"),
    ("bad", 0.5, 0.5, 3, 1, "opinion"), ("!", 0, 0, 3, 1, "rest"), ("The", 0, 0, 4, 2, "rest"),
    ("story", 0, 0, 4, 2, "aspect"), ("isn’t", 0, 0, 4, 2, "negator"), ("dull", 0.5, 0, 4, 2, "opinion"),
    (".", 0, 0, 4, 2, "rest"), ("Skip it", -1, -1, 5, 3, "opinion"),
]  # fmt: skip


def truth(*texts: str) -> Truth:
    """Of answers whose tokens are words with the space before them, and marks."""
    tokens = [re.findall(r"\s*[\w’]+|\s*[^\w\s]", text) for text in texts]
    return Truth([Answer([], [], [], text, True) for text in texts], tokens)


def test_a_response_is_read_word_by_word():
    found = words(TEXT)
    assert [(TEXT[w.start : w.end], *w[2:]) for w in found] == READ
    assert words("") == words(" \n") == []


@given(st.text() | st.lists(st.sampled_from([*TEXT.split(), "\n", "good film", "İ"])).map(" ".join))
def test_words_hold_all_that_is_paid_and_stand_in_order(text):
    found = words(text)
    assert sum(w.paid for w in found) == pytest.approx(sum(o.paid for o in reviews.opinions(text)))
    for before, word in pairwise(found):
        assert before.end <= word.start
        assert 0 <= word.sentence - before.sentence <= word.clause - before.clause <= 1


def test_a_token_is_of_the_word_in_which_it_ends():
    text = (
        " The plot isn't  du\n\nll."  # a word that the tokenizer cuts, spaces behind words, and a character cut in two
    )
    texts = [" The", " pl", "ot", " isn", "'t", "  ", "", "du", "\n\n", "ll", ".", ""]
    assert "".join(texts) == text
    found = words(text)
    assert [text[w.start : w.end] for w in found] == ["The", "plot", "isn't", "du", "ll", "."]
    sums = by_word([2**i for i in range(len(texts))], texts, found)
    assert sums.tolist() == [1, 2 + 4, 8 + 16, 32 + 128 + 64, 256 + 512, 1024 + 2048]
    assert by_word([1, 2], [" The pl", "ot "], words(" The plot ")).tolist() == [0, 3]


@given(st.lists(st.sampled_from([" the", "plo", "t", " is", " good", ".", " ", "\n", "", "’", "é"]), min_size=1))
def test_no_credit_is_lost(texts):
    found = words("".join(texts))
    if found:
        assert by_word([1.0] * len(texts), texts, found).sum() == len(texts)


def test_a_signal_that_is_what_is_paid_agrees_and_its_opposite_does_not():
    of = truth(TEXT, " The plot is good. The plot is great. The cast is bad.", "")
    assert len(of.answers) == 2 and of.counts() == {
        "responses": 2, "words": 40, "clauses": 9, "paid": 6, "said again": 2, "negators": 3
    }  # fmt: skip
    right, wrong = of.agreement(of.paid), of.agreement(-of.paid)
    levels = ("word", "clause", "sentence", "response")
    for level in levels:
        assert right[level]["spearman"] == pytest.approx(1) and right[level]["pearson"] == pytest.approx(1)
        assert wrong[level]["spearman"] == pytest.approx(-1)
    for level in levels[:2]:
        assert (right[level]["praise"], right[level]["paid"], right[level]["again"]) == (1, 1, 1)
        assert (wrong[level]["praise"], wrong[level]["paid"], wrong[level]["again"]) == (0, 1, 0)
    assert right["where"]["plain"]["opinion"] == right["where"]["negated"]["opinion"] == 1
    ended = of.agreement(of.paid, np.array([5.0, -4.0]))  # of responses that are paid -5/4 and 0
    assert {level for level in levels if ended[level] != right[level]} == {"response"}
    assert ended["response"]["pearson"] == pytest.approx(-1)
    again = of.agreement(of.value)  # which pays for what is said again, less than for other words
    assert again["word"]["again"] == 4.5 / 12  # 1/4, 1, 1/2, 1, 1, 1 against 1/2 and 3/2


def test_credit_at_the_negator_is_found_at_the_negator():
    of = truth(TEXT)
    at_negators = np.array([{("never"): 3.0, "far from": 1.0, "isn’t": 9.0}.get(word, 0.0) for word, *_ in READ])
    where = of.agreement(at_negators)["where"]["negated"]  # isn't is of an opinion that is not paid
    assert where == {"negator": 1, "opinion": 0, "degree": 0, "aspect": 0, "rest": 0}
    against = at_negators - np.array([word == "dull" for word, *_ in READ])
    where = of.agreement(against)["where"]["negated"]
    assert (where["negator"], where["opinion"]) == (4 / 5, -1 / 5)
    by_clause = of.agreement(at_negators)["clause"]["pearson"]
    assert by_clause > of.agreement(at_negators)["word"]["pearson"] + 0.1


def test_opinion_words_alone_know_nothing_of_what_stands_around_them():
    of = truth(" The plot is never dull. Skip it.")
    assert of.alone().tolist() == [0, 0, 0, 0, -1, 0, -1, 0]
    assert of.paid.tolist() == [0, 0, 0, 0, 0.5, 0, -1, 0]


# ---- measured on runs ------------------------------------------------------------------------------------------------

RUNS = {
    "dpo 0.15": {"beta": 0.15, "logprobs": "sum", "reference": "model"},
    "dpo 0.5": {"beta": 0.5, "logprobs": "sum", "reference": "model"},
    "ppo": {"beta": 0.9, "kl_target": 6.0, "reward": ["SEED/rm"], "doubt": 0.5, "temperature": 1.5},
    "ppo-true": {"beta": 0.2, "kl_target": None, "reward": ["true"], "doubt": 0.0, "temperature": 1.0},
}
LAST_BETA = {"ppo": 0.3}  # to which --kl-target brought it
GAMMA, LAM, MISSING = 0.9, 0.8, 0.7


@pytest.fixture(scope="module")
def seeds(tmp_path_factory) -> Path:
    """The folder of an experiment of two seeds, of which the second lacks a run; none has learnt anything."""
    root = tmp_path_factory.mktemp("credit")
    for seed in (0, 1):
        folder = root / f"seed-{seed}"
        by_hand.tiny_model(folder / "sft", seed=10 * seed)
        by_hand.tiny_judge(folder / "rm", str(folder / "sft"), 2, seed=10 * seed + 1)
        for i, (name, flags) in enumerate(RUNS.items()):
            run = folder / name
            by_hand.tiny_model(run / "model", seed=10 * seed + 2 + i)
            flags = {"init": str(folder / "sft"), "gamma": GAMMA, "lam": LAM, "missing_end": MISSING} | flags
            (run / "config.json").write_text(json.dumps({"flags": flags}).replace("SEED", str(folder)))
            if "reward" in flags:
                by_hand.tiny_judge(run / "critic", str(folder / "sft"), 1, seed=10 * seed + 6 + i)
                rows = [{"step": 0, "beta": 0.9}, {"step": 1, "beta": LAST_BETA.get(name, 7.0)}]
                (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name in ("sft", "rm", *RUNS):
            if (seed, name) != (1, "ppo"):
                (folder / name / "report.json").write_text("{}")
    return root


@cache
def said(folder: Path, seed: int) -> list[Answer]:
    """Words of the tokenizer and others, cut off now and then, and once nothing at all."""
    rng, (_, tokenizer) = random.Random(f"{folder.name} {seed}"), models.load(folder)
    parts = [" the film", " is good", " its plot", " is dull", " is slow", " not", " but", ",", ".", " Far from bad"]
    found = []
    for i in range(16):
        text = "".join(rng.choices(parts, k=rng.randint(2, 5))) if i else ""
        tokens, ended = tokenizer.encode(text), i % 3 == 0
        tokens += [tokenizer.end_of_text] * ended
        found.append(Answer(tokenizer.encode(" the film"), tokens, [0.0] * len(tokens), text, ended))
    assert max(len(answer.tokens) for answer in found) < 44
    return found


@pytest.fixture
def experiment(seeds, monkeypatch):
    """What starts no run, samples nothing and asks nobody."""

    def sampled(config, sft: Path, seed: int, kind: str) -> Path:
        path = sft.parent / f"{kind}.jsonl"
        path.write_text("".join(f'{{"prompt": "{i}", "chosen": "a", "rejected": "b"}}\n' for i in range(20)))
        return path

    monkeypatch.setattr(runs, "launch", lambda commands, jobs: None)
    monkeypatch.setattr(runs, "sampled", sampled)
    monkeypatch.setattr(runs, "answers", said)
    return lambda **more: credit.Config(out=str(seeds), **more)


@cache
def scalar(folder: Path):
    return models.load_scalar(folder)[0].double()


@cache
def policy(folder: Path):
    return by_hand.in_float64(folder)[0]


@torch.no_grad()
def logprobs(folder: Path, answer: Answer, temperature: float) -> list[float]:
    """log π of each token, from what stands before it and nothing else."""
    found, model = [], policy(folder)
    for t, token in enumerate(answer.tokens):
        hidden = model.hidden(torch.tensor([answer.prompt + answer.tokens[:t]]))[0, -1]
        found.append((hidden @ model.wte.weight.T / temperature).log_softmax(-1)[token].item())
    return found


@torch.no_grad()
def heads(folder: Path, answer: Answer, t: int) -> list[float]:
    """Of the prompt and t tokens."""
    return scalar(folder)(torch.tensor([answer.prompt + answer.tokens[:t]]))[0, -1].tolist()


@cache
def credited(folder: Path, i: int, of: Path, seed: int) -> dict[str, list[float]]:
    """What a run credits each token of an answer with, or the reward model, by the formulas."""
    answer, name = said(of, seed)[i], folder.name
    n = len(answer.tokens)
    if name == "rm":
        scores = [np.mean(heads(folder, answer, t)) for t in range(n + 1)]
        return {"rm": [after - before for before, after in pairwise(scores)]}
    flags = RUNS[name]
    own, reference = (logprobs(x, answer, flags.get("temperature", 1.0)) for x in (folder, folder.parent / "sft"))
    log_ratio = [LAST_BETA.get(name, flags["beta"]) * (p - q) for p, q in zip(own, reference, strict=True)]
    if "reward" not in flags:
        return {f"{name} log-ratio": log_ratio}
    judged = heads(folder.parent / "rm", answer, n)
    score = np.mean(judged) - 0.5 * np.std(judged) if name == "ppo" else reviews.true_reward(answer.text)
    score -= 0 if answer.ended else MISSING
    values = [*(heads(folder / "critic", answer, t)[0] for t in range(n)), 0.0]
    deltas = [(t == n - 1) * score - log_ratio[t] + GAMMA * values[t + 1] - values[t] for t in range(n)]
    advantage = [sum((GAMMA * LAM) ** (s - t) * deltas[s] for s in range(t, n)) for t in range(n)]
    change = [after - before for before, after in pairwise([*values[:n], score])]
    return {f"{name} log-ratio": log_ratio, f"{name} value": change, f"{name} advantage": advantage}


@pytest.mark.parametrize("name", [*RUNS, "rm"])
def test_each_token_has_its_credit_by_the_formulas(name, seeds):
    folder, sft = seeds / "seed-0" / name, seeds / "seed-0" / "sft"
    answers = said(sft, 0)[1:]
    found = credit.by_run(folder, answers) if name != "rm" else {"rm": credit.by_reward_model(folder, answers)}
    for i in range(len(answers)):
        for signal, expected in credited(folder, i + 1, sft, 0).items():
            assert found[signal.removeprefix(f"{name} ")][i] == pytest.approx(expected, abs=2e-4), (signal, i)


def sums(folder: Path, signal: str, of: Path, level: str) -> tuple[list[float], list[float]]:
    """What of the credit of tokens, and of what is paid, falls on each word, clause, sentence or response."""
    _, tokenizer = models.load(of)
    found, paid = {}, {}
    for i, answer in enumerate(said(of, 0)):
        numbers = credited(folder, i, of, 0)[signal]
        if level == "response" and answer.text:
            found[i], paid[i] = sum(numbers), sum(opinion.paid for opinion in reviews.opinions(answer.text))
        elif answer.text:
            each, start = words(answer.text), 0
            number = [k if level == "word" else getattr(word, level) for k, word in enumerate(each)]
            for k, word in zip(number, each, strict=True):
                paid[i, k] = paid.get((i, k), 0) + word.paid
                found.setdefault((i, k), 0)
            for token, credit_of_it in zip(answer.tokens, numbers, strict=True):
                if token == tokenizer.end_of_text:
                    continue
                text = tokenizer.decode([token])
                stop = start + len(text)
                last = stop - 1 - (len(text) - len(text.rstrip())) * bool(text.strip())
                k = next((k for k, word in zip(number, each, strict=True) if word.end > last), number[-1])
                found[i, k] += credit_of_it
                start = stop
    return list(found.values()), [paid[key] for key in found]


def test_what_is_measured_is_the_credit_of_words_beside_what_they_are_paid(experiment, seeds):
    """At each level, on the reference's answers and on those of each policy; the end's credit is the response's."""
    signals, sft = credit.measure(experiment(seeds=1))["signals"], seeds / "seed-0" / "sft"
    run_of = {name: seeds / "seed-0" / name.rpartition(" ")[0] for name in signals} | {"rm": seeds / "seed-0" / "rm"}
    assert set(signals) == {"alone", "rm", "dpo 0.15 log-ratio", "dpo 0.5 log-ratio"} | {
        f"{run} {signal}" for run in ("ppo", "ppo-true") for signal in ("log-ratio", "value", "advantage")
    }
    for name in signals.keys() - {"alone"}:
        (found,) = signals[name]
        for level in ("word", "clause", "sentence", "response"):
            expected = np.corrcoef(*sums(run_of[name], name, sft, level))[0, 1]
            assert found[level]["pearson"] == pytest.approx(expected, abs=2e-3), (name, level)
            if name != "rm":
                own = np.corrcoef(*sums(run_of[name], name, run_of[name], level))[0, 1]
                assert found["own"][level]["pearson"] == pytest.approx(own, abs=2e-3), (name, level)
    assert signals["rm"][0]["own"] is signals["alone"][0]["own"] is None


@pytest.mark.parametrize("n", [1, 2])
def test_from_runs_to_tables_and_pictures(n, experiment, seeds):
    """The second seed lacks a run."""
    credit.main(experiment(seeds=n))
    found = json.loads((seeds / "results.json").read_text())
    assert {name: len(each) for name, each in found["signals"].items()} == {
        name: 1 if name.startswith("ppo ") else n for name in found["signals"]
    }
    table = (seeds / "table.md").read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line]
    rows = {name: cells for name, *cells in lines}
    assert {*rows} == {"", "---", *(credit.NAMES[name] for name in found["signals"])} and "nan" not in table
    for name in ("DPO β 0.5: log-ratio", "PPO, learned reward: GAE"):
        assert all(("±" in cell) is (n == 2 and "DPO" in name) for cell in rows[name]), name
    example = found["example"]
    assert len(example["words"]) > 3 and {len(row) for row in example["rows"].values()} == {len(example["words"])}
    assert {*example["rows"]} == {"true", *found["signals"]}
    for name in ("plot.png", "example.png"):
        assert (seeds / name).stat().st_size > 5000
        (seeds / name).unlink()


def test_without_a_reward_model_there_is_nothing_to_measure(experiment, tmp_path):
    said = message_of(credit.measure, credit.Config(out=str(tmp_path / "empty")))
    assert said == f"--out {tmp_path}/empty: no seed has a finished reward model"


def test_the_example_is_a_response_in_which_all_is_to_be_seen():
    texts = [" It is good.", " The plot is never dull. The cast is warm. Skip it.", " It is bad. It is bad."]
    of = truth(*texts)
    example = credit.example_of(of, {"alone": of.alone(), "rm": -of.paid})
    rows = example["rows"]
    assert " ".join(example["words"]) == texts[1][1:].replace(".", " .")
    assert rows["true"] == [-x for x in rows["rm"]] != rows["alone"] and sum(rows["true"]) == 0.5 + 1 - 1


def test_pictures_are_the_tables_means_and_an_area_of_a_half_is_white():
    of = truth(TEXT)
    seeds = [of.agreement(of.paid) | {"own": None}, of.agreement(-of.paid) | {"own": None}]
    _, panels = credit.show({"signals": {"rm": seeds, "ppo value": seeds[:1], "ppo advantage": seeds[1:]}})
    figure = credit.plt.figure()
    axis = figure.add_subplot()
    panels[0](axis)
    columns, names = ([label.get_text() for label in get()] for get in (axis.get_xticklabels, axis.get_yticklabels))
    colours = axis.collections[0].get_array().reshape(len(names), len(columns))
    texts = np.array([text.get_text() for text in axis.texts]).reshape(len(names), len(columns))
    assert columns == list(credit.AGREEMENT)
    assert names == ["reward model: by prefix", "PPO, learned reward: critic", "PPO, learned reward: GAE"]
    at = columns.index("AUC: praise or blame, words")
    assert texts[:, at].tolist() == ["0.50", "1.00", "0.00"] and colours[:, at].tolist() == [0, 1, -1]
    assert texts[:, 0].tolist() == ["0.00", "1.00", "-1.00"] and texts[0, -1] == ""
    low, high = axis.get_ylim()
    assert low > high  # the first row at the top
    credit.plt.close(figure)
