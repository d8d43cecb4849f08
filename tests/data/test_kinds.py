"""Ratings, labels, prompts and JSON arrays: what is read, what is refused and why."""

import gzip
import json
from collections import Counter

import pytest
from files import feedback, jsonl, refusal

from nanopref.data.formats import read, read_prompts, read_rows, read_to_imitate
from nanopref.data.groups import Group

RATED = {"prompt": "p", "responses": ["a", "b", "c"], "scores": [0, 2.5, -1]}
LABEL = {"prompt": "p", "completion": "a", "label": True}
EMPTY, NO_TEXT = "rows dropped: the chosen answer is empty", "rows dropped: no text"


# ---- what is read ----------------------------------------------------------------------------------------------------


def test_ratings_are_sorted_with_their_answers(write):
    """The best first, and of equals the one that stood first; whatever is beside them is ignored."""
    rows = [RATED, {"prompt": "q", "responses": ["d", "e", "f"], "scores": [1, 2, 1], "label": 7}]
    groups = [Group("p", ("b", "a", "c"), scores=(2.5, 0.0, -1.0)), Group("q", ("e", "d", "f"), scores=(2.0, 1.0, 1.0))]
    kind, found, notes = read(write(jsonl(*rows)))
    assert (kind, found, notes) == ("ratings", groups, Counter())
    assert all(type(score) is float for group in found for score in group.scores)
    assert [group.said() for group in found] == [group.scores for group in groups]


def test_ratings_of_equal_answers_or_an_empty_best_are_dropped(write):
    rows = [RATED | {"responses": x} for x in (["a", "b", "a"], ["a", " ", "c"], ["", "b", "c"])]
    kept = [Group("p", ("b", "", "c"), scores=(2.5, 0.0, -1.0))]
    notes = Counter({"rows dropped: two answers are equal": 1, EMPTY: 1})
    assert read(write(jsonl(*rows))) == ("ratings", kept, notes)


@pytest.mark.parametrize("label, score", [(True, 1.0), (1, 1.0), (1.0, 1.0), (False, 0.0), (0, 0.0)])
@pytest.mark.parametrize("name", ["completion", "response"])
def test_a_label_is_true_or_1_or_false_or_0(write, label, score, name):
    kind, (group,), notes = read(write(jsonl({"prompt": "p", name: "a", "label": label})))
    assert (kind, group, notes) == ("labels", Group("p", ("a",), scores=(score,)), Counter())
    assert type(group.scores[0]) is float


def test_answers_with_labels_may_be_named_in_either_way_and_are_dropped_where_empty(write):
    rows = [LABEL, {"prompt": "", "response": "b", "label": 0}, LABEL | {"completion": " \n"}]
    groups = [Group("p", ("a",), scores=(1.0,)), Group("", ("b",), scores=(0.0,))]
    for _ in range(2):
        assert read(write(jsonl(*rows))) == ("labels", groups, Counter({NO_TEXT: 1}))
        assert read_to_imitate(write(jsonl(*rows)))[0] == [group._replace(scores=()) for group in groups]
        rows, groups = [rows[1], rows[0], rows[2]], groups[::-1]


def test_what_has_a_label_is_imitated_good_or_bad(write):
    path = write(jsonl(*(LABEL | {"prompt": f"p{i}", "label": i % 2} for i in range(4))))
    assert read_to_imitate(path) == ([Group(f"p{i}", ("a",)) for i in range(4)], Counter())


def test_of_ratings_the_best_is_imitated(write):
    assert read_to_imitate(write(jsonl(RATED))) == ([Group("p", ("b",))], Counter())


def test_prompts_alone_are_split_and_never_imitated(write):
    path = write(jsonl(*({"prompt": f"p{i % 30}", "source": 3} for i in range(40))))
    assert read(path) == ("prompts", [Group(f"p{i % 30}", ()) for i in range(40)], Counter())
    training, held_out = read_prompts(path)
    assert sorted(training + held_out) == sorted(f"p{i}" for i in range(30)) and len(held_out) == 3
    assert "prompts without an answer, of which there is nothing to imitate" in refusal(read_to_imitate, path)
    answered = write(jsonl(*({"prompt": f"p{i}", "completion": "a"} for i in range(30))))
    assert (training, held_out) == read_prompts(answered)  # no stage trains on what another holds out


def test_an_empty_prompt_is_a_prompt(write):
    training, held_out = read_prompts(write(jsonl(*({"prompt": x} for x in ("", "a", "b")))))
    assert sorted(training + held_out) == ["", "a", "b"]


