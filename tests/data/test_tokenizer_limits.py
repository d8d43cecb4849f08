"""Tokenizers and texts of any size: refused in one sentence, or done in time that grows as they do."""

import json
import random
import time
import unicodedata
from itertools import pairwise

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_layouts import FAMILIES, added, family, write

from nanopref.data import chat
from nanopref.data.tokenizer import SPACES, Tokenizer
from nanopref.data.tokenizer_files import LONGEST


def seconds(call, *arguments) -> float:
    start = time.process_time()
    call(*arguments)
    return time.process_time() - start


def test_no_token_that_is_learnt_is_longer_than_can_be_read(tmp_path):
    for text in ("a" * 1_000_000, " " * 1_000_000 + "b", "ab" * 500_000):
        assert seconds(Tokenizer.train, [text], 2000) < 2
        tokenizer = Tokenizer.train([text], 2000)
        assert max(map(len, tokenizer.ranks)) == LONGEST
        tokenizer.save(tmp_path)
        assert Tokenizer.load(tmp_path) == tokenizer


def test_a_long_word_is_learnt_from_in_the_time_of_its_length():
    letters = random.Random(0).choices("abcdefghij", k=200_000)
    assert seconds(Tokenizer.train, ["".join(letters)], 1000) < 5  # 27 where each merge looks through the word


words = st.tuples(st.text("ab", min_size=1, max_size=3), st.integers(1, 800)).map(lambda word: word[0] * word[1])


@given(st.lists(words, max_size=4), st.integers(0, 30))
def test_a_longer_word_is_learnt_from_as_its_parts(texts, n_merges):
    parts = [text[i : i + LONGEST] for text in texts for i in range(0, len(text), LONGEST)]
    assert Tokenizer.train(texts, 257 + n_merges).ranks == Tokenizer.train(parts, 257 + n_merges).ranks


@pytest.mark.parametrize("name", FAMILIES)
def test_very_many_spaces_before_a_word_are_split_as_few(name, tmp_path):
    folder = write(tmp_path, *family(name))
    ours, theirs = Tokenizer.load(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in (" " * SPACES + "x", "a" + "\u3000\n " * SPACES + "12", "  b" + " " * (SPACES - 1) + "12"):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    assert seconds(ours.encode, " " * 1_000_000 + "x") < 5  # tiktoken's stack holds fewer


def test_many_marks_on_a_letter_are_composed_as_few(tmp_path):
    ours = Tokenizer.load(write(tmp_path, *family("qwen2")))
    marks = "\u0301\u0316\u0327\u0334\u0344\u0323\u0f73é"
    draw = random.Random(0)
    for base in ("e", "ệ", "\u1100", ""):
        text = base + "".join(draw.choices(marks, k=400))
        assert ours.decode(ours.encode(text)) == unicodedata.normalize("NFC", text)
    assert seconds(ours.encode, "e" + "\u0301\u0316" * 100_000) < 3  # a minute as `unicodedata` does it


def test_a_message_of_special_tokens_is_broken_in_one_pass():
    special = chat._special(("<|im_end|>", "<|im_start|>", "ab" * 256))
    assert seconds(chat._broken, "<|im_end|>" * 100_000, special, "#") < 2  # six where each break copies the message


@given(st.lists(st.text("ab<", min_size=1, max_size=4), min_size=1, max_size=6), st.text("ab<", max_size=6))
def test_where_a_part_may_become_a_special_token(names, part):
    assert chat._begins(sorted(names), part) == any(name.startswith(part) and name != part for name in names)


def token_of(length: int, letter: str = "a"):
    """A vocabulary in which each token is the one before and a letter."""

    def change(file):
        model = file["model"]
        for left, right in pairwise(letter * n for n in range(1, length + 1)):
            if right not in model["vocab"]:
                model["vocab"][right] = len(model["vocab"])
                model["merges"].append(f"{left} {letter}")
        file["added_tokens"] = [added("<|endoftext|>", len(model["vocab"]))]

    return change


def ids(**changes):
    return lambda file: file["model"]["vocab"].update(changes)


REFUSED = {
    "a token of a thousand bytes": (token_of(1000), "has more than 512 bytes"),
    "an id of 2^31": (ids(the=2**31), "not whole numbers, each used once"),
    "an id of 2^63": (ids(the=2**63), "not whole numbers, each used once"),
    "an id of 400 digits": (ids(the=10**400), "not whole numbers, each used once"),
    "no tokens": (lambda file: (file["model"].update(vocab={}, merges=[]), file.update(added_tokens=[])), "not whole"),
    "a long added token": (
        lambda file: file["added_tokens"].append(added("x" * 600, file["added_tokens"][-1]["id"] + 1)),
        "has more than 512 characters",
    ),
    "no part in a template": (
        lambda file: file.update(post_processor={"type": "TemplateProcessing", "single": []}),
        "not laid out",
    ),
}


@pytest.mark.parametrize("refused", REFUSED)
def test_load_refuses(refused, tmp_path):
    change, reason = REFUSED[refused]
    text, config = family("gpt2")
    file = json.loads(text)
    change(file)
    with pytest.raises(ValueError) as error:
        Tokenizer.load(write(tmp_path, file, config))
    assert reason in str(error.value) and str(tmp_path / "tokenizer.json") in str(error.value)
    assert len(str(error.value)) < 1000 and str(error.value).isprintable()


def test_the_ids_of_added_tokens_are_whole_numbers(tmp_path):
    text, config = family("smollm2")  # whose added tokens are in the vocabulary
    file = json.loads(text)
    for token in file["added_tokens"]:
        token["id"] = float(token["id"])
    assert all(type(i) is int for i in Tokenizer.load(write(tmp_path, file, config)).added.values())


@pytest.mark.parametrize("text", ["<|reserved_17|> and ", "xxxxxxxxxx"])
def test_a_text_costs_the_same_however_many_tokens_are_added(tmp_path, text):
    ours, config = family("gpt2")
    file = json.loads(ours)
    names = [f"<|reserved_{i}|>" for i in range(5000)] + [f"{'x' * (i % 9)}y{i}" for i in range(5000)]
    file["added_tokens"] = [
        added(name, len(file["model"]["vocab"]) + i) for i, name in enumerate(["<|endoftext|>", *names])
    ]
    tokenizer = Tokenizer.load(write(tmp_path, file, config))
    assert seconds(tokenizer.encode, text * 20_000, True) < 2  # each name takes its time where all are tried in turn
    theirs = tokenizers.Tokenizer.from_str(json.dumps(file))
    some = "xxxxy17 xy1y10xxy9999<|reserved_4999|><|reserved_5000|> <|reserved_49|> yyy0"
    assert tokenizer.encode(some, special=True) == theirs.encode(some, add_special_tokens=False).ids
