"""Folders of models: every layout that loads, what is refused and why, and saves that are interrupted."""

import json
import os
import shutil
import stat
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import SMALL, message_of, random_tokens, randomise

from nanopref import models
from nanopref.data.tokenizer import Tokenizer
from nanopref.models import checkpoint
from nanopref.models.gpt2 import GPT, GPTConfig, preset
from nanopref.models.scalar import ScalarModel
from nanopref.running.flags import StartFlags

TOKENIZER = Tokenizer.train(["aaa bb, aaa bb"], SMALL.vocab_size)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a model and its tokenizer; tests copy it."""
    folder = tmp_path_factory.mktemp("saved")
    models.save(randomise(GPT(SMALL)), TOKENIZER, folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def change_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    save_file(change(weights) or weights, path, metadata={"format": "pt"})


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- what is saved ---------------------------------------------------------------------------------------------------


def test_a_saved_model_loads_the_same(saved):
    model = randomise(GPT(SMALL))
    loaded, tokenizer = models.load(saved, dropout=0.25)
    assert loaded.config == GPTConfig(**{**vars(SMALL), "dropout": 0.25}) and tokenizer == TOKENIZER
    for (name, a), (other_name, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other_name and torch.equal(a, b) and b.requires_grad and b.dtype == torch.float32, name
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(p.name for p in saved.iterdir()) == names


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
@pytest.mark.parametrize("kind", ["policy", "scalar model"])
def test_the_umask_says_who_may_read_what_is_saved(tmp_path, kind, umask, mode):
    model = GPT(SMALL) if kind == "policy" else ScalarModel(GPT(SMALL))
    before = os.umask(umask)
    try:
        models.save(model, TOKENIZER, tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 4 and set(modes.values()) == {mode}, modes


def test_a_model_remembers_whether_it_was_made_here(tmp_path, saved):
    """Where it was not, or nobody knows, it takes a pretrained model's learning rates."""
    made = GPT(preset("tiny", vocab_size=SMALL.vocab_size, block_size=8))
    models.save(made, TOKENIZER, tmp_path / "run" / "model")
    model, tokenizer, origin = models.load_init(StartFlags(init=str(tmp_path / "run")))
    assert model.config.from_scratch and origin == "" and tokenizer == TOKENIZER
    models.save(model, tokenizer, tmp_path / "again")  # through as many stages as one likes
    models.save(ScalarModel(model), tokenizer, tmp_path / "scalar")
    assert models.load_init(StartFlags(init=str(tmp_path / "again")))[2] == ""
    assert models.load_scalar(tmp_path / "scalar")[0].config.from_scratch
    for value in (False, "true", 1, None):
        change_config(tmp_path / "again", nanopref_from_scratch=value)
        assert models.load_init(StartFlags(init=str(tmp_path / "again")))[2] == "pretrained"
    settings = json.loads((tmp_path / "again" / "config.json").read_text())
    del settings["nanopref_from_scratch"]
    (tmp_path / "again" / "config.json").write_text(json.dumps(settings))
    model, _, origin = models.load_init(StartFlags(init=str(tmp_path / "again")))
    assert origin == "pretrained" and not model.config.from_scratch
    assert models.load_init(StartFlags(init=str(saved)))[2] == "pretrained"  # SMALL does not say that it was made here
    assert models.load_init(StartFlags()) == (None, None, "")


def test_a_long_context_is_read_where_it_is_asked_for(tmp_path):
    models.save(GPT(GPTConfig(SMALL.vocab_size, 1100, 1, 1, 8)), TOKENIZER, tmp_path)
    assert models.load(tmp_path)[0].context == 1100 and models.load(tmp_path, context=40)[0].context == 40
    for given, context in ((None, 1024), (1050, 1050), (40, 40)):
        assert models.load_init(StartFlags(init=str(tmp_path), block_size=given))[0].context == context


def test_a_policy_is_no_scalar_model_and_the_other_way_round(tmp_path, saved):
    assert f"{saved}: has no scalar head" in message_of(models.load_scalar, saved)
    models.save(ScalarModel(GPT(SMALL)), TOKENIZER, tmp_path)
    assert f"{tmp_path}: a reward model or a critic, which writes no text" in message_of(models.load, tmp_path)


# ---- the file layouts that GPT-2 checkpoints come in -----------------------------------------------------------------


def masks(w):
    """The causal masks that old releases saved as buffers."""
    for i in range(SMALL.n_layer):
        w[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 12, 12).tril()
        w[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)


def without_prefix(w):
    return {name.removeprefix("transformer."): x for name, x in w.items()}