KIND_OF = {
    "pairs": {"prompt": "p", "chosen": "a", "rejected": "b", "responses": ["c", "d"], "label": 1, "text": "t"},
    "ratings": RATED | {"label": 1, "completion": "c"},
    "rankings": {"prompt": "p", "responses": ["a", "b"], "label": 1, "text": "t"},
    "texts with labels": {"prompt": "p", "completion": "a", "text": "word " * 31 + "end.", "label": 1},
    "text": {"prompt": "p", "completion": "a", "text": "t"},
    "labels": LABEL | {"scores": [1]},
    "responses": {"prompt": "p", "response": "a", "scores": [1]},
    "prompts": {"prompt": "p", "scores": [1], "margin": 2},
}


@pytest.mark.parametrize("kind", KIND_OF)
def test_the_kind_follows_from_the_fields_of_the_first_row(write, kind):
    assert read(write(jsonl(KIND_OF[kind])))[0] == kind


def test_a_margin_may_be_negative_or_a_fraction(write):
    rows = [{"prompt": "p", "chosen": "c", "rejected": "r", "margin": x} for x in (-2, -0.5, 0, 999999999999999)]
    assert [group.margin for group in read(write(jsonl(*rows)))[1]] == [-2.0, -0.5, 0.0, 999999999999999.0]


# ---- what is refused -------------------------------------------------------------------------------------------------

SCORES, NUMBER = "'scores' must be a list with a number for each of 'responses'", "'scores' must be a number below 1e15"
GOOD_OR_BAD = "'label' must be 1 or true (good), 0 or false (bad), found"
BAD = [
    (RATED, RATED | {"scores": [1, 2]}, SCORES),
    (RATED, RATED | {"scores": [1, 2, 3, 4]}, SCORES),
    (RATED, RATED | {"scores": {"a": 1, "b": 2, "c": 3}}, SCORES),
    (RATED, RATED | {"scores": None}, SCORES),
    (RATED, {"prompt": "p", "responses": ["a", "b"]}, SCORES),
    (RATED, RATED | {"scores": [1, 2, None]}, f"{NUMBER}, found None"),
    (RATED, RATED | {"scores": [1, "2", 3]}, f"{NUMBER}, found '2'"),
    (RATED, RATED | {"scores": [True, 2, 3]}, f"{NUMBER}, found True"),
    (RATED, RATED | {"scores": [float("nan"), 2, 3]}, f"{NUMBER}, found nan"),
    (RATED, RATED | {"scores": [1, -(10**15), 3]}, f"{NUMBER}, found -1000000000000000"),
    (RATED, RATED | {"scores": [1, 10**400, 3]}, NUMBER),
    (RATED, RATED | {"responses": ["a"], "scores": [1]}, "'responses' must be a list of at least two texts"),
    (RATED, RATED | {"responses": ["a", 3, "c"]}, "'responses' must be text, found a int"),
    (RATED, {"responses": ["a", "b"], "scores": [1, 2]}, "has no field 'prompt'"),
    (LABEL, LABEL | {"label": 2}, f"{GOOD_OR_BAD} 2"),
    (LABEL, LABEL | {"label": 0.5}, f"{GOOD_OR_BAD} 0.5"),
    (LABEL, LABEL | {"label": -1}, f"{GOOD_OR_BAD} -1"),
    (LABEL, LABEL | {"label": "true"}, f"{GOOD_OR_BAD} 'true'"),
    (LABEL, LABEL | {"label": None}, f"{GOOD_OR_BAD} None"),
    (LABEL, LABEL | {"label": [1]}, f"{GOOD_OR_BAD} [1]"),
    (LABEL, {"prompt": "p", "completion": "a"}, f"{GOOD_OR_BAD} None"),
    (LABEL, {"prompt": "p", "label": 1}, "has no field 'completion'"),
    (LABEL, {"completion": "a", "label": 1}, "has no field 'prompt'"),
    (LABEL, LABEL | {"completion": 3}, "'completion' must be text, found a int"),
    (LABEL, LABEL | {"response": None}, "'response' must be text, found a NoneType"),
    ({"prompt": "p"}, {"text": "t"}, "has no field 'prompt'"),
    ({"prompt": "p"}, {"prompt": ["p"]}, "'prompt' must be text, or a list of messages"),
    ({"prompt": "p"}, {"prompt": None}, "'prompt' must be text, found a NoneType"),
]


