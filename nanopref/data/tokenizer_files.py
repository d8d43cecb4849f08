"""Hugging Face's tokenizer files: what of them gives a text its ids, read whole or refused, and written.

A tokenizer.json describes a pipeline: added tokens are found in the text, what is left is normalized, split into pieces
by patterns, and each piece is encoded by BPE. Read here are the pipelines of GPT-2, Llama 3, Qwen2 and SmolLM2, in any
vocabulary. What another file asks for is a ValueError, never left out: an id that differs from those the model was
trained on is an error that nobody sees.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path

from nanopref.running.terminal import line

END_OF_TEXT = "<|endoftext|>"
LONGEST = 512  # bytes of a token; the longest of those that are published has 128
LARGEST = 2**24  # ids are smaller
VARIABLES = ("bos_token", "eos_token", "pad_token", "unk_token")
OWN_VARIABLES = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)  # of the tokenizers made here

# A tokenizer's splitting as tiktoken writes it: the pieces of the published pattern, without its backtracking.
# GPT-2: '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
GPT2_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# SmolLM2 cuts the text at every digit and then splits as GPT-2, for which the text ends before each digit.
DIGITS_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++|\s++(?=\p{N}|$)|\s+(?!\S)|\s"""
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s*[\r\n]|\s++$"
    r"|\s+(?!\S)|\s"
)
# The patterns that a file may bring: as written there, and as tiktoken runs them. Another could take exponential time.
REGEXES = {_LLAMA3: _LLAMA3_SPLIT, _LLAMA3.replace("{1,3}", ""): _LLAMA3_SPLIT.replace("{1,3}+", "")}  # and Qwen's

# The files write a token as text, one printable character for each byte: the byte's own where Latin-1 prints it, else
# the next one from U+0100 on.
_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_CHARACTER = {byte: chr(byte) for byte in _PRINTABLE}
_CHARACTER |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in _CHARACTER)}
_BYTE = {ord(character): byte for byte, character in _CHARACTER.items()}
_IS_BYTE = dict.fromkeys(_BYTE)  # for `str.translate`: leaves what is no byte
_IN_TEXT = {*range(0xC0), *range(0xC2, 0xF5)}  # the bytes that UTF-8 makes use of


# What comes of looking for something in an object of JSON where it is not, or is something else.
MALFORMED = (LookupError, TypeError, AttributeError, RecursionError, OverflowError)


@dataclass(frozen=True)
class Layout:
    """What besides the merges decides a text's ids."""

    added: dict[str, int]  # tokens that are found in the text as they stand, the longest at a place
    ordinary: frozenset[str] = frozenset()  # those of them that are no special ones: found in every text
    late: frozenset[str] = frozenset()  # those that are looked for after the others
    split: str = GPT2_SPLIT
    compose: bool = False  # the text to Unicode's normal form C first


@dataclass(frozen=True)
class Settings:
    """What changes no text's ids."""

    ends: list[int]  # the ids that end an answer, the first of them above all
    begin: list[int] = field(default_factory=list)  # what `transformers` puts before a text
    variables: dict[str, str] = field(default_factory=dict)
    template: str | None = None
    files: dict[str, bytes] = field(default_factory=dict)  # what it was read from


def read(folder: Path) -> tuple[dict[bytes, int], Layout, Settings]:
    """The tokenizer of a folder: ranks, layout, settings.

    FileNotFoundError without tokenizer.json. ValueError names the file that is malformed or asks for what is not here.
    """
    names = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
    paths = [folder / name for name in [*names, "generation_config.json"]]
    files = {path.name: path.read_bytes() for path in paths if path.is_file() or path.name == "tokenizer.json"}
    path = folder / "tokenizer.json"
    file = _json(path)
    try:
        layout = _read_layout(file)
        ranks = _read_ranks(file["model"], layout)
        begin = _read_begin(file["post_processor"])
        if not {*begin} <= {*layout.added.values()}:
            raise ValueError("its post_processor puts something else than added tokens before the text")
    except MALFORMED as error:
        raise ValueError(f"{path} is not laid out as a byte-level BPE tokenizer: {line(repr(error), 500)}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not a tokenizer that can be used here: {line(error, 500)}") from error
    settings, special = _read_settings(folder, ranks, layout.added, begin, files)
    return ranks, replace(layout, ordinary=layout.ordinary - special), settings


def contents(ranks: dict[bytes, int], end_of_text: int) -> dict[str, str]:
    """Files by name, from which `transformers` makes GPT-2's tokenizer with these ranks."""
    vocab = {to_characters(token): rank for token, rank in ranks.items()} | {END_OF_TEXT: end_of_text}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = {"id": end_of_text, "content": END_OF_TEXT, "special": True, "normalized": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added | {"single_word": False, "lstrip": False, "rstrip": False}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": vocab,
            # "a b" and not ["a", "b"]: every release of `tokenizers` reads it.
            "merges": [" ".join(map(to_characters, pair)) for _, pair in _derive_merges(ranks)],
        },
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **OWN_VARIABLES}
    return {
        "tokenizer_config.json": json.dumps(config, indent=2),
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False, indent=1),
    }


