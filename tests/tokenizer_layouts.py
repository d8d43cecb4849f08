"""Folders of tokenizers as GPT-2, Llama 3, Qwen2 and SmolLM2 lay them out, of vocabularies learnt here."""

import json
from functools import cache
from pathlib import Path

import tokenizers
from tokenizers import Regex, models, pre_tokenizers, trainers

from nanopref.data.tokenizer import Tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>", "<think>", "</think>"]
CORPUS = [
    "The film wasn't the best of the year; they'LL say it's 1234 of 12, 2024.\n\n  I say: the worst! ==\r\n\t== " * 3,
    "  a\n  b\n\n  c   d    1  2   3\n 4 \t\t \n\n\n   \n  5  'Sam 'Sam 'sam 'Lla" * 3,
    "Größe, café naïve кино кино 映画映画, 🎬🎬 e\u0301e\u0301 각각  \u3000 abcab abc cab == === ((",
]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FAMILIES = ["gpt2", "llama3", "qwen2", "smollm2"]


def added(name: str, token_id: int, **flags) -> dict:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": name, "special": True, **plain, **flags}


def regex_then_bytes(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def all_pairs(vocab: dict[str, int]) -> list[str]:
    """Every pair of tokens that makes a token, as Llama 3's file lists them."""
    merges = []
    for token in sorted(vocab, key=vocab.get):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab]
        merges += sorted(cuts, key=lambda cut: (vocab[cut[0]], vocab[cut[1]]))
    return [" ".join(cut) for cut in merges]


def trained(splitting: pre_tokenizers.PreTokenizer, without: str = "", first: tuple[str, ...] = ()) -> dict:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitting
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = [c for c in pre_tokenizers.ByteLevel.alphabet() if c not in without]
    trainer = trainers.BpeTrainer(
        vocab_size=460, initial_alphabet=alphabet, special_tokens=list(first), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return json.loads(tokenizer.to_str())


@cache
def family(name: str) -> tuple[str, str]:
    """tokenizer.json and tokenizer_config.json as a family lays them out, of a vocabulary learnt here."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if name == "gpt2":
        file = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
        size = len(file["model"]["vocab"])
        file["added_tokens"] = [added("<|endoftext|>", size, normalized=True), added("<|endoftext|> <", size + 1)]
        config |= {"eos_token": "<|endoftext|>"}
    elif name == "llama3":
        file = trained(regex_then_bytes(LLAMA3))
        vocab = file["model"]["vocab"]
        for token in ("abcabcab", "Ġfilmmovie", "zzzz"):  # which no merges make, as some of Llama 3's
            vocab[token] = len(vocab)
        file["model"] |= {"merges": all_pairs(vocab), "ignore_merges": True}
        begin = "<|begin_of_text|>"
        file["added_tokens"] = [added(begin, len(vocab)), added("<|eot_id|>", len(vocab) + 1)]
        file["added_tokens"].append(added("<|eot_id|>a", len(vocab) + 2))
        single = [{"SpecialToken": {"id": begin, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        template = {
            "type": "TemplateProcessing",
            "single": single,
            "pair": single + [{"Sequence": {"id": "B", "type_id": 1}}],
        }
        template["special_tokens"] = {begin: {"id": begin, "ids": [len(vocab)], "tokens": [begin]}}
        byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
        file["post_processor"] = {"type": "Sequence", "processors": [byte_level, template]}
        config |= {"bos_token": begin, "eos_token": "<|eot_id|>"}
    elif name == "qwen2":
        file = trained(regex_then_bytes(QWEN2))
        file["normalizer"] = {"type": "NFC"}
        size = len(file["model"]["vocab"])
        file["added_tokens"] = [added(token, size + i) for i, token in enumerate(SPECIAL[:3])]
        file["added_tokens"] += [added("<think>", size + 3, special=False), added("</think>", size + 4, special=False)]
        config |= {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False, "bos_token": None}
        config["added_tokens_decoder"] = {
            str(token["id"]): {key: token[key] for key in token if key != "id"} for token in file["added_tokens"]
        }
    else:
        names = (*SPECIAL[:3], *(f"<extra_{i}>" for i in range(14)))
        digits = pre_tokenizers.Digits(individual_digits=True)
        splitting = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        file = trained(splitting, without="ĄñĀÿ", first=names)  # the bytes 4, 0xf1, 0 and 0xff
        config |= {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
        config |= {"unk_token": {"__type": "AddedToken", "content": "<|endoftext|>", "lstrip": False}}
    return json.dumps(file, ensure_ascii=False), json.dumps(config)


def write(folder: Path, file: dict | str, settings: dict | str, **others: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {"tokenizer": file, "tokenizer_config": settings, **others}.items():
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return folder


def loaded(tmp_path: Path, name: str, changes: dict | None = None, **others: str) -> Tokenizer:
    text, settings = family(name)
    return Tokenizer.load(write(tmp_path, text, json.loads(settings) | (changes or {}), **others))