@pytest.mark.parametrize("good, bad, reason", BAD, ids=range(len(BAD)))
def test_a_bad_row_is_refused_with_its_place_and_the_reason(write, good, bad, reason):
    """In the second line, and as the second row of an array."""
    lines = write(jsonl(good, bad, good))
    assert refusal(read, lines).startswith(f"{lines}, line 2: {reason}")
    array = write(json.dumps([good, bad, good]).encode(), "rows.json.gz")
    assert refusal(read, array).startswith(f"{array}, row 2: {reason}")


def test_a_label_without_an_answer_is_no_prompt(write):
    path = write(jsonl({"prompt": "p", "label": 1}))
    assert refusal(read, path) == f"{path}, line 1: has no field 'completion'"


@pytest.mark.parametrize("first", [{"prompt": "p", "rejected": "r"}, {"prompt": "p", "chosen": None, "rejected": "r"}])
def test_pairs_are_known_by_either_of_the_two(write, first):
    """Or a file whose first row is at fault would be taken for one of prompts."""
    path = write(jsonl(first, {"prompt": "q", "chosen": "c", "rejected": "r"}))
    reason = "'chosen' must be text, found a NoneType" if "chosen" in first else "has no field 'chosen'"
    for reads in (read, read_prompts, read_to_imitate, feedback):
        assert refusal(reads, path) == f"{path}, line 1: {reason}"


def test_a_row_with_no_field_that_is_known_is_taken_for_a_prompt(write):
    path = write(jsonl({"question": "p"}))
    assert refusal(read, path) == f"{path}, line 1: has no field 'prompt'"


@pytest.mark.parametrize(
    "row, nothing",
    [
        (RATED | {"responses": ["a", "a", "b"]}, "no usable rating"),
        (RATED | {"responses": ["a", "", "b"]}, "no usable rating"),
        (LABEL | {"completion": ""}, "no text"),
    ],
)
def test_a_file_whose_rows_are_all_dropped_is_refused(write, row, nothing):
    path = write(jsonl(row, row))
    assert refusal(read, path) == f"{path}: holds {nothing}"


# ---- arrays ----------------------------------------------------------------------------------------------------------

ROWS = [{"prompt": f"é{i}", "chosen": "c", "rejected": "[r]"} for i in range(3)]
ARRAYS = {
    "in one line": json.dumps(ROWS).encode(),
    "indented": json.dumps(ROWS, indent=4, ensure_ascii=False).encode(),
    "after a byte order mark": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "after blank lines": b" \r\n\t\n" + json.dumps(ROWS).encode() + b"\n \n",
    "after both": b"\xef\xbb\xbf\n " + json.dumps(ROWS, indent=1).encode(),
}


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.json.gz"])
@pytest.mark.parametrize("case", ARRAYS)
def test_an_array_is_read_as_its_rows(write, case, name):
    path = write(ARRAYS[case], name)
    assert list(read_rows(path)) == [(f"{path}, row {i}", row) for i, row in enumerate(ROWS, 1)]
    assert read(path) == read(write(jsonl(*ROWS)))


@pytest.mark.parametrize("name", ["rows.json", "rows.json.gz"])
@pytest.mark.parametrize(
    "content, message",
    [
        (b"[]", ": holds no row"),
        (b" [ ]\n", ": holds no row"),
        (b'[{"prompt": "p"}', ": not JSON ("),
        (b'[{"prompt": "p"},]', ": not JSON ("),
        (b'[{"prompt": "p"}]\n{"prompt": "q"}\n', ": not JSON ("),
        (b'[{"prompt": "\xff"}]', ": not valid UTF-8"),
        (b"[" * 100_000, ": not JSON ("),
        (b'[{"prompt": "p"}, ["q"]]', ", row 2: must be an object with named fields, found a list"),
        (b'["p"]\n["q"]\n', ": not JSON ("),
        (b'[{"prompt": "p"}, null]', ", row 2: must be an object with named fields, found a NoneType"),
    ],
)
def test_a_bad_array_is_refused(write, content, message, name):
    path = write(content, name)
    assert refusal(read, path).startswith(f"{path}{message}")
    assert refusal(feedback, path).startswith(f"{path}{message}")


def test_an_array_in_a_gz_that_is_cut_off_is_refused(write):
    path, whole = write(b"", "rows.json.gz"), gzip.compress(json.dumps(ROWS * 50).encode())
    for end in (1, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert "damaged or cut off" in refusal(read, path), end


@pytest.mark.parametrize("row", [RATED | {"scores": None}, LABEL | {"label": None}, {"prompt": "p", "text": None}])
def test_a_column_without_a_value_decides_nothing(write, row):
    kind, _, _ = read(write(jsonl(row)))
    assert kind == {"scores": "rankings", "label": "responses", "text": "prompts"}[list(row)[-1]]
