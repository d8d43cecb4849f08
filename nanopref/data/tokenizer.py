"""Byte-level byte-pair encoding: trained here, or GPT-2's, and run by tiktoken.

Training (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909) starts from single symbols, joins the pair of
neighbours that is seen most often into a new symbol, and repeats. GPT-2 (Radford et al. 2019) starts from the 256
bytes, so that any text has an encoding, and first splits the text into words, numbers, punctuation and spaces, across
which nothing is joined. Encoding replays the merges in the order in which they were learnt, which is that of the ids.
"""

import heapq
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import regex
import tiktoken

from nanopref.running.folder import write_atomic
from nanopref.running.parallel import progress

END_OF_TEXT = "<|endoftext|>"

# GPT-2's splitting as tiktoken writes it: the same pieces as the original, without its backtracking on long runs.
_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

# GPT-2's files write a token as text, one printable character for each byte: the byte's own where Latin-1 prints it,
# else the next one from U+0100 on.
_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_CHARACTER = {byte: chr(byte) for byte in _PRINTABLE}
_CHARACTER |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in _CHARACTER)}
_BYTE = {character: byte for byte, character in _CHARACTER.items()}


class Tokenizer:
    """A byte-level BPE vocabulary: `ranks` gives each token's bytes its id, and the end of text has the last id.

    Two tokenizers are equal if they give every text the same ids.
    """

    def __init__(self, ranks: dict[bytes, int]):
        self.ranks = ranks
        self.end_of_text = len(ranks)
        self.vocab_size = len(ranks) + 1
        self._encoding = tiktoken.Encoding(
            "nanopref", pat_str=_SPLIT, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: self.end_of_text}
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.ranks == other.ranks

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn a vocabulary of 256 bytes, `vocab_size` - 257 merges and the end of text.

        Ties go to the pair with the smaller ids, so the order of the texts does not matter. Texts that run out of pairs
        give a smaller vocabulary: `.vocab_size` says how large it is. ValueError if `vocab_size` is below 257.
        """
        if vocab_size < 257:
            raise ValueError(f"vocab_size must be at least 257 (256 bytes and the end of text), not {vocab_size}")
        pieces: Counter[str] = Counter()
        for text in texts:
            pieces.update(regex.findall(_SPLIT, text))
        tokens = [bytes([byte]) for byte in range(256)]
        for left, right in _learn_merges(pieces, vocab_size - 257):
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

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of any text or bytes. Nothing in it is special: "<|endoftext|>" is thirteen characters of text."""
        if isinstance(text, str):
            return self._encoding.encode_ordinary(text)
        # tiktoken reads text only, so bytes that are not valid UTF-8 become one token each between the runs that are.
        ids: list[int] = []
        for run in re.split("([\udc80-\udcff])", text.decode("utf-8", "surrogateescape")):
            if "\udc80" <= run <= "\udcff":
                ids.append(self.ranks[run.encode("utf-8", "surrogateescape")])
            else:
                ids += self._encoding.encode_ordinary(run)
        return ids

    def decode(self, tokens: list[int]) -> str:
        """The text of ids, the end of text as "<|endoftext|>", bytes that are not valid UTF-8 as U+FFFD."""
        return self._encoding.decode(tokens, errors="replace")

    def decode_bytes(self, tokens: list[int]) -> bytes:
        """The bytes of ids, the end of text as b"<|endoftext|>"; KeyError for an id outside the vocabulary."""
        return self._encoding.decode_bytes(tokens)

    def save(self, folder: str | os.PathLike) -> None:
        """Write tokenizer.json and tokenizer_config.json, from which `transformers` makes the same tokenizer."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        vocab = {_to_characters(token): rank for token, rank in self.ranks.items()} | {END_OF_TEXT: self.end_of_text}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        end_of_text = {"id": self.end_of_text, "content": END_OF_TEXT, "special": True, "normalized": False}
        tokenizer = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [end_of_text | {"single_word": False, "lstrip": False, "rstrip": False}],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "vocab": vocab,
                # "a b" and not ["a", "b"]: every release of `tokenizers` reads it.
                "merges": [" ".join(map(_to_characters, pair)) for pair in _merges(self.ranks)],
            },
        }
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "unk_token": END_OF_TEXT,
        }
        write_atomic(folder / "tokenizer_config.json", json.dumps(config, indent=2))
        write_atomic(folder / "tokenizer.json", json.dumps(tokenizer, ensure_ascii=False, indent=1))

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Tokenizer":
        """Read `folder`/tokenizer.json, ours or GPT-2's of the hub.

        FileNotFoundError without that file; ValueError if it is malformed or means what GPT-2's tokenizer cannot.
        """
        path = Path(folder) / "tokenizer.json"
        try:
            return cls(_read_ranks(json.loads(path.read_text(encoding="utf-8"))))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not laid out as a byte-level BPE tokenizer: {error!r}") from error
        except ValueError as error:
            raise ValueError(f"{path} is not a GPT-2 tokenizer: {error}") from error


def _learn_merges(pieces: dict[str, int], n_merges: int) -> list[tuple[int, int]]:
    """The pairs of ids to join, in order; the i-th makes id 256 + i. `pieces` counts each piece of text."""
    # JSON can hold a lone surrogate, which has no UTF-8 form; one bad character must not end the training.
    words = [list(piece.encode("utf-8", "replace")) for piece in pieces]
    frequencies = list(pieces.values())
    counts: dict[tuple[int, int], int] = defaultdict(int)
    holders: dict[tuple[int, int], set[int]] = defaultdict(set)
    for index, (word, frequency) in enumerate(zip(words, frequencies, strict=True)):
        for pair in pairwise(word):
            counts[pair] += frequency
            holders[pair].add(index)
    # Counts that grow are pushed again; those that shrink are found out when they are popped. So no pair's best entry
    # is ever below its count, and the first entry that tells the truth is the most frequent pair.
    queue = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(queue)
    merges: list[tuple[int, int]] = []
    with progress("tokenizer", n_merges, "merge") as bar:
        while queue and len(merges) < n_merges:
            count, pair = heapq.heappop(queue)
            if counts[pair] != -count:
                if counts[pair] > 0:
                    heapq.heappush(queue, (-counts[pair], pair))
                continue
            new = 256 + len(merges)
            merges.append(pair)
            born = set()
            for index in holders.pop(pair):
                word, frequency = words[index], frequencies[index]
                for old in pairwise(word):
                    counts[old] -= frequency
                word = words[index] = _join(word, pair, new)
                for made in pairwise(word):
                    counts[made] += frequency
                    if new in made:
                        holders[made].add(index)
                        born.add(made)
            for made in born:
                heapq.heappush(queue, (-counts[made], made))
            bar.update()
    return merges


def _join(word: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """`word` with each `pair` replaced by `new`, from left to right."""
    left, right = pair
    joined, i, last = [], 0, len(word) - 1
    while i <= last:
        if i < last and word[i] == left and word[i + 1] == right:
            joined.append(new)
            i += 2
        else:
            joined.append(word[i])
            i += 1
    return joined


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that makes each token, in order of rank: what BPE leaves of the token's bytes at lower ranks alone.

    ValueError for ranks that no BPE has learnt.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1])[256:]:
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best, i = min((ranks.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1))
            if best >= rank:
                raise ValueError(f"no merge of earlier tokens makes token {rank}, {_to_characters(token)!r}")
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        merges.append((parts[0], parts[1]))
    return merges


def _read_ranks(file: dict) -> dict[bytes, int]:
    """The ranks in the contents of a tokenizer.json; ValueError says what in it is not GPT-2's."""
    added = {token["content"]: token["id"] for token in file["added_tokens"]}
    vocab = file["model"]["vocab"]
    if len(file["added_tokens"]) != 1 or added != {END_OF_TEXT: vocab.get(END_OF_TEXT, added.get(END_OF_TEXT))}:
        raise ValueError(f"its added tokens are not exactly one {END_OF_TEXT}")
    vocab = vocab | added
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError(f"its ids are not 0 to {len(vocab) - 1}, each once")
    if vocab.pop(END_OF_TEXT) != len(vocab):
        raise ValueError(f"{END_OF_TEXT} does not have the last id")
    split = file["pre_tokenizer"]
    plain = split["type"] == "ByteLevel" and not split["add_prefix_space"] and split.get("use_regex", True)
    if not plain or file["normalizer"] is not None:
        raise ValueError("it changes or splits the text in another way")
    if foreign := [token for token in vocab if not token or not set(token) <= _BYTE.keys()]:
        raise ValueError(f"token {foreign[0]!r} is not written in its alphabet of bytes")
    ranks = {bytes(_BYTE[character] for character in token): rank for token, rank in vocab.items()}
    if {token for token, rank in ranks.items() if rank < 256} != {bytes([byte]) for byte in range(256)}:
        raise ValueError("its first 256 ids are not the 256 bytes")
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in file["model"]["merges"]]
    if merges != [tuple(map(_to_characters, pair)) for pair in _merges(ranks)]:
        raise ValueError("its merges do not make its tokens in the order of their ids")
    return ranks


def _to_characters(token: bytes) -> str:
    return "".join(_CHARACTER[byte] for byte in token)
