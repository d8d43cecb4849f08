"""Files in, groups out: what is read, what is refused and why, what is dropped and counted."""

import gzip
import json
import math
import os
from collections import Counter
from pathlib import Path

import pytest
from files import feedback, jsonl, judged, refusal

from nanopref.data.formats import (
    TURN,
    read,
    read_prompts,
    read_rows,
    read_to_imitate,
    split_dialogues,
)
from nanopref.data.groups import Group, split

GOOD = b'{"prompt": "p", "chosen": "c", "rejected": "r"}\n'
EQUAL = "rows dropped: two answers are equal"
EMPTY = "rows dropped: the chosen answer is empty"
PART_EARLIER = "pairs that part before the last turn (kept: the answer runs to the end)"


def read_all(path):
    return [row for _, row in read_rows(path)]


READERS = [read, read_to_imitate, feedback, read_prompts, read_all]


def pair(prompt: str, chosen: str, rejected: str, **more) -> Group:
    return Group(prompt, (chosen, rejected), **more)


# ---- bad rows and bad files ------------------------------------------------------------------------------------------

BAD_ROWS = {  # what stands in the third line, and what is said of it
    "not JSON": (b"{'prompt'}\n", "not JSON"),
    "half a row": (b'{"prompt": "p", "chosen"\n', "not JSON"),
    "two objects": (GOOD.strip() + GOOD, "not JSON"),
    "deeply nested": (b"[" * 100_000 + b"\n", "not JSON"),
    "a list": (b'["p", "c", "r"]\n', "must be an object with named fields, found a list"),
    "a string": (b'"p"\n', "found a str"),
    "a number": (b"3\n", "found a int"),
    "null": (b"null\n", "found a NoneType"),
    "no chosen": (jsonl({"prompt": "p", "rejected": "r"}), "has no field 'chosen'"),
    "no rejected": (jsonl({"prompt": "p", "chosen": "c"}), "has no field 'rejected'"),
    "no prompt": (jsonl({"chosen": "c", "rejected": "r"}), "has no field 'prompt', and the two share no dialogue"),
    "empty object": (b"{}\n", "has no field 'chosen'"),
    "chosen a list": (
        jsonl({"prompt": "p", "chosen": ["c"], "rejected": "r"}),
        "'chosen' must be text, or a list of messages",
    ),
    "rejected null": (jsonl({"prompt": "p", "chosen": "c", "rejected": None}), "'rejected' must be text"),
    "prompt a number": (jsonl({"prompt": 3, "chosen": "c", "rejected": "r"}), "'prompt' must be text, found a int"),
    "prompt null": (jsonl({"prompt": None, "chosen": "c", "rejected": "r"}), "'prompt' must be text"),
    "a text": (jsonl({"text": "t"}), "a text in a file of pairs"),
    "margin a text": (
        jsonl({"prompt": "p", "chosen": "c", "rejected": "r", "margin": "2"}),
        "'margin' must be a number",
    ),
    "margin without end": (
        jsonl({"prompt": "p", "chosen": "c", "rejected": "r", "margin": -math.inf}),
        "'margin' must be a number below 1e15, found -inf",
    ),
    "margin too far below 0": (
        jsonl({"prompt": "p", "chosen": "c", "rejected": "r", "margin": -(10**15)}),
        "'margin' must be a number below 1e15",
    ),
    "invalid UTF-8": (b'{"prompt": "\xff", "chosen": "c", "rejected": "r"}\n', "not valid UTF-8"),
    "Latin-1": ('{"prompt": "é", "chosen": "c", "rejected": "r"}\n'.encode("latin-1"), "not valid UTF-8"),
    "lone surrogate": (
        b'{"prompt": "p", "chosen": "\\ud83d", "rejected": "r"}\n',
        "'chosen' holds half of a surrogate",
    ),
}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_refused_with_its_line_and_the_reason(write, case, name):
    row, reason = BAD_ROWS[case]
    path = write(GOOD + b"\n" + row + GOOD, name)
    for reader in (read, read_to_imitate, feedback, read_prompts):
        message = refusal(reader, path)
        assert message.startswith(f"{path}, line 3: ") and reason in message


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"prompt": "p"}, "'responses' must be a list of at least two texts"),
        ({"prompt": "p", "responses": "ab"}, "'responses' must be a list of at least two texts"),
        ({"prompt": "p", "responses": ["a"]}, "'responses' must be a list of at least two texts"),
        ({"prompt": "p", "responses": ["a", 3]}, "'responses' must be text, found a int"),
        ({"prompt": "p", "responses": ["a", "\ud83d"]}, "'responses' holds half of a surrogate"),
        ({"responses": ["a", "b"]}, "has no field 'prompt'"),
        ({"prompt": ["p"], "responses": ["a", "b"]}, "'prompt' must be text, or a list of messages"),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "'responses' must be a list"),
    ],
)
def test_a_bad_ranking_is_refused_with_its_line(write, row, reason):
    path = write(jsonl({"prompt": "p", "responses": ["a", "b", "c"]}) + json.dumps(row).encode())
    message = refusal(read, path)
    assert message.startswith(f"{path}, line 2: ") and reason in message


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"text": 3}, "'text' must be text, found a int"),
        ({"prompt": "p"}, "has no field 'text'"),
        ({"text": "\ud83d"}, "'text' holds half of a surrogate"),
    ],
)
def test_a_bad_text_is_refused_with_its_line(write, row, reason):
    path = write(jsonl({"text": "a"}) + json.dumps(row).encode())
    message = refusal(read, path)
    assert message.startswith(f"{path}, line 2: ") and reason in message


