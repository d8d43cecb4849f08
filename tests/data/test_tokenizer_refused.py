"""Folders of tokenizers that would give other ids than `transformers` are refused in one sentence."""

import json

import pytest
from tokenizer_layouts import added, family, loaded, write

from nanopref.data.tokenizer import Tokenizer


def of(part: str, **changes):
    return lambda file, config: file[part].update(changes)


def token(**changes):
    return lambda file, config: file["added_tokens"][0].update(changes)


def settings_say(**changes):
    return lambda file, config: config.update(changes)


def byte_level(**changes):
    return lambda file, config: file["pre_tokenizer"]["pretokenizers"][-1].update(changes)


def split(**changes):
    return lambda file, config: file["pre_tokenizer"]["pretokenizers"][0].update(changes)


def end_after(file, config):
    steps = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}]
    file["post_processor"] = {"type": "TemplateProcessing", "single": steps, "special_tokens": {}}


def put_first(file, config):
    steps = [{"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"x": {"id": "x", "ids": [999], "tokens": ["x"]}}
    file["post_processor"] = {"type": "TemplateProcessing", "single": steps, "special_tokens": special}


def lose(byte: str):
    def change(file, config):
        file["model"]["vocab"]["<unused>"] = file["model"]["vocab"].pop(byte)
        file["added_tokens"].insert(0, added("<unused>", file["model"]["vocab"]["<unused>"]))
        del config["added_tokens_decoder"]

    return change


FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
REFUSED = {
    "dropout": (of("model", dropout=0.1), FILE, "its BPE has dropout"),
    "byte fallback": (of("model", byte_fallback=True), FILE, "its BPE has byte_fallback"),
    "a prefix": (of("model", continuing_subword_prefix="##"), FILE, "its BPE has continuing_subword_prefix"),
    "a suffix": (of("model", end_of_word_suffix="</w>"), FILE, "its BPE has end_of_word_suffix"),
    "another model": (of("model", type="Unigram"), FILE, "its model is Unigram, not BPE"),
    "another decoder": (of("decoder", type="Metaspace"), FILE, "its decoder is not ByteLevel"),
    "no decoder": (lambda file, config: file.update(decoder=None), FILE, "not laid out"),
    "another normalizer": (of("normalizer", type="NFKC"), FILE, "its normalizer is neither null nor NFC"),
    "a space first": (byte_level(add_prefix_space=True), FILE, "add_prefix_space"),
    "two splittings": (byte_level(use_regex=True), FILE, "another than those known: Split, ByteLevel"),
    "a foreign pattern": (split(pattern={"Regex": r"(\w+)+$"}), FILE, "neither Llama 3's nor Qwen2's"),
    "no pattern": (split(pattern={"String": " "}), FILE, "neither Llama 3's nor Qwen2's"),
    "pieces removed": (split(behavior="Removed"), FILE, "neither Llama 3's nor Qwen2's"),
    "pieces between": (split(invert=True), FILE, "neither Llama 3's nor Qwen2's"),
    "a token with spaces": (token(lstrip=True), FILE, "'<|endoftext|>' takes spaces along"),
    "a token alone": (token(single_word=True), FILE, "'<|endoftext|>' takes spaces along or has to stand alone"),
    "a normalized token": (token(normalized=True), FILE, "'<|endoftext|>' is looked for in the normalized text"),
    "a token elsewhere": (token(id=1000), FILE, "'<|endoftext|>' has the id 1000, which is not the next one"),
    "an empty token": (token(content=""), FILE, "added token '' has the id"),
    "another post-processor": (of("post_processor", type="BertProcessing"), FILE, "its post_processor does more"),
    "a token after the text": (end_after, FILE, "its post_processor does more than put tokens before"),
    "an id before the text": (put_first, FILE, "puts something else than added tokens before"),
    "a token in numbers": (token(content=5), FILE, "not laid out"),
    "a byte without token": (lose("!"), FILE, "the byte 0x21 has no token"),
    "an unknown eos_token": (settings_say(eos_token="</s>"), CONFIG, "names the token '</s>', which is no added token"),
    "an eos_token of the BPE": (settings_say(eos_token="!"), CONFIG, "names the token '!', which is no added token"),
    "an unknown extra": (settings_say(extra_special_tokens=["<x>"]), CONFIG, "names the token '<x>'"),
    "an eos_token in numbers": (settings_say(eos_token=5), CONFIG, "not laid out as a tokenizer's settings"),
    "a template in numbers": (settings_say(chat_template=5), CONFIG, "not laid out as a tokenizer's settings"),
}


@pytest.mark.parametrize("refused", REFUSED)
def test_load_refuses(refused, tmp_path):
    change, name, reason = REFUSED[refused]
    file, config = map(json.loads, family("qwen2"))
    file["post_processor"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    file["model"]["ignore_merges"] = refused == "a byte without token"
    Tokenizer.load(write(tmp_path, file, config))
    change(file, config)
    with pytest.raises(ValueError) as error:
        Tokenizer.load(write(tmp_path, file, config))
    assert reason in str(error.value)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [CONFIG, "generation_config.json", "config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000])
def test_load_refuses_what_is_no_object_of_json(name, content, tmp_path):
    write(tmp_path, *family("smollm2"))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("eos", ["2", [2, None], {"id": 2}, 2.0])
def test_load_refuses_an_eos_token_id_that_is_none(eos, tmp_path):
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id is .*, not an id"):
        loaded(tmp_path, "smollm2", generation_config=json.dumps({"eos_token_id": eos}))


def test_load_refuses_a_template_that_is_no_text(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template.jinja is not text"):
        loaded(tmp_path, "smollm2")


def test_load_refuses_a_token_of_bytes_that_have_none(tmp_path):
    text, config = family("smollm2")
    file = json.loads(text)
    file["model"]["vocab"]["ĄĄ"] = len(file["model"]["vocab"])
    with pytest.raises(ValueError, match="its merges do not make its tokens"):
        Tokenizer.load(write(tmp_path, file, config))