def with_masks_without_prefix(w):
    masks(w)
    return without_prefix(w)


def tied_copy(w):
    w["lm_head.weight"] = w["transformer.wte.weight"].clone()


@pytest.mark.parametrize("layout", [without_prefix, masks, with_masks_without_prefix, tied_copy])
def test_every_layout_of_the_same_weights_loads(folder, saved, layout):
    change_weights(folder, layout)
    tokens = random_tokens(SMALL.vocab_size, 2, 12)
    assert torch.equal(models.load(folder)[0].logits(tokens), models.load(saved)[0].logits(tokens))


def test_half_precision_weights_become_float32(folder, saved):
    change_weights(folder, lambda w: {name: x.bfloat16() for name, x in w.items()})
    (half, _), (full, _) = models.load(folder), models.load(saved)
    assert half.wte.weight.dtype == torch.float32
    assert torch.equal(half.wte.weight, full.wte.weight.bfloat16().float())


# ---- bad checkpoints -------------------------------------------------------------------------------------------------


def drop(w):
    del w["transformer.h.1.ln_2.bias"]


def add(w):
    w["transformer.h.2.ln_1.bias"] = torch.zeros(8)


def misshape(w):
    w["transformer.wpe.weight"] = torch.zeros(13, 8)


def transpose(w):
    w["transformer.h.0.mlp.c_fc.weight"] = w["transformer.h.0.mlp.c_fc.weight"].t().contiguous()


def flatten(w):
    w["transformer.h.0.mlp.c_fc.weight"] = w["transformer.h.0.mlp.c_fc.weight"].flatten()


def whole_numbers(w):
    w["transformer.ln_f.weight"] = torch.ones(8, dtype=torch.int64)


def diverge(w):
    w["transformer.ln_f.weight"][3] = torch.nan


def untie(w):
    w["lm_head.weight"] = w["transformer.wte.weight"] + 1


def untie_shape(w):
    w["lm_head.weight"] = torch.zeros(3, 8)