@pytest.mark.parametrize(
    "row, reason",
    [({"prompt": "p"}, "'completion'"), ({"response": "r"}, "'prompt'"), ({"completion": "r"}, "'prompt'")],
)
def test_a_response_without_its_fields_is_refused(write, row, reason):
    path = write(jsonl({"prompt": "p", "response": "r"}, row))
    message = refusal(read, path)
    assert message.startswith(f"{path}, line 2: has no field") and reason in message


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["nothing.jsonl", "nothing.jsonl.gz", "no/such/folder.jsonl"])
def test_a_missing_file_is_refused(tmp_path, reader, name):
    assert "no such file" in refusal(reader, tmp_path / name)


@pytest.mark.parametrize("reader", READERS)
def test_a_folder_is_refused(tmp_path, reader):
    assert "a folder, not a file" in refusal(reader, tmp_path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize("content", [b"", b"\n \n\t\n"])
def test_a_file_without_rows_is_refused(write, content, name):
    for reader in (read, read_to_imitate, feedback, read_prompts):
        assert "holds no row" in refusal(reader, write(content, name))


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"chosen": f"q{TURN} ", "rejected": f"q{TURN} a"}, "no usable pair"),
        ({"prompt": "p", "chosen": "c", "rejected": "c"}, "no usable pair"),
        ({"prompt": "p", "responses": ["a", "b", "a"]}, "no usable ranking"),
        ({"prompt": "p", "completion": " \n"}, "no text"),
        ({"text": " "}, "no text"),
        ({"text": "a.", "label": 1}, "no text in which a sentence ends after its first 32 words"),
    ],
)
def test_a_file_whose_rows_are_all_dropped_is_refused(write, row, reason):
    assert f"holds {reason}" in refusal(read, write(jsonl(row, row)))


def test_a_gz_cut_off_anywhere_is_refused(write):
    whole = gzip.compress(b"".join(jsonl({"prompt": f"{i}", "chosen": "c" * i, "rejected": "r"}) for i in range(1, 30)))
    path = write(b"", "rows.jsonl.gz")
    for end in range(1, len(whole)):
        path.write_bytes(whole[:end])
        assert "damaged or cut off after line" in refusal(read, path), end


