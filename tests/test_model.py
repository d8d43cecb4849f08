import json
import math
import shutil
import sys
import tempfile
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nanopref import model as model_module
from nanopref.model import GPT, PRESETS, GPTConfig, KVCache, find_model, load_pretrained, preset, save_pretrained
from nanopref.run import UserError
from nanopref.tokenizer import Tokenizer

SMALL = GPTConfig(vocab_size=260, block_size=12, n_layer=2, n_head=2, n_embd=8)


@st.composite
def configs(draw):
    n_head = draw(st.integers(1, 4))
    width = n_head * draw(st.integers(1, 8))
    return GPTConfig(draw(st.integers(2, 40)), draw(st.integers(1, 20)), draw(st.integers(1, 3)), n_head, width)


def randomise(model, std=0.2):
    """Weights that leave nothing at 0 or 1, so that every one of them counts."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.normal_(std=std, generator=generator)
    return model.eval()


def random_tokens(vocab_size, *shape, seed=0):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def message_of(call, *arguments) -> str:
    """What a call that must be refused says, in one line."""
    with pytest.raises(UserError) as refusal:
        call(*arguments)
    message = str(refusal.value)
    assert "\n" not in message and message.strip()
    return message


# ---- against transformers --------------------------------------------------------------------------------------------


def theirs(config: GPTConfig):
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = vars(config) | {"n_positions": config.block_size, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**{k: v for k, v in settings.items() if k not in ("block_size", "dropout")}))


@settings(deadline=None, max_examples=15)
@given(configs())
def test_the_same_logits_as_transformers_both_ways(config):
    from transformers import GPT2LMHeadModel

    tokens = random_tokens(config.vocab_size, 3, config.block_size)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        other = randomise(theirs(config))
        other.save_pretrained(folder)
        ours = GPT.from_pretrained(folder)
        assert ours.config == config
        torch.testing.assert_close(ours.eval()(tokens), other(tokens).logits, atol=1e-5, rtol=0)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        ours = randomise(GPT(config))
        ours.save_pretrained(folder)
        other, info = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        torch.testing.assert_close(ours(tokens), other.eval()(tokens).logits, atol=1e-5, rtol=0)


def test_a_saved_model_loads_the_same(tmp_path):
    saved = randomise(GPT(SMALL))
    saved.save_pretrained(tmp_path)
    loaded = GPT.from_pretrained(tmp_path, dropout=0.25)
    assert loaded.config == GPTConfig(**{**vars(SMALL), "dropout": 0.25})
    for (name, a), (other_name, b) in zip(saved.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other_name and torch.equal(a, b) and b.requires_grad and b.dtype == torch.float32, name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


# ---- the file layouts that GPT-2 checkpoints come in -----------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a model and its tokenizer; tests copy it."""
    folder = tmp_path_factory.mktemp("saved")
    save_pretrained(randomise(GPT(SMALL)), Tokenizer.train(["aaa bb, aaa bb"], SMALL.vocab_size), folder)
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
    assert torch.equal(GPT.from_pretrained(folder)(tokens), GPT.from_pretrained(saved)(tokens))


def test_half_precision_weights_become_float32(folder, saved):
    change_weights(folder, lambda w: {name: x.bfloat16() for name, x in w.items()})
    half, full = GPT.from_pretrained(folder), GPT.from_pretrained(saved)
    assert half.wte.weight.dtype == torch.float32
    assert torch.equal(half.wte.weight, full.wte.weight.bfloat16().float())


# ---- what the model computes -----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(configs(), st.data())
def test_right_padding_cannot_change_real_tokens(config, data):
    model = randomise(GPT(config)).double()
    n = data.draw(st.integers(1, config.block_size))
    tokens = random_tokens(config.vocab_size, 2, config.block_size)
    padded = torch.cat([tokens[:, :n], random_tokens(config.vocab_size, 2, config.block_size - n, seed=1)], dim=1)
    assert torch.equal(model(tokens)[:, :n], model(padded)[:, :n])  # the same shapes: bit for bit
    torch.testing.assert_close(model(tokens[:, :n]), model(padded)[:, :n], atol=1e-12, rtol=0)


