import gzip
import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nanopref import run
from nanopref.data import (
    TURN,
    Pair,
    Response,
    collate,
    encode_pairs,
    encode_prompt,
    encode_responses,
    micro_batches,
    my_micro_batches,
    passages,
    read_comparisons,
    read_pairs,
    read_passages,
    read_prompts,
    read_responses,
    read_rows,
    split,
    split_dialogues,
    write_pairs,
)
from nanopref.run import UserError
from nanopref.tokenizer import Tokenizer

GOOD = b'{"prompt": "p", "chosen": "c", "rejected": "r"}\n'
TOKENIZER = Tokenizer.train(["the film was good. the film was bad."], 270)
END = TOKENIZER.end_of_text
EMPTY_CHOSEN = "pairs dropped: the chosen answer is empty"
PART_EARLIER = "pairs that part before the last turn (kept: the answer runs to the end)"
CUT_ANSWERS = "answers cut on the right to fit the context"
CUT_PROMPTS = "prompts cut on the left to fit the context"
texts = st.text(max_size=12)
words = st.lists(st.sampled_from(["the", " film", " was", " good", ".", "é"]), max_size=12).map("".join)


def refusal(read, path) -> str:
    """What a reader says of a file that it must refuse, in one line that names the file."""
    with pytest.raises(UserError) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message


def read_all(path):
    return [row for _, row in read_rows(path)]