def test_a_gz_that_is_none_or_is_damaged_is_refused(write):
    path = write(b"", "rows.jsonl.gz")
    path.write_bytes(GOOD)
    assert "damaged" in refusal(read, path)
    whole = bytearray(gzip.compress(GOOD * 100))
    for position in (12, len(whole) // 2, len(whole) - 6):  # the data, and the checksum
        damaged = whole.copy()
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        assert "damaged or cut off" in refusal(read, path)


# ---- good files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_byte_order_mark_and_blank_lines_are_fine(write, name):
    path = write(b"\xef\xbb\xbf" + GOOD + b"\n  \r\n" + GOOD.replace(b"\n", b"\r\n") + GOOD.strip(), name)
    assert read(path) == ("pairs", [pair("p", "c", "r")] * 3, Counter())
    assert [where for where, _ in read_rows(path)] == [f"{path}, line {n}" for n in (1, 4, 5)]


def test_a_byte_order_mark_before_a_blank_line_is_fine(write):
    assert read(write(b"\xef\xbb\xbf\n" + GOOD))[1] == [pair("p", "c", "r")]


def test_other_fields_are_ignored_and_an_empty_rejected_is_fine(write):
    path = write(jsonl({"prompt": "", "chosen": "c", "rejected": "", "source": 3, "margin": None}))
    assert read(path) == ("pairs", [pair("", "c", "")], Counter())


def test_what_compares_nothing_is_dropped_and_counted(write):
    rows = [("c", "r"), ("c", "c"), ("", "r"), (" \n", "r"), ("", ""), ("c", "")]
    path = write(jsonl(*({"prompt": "p", "chosen": c, "rejected": r, "margin": 2} for c, r in rows)))
    kept = [pair("p", "c", "r", margin=2.0), pair("p", "c", "", margin=2.0)]
    assert read(path) == ("pairs", kept, Counter({EQUAL: 2, EMPTY: 2}))
    dialogues = [(f"q{TURN}{c}", f"q{TURN}{r}") for c, r in rows]
    path = write(jsonl(*({"chosen": c, "rejected": r} for c, r in dialogues)))
    kept = [pair(f"q{TURN}", "c", "r", whole=True), pair(f"q{TURN}", "c", "", whole=True)]
    assert read(path) == ("pairs", kept, Counter({EQUAL: 2, EMPTY: 2}))


def test_rankings_have_their_best_first(write):
    rows = [["a", "b", "c"], ["a", "b", "a"], [" ", "b"], ["b", ""], ["d", "c", "b", "a"]]
    path = write(jsonl(*({"prompt": f"p{i}", "responses": row, "stars": 3} for i, row in enumerate(rows))))
    kept = [Group(f"p{i}", tuple(rows[i])) for i in (0, 3, 4)]
    notes = Counter({EQUAL: 1, EMPTY: 1})
    assert read(path) == ("rankings", kept, notes)
    assert read_to_imitate(path) == ([Group(g.prompt, g.responses[:1]) for g in kept], notes)
    training, held_out, again = feedback(path, "plackett-luce")
    assert (training, held_out) == split(kept) and again == notes
    assert read_prompts(path) == tuple([g.prompt for g in part] for part in (training, held_out))


def test_what_is_imitated_of_each_kind(write):
    path = write(jsonl({"text": "a"}, {"text": " "}, {"text": "b"}))
    notes = Counter({"rows dropped: no text": 1})
    assert read_to_imitate(path) == ([Group("", ("a",), whole=True), Group("", ("b",), whole=True)], notes)
    path = write(jsonl({"prompt": "p", "chosen": "c", "rejected": "r", "margin": 2}))
    assert read_to_imitate(path) == ([Group("p", ("c",))], Counter())
    dialogue = f"\n\nHuman: h{TURN}"
    path = write(jsonl({"chosen": f"{dialogue} c", "rejected": f"{dialogue} r"}))
    assert read_to_imitate(path) == ([Group(dialogue, (" c",), whole=True)], Counter())


def test_an_answer_is_a_completion_or_a_response(write):
    rows = [{"prompt": "p", "response": "r"}, {"prompt": "", "completion": "s"}, {"prompt": "q", "completion": " "}]
    for ordered in (rows, rows[1:] + rows[:1]):
        kind, groups, notes = read(write(jsonl(*ordered)))
        assert kind == "responses" and notes == Counter({"rows dropped: no text": 1})
        assert sorted(groups) == [Group("", ("s",)), Group("p", ("r",))]


def test_a_file_may_hold_pairs_and_dialogues(write):
    dialogue, plain = f"\n\nHuman: h{TURN}", {"prompt": "p", "chosen": "c", "rejected": "r"}
    rows = [plain, {"chosen": f"{dialogue} c", "rejected": f"{dialogue} r", "margin": 3}, plain]
    expected = [pair("p", "c", "r"), pair(dialogue, " c", " r", margin=3.0, whole=True), pair("p", "c", "r")]
    for shift in (0, 1):
        assert read(write(jsonl(*rows[shift:]))) == ("pairs", expected[shift:], Counter())
        assert [g.whole for g in read_to_imitate(write(jsonl(*rows[shift:])))[0]] == [g.whole for g in expected[shift:]]


# ---- dialogues -------------------------------------------------------------------------------------------------------

Q, A, Q2 = "\n\nHuman: q", f"{TURN} a", "\n\nHuman: q2"
DIALOGUES = {  # chosen, rejected -> what they share, and the two answers
    "the last turn": (Q + A, Q + TURN + " b", Q + TURN, " a", " b"),
    "the last of two turns": (Q + A + Q2 + A, Q + A + Q2 + TURN + " b", Q + A + Q2 + TURN, " a", " b"),
    "answers that begin alike": (Q + TURN + " same x", Q + TURN + " same y", Q + TURN, " same x", " same y"),
    "an empty rejected": (Q + A, Q + TURN, Q + TURN, " a", ""),
    "an answer that goes on": (Q + A, Q + A + " more", Q + TURN, " a", " a more"),
    "parting earlier": (Q + A + Q2 + A, Q + TURN + " b" + Q2 + A, Q + TURN, " a" + Q2 + A, " b" + Q2 + A),
    "one a turn longer": (Q + A, Q + A + Q2 + A, Q + TURN, " a", " a" + Q2 + A),
    "parting in a question": (Q + A + Q2 + A, Q + A + Q2 + "!" + A, Q + TURN, " a" + Q2 + A, " a" + Q2 + "!" + A),
}


@pytest.mark.parametrize("case", DIALOGUES)
def test_dialogues_are_split_at_the_last_turn_they_share(write, case):
    chosen, rejected, *expected = DIALOGUES[case]
    for forth in (True, False):
        if not forth:
            chosen, rejected, expected = rejected, chosen, [expected[0], *expected[:0:-1]]
        assert split_dialogues(chosen, rejected) == pair(*expected, whole=True)
        path = write(jsonl({"chosen": chosen, "rejected": rejected}, {"prompt": "p", "chosen": "c", "rejected": "r"}))
        _, found, notes = read(path)
        if expected[1]:
            later = TURN in expected[1] or TURN in expected[2]
            assert found[0] == pair(*expected, whole=True) and notes == Counter({PART_EARLIER: 1} if later else {})
        else:
            assert len(found) == 1 and notes == Counter({EMPTY: 1})


@pytest.mark.parametrize("chosen, rejected", [("a", "b"), (Q, Q + A), ("x" + A, "y" + A), (Q + "\n\nAssistant", Q)])
def test_dialogues_that_share_no_turn_are_none(chosen, rejected):
    assert split_dialogues(chosen, rejected) is None


def real_file(name) -> Path:
    path = Path(os.environ.get("NANOPREF_DATA", "")) / name
    if "NANOPREF_DATA" not in os.environ or not path.is_file():
        reason = f"NANOPREF_DATA names no folder that holds {name}"
        print(reason)
        pytest.skip(reason)
    return path


def test_the_real_dialogues():
    path = real_file("hh_harmless.jsonl.gz")
    rows = read_all(path)
    kind, groups, notes = read(path)
    assert (kind, len(rows), len(groups)) == ("pairs", 1500, 1496)
    assert notes == {EMPTY: 4, PART_EARLIER: 1}
    whole = [row for row in rows if not row["chosen"].endswith(TURN) and row["chosen"].rpartition(TURN)[2].strip()]
    assert len(whole) == 1496
    for row, (prompt, (chosen, rejected), *_) in zip(whole, groups, strict=True):
        assert prompt + chosen == row["chosen"] and prompt + rejected == row["rejected"]
        assert prompt.startswith("\n\nHuman:") and prompt.endswith(TURN)
    imitated = [Group(group.prompt, group.responses[:1], whole=True) for group in groups]
    assert read_to_imitate(path) == (imitated, notes)


def test_the_real_reviews():
    path = real_file("movie_reviews.jsonl.gz")
    found, notes = read_to_imitate(path)
    assert len({group.source for group in found}) == 1999 and notes.total() == 1
    assert all(20 <= len(group.responses[0].split()) <= 52 for group in found)
    training, held_out, notes = judged(path)
    assert (len(training), len(held_out)) == (13837, 1525) and notes
