"""Credit of tokens beside what the true reward pays: by hand, and of signals of which the answer is known."""

import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopref.data import reviews
from nanopref.evaluation import report
from nanopref.experiments import credit
from nanopref.experiments.credit import LEVELS, Truth, by_word, words
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
    for level in LEVELS:
        assert right[level]["spearman"] == pytest.approx(1) and right[level]["pearson"] == pytest.approx(1)
        assert wrong[level]["spearman"] == pytest.approx(-1)
    for level in LEVELS[:2]:
        assert (right[level]["praise"], right[level]["paid"], right[level]["again"]) == (1, 1, 1)
        assert (wrong[level]["praise"], wrong[level]["paid"], wrong[level]["again"]) == (0, 1, 0)
    assert right["where"]["plain"]["opinion"] == right["where"]["negated"]["opinion"] == 1
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


def test_the_picture_and_the_table_show_each_signal(tmp_path):
    texts = [" The plot is never dull. The cast is warm. Skip it.", " It is bad. It is bad. It is good."]
    of = truth(*texts)
    signals = {"alone": of.alone(), "dpo 0.15 log-ratio": of.paid, "ppo advantage": -of.paid, "rm": of.value}
    agreements = {name: [of.agreement(x) | {"own": None}] * 2 for name, x in signals.items()}
    agreements["dpo 0.15 log-ratio"] = [found | {"own": found} for found in agreements["dpo 0.15 log-ratio"]]
    example = credit.example_of(of, signals)
    rows = example["rows"]
    assert rows["true"] == rows["dpo 0.15 log-ratio"] == [-x for x in rows["ppo advantage"]] != rows["alone"]
    assert " " + " ".join(example["words"]) in [text.replace(".", " .") for text in texts]
    table, panels = credit.show({"signals": agreements})
    assert "| DPO β 0.15: log-ratio | 1.00 ± 0.00 |" in table and "| PPO, learned reward: GAE | -1.00 ± 0.00 |" in table
    report.plot(panels, tmp_path / "plot.png")
    credit.draw_example(example, tmp_path / "example.png")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("plot.png", "example.png"))