@pytest.mark.parametrize(
    "change, reason",
    [
        (drop, "h.1.ln_2.bias is missing; 27 tensors"),
        (add, "1 tensors do not belong to the model, the first is h.2.ln_1.bias"),
        (misshape, "wpe.weight is [13, 8], config.json makes it [12, 8]"),
        (transpose, "h.0.mlp.c_fc.weight is "),
        (flatten, "h.0.mlp.c_fc.weight is [256]"),
        (whole_numbers, "ln_f.weight holds torch.int64"),
        (diverge, "ln_f.weight holds numbers that are not finite"),
        (untie, "lm_head.weight is not tied"),
        (untie_shape, "lm_head.weight is [3, 8], config.json makes it [260, 8]"),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder, change, reason):
    change_weights(folder, change)
    message = message_of(models.load, folder)
    assert message.startswith(f"{folder / 'model.safetensors'}: ") and reason in message


class Trap:
    """A pickle of it makes a folder when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pt"])
def test_a_pickle_is_refused_and_never_opened(folder, name):
    sprung = folder / "sprung"
    (folder / "model.safetensors").unlink()
    torch.save(Trap(sprung), folder / name)
    message = message_of(models.load, folder)
    assert str(folder / "model.safetensors") in message and "pickle" in message
    assert name in message and not sprung.exists()


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.999])
def test_weights_cut_off_are_refused(folder, share):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert f"{path}: not a safetensors file" in message_of(models.load, folder)


def test_missing_weights_are_refused(folder):
    (folder / "model.safetensors").unlink()
    assert f"{folder / 'model.safetensors'}: no such file" in message_of(models.load, folder)


@pytest.mark.parametrize(
    "content", ["", "{", "[1, 2]", "null", "3", '"gpt2"', "{}", '{"model_type": "gpt2"}', "\x00", b"\xff\xfe{}"]
)
def test_a_config_that_is_none_is_refused(folder, content):
    (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert f"{folder / 'config.json'}: not a model's configuration" in message_of(models.load, folder)


@pytest.mark.parametrize("key", ["vocab_size", "n_positions", "n_layer", "n_head", "n_embd"])
@pytest.mark.parametrize("value", [-8, 0, 8.0, "8", True, None, [8]])
def test_sizes_that_are_none_are_refused(folder, key, value):
    change_config(folder, **{key: value})
    message = message_of(models.load, folder)
    assert str(folder / "config.json") in message and "whole numbers above 0" in message


@pytest.mark.parametrize(
    "key, value",
    [
        ("model_type", "mistral"),
        ("activation_function", "relu"),
        ("activation_function", "gelu"),
        ("layer_norm_epsilon", 1e-6),
        ("n_inner", 16),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("tie_word_embeddings", False),
    ],
)
def test_another_architecture_is_refused(folder, key, value):
    change_config(folder, **{key: value})
    message = message_of(models.load, folder)
    assert message.startswith(f"{folder / 'config.json'}: {key} is {value!r}")


def test_a_width_that_the_heads_cannot_share_is_refused(folder):
    change_config(folder, n_head=3)
    assert str(folder / "config.json") in message_of(models.load, folder)


def test_a_config_of_other_sizes_is_refused(folder):
    change_config(folder, n_layer=3)
    assert "h.2.ln_1.weight is missing" in message_of(models.load, folder)
    change_config(folder, n_layer=1)
    assert "12 tensors do not belong" in message_of(models.load, folder)


# ---- the tokenizer beside it -----------------------------------------------------------------------------------------


def test_a_vocabulary_that_is_larger_than_the_models_is_refused(folder):
    Tokenizer.train(["aaa bbb cc ddd eee"], 262).save(folder)
    message = message_of(models.load, folder)
    assert str(folder) in message and "262" in message and "260" in message


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"model": 3}'])
def test_a_broken_tokenizer_is_refused(folder, content):
    (folder / "tokenizer.json").write_text(content)
    assert str(folder / "tokenizer.json") in message_of(models.load, folder)


def test_without_a_tokenizer_gpt2s_is_taken_only_where_it_fits(folder, monkeypatch):
    (folder / "tokenizer.json").unlink()
    gpt2 = Tokenizer.train(["aaa bb"], 258)
    monkeypatch.setattr(Tokenizer, "gpt2", lambda: gpt2)
    assert str(folder) in message_of(models.load, folder)
    monkeypatch.setattr(GPTConfig, "vocab_size", 258)
    models.save(GPT(GPTConfig(**{**vars(SMALL), "vocab_size": 258})), gpt2, folder)
    (folder / "tokenizer.json").unlink()
    assert models.load(folder)[1] is gpt2


def test_without_a_tokenizer_nothing_is_downloaded_that_cannot_fit(folder, monkeypatch):
    def download():
        raise OSError("no network")

    (folder / "tokenizer.json").unlink()
    monkeypatch.setattr(Tokenizer, "gpt2", download)
    assert str(folder) in message_of(models.load, folder)


# ---- finding a model -------------------------------------------------------------------------------------------------


def test_a_run_folder_holds_its_model_below(tmp_path, saved):
    shutil.copytree(saved, tmp_path / "run" / "model")
    (tmp_path / "run" / "config.json").write_text("{}")  # the run's own
    assert models.find(tmp_path / "run") == tmp_path / "run" / "model"


@pytest.mark.parametrize(
    "name", ["out/nothing", "./nothing", "../nothing", "/no/such/folder", "a/b/c", "empty", "file"]
)
def test_a_missing_folder_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace())  # would fail otherwise than by name
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert message_of(models.load, name).startswith(f"{name}: no model folder there")


def test_a_hub_name_without_the_hub_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = message_of(models.load, "someone/gpt2-tiny")
    assert message.startswith("someone/gpt2-tiny: no such folder") and "nanopref[hub]" in message


def test_a_hub_that_does_not_answer_is_refused(tmp_path, monkeypatch):
    def offline(name, **kwargs):
        raise ConnectionError("no route to the hub\nand four lines more")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=offline))
    message = message_of(models.load, "gpt2")
    assert message.startswith("gpt2: ") and message.endswith("no route to the hub")


def test_a_hub_name_loads_what_the_hub_gives(tmp_path, monkeypatch, saved):
    def snapshot(name, allow_patterns):
        assert name == "gpt2" and not any(pattern.endswith(("*", ".bin", ".pt")) for pattern in allow_patterns)
        return str(saved)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot))
    assert models.load("gpt2")[0].config == SMALL


# ---- saving ----------------------------------------------------------------------------------------------------------


def test_an_interrupted_save_leaves_the_old_files_whole(folder, monkeypatch):
    def half(state, path, **kwargs):
        Path(path).write_bytes(b"half of it")
        raise KeyboardInterrupt

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(checkpoint, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        models.save(GPT(SMALL), TOKENIZER, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_first_save_that_is_interrupted_leaves_no_model_folder(tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        models.save(GPT(SMALL), TOKENIZER, tmp_path)
    assert "no model folder there" in message_of(models.find, tmp_path)
