"""Byte-level byte-pair encoding: trained here or read from Hugging Face's files, and run by tiktoken.

Training (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909) starts from single symbols, joins the pair of
neighbours that is seen most often into a new symbol, and repeats. GPT-2 (Radford et al. 2019) starts from the 256
bytes, so that any text has an encoding, and first splits the text into words, numbers, punctuation and spaces, across
which nothing is joined. Encoding replays the merges in the order in which they were learnt, which is that of the ids.
"""

import heapq
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple

import regex
import tiktoken

from nanopref.data.tokenizer_files import (
    END_OF_TEXT,
    GPT2_SPLIT,
    LONGEST,
    OWN_VARIABLES,
    Layout,
    Settings,
    contents,
    read,
)
from nanopref.running.files import write_atomic
from nanopref.running.parallel import progress

SPACES = 100_000  # as many in a row are split by `regex` and not by tiktoken
_MANY_SPACES = re.compile(rf"(?<!\s)\s{{{SPACES}}}")
_MANY_MARKS = regex.compile(r"\p{M}{100,}+")


class Tokenizer:
    """A byte-level BPE vocabulary. Two tokenizers are equal if they give every text the same ids.

    ranks        each BPE token's bytes and its id; the ids increase in the order of the merges and may begin anywhere
    added        the tokens beside the BPE, as "<|im_end|>", and their ids; `special` those that no text holds
    vocab_size   the largest id and one more; an id below it may be that of no token
    end_of_text  the id that ends an answer, and `ends` all ids at which sampling stops
    begin        the ids that `transformers` puts before a text; `encode` does not
    padding      an id for padding that no text holds
    template     the chat template, in Jinja, and `variables` what it may refer to: "bos_token", "eos_token", ...
    """

    def __init__(self, ranks: dict[bytes, int], layout: Layout | None = None, settings: Settings | None = None):
        """Without a `layout`: GPT-2's, where the end of text has the id after the ranks."""
        layout = layout or Layout({END_OF_TEXT: len(ranks)})
        settings = settings or Settings([layout.added[END_OF_TEXT]], variables=dict(OWN_VARIABLES))
        self.ranks, self.added = ranks, layout.added
        self.special = tuple(token for token in layout.added if token not in layout.ordinary)
        self.vocab_size = max([*ranks.values(), *self.added.values()]) + 1
        self.begin, self.template, self.variables = settings.begin, settings.template, settings.variables
        self.end_of_text, self.ends = settings.ends[0], frozenset(settings.ends)
        candidates = [self.added.get(self.variables.get("pad_token", "")), ranks.get(b"\0"), *self.added.values()]
        self.padding = next((i for i in candidates if i not in (None, self.end_of_text)), self.end_of_text)
        self._layout, self._files = layout, settings.files
        self._tokens = {i: token for token, i in ranks.items()} | {
            i: t.encode("utf-8", "replace") for t, i in self.added.items()
        }
        self._missing = bytes(byte for byte in range(256) if bytes([byte]) not in ranks)
        self._encoding = tiktoken.Encoding("nanopref", pat_str=layout.split, mergeable_ranks=ranks, special_tokens={})
        late = [token for token in self.added if token in layout.late]
        early = [token for token in self.added if token not in layout.late]
        self._names = [_Names.of(tokens) for tokens in (early, late) if tokens]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.ranks == other.ranks and self._layout == other._layout

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn a vocabulary of 256 bytes, `vocab_size` - 257 merges and the end of text.

        Ties go to the pair with the smaller ids, so the order of the texts does not matter. Texts that run out of pairs
        give a smaller vocabulary: `.vocab_size` says how large it is. ValueError if `vocab_size` is below 257, or above
        a million.

        No token is longer than LONGEST bytes: a longer piece of text, as a million spaces, is cut there first. So a
        merge costs what it joins, and all of them together what the text is long, however long its words are.
        """
        if not 257 <= vocab_size <= 1_000_000:
            raise ValueError(
                f"vocab_size must be at least 257 (256 bytes and the end of text) and at most 1000000, not {vocab_size}"
            )
        pieces: Counter[str] = Counter()
        for text in texts:
            pieces.update(regex.findall(GPT2_SPLIT, text))
        words: Counter[bytes] = Counter()
        for piece, frequency in pieces.items():
            # JSON can hold a lone surrogate, which has no UTF-8 form; one bad character must not end the training.
            word = piece.encode("utf-8", "replace")
            for start in range(0, len(word), LONGEST):
                words[word[start : start + LONGEST]] += frequency
        tokens = [bytes([byte]) for byte in range(256)]
        for left, right in _learn_merges(words, vocab_size - 257):
            tokens.append(tokens[left] + tokens[right])
        return cls({token: rank for rank, token in enumerate(tokens)})

    @classmethod
    def gpt2(cls) -> "Tokenizer":
        """GPT-2's own vocabulary of 50,257, which tiktoken downloads at first use; OSError if it cannot."""
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except OSError as error:
            raise OSError(f"GPT-2's vocabulary is not in tiktoken's cache and cannot be downloaded: {error}") from error
        return cls({encoding.decode_single_token_bytes(rank): rank for rank in range(encoding.eot_token)})

    def encode(self, text: str | bytes, special: bool = False) -> list[int]:
        """Ids of any text or bytes. Unless `special`, "<|endoftext|>" is thirteen characters of text as any others.

        Added tokens that their file does not call special, as Qwen3's "<think>", are tokens of every text. A byte for
        which the vocabulary has no token is left out.
        """
        if isinstance(text, str):
            return self._encode(text, special)
        # tiktoken reads text only, so bytes that are not valid UTF-8 become one token each between the runs that are.
        ids: list[int] = []
        for run in re.split("([\udc80-\udcff])", text.decode("utf-8", "surrogateescape")):
            if "\udc80" <= run <= "\udcff":
                stray = self.ranks.get(run.encode("utf-8", "surrogateescape"))
                ids += [] if stray is None else [stray]
            else:
                ids += self._encode(run, special)
        return ids

    def _encode(self, text: str, special: bool) -> list[int]:
        ids: list[int] = []
        for run in self._find_added(text, special, self._names if special or self._layout.ordinary else []):
            ids += [run] if isinstance(run, int) else self._encode_run(run)
        return ids

    def _find_added(self, text: str, special: bool, names: list["_Names"]) -> Iterator[str | int]:
        """The ids of the added tokens in a text, and the text between them."""
        if not names:
            yield text
            return
        start = 0
        for at, name in names[0].found(text):
            if special or name in self._layout.ordinary:
                yield from self._find_added(text[start:at], special, names[1:])
                yield self.added[name]
                start = at + len(name)
        yield from self._find_added(text[start:], special, names[1:])

    def _encode_run(self, text: str) -> list[int]:
        """Ids of a text without added tokens."""
        if self._layout.compose:
            text = _composed(text)
        many_spaces = len(text) >= SPACES and _MANY_SPACES.search(text)
        if not (many_spaces or (self._missing and _holds(text, self._missing))):
            return self._encoding.encode_ordinary(text)
        # tiktoken cannot do without a byte's token (it panics), nor split where there are very many spaces before a
        # word (its stack overflows). Hugging Face's BPE joins what stands around a byte without token.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        pieces = [piece.encode() for piece in regex.findall(self._layout.split, text)]
        kept = filter(None, (piece.translate(None, self._missing) for piece in pieces))
        return [i for piece in kept for i in self._encoding._encode_single_piece(piece)]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of ids, the end of text as "<|endoftext|>", bytes that are not valid UTF-8 as U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", "replace")

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """The bytes of ids, the end of text as b"<|endoftext|>". An id of no token, which the embedding of a model may
        have beside its vocabulary's, gives none.
        """
        return b"".join(self._tokens.get(token, b"") for token in tokens)

    def files(self) -> dict[str, str | bytes]:
        """What `save` writes, by name."""
        return self._files or contents(self.ranks, self.end_of_text)

    def save(self, folder: str | os.PathLike) -> None:
        """Write tokenizer.json and tokenizer_config.json, from which `transformers` makes the same tokenizer.

        A tokenizer that was loaded writes the files that it was read from, byte for byte.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = self.files()
        for name in sorted(files, key=lambda name: name == "tokenizer.json"):  # which makes it a tokenizer's folder
            write_atomic(folder / name, files[name])

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Tokenizer":
        """Read the tokenizer of a folder: ours, or GPT-2's, Llama 3's, Qwen's or SmolLM2's of the hub.

        FileNotFoundError without tokenizer.json; ValueError, which names the file, if one is malformed or asks for what
        this tokenizer cannot do.
        """
        return cls(*read(Path(folder)))


class _Names(NamedTuple):
    """Tokens that are found in a text as they stand, the longest at a place, however many they are."""

    tokens: frozenset[str]
    lengths: list[int]  # theirs, the longest first
    starts: re.Pattern  # what they start with

    @classmethod
    def of(cls, tokens: list[str]) -> "_Names":
        starts = "|".join(re.escape(start) for start in sorted({token[:2] for token in tokens}))
        return cls(frozenset(tokens), sorted({len(token) for token in tokens}, reverse=True), re.compile(starts))

    def found(self, text: str) -> Iterator[tuple[int, str]]:
        """Each token in a text and where it begins, from left to right."""
        at = 0
        while match := self.starts.search(text, at):
            at = match.start()
            token = next((token for n in self.lengths if (token := text[at : at + n]) in self.tokens), None)
            if token:
                yield at, token
            at += len(token or " ")


def _composed(text: str) -> str:
    """The text in Unicode's normal form C, in linear time: Python puts the marks on a letter in order by insertion, so
    where there are hundreds of them they are put in order first, which changes nothing of the normal form."""
    return text if text.isascii() else unicodedata.normalize("NFC", _MANY_MARKS.sub(_ordered, text))


def _ordered(match: regex.Match) -> str:
    marks = [part for mark in match[0] for part in unicodedata.normalize("NFD", mark)]
    runs = groupby(marks, key=lambda mark: unicodedata.combining(mark) > 0)
    return "".join(mark for _, run in runs for mark in sorted(run, key=unicodedata.combining))


def _holds(text: str, some: bytes) -> bool:
    data = text.encode("utf-8", "replace")
    return len(data.translate(None, some)) < len(data)


def _learn_merges(pieces: dict[bytes, int], n_merges: int) -> list[tuple[int, int]]:
    """The pairs of ids to join, in order; the i-th makes id 256 + i. `pieces` counts each piece of text.

    An id is a character here, so that to join a pair in a word is to replace text in text, from left to right.
    """
    words, frequencies = [piece.decode("latin-1") for piece in pieces], list(pieces.values())
    counts: dict[tuple[str, str], int] = defaultdict(int)
    holders: dict[tuple[str, str], set[int]] = defaultdict(set)
    for index, (word, frequency) in enumerate(zip(words, frequencies, strict=True)):
        for pair in pairwise(word):
            counts[pair] += frequency
            holders[pair].add(index)
    # Counts that grow are pushed again; those that shrink are found out when they are popped. So no pair's best entry
    # is ever below its count, and the first entry that tells the truth is the most frequent pair.
    queue = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(queue)
    merges: list[tuple[str, str]] = []
    with progress("tokenizer", n_merges, "merge") as bar:
        while queue and len(merges) < n_merges:
            count, pair = heapq.heappop(queue)
            if counts[pair] != -count:
                if counts[pair] > 0:
                    heapq.heappush(queue, (-counts[pair], pair))
                continue
            new = chr(256 + len(merges))
            merges.append(pair)
            born = set()
            for index in holders.pop(pair):
                frequency, parts = frequencies[index], words[index].split("".join(pair))
                words[index] = new.join(parts)
                counts[pair] -= frequency * (len(parts) - 1)
                for made, old in _around(parts, pair, new):
                    counts[old] -= frequency
                    counts[made] += frequency
                    holders[made].add(index)
                    born.add(made)
            for made in born:
                heapq.heappush(queue, (-counts[made], made))
            bar.update()
    return [(ord(left), ord(right)) for left, right in merges]


def _around(parts: list[str], pair: tuple[str, str], new: str) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """The pairs that `new`, between the parts of a word, makes with its neighbours, each with the one it was before."""
    left, right = pair
    for i, part in enumerate(parts):
        if part and i > 0:
            yield (new, part[0]), (right, part[0])
        if part and i < len(parts) - 1:
            yield (part[-1], new), (part[-1], left)
        if not part and 0 < i < len(parts) - 1:
            yield (new, new), (right, left)