@pytest.fixture
def write(tmp_path):
    def write(content: bytes, name="rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
        return path

    return write


def jsonl(*rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


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
    "chosen a list": (jsonl({"prompt": "p", "chosen": ["c"], "rejected": "r"}), "'chosen' must be text, found a list"),
    "rejected null": (jsonl({"prompt": "p", "chosen": "c", "rejected": None}), "'rejected' must be text"),
    "prompt a number": (jsonl({"prompt": 3, "chosen": "c", "rejected": "r"}), "'prompt' must be text, found a int"),
    "prompt null": (jsonl({"prompt": None, "chosen": "c", "rejected": "r"}), "'prompt' must be text"),
    "empty chosen": (jsonl({"prompt": "p", "chosen": "", "rejected": "r"}), "'chosen' is empty"),
    "blank chosen": (jsonl({"prompt": "p", "chosen": " \n", "rejected": "r"}), "'chosen' is empty"),
    "both equal": (jsonl({"prompt": "p", "chosen": "c", "rejected": "c"}), "are equal"),
    "dialogues equal": (jsonl({"chosen": f"q{TURN} a", "rejected": f"q{TURN} a"}), "are equal"),
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
    assert refusal(read_pairs, path).startswith(f"{path}, line 3: ") and reason in refusal(read_pairs, path)


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
    assert refusal(read_responses, path).startswith(f"{path}, line 2: ") and reason in refusal(read_responses, path)


@pytest.mark.parametrize("row, reason", [({"prompt": "p"}, "'response'"), ({"response": "r"}, "'prompt'")])
def test_a_response_without_its_fields_is_refused(write, row, reason):
    path = write(jsonl({"prompt": "p", "response": "r"}, row))
    message = refusal(read_responses, path)
    assert message.startswith(f"{path}, line 2: has no field") and reason in message


@pytest.mark.parametrize("read", [read_pairs, read_responses, read_all])
@pytest.mark.parametrize("name", ["nothing.jsonl", "nothing.jsonl.gz", "no/such/folder.jsonl"])
def test_a_missing_file_is_refused(tmp_path, read, name):
    assert "no such file" in refusal(read, tmp_path / name)


@pytest.mark.parametrize("read", [read_pairs, read_responses, read_all])
def test_a_folder_is_refused(tmp_path, read):
    assert "a folder, not a file" in refusal(read, tmp_path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize("content", [b"", b"\n \n\t\n"])
def test_a_file_without_rows_is_refused(write, content, name):
    assert "no usable pair" in refusal(read_pairs, write(content, name))
    assert "no row" in refusal(read_responses, write(content, name))


def test_a_file_whose_pairs_are_all_dropped_is_refused(write):
    path = write(jsonl({"chosen": f"q{TURN} ", "rejected": f"q{TURN} a"}))
    assert "no usable pair" in refusal(read_pairs, path)


def test_a_file_whose_texts_are_all_empty_is_refused(write):
    assert "no text" in refusal(read_responses, write(jsonl({"text": ""}, {"text": " "})))


def test_a_gz_cut_off_anywhere_is_refused(write):
    whole = gzip.compress(b"".join(jsonl({"prompt": f"{i}", "chosen": "c" * i, "rejected": "r"}) for i in range(1, 30)))
    path = write(b"", "rows.jsonl.gz")
    for end in range(1, len(whole)):
        path.write_bytes(whole[:end])
        assert "damaged or cut off after line" in refusal(read_pairs, path), end


def test_a_gz_that_is_none_or_is_damaged_is_refused(write):
    path = write(b"", "rows.jsonl.gz")
    path.write_bytes(GOOD)
    assert "damaged" in refusal(read_pairs, path)
    whole = bytearray(gzip.compress(GOOD * 100))
    for position in (12, len(whole) // 2, len(whole) - 6):  # the data, and the checksum
        damaged = whole.copy()
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        assert "damaged or cut off" in refusal(read_pairs, path)


# ---- good files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_byte_order_mark_and_blank_lines_are_fine(write, name):
    path = write(b"\xef\xbb\xbf" + GOOD + b"\n  \r\n" + GOOD.replace(b"\n", b"\r\n") + GOOD.strip(), name)
    assert read_pairs(path) == ([Pair("p", "c", "r")] * 3, Counter())
    assert [where for where, _ in read_rows(path)] == [f"{path}, line {n}" for n in (1, 4, 5)]


def test_a_byte_order_mark_before_a_blank_line_is_fine(write):
    assert read_pairs(write(b"\xef\xbb\xbf\n" + GOOD))[0] == [Pair("p", "c", "r")]


def test_other_fields_are_ignored_and_an_empty_rejected_is_fine(write):
    path = write(jsonl({"prompt": "", "chosen": "c", "rejected": "", "source": 3}))
    assert read_pairs(path) == ([Pair("", "c", "")], Counter())


@settings(deadline=None, max_examples=50)
@given(
    pairs=st.lists(
        st.builds(Pair, texts, texts, texts, st.floats(0, 9), rejected_prompt=st.none()), min_size=1, max_size=5
    )
)
def test_what_is_written_is_read_again(tmp_path_factory, pairs):
    pairs = [pair for pair in pairs if pair.chosen.strip() and pair.chosen != pair.rejected] or [Pair("p", "c", "r")]
    path = tmp_path_factory.getbasetemp() / "written.jsonl"
    path.write_text(write_pairs(pairs), encoding="utf-8", newline="")
    assert read_pairs(path) == (pairs, Counter())


def test_responses_of_each_kind(write):
    path = write(jsonl({"text": "a"}, {"text": " "}, {"text": "b"}))
    assert read_responses(path) == (
        [Response("", "a", True), Response("", "b", True)],
        Counter({"rows dropped: no text": 1}),
    )
    path = write(jsonl({"prompt": "p", "response": "r"}, {"prompt": "", "response": "s"}))
    assert read_responses(path) == ([Response("p", "r"), Response("", "s")], Counter())
    path = write(jsonl({"prompt": "p", "chosen": "c", "rejected": "r"}))
    assert read_responses(path) == ([Response("p", "c")], Counter())
    dialogue = f"\n\nHuman: h{TURN}"
    path = write(jsonl({"chosen": f"{dialogue} c", "rejected": f"{dialogue} r"}))
    assert read_responses(path) == ([Response(dialogue, " c", True)], Counter())


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
        assert split_dialogues(chosen, rejected) == Pair(*expected)
        path = write(jsonl({"chosen": chosen, "rejected": rejected}, {"prompt": "p", "chosen": "c", "rejected": "r"}))
        pairs, notes = read_pairs(path)
        if expected[1]:
            later = TURN in expected[1] or TURN in expected[2]
            assert pairs[0] == Pair(*expected) and notes == Counter({PART_EARLIER: 1} if later else {})
        else:
            assert len(pairs) == 1 and notes == Counter({EMPTY_CHOSEN: 1})


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
    pairs, notes = read_pairs(path)
    assert (len(rows), len(pairs)) == (1500, 1496)
    assert notes == {EMPTY_CHOSEN: 4, PART_EARLIER: 1}
    whole = [row for row in rows if not row["chosen"].endswith(TURN) and row["chosen"].rpartition(TURN)[2].strip()]
    assert len(whole) == 1496
    for row, pair in zip(whole, pairs, strict=True):
        assert pair.prompt + pair.chosen == row["chosen"] and pair.prompt + pair.rejected == row["rejected"]
        assert pair.prompt.startswith("\n\nHuman:") and pair.prompt.endswith(TURN)
    assert read_responses(path) == ([Response(pair.prompt, pair.chosen, True) for pair in pairs], notes)


def test_the_real_reviews():
    path = real_file("movie_reviews.jsonl.gz")
    found, notes = read_responses(path)
    assert len({row.source for row in found}) == 1999 and notes.total() == 1
    assert all(20 <= len(row.response.split()) <= 52 for row in found)
    training, held_out, notes = read_comparisons(path)
    assert (len(training), len(held_out)) == (13837, 1525) and notes


# ---- encoding --------------------------------------------------------------------------------------------------------


def sequences(pair):
    return [(pair.prompt, pair.chosen), (pair.prompt, pair.rejected)]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.builds(Pair, words, words, words, rejected_prompt=st.none()), max_size=4), st.integers(2, 24))
def test_encoded_pairs_fit_and_say_what_was_cut(pairs, block_size):
    encoded, notes = encode_pairs(pairs, TOKENIZER, block_size)
    cut = Counter()
    for pair, ((prompt, chosen), (again, rejected)) in zip(pairs, encoded, strict=True):
        answers = chosen, rejected
        whole_prompt = encode_prompt(TOKENIZER, pair.prompt)
        assert prompt == again
        assert 1 <= len(prompt) and prompt == whole_prompt[-len(prompt) :]
        cut[CUT_PROMPTS] += prompt != whole_prompt
        assert max(len(prompt) + len(answer) for answer in answers) <= block_size
        for text, answer in zip((pair.chosen, pair.rejected), answers, strict=True):
            whole = [*TOKENIZER.encode(text), END]
            assert answer == whole[: len(answer)]
            assert answer == whole or len(answer) == block_size - 1  # cut only where it must be
            cut[CUT_ANSWERS] += answer != whole
        if prompt != whole_prompt:  # and no more than needed
            assert max(len(prompt) + len(answer) for answer in answers) == block_size
    assert notes == +cut and all(notes.values())


def test_an_empty_prompt_is_end_of_text():
    assert encode_prompt(TOKENIZER, "") == [END]
    assert encode_prompt(TOKENIZER, "the") == TOKENIZER.encode("the")


@settings(deadline=None, max_examples=200)
@given(st.lists(st.builds(Response, words, words, st.booleans()), max_size=8), st.integers(2, 24))
def test_encoded_responses_fit_and_packing_loses_nothing(rows, block_size):
    encoded, notes = encode_responses(rows, TOKENIZER, block_size)
    assert all(prompt and response and len(prompt) + len(response) <= block_size for prompt, response in encoded)
    with_prompt = [(row.prompt, row.response) for row in rows if not row.whole]
    cut = Counter()
    for (prompt, response), (x, y) in zip(with_prompt, encoded, strict=False):
        whole_x, whole_y = encode_prompt(TOKENIZER, prompt), [*TOKENIZER.encode(response), END]
        assert y == whole_y[: block_size - 1] and x == whole_x[-(block_size - len(y)) :]
        cut += Counter({CUT_PROMPTS: int(x != whole_x), CUT_ANSWERS: int(y != whole_y)})
    assert notes == cut
    packed = encoded[len(with_prompt) :]
    whole = [TOKENIZER.encode(row.prompt) + TOKENIZER.encode(row.response) + [END] for row in rows if row.whole]
    stream = [token for tokens in whole for token in tokens]
    targets = [token for _, response in packed for token in response]
    assert targets == stream[1:]  # each token counts once, but for the very first
    first, previous = stream[:1], stream[:-1]
    assert [x for x, _ in packed] == [previous[i : i + 1] for i in range(0, len(previous), block_size - 1)]
    assert not packed or packed[0][0] == first
    assert all(len(response) == block_size - 1 for _, response in packed[:-1])


token_lists = st.lists(st.integers(0, 50), min_size=1, max_size=8)


@settings(deadline=None)
@given(st.lists(st.tuples(token_lists, token_lists), min_size=1, max_size=5))
def test_a_batch_counts_exactly_the_response(rows):
    inputs, targets, mask = collate(rows)
    assert inputs.shape == targets.shape == mask.shape == (len(rows), max(len(x) + len(y) for x, y in rows) - 1)
    assert inputs.dtype == targets.dtype == torch.long and mask.dtype == torch.float32
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert set(mask.flatten().tolist()) <= {0.0, 1.0}
    for (prompt, response), row, target, counts in zip(rows, inputs, targets, mask, strict=True):
        whole = prompt + response
        assert row[: len(whole) - 1].tolist() == whole[:-1]
        assert target[counts == 1].tolist() == response
        assert counts[: len(prompt) - 1].sum() == 0 and counts[len(whole) - 1 :].sum() == 0


# ---- batches ---------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.builds(Pair, st.sampled_from("abcdefgh"), words, words), min_size=2, max_size=40), st.randoms())
def test_the_split_is_a_partition_by_prompts(rows, rng):
    assume(len({row.prompt for row in rows}) > 1)
    training, held_out = split(rows)
    assert training and held_out and Counter(training) + Counter(held_out) == Counter(rows)
    assert not {row.prompt for row in training} & {row.prompt for row in held_out}
    rng.shuffle(rows)
    assert Counter(split(rows)[1]) == Counter(held_out)  # whatever the order, and so the file


def test_sft_and_dpo_hold_out_the_same_dialogues():
    pairs = [Pair(f"prompt {i}", f"chosen {i}", f"rejected {i}") for i in range(1000)]
    responses = [Response(pair.prompt, pair.chosen, whole=True) for pair in pairs]
    held_out = [pair.prompt for pair in split(pairs)[1]]
    assert len(held_out) == 100 and held_out == [row.prompt for row in split(responses)[1]]
    assert 350 < sum(int(prompt.split()[1]) for prompt in held_out) / 100 < 650  # from all over the file


def test_texts_are_split_by_themselves():
    training, held_out = split([Response("", f"text {i}", whole=True) for i in range(50)])
    assert (len(training), len(held_out)) == (45, 5)


def test_one_prompt_cannot_be_split():
    with pytest.raises(UserError, match="only one prompt"):
        split([Pair("p", "a", "b"), Pair("p", "c", "d")])


lengths_lists = st.lists(st.integers(1, 100), min_size=1, max_size=40)


@settings(deadline=None)
@given(lengths_lists, st.integers(1, 12), st.data())
def test_micro_batches_partition_a_batch(lengths, size, data):
    rows = data.draw(st.lists(st.sampled_from(range(len(lengths))), unique=True, min_size=1))
    pieces = micro_batches(rows, lengths, size)
    assert sorted(i for piece in pieces for i in piece) == sorted(rows)
    assert len(pieces) == -(-len(rows) // size) and all(1 <= len(piece) <= size for piece in pieces)
    ordered = [lengths[i] for piece in pieces for i in piece]
    assert ordered == sorted(ordered)  # alike in length: little padding


@settings(deadline=None)
@given(lengths_lists, st.integers(1, 12), st.integers(1, 5))
def test_the_processes_share_a_batch(lengths, size, world_size):
    rows = list(range(len(lengths)))
    shares = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "world_size", lambda: world_size)
        for rank in range(world_size):
            patch.setattr(run, "rank", lambda rank=rank: rank)
            shares.append(my_micro_batches(rows, lengths, size))
    assert sorted(i for pieces in shares for piece in pieces for i in piece) == rows
    assert all(1 <= len(piece) <= size for pieces in shares for piece in pieces)
    counts = [len(pieces) for pieces in shares]
    assert max(counts) - min(counts) <= 1  # none waits long for another


# ---- texts with labels -----------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(["good", "film", "end.", "why?", ".", "\n"]), max_size=200).map(" ".join))
def test_passages_are_the_text_in_order(text):
    found = [(prompt + response).split() for prompt, response in passages(text)]
    words = text.split()
    assert [word for passage in found for word in passage] == words[: sum(map(len, found))]
    for prompt, response in passages(text):
        assert len(prompt.split()) == 12 and response.startswith(" ") and 20 <= len(response.split()) <= 52
    for passage in found:
        *inside, last = passage[31:]
        assert not any(word[-1] in ".!?" for word in inside)  # it ends where it first may
        assert last[-1] in ".!?" or len(passage) == 64
    left = words[sum(map(len, found)) :]
    assert len(left) < 64 and not any(word[-1] in ".!?" for word in left[31:])


def labelled(n: int) -> list[dict]:
    """Texts of two passages each, the even ones good."""
    return [{"text": f"w{i} " * 31 + "end. " + f"v{i} " * 31 + "end.", "label": (i + 1) % 2} for i in range(n)]


def test_every_stage_holds_out_the_same_texts(write):
    path = write(b"".join(json.dumps(row).encode() + b"\n" for row in labelled(40)))
    rows, notes = read_responses(path)
    assert len(rows) == 80 and not notes and {row.good for row in rows} == {True, False}
    held_out = {row.source for row in split(rows)[1]}
    assert len(held_out) == 4 == len({row.source for row in split(rows)[1]}) and len(split(rows)[1]) == 8
    _, tested, _ = read_comparisons(path)
    _, prompts = read_prompts(path)
    words = {word for text in held_out for word in text.split()}
    assert all(word in words for pair in tested for x in pair.prompts for word in x.split())
    assert {x for pair in tested for x in pair.prompts} <= set(prompts) and len(prompts) == 8
    streamed = write(b"".join(json.dumps({"text": row["text"]}).encode() + b"\n" for row in labelled(40)))
    assert {row.response for row in split(read_responses(streamed)[0])[1]} == held_out  # with no labels, too


def test_other_fields_do_not_change_what_a_file_holds(write):
    """Pairs with a text or a label beside them are pairs, and responses with a label are responses."""
    rows = [{"prompt": f"p{i}", "chosen": "c", "rejected": "r", "text": "t", "label": 1} for i in range(20)]
    path = write(jsonl(*rows))
    assert len(read_comparisons(path)[0]) == 18 and read_comparisons(path)[0] == split(read_pairs(path)[0])[0]
    assert set(read_prompts(path)[1]) == {pair.prompt for pair in split(read_pairs(path)[0])[1]}
    assert read_responses(path)[0] == [Response(f"p{i}", "c") for i in range(20)]
    path = write(jsonl({"prompt": "p", "response": "r", "label": 1}))
    assert read_responses(path)[0] == [Response("p", "r")]


def test_held_out_prompts_are_no_training_prompts(write):
    """Passages of two texts may begin alike."""
    rows = [{"text": f"{'same ' * 12}{'w ' * 20}{i}.", "label": i % 2} for i in range(30)]
    assert "none to hold out" in refusal(read_prompts, write(jsonl(*rows)))
    training, held_out = read_prompts(write(jsonl(*rows, *labelled(40))))
    assert held_out and not set(training) & set(held_out)


def test_a_good_passage_meets_a_bad_one(write):
    path = write(b"".join(json.dumps(row).encode() + b"\n" for row in labelled(41)))
    training, tested, notes = read_comparisons(path)
    for pair in training + tested:
        good, bad = (int(x.split()[0][1:]) for x in pair.prompts)
        assert good % 2 == 0 and bad % 2 == 1
    met = {(pair.prompts[0].split()[0][1:], pair.prompts[1].split()[0][1:]) for pair in training}
    assert len(met) > len(training) // 2 + 5  # not text by text
    assert len(training) + len(tested) == 41 - notes["passages dropped: more of one label than of the other"] / 2
    encoded, _ = encode_pairs(training, TOKENIZER, 600)
    for pair, rows in zip(training, encoded, strict=True):
        for x, y, (prompt, response) in zip(pair.prompts, (pair.chosen, pair.rejected), rows, strict=True):
            assert TOKENIZER.decode(prompt) == x and TOKENIZER.decode(response[:-1]) == y and response[-1] == END


def test_texts_that_cannot_be_learnt_from_are_refused(write):
    def content(*rows):
        return write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))

    assert "'label' must be 1 (good) or 0 (bad)" in refusal(read_comparisons, content({"text": "a", "label": "good"}))
    assert "no text in which a sentence ends after its first 32 words" in refusal(
        read_comparisons, content({"text": "a.", "label": 1})
    )
    one_sided = content(*({**row, "label": 1} for row in labelled(20)))
    assert "needs good and bad texts" in refusal(read_comparisons, one_sided)
    assert "a text, no pair" in refusal(read_pairs, content(*labelled(20)))
    _, notes = read_passages(content(*labelled(20), {"text": "too short.", "label": 0}))
    assert notes == Counter({"texts dropped: no sentence ends after its first 32 words": 1})