def test_every_token_of_the_past_counts():
    model, tokens = randomise(GPT(SMALL), std=0.6), random_tokens(SMALL.vocab_size, 1, 12)
    before = model(tokens)[0, -1]
    for t in range(12):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % SMALL.vocab_size
        assert (model(changed)[0, -1] - before).abs().max() > 1e-3


def test_logits_are_hidden_states_times_the_tied_unembedding():
    model, tokens = randomise(GPT(SMALL)), random_tokens(SMALL.vocab_size, 2, 7)
    assert model.unembedding is model.wte.weight and model.hidden(tokens).shape == (2, 7, 8)
    torch.testing.assert_close(model(tokens), model.hidden(tokens) @ model.wte.weight.T, atol=1e-6, rtol=0)
    assert "lm_head.weight" not in model.state_dict()


def test_the_initial_scale_is_gpt2s():
    model = GPT(preset("tiny", vocab_size=512, block_size=128))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif "ln_" in name:
            assert (p == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 4) if name.endswith("c_proj.weight") else 0.02
            # the estimate from n numbers is off by 1 / sqrt(2 n): five times that
            assert abs(p.std().item() / std - 1) < 5 / math.sqrt(2 * p.numel()), name
            assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), name


@pytest.mark.parametrize(
    "name, parameters",
    [("gpt2", 124439808), ("gpt2-medium", 354823168), ("gpt2-large", 774030080), ("gpt2-xl", 1557611200)],
)
def test_the_presets_have_the_published_sizes(name, parameters):
    with torch.device("meta"):
        model = GPT(preset(name, vocab_size=50257, block_size=1024))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_presets_by_name():
    assert preset("tiny", vocab_size=5, block_size=7, dropout=0.5) == GPTConfig(5, 7, *PRESETS["tiny"], 0.5)
    assert preset("gpt2", vocab_size=50257, block_size=1024) == GPTConfig()
    assert "gpt2-xl" in message_of(lambda: preset("huge", vocab_size=5, block_size=7))


def test_dropout_only_in_training():
    tokens = random_tokens(SMALL.vocab_size, 2, 12)
    model = randomise(GPT(GPTConfig(**{**vars(SMALL), "dropout": 0.5})))
    plain = GPT(SMALL)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(tokens), plain.eval()(tokens))
    assert not torch.equal(model.train()(tokens), model(tokens))
    assert torch.equal(plain.train()(tokens), plain.eval()(tokens))


def test_dropout_stands_where_gpt2_has_it(monkeypatch):
    """On the embedding, on each attention and each branch: in training only."""
    model = GPT(GPTConfig(**{**vars(SMALL), "dropout": 0.5}))
    functional, calls = torch.nn.functional, []
    dropout, attention = functional.dropout, functional.scaled_dot_product_attention

    def see_dropout(x, p, training):
        calls.append(p if training else 0)
        return dropout(x, p, training)

    def see_attention(*args, dropout_p=0.0, **kwargs):
        calls.append(dropout_p)
        return attention(*args, dropout_p=dropout_p, **kwargs)

    monkeypatch.setattr(functional, "dropout", see_dropout)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", see_attention)
    for training, p in [(True, 0.5), (False, 0)]:
        calls.clear()
        model.train(training)(random_tokens(SMALL.vocab_size, 1, 3))
        assert calls == [p] * (1 + 3 * SMALL.n_layer)


# ---- the KV cache ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.lists(st.integers(1, 4), max_size=4), st.data())
def test_decoding_in_chunks_equals_the_whole(prompts, chunks, data):
    length = max(prompts) + sum(chunks)
    config = GPTConfig(17, length + data.draw(st.integers(0, 2)), 2, 2, 8)
    model = randomise(GPT(config)).double()
    tokens = random_tokens(17, len(prompts), length)
    whole = model.hidden(tokens)
    cache = KVCache(config, len(prompts), length, dtype=torch.float64)
    done = torch.tensor(prompts)
    padded = tokens[:, : max(prompts)].clone()
    padded[torch.arange(max(prompts)) >= done[:, None]] = 16
    first = model.hidden(padded, cache)
    for row, n in enumerate(prompts):
        torch.testing.assert_close(first[row, :n], whole[row, :n], atol=1e-12, rtol=0)
    cache.lengths = done.clone()
    for chunk in chunks:
        if data.draw(st.booleans()):
            rows = data.draw(st.lists(st.sampled_from(range(len(tokens))), min_size=1, unique=True).map(torch.tensor))
            cache.keep(rows)
            tokens, whole, done = tokens[rows], whole[rows], done[rows]
        index = done[:, None] + torch.arange(chunk)
        found = model.hidden(tokens.gather(1, index), cache)
        expected = whole.gather(1, index[:, :, None].expand(-1, -1, config.n_embd))
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
        done = done + chunk
        assert torch.equal(cache.lengths, done)