def to_characters(token: bytes) -> str:
    return "".join(_CHARACTER[byte] for byte in token)


def _read_layout(file: dict) -> Layout:
    if file["normalizer"] not in (None, {"type": "NFC"}):
        raise ValueError("its normalizer is neither null nor NFC")
    if file["decoder"]["type"] != "ByteLevel":
        raise ValueError("its decoder is not ByteLevel")
    vocab, tokens = file["model"]["vocab"], file["added_tokens"]
    added: dict[str, int] = {}
    following = len(vocab)
    for token in tokens:
        name = _text(token)
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise ValueError(f"its added token {name!r} takes spaces along or has to stand alone")
        # `tokenizers` does not read the id, but counts on from the vocabulary.
        added[name] = vocab.get(name, following)
        if token["id"] != added[name] or not name:
            raise ValueError(f"its added token {name!r} has the id {token['id']}, which is not the next one")
        if len(name) > LONGEST:
            raise ValueError(f"its added token {name!r} has more than {LONGEST} characters")
        following = max(following, added[name] + 1)
    late = frozenset(token["content"] for token in tokens if token.get("normalized"))
    if late and file["normalizer"]:
        raise ValueError(f"its added token {min(late)!r} is looked for in the normalized text")
    return Layout(
        added=added,
        ordinary=frozenset(token["content"] for token in tokens if not token.get("special")),
        late=late,
        split=_read_split(file["pre_tokenizer"]),
        compose=file["normalizer"] is not None,
    )


def _read_split(pre_tokenizer: dict) -> str:
    """The pattern for what a file splits the text with."""
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    *before, last = steps
    if last["type"] == "ByteLevel" and last["add_prefix_space"]:
        raise ValueError("its pre_tokenizer puts a space first (add_prefix_space)")
    if last["type"] == "ByteLevel" and last.get("use_regex", True):
        if not before:
            return GPT2_SPLIT
        if before == [{"type": "Digits", "individual_digits": True}]:
            return DIGITS_SPLIT
    elif last["type"] == "ByteLevel" and len(before) == 1 and before[0]["type"] == "Split":
        pattern, way = before[0]["pattern"].get("Regex"), (before[0]["behavior"], before[0]["invert"])
        if pattern in REGEXES and way == ("Isolated", False):
            return REGEXES[pattern]
        raise ValueError("its pre_tokenizer splits by a pattern that is neither Llama 3's nor Qwen2's")
    raise ValueError(f"its pre_tokenizer is another than those known: {', '.join(step['type'] for step in steps)}")


def _read_begin(post_processor: dict | None) -> list[int]:
    """The ids that a file puts before a text."""
    kind = post_processor["type"] if post_processor else "ByteLevel"
    if kind == "ByteLevel":  # which concerns offsets in the text alone
        return []
    if kind == "Sequence":
        return [i for step in reversed(post_processor["processors"]) for i in _read_begin(step)]
    if kind != "TemplateProcessing" or post_processor["single"][-1].get("Sequence", {}).get("id") != "A":
        raise ValueError("its post_processor does more than put tokens before the text")
    names = [part["SpecialToken"]["id"] for part in post_processor["single"][:-1]]
    return [i for name in names for i in post_processor["special_tokens"][name]["ids"]]


def _read_ranks(model: dict, layout: Layout) -> dict[bytes, int]:
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"its model is {model['type']}, not BPE")
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(setting):
            raise ValueError(f"its BPE has {setting}")
    vocab, whole = model["vocab"], bool(model.get("ignore_merges"))
    ids = [*vocab.values(), *(i for name, i in layout.added.items() if name not in vocab)]
    if not ids or not all(type(i) is int and 0 <= i < LARGEST for i in ids) or len(set(ids)) < len(ids):
        raise ValueError("its ids are not whole numbers, each used once")
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    made = {"".join(merge) for merge in merges}
    # An added token that stands in the vocabulary is one of the BPE too where a piece of text can become it.
    tokens = {token: i for token, i in vocab.items() if token not in layout.added or token in made}
    ranks = {}
    for token, i in tokens.items():
        data = token.translate(_BYTE)
        if not token or token.translate(_IS_BYTE):
            raise ValueError(f"token {token!r} is not written in its alphabet of bytes")
        if len(token) > LONGEST:
            raise ValueError(f"token {token!r} has more than {LONGEST} bytes")
        ranks[data.encode("latin-1")] = i
    missing = [byte for byte in _IN_TEXT if bytes([byte]) not in ranks]
    if missing and (whole or model.get("unk_token") is not None):
        raise ValueError(f"the byte {missing[0]:#04x} has no token, and would not simply be left out")
    _check_merges(ranks, merges, whole)
    return ranks


