"""Any folder of a model or a tokenizer, and any text: refused in one sentence that names the folder, or done."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
from damage import Folder, memory, within
from fuzzing import examples, how_it_ends, tried
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_models import SMALL, random_tokens, randomise
from tokenizer_layouts import FAMILIES, family, write

from nanopref import models
from nanopref.data.tokenizer import Tokenizer
from nanopref.models.gpt2 import GPT
from nanopref.models.llama import Llama, LlamaConfig
from nanopref.models.scalar import ScalarModel
from nanopref.running.flags import UserError, execute

TOKENIZER = Tokenizer.train(["aaa bb, aaa bb"], SMALL.vocab_size)
LLAMA = LlamaConfig(260, 12, 2, 4, 2, 8, 16, 4, family="qwen3", tied=False, rope_scaling=(8.0, 1.0, 4.0, 6))


@pytest.fixture(scope="module", autouse=True)
def no_memory_beyond():
    with memory(2 << 30):
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Folder]:
    root = tmp_path_factory.mktemp("valid")
    models.save(randomise(GPT(SMALL)), TOKENIZER, root / "gpt2")
    models.save(randomise(Llama(LLAMA)), TOKENIZER, root / "qwen3")
    models.save(randomise(ScalarModel(GPT(SMALL), 2)), TOKENIZER, root / "scalar")
    shutil.copytree(root / "gpt2", root / "shards")
    weights = load_file(root / "shards" / "model.safetensors")
    (root / "shards" / "model.safetensors").unlink()
    where = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(weights)}
    for shard in set(where.values()):
        save_file({name: x for name, x in weights.items() if where[name] == shard}, root / "shards" / shard)
    (root / "shards" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return {folder.name: Folder(folder) for folder in root.iterdir()}


def use(folder: Path, scalar: bool, finite: bool) -> None:
    """Load a model and run it forward once."""
    model, tokenizer = (models.load_scalar if scalar else models.load)(folder)
    assert tokenizer.decode(tokenizer.encode("aaa bb")) == "aaa bb"
    tokens = random_tokens(min(model.config.vocab_size, 260), 2, min(model.context, 12))
    with torch.no_grad():
        found = model(tokens) if scalar else model.logits(tokens)
    assert not finite or found.isfinite().all()


@examples(200)
@given(data=st.data())
def test_any_model_folder_is_refused_or_runs(folders, tmp_path_factory, data):
    kind = data.draw(st.sampled_from(sorted(folders)))
    folder = tmp_path_factory.getbasetemp() / "model"
    names = folders[kind].spoilt(data.draw, folder)
    finite = not any(name.endswith(".safetensors") for name in names)  # garbled weights may be very large
    with tried("model folders"), within(5):
        code, _, error = how_it_ends(execute, lambda _: use(folder, kind == "scalar", finite), None)
        assert not code or str(folder) in error


# ---- tokenizers ------------------------------------------------------------------------------------------------------

TEXT = "The film wasn't 1234 of\n\n  12 <think> == ===<|im_end|> abcabcab <|endoftext|> <Größe e\u0301映画 \t  x"


@pytest.fixture(scope="module")
def tokenizer_folders(tmp_path_factory) -> dict[str, Folder]:
    root = tmp_path_factory.mktemp("tokenizers")
    more = {"special_tokens_map": "{}", "generation_config": '{"eos_token_id": [2, 3]}'}
    for name in FAMILIES:
        write(root / name, *family(name), **more)
    TOKENIZER.save(root / "own")
    return {folder.name: Folder(folder) for folder in root.iterdir()}


def their_ids(path: Path, text: str) -> list[int] | None:
    """What Hugging Face's own library makes of it, where it can read the file."""
    try:
        return tokenizers.Tokenizer.from_file(str(path)).encode(text, add_special_tokens=False).ids
    except BaseException as error:  # it panics too
        if isinstance(error, KeyboardInterrupt | AssertionError):
            raise
        return None


@examples(200)
@given(data=st.data())
def test_any_tokenizer_folder_is_refused_or_gives_their_ids(tokenizer_folders, tmp_path_factory, data):
    folder, found = tmp_path_factory.getbasetemp() / "tokenizer", []
    tokenizer_folders[data.draw(st.sampled_from(sorted(tokenizer_folders)))].spoilt(data.draw, folder)

    def command(_):
        try:
            found.append(Tokenizer.load(folder))
        except (ValueError, OSError) as error:
            raise UserError(str(error)) from None

    with tried("tokenizer folders"), within(5):
        code, _, error = how_it_ends(execute, command, None)
        assert not code or str(folder) in error
        for tokenizer in found:
            ids = tokenizer.encode(TEXT, special=True)
            assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
            tokenizer.decode([*ids, *tokenizer.ends, *tokenizer.begin, tokenizer.padding])
            theirs = their_ids(folder / "tokenizer.json", TEXT)
            assert theirs is None or ids == theirs


# ---- texts -----------------------------------------------------------------------------------------------------------

UNITS = ["a", " ", "ab", "1", "=", "\n", "\r\n", " \n", "\t", "\u3000", "e\u0301", "\u0301", "\u0316\u0301", "映", "🎬"]
UNITS += ["<|im_end|>", "<", "'", "'s", "a ", " a", "abc", "\x04", "ệ"]
runs = st.tuples(st.sampled_from(UNITS) | st.text(max_size=3), st.sampled_from([1, 2, 7, 300, 5000, 60_000]))
texts = st.lists(runs, max_size=5).map(lambda parts: "".join(unit * n for unit, n in parts))


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> list[tuple[Tokenizer, tokenizers.Tokenizer]]:
    root = tmp_path_factory.mktemp("both")
    made = [write(root / name, *family(name)) for name in FAMILIES]
    TOKENIZER.save(root / "own")
    made.append(root / "own")
    return [(Tokenizer.load(f), tokenizers.Tokenizer.from_file(str(f / "tokenizer.json"))) for f in made]


@examples(30)
@given(text=texts, which=st.integers(0, 4))
def test_any_text_is_encoded_as_theirs_in_little_time(both, text, which):
    ours, theirs = both[which]
    with tried("texts"), within(3):
        ids = ours.encode(text, special=True)
    assert ids == theirs.encode(text, add_special_tokens=False).ids


@examples(30)
@given(text=texts, size=st.sampled_from([257, 260, 400, 2000]))
def test_a_tokenizer_is_trained_on_any_text_in_little_time(tmp_path_factory, text, size):
    folder = tmp_path_factory.getbasetemp() / "trained"
    with tried("texts"), within(3):
        tokenizer = Tokenizer.train([text], size)
        assert tokenizer.decode(tokenizer.encode(text)) == text.encode("utf-8", "replace").decode()
        tokenizer.save(folder)
        assert Tokenizer.load(folder) == tokenizer