def test_too_many_tokens_are_refused():
    model, tokens = randomise(GPT(SMALL)), random_tokens(SMALL.vocab_size, 2, 13)
    with pytest.raises(ValueError, match="13 tokens are more than the context of 12"):
        model(tokens)
    for room in (5, 30):  # the cache is what is full, or the context
        cache = KVCache(SMALL, 2, room)
        limit = min(room, SMALL.block_size)
        model(tokens[:, : limit - 1], cache)
        cache.lengths = torch.tensor([1, limit - 1])
        model(tokens[:, :1], cache)
        lengths, keys = cache.lengths.clone(), cache.keys.clone()
        with pytest.raises(ValueError, match=f"{limit + 1} tokens"):
            model(tokens[:, :1], cache)
        assert torch.equal(cache.lengths, lengths) and torch.equal(cache.keys, keys)


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
        (drop, "1 tensors are missing, the first is h.1.ln_2.bias"),
        (add, "1 tensors do not belong to a GPT-2, the first is h.2.ln_1.bias"),
        (misshape, "wpe.weight is [13, 8], config.json makes it [12, 8]"),
        (transpose, "h.0.mlp.c_fc.weight is "),
        (flatten, "h.0.mlp.c_fc.weight is [256]"),
        (whole_numbers, "ln_f.weight holds torch.int64"),
        (diverge, "ln_f.weight holds numbers that are not finite"),
        (untie, "lm_head.weight is not tied"),
        (untie_shape, "lm_head.weight is not tied"),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder, change, reason):
    change_weights(folder, change)
    message = message_of(GPT.from_pretrained, folder)
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
    message = message_of(GPT.from_pretrained, folder)
    assert str(folder / "model.safetensors") in message and "pickle" in message
    assert name in message and not sprung.exists()


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.999])
def test_weights_cut_off_are_refused(folder, share):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert f"{path}: not a safetensors file" in message_of(GPT.from_pretrained, folder)


def test_missing_weights_are_refused(folder):
    (folder / "model.safetensors").unlink()
    assert f"{folder / 'model.safetensors'}: no such file" in message_of(GPT.from_pretrained, folder)