def _check_merges(ranks: dict[bytes, int], merges: list[tuple[str, ...]], whole: bool) -> None:
    """ValueError unless BPE by a file's `merges` is what tiktoken does, which knows no merges.

    tiktoken joins whichever neighbours make a token, first those that make the token of the lowest id. The bytes of a
    token go the same way in any text, until something is joined across their bounds: so of the pairs that could make
    the token it only ever meets the one that lower ids lead to. The list has to hold that pair of each token, in the
    order of ids; what it holds besides, as Llama 3's does, is never used. Where lower ids lead to no pair, a token is
    still taken as a `whole` piece, and could be met in any two parts: the list has to hold all that are tokens.
    """
    characters = {token: to_characters(token) for token in ranks}
    wanted = {}
    for token, pair in _derive_merges(ranks, whole):
        for a, b in [pair] if pair else [(token[:i], token[i:]) for i in range(1, len(token))]:
            if pair or (a in ranks and b in ranks):
                wanted[characters.get(a), characters.get(b)] = ranks[token]
    known = {*characters.values()}
    possible = all(len(merge) == 2 and known.issuperset((*merge, "".join(merge))) for merge in merges)
    if not possible or [wanted[merge] for merge in merges if merge in wanted] != [*wanted.values()]:
        raise ValueError("its merges do not make its tokens in the order of their ids")


def _derive_merges(ranks: dict[bytes, int], whole: bool = False) -> Iterator[tuple[bytes, tuple[bytes, bytes] | None]]:
    """Each token of several bytes in the order of ids, and the pair that makes it: what BPE leaves of the token's bytes
    at lower ranks alone. Where that is no pair: None if tokens may be taken `whole`, else ValueError.
    """
    for token, rank in sorted(ranks.items(), key=itemgetter(1)):
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        scores = [ranks.get(token[i : i + 2], rank) for i in range(len(token) - 1)]
        while len(parts) > 2 and (best := min(scores)) < rank:
            i = scores.index(best)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
            del scores[i]
            for j in (i - 1, i):
                if 0 <= j < len(scores):
                    scores[j] = ranks.get(parts[j] + parts[j + 1], rank)
        if len(parts) > 2 and not whole:
            raise ValueError(f"no merge of earlier tokens makes token {rank}, {to_characters(token)!r}")
        yield token, (parts[0], parts[1]) if len(parts) == 2 else None


def _read_settings(
    folder: Path, ranks: dict[bytes, int], added: dict[str, int], begin: list[int], files: dict[str, bytes]
) -> tuple[Settings, set[str]]:
    """The settings, and which added tokens they make special ones."""
    path = folder / "tokenizer_config.json"
    config = _json(path, {})
    if "added_tokens_decoder" not in config:  # `transformers` then goes by the older file
        config |= _json(folder / "special_tokens_map.json", {})
    try:
        variables = {name: _text(config[name]) for name in VARIABLES if config.get(name) is not None}
        named, special = [*variables.values()], {*variables.values()}
        for key in ("additional_special_tokens", "extra_special_tokens"):
            more = config.get(key) or []
            named += map(_text, more.values() if isinstance(more, dict) else more)
        for token in (config.get("added_tokens_decoder") or {}).values():
            named.append(_text(token))
            special |= {_text(token)} if token.get("special") else set()
        templates = config.get("chat_template") or []
        if isinstance(templates, str):
            templates = [{"name": "default", "template": templates}]
        template = {row["name"]: _text(row["template"]) for row in templates}.get("default")
    except MALFORMED as error:
        raise ValueError(f"{path} is not laid out as a tokenizer's settings: {line(repr(error), 500)}") from error
    # `transformers` would add a token for each name that is none, at an id of which the model knows nothing.
    for name in named:
        if name not in added:
            raise ValueError(
                f"{path} names the token {line(repr(name), 500)}, which is no added token of tokenizer.json"
            )
    if "chat_template.jinja" in files:  # which `transformers` takes first
        try:
            template = files["chat_template.jinja"].decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{folder / 'chat_template.jinja'} is not text: {error}") from error
    ends = [added[variables["eos_token"]]] if "eos_token" in variables else []
    # Ids of no token, as the defaults of a configuration are in another vocabulary, cannot be sampled.
    known = {*ranks.values(), *added.values()}
    ends += [i for name in ("config.json", "generation_config.json") for i in _read_ends(folder / name) if i in known]
    ends = ends or [added[name] for name in [END_OF_TEXT] if name in added]
    if not ends:
        raise ValueError(f"{path} has no eos_token, and no other file says which token ends a text")
    return Settings(ends, begin, variables, template, files), special


def _read_ends(path: Path) -> list[int]:
    """What a configuration's eos_token_id names."""
    ids = _json(path, {}).get("eos_token_id")
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(type(i) is int for i in ids):
        raise ValueError(f"{path}: eos_token_id is {line(ids, 500)}, not an id or a list of ids")
    return ids


def _text(token: str | dict) -> str:
    """A token, which the files write as text or as an object, or a template."""
    text = token if isinstance(token, str) else token["content"]
    if not isinstance(text, str):
        raise TypeError(f"{text!r} is not text")
    return text


def _json(path: Path, default: dict | None = None) -> dict:
    """The object in a file of JSON; `default` where there is none."""
    if default is not None and not path.is_file():
        return default
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not an object of JSON")
    return content
