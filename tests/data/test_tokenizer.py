import gzip
import json
import os
import time
import unicodedata
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import regex
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopref.data.tokenizer import Tokenizer

# `regex` (training, and the definitions below), tiktoken and `tokenizers` each bring the tables of another release of
# Unicode, and differ in which of its youngest characters are letters. On those of Unicode 3.2 they must agree.
old_characters = st.characters(exclude_categories=["Cs", "Cn"]).filter(
    lambda character: unicodedata.ucd_3_2_0.category(character) != "Cn"
)
# Few letters make many ties and runs; "'" and the kinds of space exercise the splitting.
letters = st.text(alphabet="ab 's\n\t1.é", max_size=40)
corpora = st.lists(letters | st.text("ab", max_size=60) | st.text(old_characters, max_size=20), max_size=6)
# Bytes that are in part valid UTF-8, so that stray bytes stand between runs of text.
raw = st.lists(st.binary(max_size=8) | st.text(max_size=8).map(str.encode), max_size=6).map(b"".join)
chunks = old_characters | st.sampled_from(["the", " the", "'ll", "  ", "\n\n", "aa", "\u3000", "é", "🎬", "12"])
runs = st.lists(st.tuples(chunks, st.integers(1, 40)), max_size=8).map(lambda parts: "".join(c * n for c, n in parts))

TEXTS = [
    "The film was good, the acting wasn't; they'll say it's the best of the year.\n\n  I say: the worst! " * 3,
    "aaaaaaaaaaaaaaaa aaaa aaa ======== ==== ........   \t\t\t\n\n\n 1234 12341234",
    "Größe, café, naïve, кино кино кино, 映画映画, 🎬🎬🎬🎬 👩‍👩‍👧",
]
VOCAB_SIZE = 380


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.train(TEXTS, VOCAB_SIZE)
    assert tokenizer.vocab_size == VOCAB_SIZE
    return tokenizer


def split(text: str) -> list[str]:
    """The pattern as OpenAI published it with GPT-2, which the module writes in another way."""
    return regex.findall(
        r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
        text,
    )


def join(word: tuple[int, ...], pair: tuple[int, int], new: int) -> tuple[int, ...]:
    if len(word) < 2:
        return word
    if word[:2] == pair:
        return (new, *join(word[2:], pair, new))
    return (word[0], *join(word[1:], pair, new))


def slow_merges(texts: list[str], n_merges: int) -> list[tuple[int, int]]:
    """BPE as it is defined: count every pair of neighbours anew before each merge."""
    words = [tuple(piece.encode()) for text in texts for piece in split(text)]
    merges = []
    for new in range(256, 256 + n_merges):
        counts = Counter(pair for word in words for pair in pairwise(word))
        if not counts:
            break
        merges.append(min(counts, key=lambda pair: (-counts[pair], pair)))
        words = [join(word, merges[-1], new) for word in words]
    return merges


def slow_tokens(merges: list[tuple[int, int]]) -> list[bytes]:
    tokens = [bytes([byte]) for byte in range(256)]
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    return tokens


def slow_encode(text: str, merges: list[tuple[int, int]]) -> list[int]:
    ids = []
    for piece in split(text):
        word = tuple(piece.encode())
        for new, pair in enumerate(merges, start=256):
            word = join(word, pair, new)
        ids += word
    return ids


# Training


@given(corpora, st.integers(0, 30))
def test_train_learns_what_recounting_before_each_merge_learns(texts, n_merges):
    merges = slow_merges(texts, n_merges)
    tokenizer = Tokenizer.train(texts, 257 + n_merges)
    assert tokenizer.ranks == {token: rank for rank, token in enumerate(slow_tokens(merges))}
    assert tokenizer.vocab_size == 257 + len(merges)
    assert tokenizer.end_of_text == tokenizer.vocab_size - 1