@pytest.mark.parametrize(
    "content", ["", "{", "[1, 2]", "null", "3", '"gpt2"', "{}", '{"model_type": "gpt2"}', "\x00", b"\xff\xfe{}"]
)
def test_a_config_that_is_none_is_refused(folder, content):
    (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert f"{folder / 'config.json'}: not a GPT-2 configuration" in message_of(GPT.from_pretrained, folder)


@pytest.mark.parametrize("key", ["vocab_size", "n_positions", "n_layer", "n_head", "n_embd"])
@pytest.mark.parametrize("value", [-8, 0, 8.0, "8", True, None, [8]])
def test_sizes_that_are_none_are_refused(folder, key, value):
    change_config(folder, **{key: value})
    message = message_of(GPT.from_pretrained, folder)
    assert str(folder / "config.json") in message and "whole numbers above 0" in message


@pytest.mark.parametrize(
    "key, value",
    [
        ("model_type", "llama"),
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
    message = message_of(GPT.from_pretrained, folder)
    assert message.startswith(f"{folder / 'config.json'}: {key} is {value!r}")


def test_a_width_that_the_heads_cannot_share_is_refused(folder):
    change_config(folder, n_head=3)
    assert str(folder / "config.json") in message_of(GPT.from_pretrained, folder)


def test_a_config_of_other_sizes_is_refused(folder):
    change_config(folder, n_layer=3)
    assert "12 tensors are missing" in message_of(GPT.from_pretrained, folder)
    change_config(folder, n_layer=1)
    assert "12 tensors do not belong" in message_of(GPT.from_pretrained, folder)


# ---- the tokenizer beside it -----------------------------------------------------------------------------------------


def test_a_model_loads_with_its_tokenizer(saved):
    model, tokenizer = load_pretrained(saved)
    assert model.config == SMALL and tokenizer == Tokenizer.load(saved)


def test_a_vocabulary_that_does_not_fit_is_refused(folder):
    Tokenizer.train(["aaa bb"], 258).save(folder)
    message = message_of(load_pretrained, folder)
    assert str(folder) in message and "258" in message and "260" in message


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"model": 3}'])
def test_a_broken_tokenizer_is_refused(folder, content):
    (folder / "tokenizer.json").write_text(content)
    assert str(folder / "tokenizer.json") in message_of(load_pretrained, folder)


def test_without_a_tokenizer_gpt2s_is_taken_only_where_it_fits(folder, monkeypatch):
    (folder / "tokenizer.json").unlink()
    gpt2 = Tokenizer.train(["aaa bb"], 258)
    monkeypatch.setattr(Tokenizer, "gpt2", lambda: gpt2)
    assert str(folder) in message_of(load_pretrained, folder)
    monkeypatch.setattr(GPTConfig, "vocab_size", 258)
    randomise(GPT(GPTConfig(**{**vars(SMALL), "vocab_size": 258}))).save_pretrained(folder)
    assert load_pretrained(folder)[1] == gpt2


def test_without_a_tokenizer_nothing_is_downloaded_that_cannot_fit(folder, monkeypatch):
    def download():
        raise OSError("no network")

    (folder / "tokenizer.json").unlink()
    monkeypatch.setattr(Tokenizer, "gpt2", download)
    assert str(folder) in message_of(load_pretrained, folder)


# ---- finding a model -------------------------------------------------------------------------------------------------


def test_a_run_folder_holds_its_model_below(tmp_path, saved):
    shutil.copytree(saved, tmp_path / "run" / "model")
    (tmp_path / "run" / "config.json").write_text("{}")  # the run's own
    assert find_model(tmp_path / "run") == tmp_path / "run" / "model"


@pytest.mark.parametrize(
    "name", ["out/nothing", "./nothing", "../nothing", "/no/such/folder", "a/b/c", "empty", "file"]
)
def test_a_missing_folder_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace())  # would fail otherwise than by name
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert message_of(GPT.from_pretrained, name).startswith(f"{name}: no model folder there")


def test_a_hub_name_without_the_hub_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = message_of(GPT.from_pretrained, "someone/gpt2-tiny")
    assert message.startswith("someone/gpt2-tiny: no such folder") and "nanopref[hub]" in message


def test_a_hub_that_does_not_answer_is_refused(tmp_path, monkeypatch):
    def offline(name, **kwargs):
        raise ConnectionError("no route to the hub\nand four lines more")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=offline))
    message = message_of(GPT.from_pretrained, "gpt2")
    assert message.startswith("gpt2: ") and message.endswith("no route to the hub")


def test_a_hub_name_loads_what_the_hub_gives(tmp_path, monkeypatch, saved):
    def snapshot(name, allow_patterns):
        assert name == "gpt2" and not any(pattern.endswith(("*", ".bin", ".pt")) for pattern in allow_patterns)
        return str(saved)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot))
    assert GPT.from_pretrained("gpt2").config == SMALL


# ---- saving ----------------------------------------------------------------------------------------------------------


def test_an_interrupted_save_leaves_the_old_files_whole(folder, monkeypatch):
    def half(state, path, **kwargs):
        Path(path).write_bytes(b"half of it")
        raise KeyboardInterrupt

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(model_module, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        GPT(SMALL).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_first_save_that_is_interrupted_leaves_no_model_folder(tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(model_module, "save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(GPT(SMALL), Tokenizer.train(["aaa bb, aaa bb"], SMALL.vocab_size), tmp_path)
    assert "no model folder there" in message_of(find_model, tmp_path)
