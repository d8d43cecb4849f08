import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopref.data import reviews
from nanopref.feedback import rules
from nanopref.feedback.rules import Rule, broken, load
from nanopref.running.flags import UserError


def rule(test, argument, name="one", weight=1.0):
    return Rule(name, "", test, argument, weight)


def written(tmp_path, text):
    """The rules of a file with this text."""
    path = tmp_path / "mine.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(str(path))


# ---- each test, kept and broken --------------------------------------------------------------------------------------

BOTH_WAYS = [
    ("mentions", ["acting", "far from"], ["The ACTING.", "far\n from it", "an acting"], ["", "reacting", "a far"]),
    ("mentions", ["don't", "C++", "what’s on"], ["I don’t know", "in c++!", "What's on"], ["dont", "c+", "C++x"]),
    ("avoids", ["acting", "far from"], ["", "reacting", "acting_", "far, from"], ["Acting!", "FAR FROM"]),
    ("at_most_words", 2, ["", "one", " one  two\n", "well-known film"], ["one two three", "a - b"]),
    ("at_least_words", 2, ["one two", "a - b"], ["", "one", " one "]),
    ("ends_with", ["see it", "Bye"], ["So see it!", "bye", "X. Do see it.. \n"], ["", "...", "See it. No.", "by e"]),
    ("matches", r"^\d+ stars$", ["5 stars", "12 stars"], ["", "five stars", "I give 5 stars"]),
    ("matches", r"(?i)OK|", [""], []),
    ("ends_with_verdict", True, ["Dull. Advice: SKIP IT.", " Buy a ticket! "], ["", "Skip it. It drags.", "skip item"]),
    ("consistent", True, ["", "The plot is dull. The cast is superb.", "The plot is not clever, but dull.", "good bad"],
     ["The plot is dull. The story is not dull.", "The cast is lively, the acting stiff.", "Skip it. Buy a ticket."]),
]  # fmt: skip


@pytest.mark.parametrize("test, argument, kept, broke", BOTH_WAYS, ids=lambda x: x if isinstance(x, str) else "")
def test_each_test_is_kept_and_broken(test, argument, kept, broke):
    found = rule(test, argument)
    assert rules.TESTS[test][1](argument)
    assert {text: found.kept(text) for text in [*kept, *broke]} == dict.fromkeys(kept, True) | dict.fromkeys(
        broke, False
    )


def test_all_are_tested():
    assert {test for test, _, kept, broke in BOTH_WAYS if kept and broke} == rules.TESTS.keys()


def test_what_one_of_two_opposites_keeps_the_other_breaks():
    for response in ("", "A cast", "recast it"):
        assert rule("mentions", ["cast"]).kept(response) != rule("avoids", ["cast"]).kept(response)


@given(st.text() | st.lists(st.sampled_from([*reviews.VERDICTS, "plot", "dull", "not", ". ", "’", ","])).map(" ".join))
def test_of_any_text_it_can_be_said_what_it_breaks(response):
    some = [rule(test, argument, f"{i}", i % 3 + 1.0) for i, (test, argument, *_) in enumerate(BOTH_WAYS)]
    found = broken(some, response)
    assert set(map(id, found)) == {id(r) for r in some if not r.kept(response)}
    order = [(-r.weight, int(r.name)) for r in found]
    assert order == sorted(order)


def test_the_heaviest_broken_rule_is_the_critique_and_of_two_the_first():
    light, heavy, also, held = (
        rule("mentions", ["x"], name, weight) for name, weight in (("a", 0.5), ("b", 2.0), ("c", 2.0), ("d", 9.0))
    )
    held = held._replace(test="avoids")
    assert broken([light, heavy, held, also], "y") == [heavy, also, light]
    assert broken([also, light, heavy], "y") == [also, heavy, light]
    assert broken([light, heavy, held], "y")[0] is heavy
    assert broken([light], "x") == []


# ---- the file --------------------------------------------------------------------------------------------------------


def test_what_a_file_says(tmp_path):
    text = b'\xef\xbb\xbf[[rule]]\r\nname = "caf\xc3\xa9"\r\nmentions = ["a"]\r\n'
    text += b'[[rule]]\nname = "b"\nprinciple = "Be short."\nat_most_words = 3\nweight = 2'
    first, second = written(tmp_path, text)
    assert first == Rule("café", "", "mentions", ["a"], 1.0)
    assert second == Rule("b", "Be short.", "at_most_words", 3, 2.0) and type(second.weight) is float