@given(corpora, st.randoms())
def test_train_depends_on_the_texts_and_not_on_their_order(texts, random):
    shuffled = random.sample(texts, len(texts))
    assert Tokenizer.train(iter(shuffled), 280).ranks == Tokenizer.train(texts, 280).ranks


def test_train_stops_when_the_text_runs_out_of_pairs():
    assert Tokenizer.train(["ab ab"], 1000).vocab_size == 256 + 2 + 1
    assert Tokenizer.train([], 1000).vocab_size == 257


def test_train_refuses_a_vocabulary_without_room_for_the_bytes():
    with pytest.raises(ValueError, match=r"at least 257 .* not 256"):
        Tokenizer.train(TEXTS, 256)


def test_a_lone_surrogate_in_a_text_is_no_error():
    tokenizer = Tokenizer.train(["good \ud83d film"], 300)
    assert tokenizer.decode(tokenizer.encode("good \ud83d film")) == "good \ufffd film"


def test_train_is_fast_enough_on_two_thousand_reviews():
    if "NANOPREF_DATA" not in os.environ:
        pytest.skip("set NANOPREF_DATA to the folder of movie_reviews.jsonl.gz to time 4,096 merges on it")
    with gzip.open(Path(os.environ["NANOPREF_DATA"]) / "movie_reviews.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    start = time.process_time()
    tokenizer = Tokenizer.train(texts, 4096 + 257)
    seconds = time.process_time() - start
    print(f"4,096 merges in {seconds:.1f} s")
    assert tokenizer.vocab_size == 4096 + 257
    assert seconds < 60


# Encoding and decoding


@given(corpora, letters | runs)
def test_encode_applies_the_merges_in_order(texts, text):
    merges = slow_merges(texts, 30)
    tokenizer = Tokenizer.train(texts, 257 + 30)
    for every in [text, *texts]:
        assert tokenizer.encode(every) == slow_encode(every, merges)


@pytest.mark.parametrize("length", range(1, 60))
def test_encode_runs_of_one_character(tokenizer, length):
    merges = slow_merges(TEXTS, VOCAB_SIZE - 257)
    assert tokenizer.encode("a" * length) == slow_encode("a" * length, merges)


@given(st.text())
def test_any_text_round_trips(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text.encode()) == ids
    assert all(0 <= token < tokenizer.end_of_text for token in ids)


@given(raw)
def test_any_bytes_round_trip(tokenizer, data):
    ids = tokenizer.encode(data)
    assert tokenizer.decode_bytes(ids) == data
    assert tokenizer.decode(ids) == data.decode(errors="replace")
    assert all(0 <= token < tokenizer.end_of_text for token in ids)


def test_bytes_that_are_no_text_leave_the_text_around_them_whole(tokenizer):
    film, stray = tokenizer.encode(" film"), tokenizer.ranks[b"\xff"]
    assert len(film) == 1
    assert tokenizer.encode(b" film\xff film") == [*film, stray, *film]


def test_end_of_text_is_special_in_ids_and_ordinary_in_text(tokenizer):
    assert tokenizer.end_of_text not in tokenizer.encode("<|endoftext|>")
    assert tokenizer.encode(b"<|endoftext|>\xff")[:-1] == tokenizer.encode("<|endoftext|>")
    assert tokenizer.decode([tokenizer.end_of_text]) == "<|endoftext|>"
    assert tokenizer.decode_bytes([tokenizer.end_of_text]) == b"<|endoftext|>"


# Files


@pytest.fixture(scope="module")
def model_folder(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = {"model_type": "gpt2", "vocab_size": tokenizer.vocab_size}
    config |= {"bos_token_id": tokenizer.end_of_text, "eos_token_id": tokenizer.end_of_text}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module", params=["AutoTokenizer", "PreTrainedTokenizerFast"])
def theirs(request, model_folder):
    import transformers

    return getattr(transformers, request.param).from_pretrained(model_folder)


@settings(max_examples=200)
@given(text=runs)
def test_transformers_gives_the_same_ids(tokenizer, theirs, text):
    ids = tokenizer.encode(text)
    assert theirs.encode(text) == ids
    assert theirs.decode(ids) == text


def test_transformers_knows_the_end_of_text(tokenizer, theirs, model_folder):
    assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.end_of_text
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.encode("good<|endoftext|>") == [*tokenizer.encode("good"), tokenizer.end_of_text]
    assert theirs.decode([tokenizer.end_of_text], skip_special_tokens=True) == ""
    bare = tokenizers.Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    assert bare.decode([tokenizer.end_of_text]) == ""


@settings(max_examples=30)
@given(texts=corpora)
def test_load_gives_back_what_was_saved(tmp_path_factory, texts):
    tokenizer = Tokenizer.train(texts, 290)
    folder = tmp_path_factory.mktemp("saved") / "new" / "folder"
    tokenizer.save(folder)
    loaded = Tokenizer.load(folder)
    assert loaded == tokenizer
    assert [loaded.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]
    assert sorted(os.listdir(folder)) == ["tokenizer.json", "tokenizer_config.json"]


def test_tokenizers_are_equal_if_their_ranks_are(tokenizer):
    assert tokenizer == Tokenizer.train(TEXTS, VOCAB_SIZE)
    assert tokenizer != Tokenizer.train(TEXTS, VOCAB_SIZE - 1)
    assert tokenizer != tokenizer.ranks


def test_a_save_that_dies_leaves_the_old_file_whole(tokenizer, tmp_path, monkeypatch):
    tokenizer.save(tmp_path)

    def write_half(path, content):
        with open(path, "wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(OSError, match="disk full"):
        Tokenizer.train(TEXTS, 300).save(tmp_path)
    assert Tokenizer.load(tmp_path) == tokenizer
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"


def hub_file() -> dict:
    """The start of GPT-2's tokenizer.json as the hub has it: its order of the bytes and its first five merges."""
    printable = [*map(chr, range(33, 127)), *map(chr, range(161, 173)), *map(chr, range(174, 256))]
    tokens = [*printable, *(chr(256 + i) for i in range(256 - len(printable)))]
    tokens += ["Ġt", "Ġa", "he", "in", "re", "<|endoftext|>"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    end_of_text = {"id": 261, "special": True, "content": "<|endoftext|>", "single_word": False, "lstrip": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end_of_text | {"rstrip": False, "normalized": True}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
        "model": {
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "vocab": {token: rank for rank, token in enumerate(tokens)},
            "merges": ["Ġ t", "Ġ a", "h e", "i n", "r e"],
        },
    }


def load(file: object, folder: Path) -> Tokenizer:
    (folder / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
    return Tokenizer.load(folder)


def test_load_reads_the_hubs_layouts(tmp_path):
    pairs, outside, more = hub_file(), hub_file(), hub_file()
    pairs["model"]["merges"] = [merge.split() for merge in pairs["model"]["merges"]]
    del outside["model"]["vocab"]["<|endoftext|>"]
    more["added_tokens"].append({"id": 262, "content": "<pad>", "special": True})
    more["added_tokens"][1] |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for file in (hub_file(), pairs, outside, more):
        tokenizer = load(file, tmp_path)
        assert (tokenizer.end_of_text, tokenizer.vocab_size) == (261, 263 if file is more else 262)
        assert tokenizer.encode("!") == [0]
        assert tokenizer.encode(b"\n\x00\xff") == [198, 188, 187]
        assert tokenizer.encode(" the area in") == [256, 258, 257, 260, 64, 220, 259]
        theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert theirs.encode(" the area in\n").ids == tokenizer.encode(" the area in\n")
        tokenizer.save(tmp_path / "again")
        assert Tokenizer.load(tmp_path / "again") == tokenizer


def rename(file: dict, old: str, new: str) -> None:
    vocab = file["model"]["vocab"]
    vocab[new] = vocab.pop(old)


def swap(file: dict, a: str, b: str) -> None:
    vocab = file["model"]["vocab"]
    vocab[a], vocab[b] = vocab[b], vocab[a]


CORRUPTIONS = {
    "an id is missing": (lambda file: file["model"]["vocab"].pop("in"), "its merges do not"),
    "an id is used twice": (
        lambda file: file["model"]["vocab"].update({"in": 258}),
        "not whole numbers, each used once",
    ),
    "an id is no number": (lambda file: file["model"]["vocab"].update({"in": "259"}), "not whole numbers"),
    "a byte is missing": (lambda file: rename(file, "!", "hi"), "its merges do not"),
    "a byte comes after a merge": (lambda file: swap(file, "!", "in"), "its merges do not"),
    "a token is empty": (lambda file: rename(file, "in", ""), "token '' is not written"),
    "a token is not in bytes": (lambda file: rename(file, "in", "映"), "token '映' is not written"),
    "no merges make a token": (lambda file: rename(file, "re", "xyz"), "no merge .* makes token 260, 'xyz'"),
    "merges are in another order": (lambda file: file["model"]["merges"].reverse(), "its merges do not"),
    "ids are in another order": (lambda file: swap(file, "in", "he"), "its merges do not"),
    "a merge makes another token": (lambda file: file["model"]["merges"].__setitem__(3, "i m"), "its merges do not"),
    "a merge is missing": (lambda file: file["model"]["merges"].pop(), "its merges do not"),
    "a merge makes no token": (lambda file: file["model"]["merges"].append("o n"), "its merges do not"),
    "a merge is of three": (lambda file: file["model"]["merges"].__setitem__(3, "i n g"), "its merges do not"),
    "no end of text": (lambda file: file.update(added_tokens=[]), "no merge .* makes token 261"),
    "two ends of text": (
        lambda file: file["added_tokens"].insert(0, file["added_tokens"][0] | {"id": 262}),
        "'<|endoftext|>' has the id 262, which is not the next one",
    ),
    "the end of text has two ids": (lambda file: file["added_tokens"][0].update(id=262), "has the id 262"),
    "another added token": (lambda file: file["added_tokens"][0].update(content="</s>"), "has the id 261"),
    "a space is put first": (lambda file: file["pre_tokenizer"].update(add_prefix_space=True), "puts a space first"),
    "the text is not split": (lambda file: file["pre_tokenizer"].update(use_regex=False), "another than those known"),
    "another splitting": (lambda file: file.update(pre_tokenizer={"type": "Whitespace"}), "another than those known"),
    "no model": (lambda file: file.pop("model"), "not laid out .* KeyError\\('model'\\)"),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_load_refuses_a_file_whose(corruption, tmp_path):
    corrupt, reason = CORRUPTIONS[corruption]
    file = hub_file()
    corrupt(file)
    with pytest.raises(ValueError, match=reason.replace("|", "\\|")) as error:
        load(file, tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b'{"model": {', b"[1, 2]", b"\xff\xfe"])
def test_load_refuses_a_file_that_is_no_object_of_json(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=str(tmp_path / "tokenizer.json")):
        Tokenizer.load(tmp_path)


def test_load_says_which_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "tokenizer.json")):
        Tokenizer.load(tmp_path)


# GPT-2's own, without the network


def test_gpt2_keeps_the_ids_of_tiktoken(monkeypatch):
    ranks = {bytes([byte]): 255 - byte for byte in range(256)} | {b" t": 256, b"he": 257}
    encoding = tiktoken.Encoding(
        "gpt2", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 258}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": encoding}.__getitem__)
    tokenizer = Tokenizer.gpt2()
    assert tokenizer.ranks == ranks
    assert tokenizer.end_of_text == 258
    assert tokenizer.encode(" the") == [256, 257]


def test_gpt2_says_that_it_cannot_be_downloaded(monkeypatch):
    def get_encoding(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    with pytest.raises(OSError, match="cannot be downloaded: no route to host"):
        Tokenizer.gpt2()