ONE = '[[rule]]\nname = "one"\n'
TOO_LONG = "9" * 400
REFUSED = [
    (b'[[rule]]\nname = "\xff"', "not valid UTF-8"),
    ("[[rule", "not TOML"),
    ("a = " + "[" * 5000, "not TOML"),
    ("", "no [[rule]]"),
    ("rule = []", "no [[rule]]"),
    ("rule = 3", "no [[rule]]"),
    ("[rule]\nname = 'x'", "no [[rule]]"),
    ("rule = [3]", "no [[rule]]"),
    ("[[rules]]\nname = 'x'", "unknown key rules"),
    (f"title = 'x'\n{ONE}consistent = true", "unknown key title"),
    ("[[rule]]\nconsistent = true", "rule 1: needs a name"),
    ("[[rule]]\nname = ' '\nconsistent = true", "rule 1: needs a name"),
    ("[[rule]]\nname = 3\nconsistent = true", "rule 1: needs a name"),
    (f"{ONE}consistent = true\n" * 2, "rule 2: rule 1 has the same name, 'one'"),
    (f"{ONE}consistent = true\nprinciple = 3", "rule 1 ('one'): principle must be text"),
    (ONE, "rule 1 ('one'): needs one test, not none: there are mentions, avoids, ends_with, at_most_words"),
    (f"{ONE}consistent = true\nat_most_words = 3", "needs one test, not consistent and at_most_words"),
    (f"{ONE}shorter_than = 3", "rule 1 ('one'): unknown test shorter_than: there are mentions, avoids"),
    (f"{ONE}consistent = true\nwieght = 3", "unknown test wieght"),
    *(
        (f"{ONE}consistent = true\nweight = {weight}", "rule 1 ('one'): weight must be a finite number above 0")
        for weight in ("nan", "inf", "-inf", "0", "0.0", "-1", "true", "'2'", "[2]", TOO_LONG)
    ),
    *(
        (f"{ONE}{test} = {argument}", f"rule 1 ('one'): {test} must be a list of words or phrases")
        for test in ("mentions", "avoids", "ends_with")
        for argument in ("'acting'", "[]", "[' ']", "['acting', 3]", "3", "true")
    ),
    *(
        (f"{ONE}{test} = {argument}", f"rule 1 ('one'): {test} must be a whole number of at least 1")
        for test in ("at_most_words", "at_least_words")
        for argument in ("true", "0", "-3", "3.0", "'3'", "[3]")
    ),
    *(
        (f"{ONE}matches = {argument}", "rule 1 ('one'): matches must be a regular expression")
        for argument in ("'('", "'a{99999999999}'", "3", "true", "['a']")
    ),
    *(
        (f"{ONE}{test} = {argument}", f"rule 1 ('one'): {test} must be true")
        for test in ("consistent", "ends_with_verdict")
        for argument in ("false", "1", "'true'", "[]")
    ),
]


@pytest.mark.parametrize("text, reason", REFUSED, ids=range(len(REFUSED)))
def test_what_is_no_constitution_is_refused_in_a_sentence(tmp_path, text, reason):
    with pytest.raises(UserError) as refused:
        written(tmp_path, text)
    message = str(refused.value)
    assert message.startswith(str(tmp_path / "mine.toml")) and reason in message and "\n" not in message


def test_no_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.toml: no such file"):
        load(str(tmp_path / "none.toml"))
    with pytest.raises(UserError, match="a folder, not a file"):
        load(str(tmp_path))


# ---- the one that is shipped -----------------------------------------------------------------------------------------


def test_the_shipped_rules_are_kept_and_broken_and_each_is_the_worst_of_some_reviews():
    shipped, rng = load(), random.Random(0)
    names = {"does not contradict itself", "is short", "names the acting", "ends with a verdict"}
    assert {r.name for r in shipped} == names and all(r.principle and math.isfinite(r.weight) for r in shipped)
    prompts = [reviews.sample_prompt(rng) for _ in range(1500)]
    some = [reviews.sample_response(rng, prompt) for prompt in prompts]
    faults = Counter(r.name for response in some for r in broken(shipped, response))
    # the grammar speaks of an aspect once; who goes on after the end (or a policy) may take back what was said
    assert faults.pop("does not contradict itself", 0) == 0
    assert faults.keys() == names - {"does not contradict itself"} and all(20 <= n <= 1400 for n in faults.values())
    longer = [a + reviews.sample_response(rng, prompt) for a, prompt in zip(some, prompts, strict=True)]
    assert 300 < sum(not shipped[0].kept(response) for response in longer) < 1400
    worst = Counter(r[0].name if (r := broken(shipped, response)) else "" for response in [*some, *longer])
    assert worst.keys() == {*names, ""} and min(worst.values()) >= 20
