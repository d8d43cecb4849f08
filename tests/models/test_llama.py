"""Llama, Qwen2 and Qwen3 against `transformers`, whose folders are read and written; in shards, tied or not, cached."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import message_of, random_tokens, randomise

from nanopref import models
from nanopref.data.chat import encode_prompt
from nanopref.data.dialogues import Dialogue
from nanopref.data.tokenizer import Tokenizer
from nanopref.models import checkpoint
from nanopref.models.llama import Llama, LlamaConfig, frequencies, preset
from nanopref.models.sampling import generate
from nanopref.models.scalar import ScalarModel

transformers = pytest.importorskip("transformers")
TOKENIZER = Tokenizer.train(["aaa bb, aaa bb"], 260)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
SMALL = LlamaConfig(260, 24, 2, 4, 2, 16, 20, 6)


@st.composite
def configs(draw) -> LlamaConfig:
    groups, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    family = draw(st.sampled_from(["llama", "qwen2", "qwen3"]))
    scaling = draw(st.sampled_from([None, (8.0, 1.0, 4.0, 16), (2.0, 1.5, 3.0, 8)]))
    return LlamaConfig(
        260, 40, draw(st.integers(1, 3)), groups * heads, heads, groups * heads * draw(st.sampled_from([2, 3])),
        draw(st.integers(1, 20)), 2 * draw(st.integers(1, 6)), family=family, tied=draw(st.booleans()),
        bias=family == "qwen2" or draw(st.booleans()), mlp_bias=family == "llama" and draw(st.booleans()),
        norm_eps=draw(st.sampled_from([1e-5, 1e-6])), rope_theta=draw(st.sampled_from([1e4, 5e5])),
        rope_scaling=scaling, rope_factor=1.0 if scaling else draw(st.sampled_from([1.0, 4.0])),
    )  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(config=configs())
def test_transformers_opens_what_is_saved_here(tmp_path_factory, config):
    folder, model = tmp_path_factory.mktemp("model"), randomise(Llama(config))
    models.save(model, TOKENIZER, folder)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(theirs).__name__.lower() == f"{config.family}forcausallm"
    tokens = random_tokens(260, 3, 40)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(tokens), theirs.eval()(tokens).logits, atol=1e-5, rtol=1e-5)
    loaded, _ = models.load(folder)
    assert loaded.config == config
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )


CONFIGS = {
    "llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config,
    "gpt2": transformers.GPT2Config,
}  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(
    family=st.sampled_from(list(CONFIGS)), heads=st.integers(1, 3), groups=st.integers(1, 3), tied=st.booleans(),
    scaled=st.booleans(), sharded=st.booleans(), scores=st.sampled_from([0, 1, 3]),
)  # fmt: skip
def test_what_transformers_saves_is_opened_here(tmp_path_factory, family, heads, groups, tied, scaled, sharded, scores):
    sizes = {"vocab_size": 260, "tie_word_embeddings": tied or family == "gpt2", "num_labels": max(1, scores)}
    if family == "gpt2":
        sizes |= {"n_embd": 8 * heads, "n_head": heads, "n_layer": 2, "n_positions": 40}
    else:
        sizes |= {
            "hidden_size": 6 * heads * groups,
            "intermediate_size": 20,
            "num_hidden_layers": 2,
            "max_position_embeddings": 40,
        }
        sizes |= {"num_attention_heads": heads * groups, "num_key_value_heads": heads, "head_dim": 6}
        rope = LLAMA3 if scaled and family == "llama" else {"rope_type": "default"}
        sizes |= {"rope_parameters": {**rope, "rope_theta": 5e5}}
    kind = transformers.AutoModelForSequenceClassification if scores else transformers.AutoModelForCausalLM
    folder, theirs = tmp_path_factory.mktemp("model"), randomise(kind.from_config(CONFIGS[family](**sizes)))
    theirs.config.pad_token_id = 259
    theirs.save_pretrained(folder, max_shard_size="6KB" if sharded else "1GB")
    assert (folder / checkpoint.INDEX).exists() == sharded
    TOKENIZER.save(folder)
    model, tokenizer = (models.load_scalar if scores else models.load)(folder)
    tokens = random_tokens(259, 3, 40)
    with torch.no_grad():
        ours = model(tokens)[:, -1] if scores else model.logits(tokens)
        torch.testing.assert_close(ours, theirs(tokens).logits, atol=1e-5, rtol=1e-5)
    models.save(model, tokenizer, folder)  # in one file, in place of the shards
    assert not (folder / checkpoint.INDEX).exists()
    again, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(tokens).logits, theirs(tokens).logits, atol=1e-5, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(config=configs(), cut=st.integers(1, 19))
def test_the_cache_changes_nothing(config, cut):
    model, tokens = randomise(Llama(config)), random_tokens(260, 2, 20)
    cache = model.new_cache(2, 20)
    assert cache.keys.shape == (config.n_layer, 2, config.n_kv_head, 20, config.head_dim)
    with torch.no_grad():
        parts = [model.logits(tokens[:, :cut], cache)]
        parts += [model.logits(tokens[:, i : i + 1], cache) for i in range(cut, 20)]
        torch.testing.assert_close(torch.cat(parts, 1), model.logits(tokens), atol=1e-5, rtol=1e-5)


def test_the_reference_in_float64():
    """RMSNorm, rotation, SwiGLU and grouped attention once more, by their formulas."""
    c = SMALL
    model, tokens = randomise(Llama(c)).double(), random_tokens(260, 1, 7)
    w = dict(model.named_parameters())

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * weight

    def turned(x, position):  # as complex numbers
        half = c.head_dim // 2
        angles = position * torch.tensor([c.rope_theta ** (-2 * i / c.head_dim) for i in range(half)]).double()
        z = torch.polar(torch.ones(half).double(), angles) * torch.complex(x[:half], x[half:])
        return torch.cat([z.real, z.imag])

    xs = list(w["embed_tokens.weight"][tokens[0]])
    for layer in range(c.n_layer):
        p = {name.split(".", 2)[2]: x for name, x in w.items() if name.startswith(f"layers.{layer}.")}
        n = [norm(x, p["input_layernorm.weight"]) for x in xs]
        q, k, v = ([(p[f"self_attn.{name}_proj.weight"] @ x).view(-1, c.head_dim) for x in n] for name in "qkv")
        for t in reversed(range(len(xs))):
            heads = []
            for h in range(c.n_head):
                g = h // (c.n_head // c.n_kv_head)
                scores = [turned(q[t][h], t) @ turned(k[s][g], s) / c.head_dim**0.5 for s in range(t + 1)]
                weights = torch.stack(scores).softmax(0)
                heads.append(sum(a * v[s][g] for s, a in enumerate(weights)))
            x = xs[t] + p["self_attn.o_proj.weight"] @ torch.cat(heads)
            m = norm(x, p["post_attention_layernorm.weight"])
            inner = p["mlp.gate_proj.weight"] @ m
            inner = inner / (1 + (-inner).exp()) * (p["mlp.up_proj.weight"] @ m)
            xs[t] = x + p["mlp.down_proj.weight"] @ inner
    expected = torch.stack([norm(x, w["norm.weight"]) for x in xs]) @ w["embed_tokens.weight"].T
    torch.testing.assert_close(model.logits(tokens)[0], expected, atol=1e-5, rtol=1e-5)  # angles are float32


def test_llama_3s_scaling_keeps_fast_waves_and_slows_slow_ones():
    plain, scaled = (
        frequencies(LlamaConfig(head_dim=64, rope_theta=5e5, rope_scaling=s)) for s in (None, (8, 1, 4, 8192))
    )
    assert torch.equal(plain[:10], scaled[:10]) and torch.allclose(plain[-10:] / 8, scaled[-10:])
    assert (scaled.diff() < 0).all()


def test_presets_are_as_large_as_their_gpt2():
    for name in ("tiny", "small"):
        a, b = (models.new(n, vocab_size=1024, block_size=96) for n in (name, f"llama-{name}"))
        counts = [sum(p.numel() for p in model.parameters()) for model in (a, b)]
        assert counts[1] == pytest.approx(counts[0], rel=0.1)
    with torch.device("meta"):
        model = Llama(preset("llama-135m", vocab_size=49152, block_size=8192))
    assert sum(p.numel() for p in model.parameters()) == 134_515_008


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    models.save(randomise(Llama(SMALL)), TOKENIZER, tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"model_type": "mixtral"}, "model_type is 'mixtral', but only gpt2, llama, qwen2, qwen3 can be loaded"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "sliding windows is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding windows is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantised weights are not supported"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "of type 'yarn' are not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "heads that turn in part"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "lacks 'factor'"),
        ({"num_key_value_heads": 3}, "no Llama has 4 heads of width 6, 3 of keys and values"),
        ({"head_dim": 5}, "no Llama has 4 heads of width 5"),
        ({"hidden_size": 0}, "sizes must be whole numbers above 0"),
        ({"num_hidden_layers": "2"}, "sizes must be whole numbers above 0"),
        ({"rms_norm_eps": 3}, "rms_norm_eps is 3"),
        ({"hidden_size": None}, "sizes must be whole numbers above 0"),
        ({"num_hidden_layers": 1}, "9 tensors do not belong to the model"),
        ({"tie_word_embeddings": False}, "lm_head.weight is missing; 20 tensors"),
        ({"intermediate_size": 21}, "config.json makes it [16, 21]"),
    ],
)
def test_another_model_is_refused(folder, change, reason):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    message = message_of(models.load, folder)
    assert reason in message and str(folder) in message


def test_shards_that_are_missing_or_elsewhere_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / checkpoint.INDEX).write_text(json.dumps(index))
    assert f"{folder / 'model-00002-of-00002.safetensors'}: no such file" in message_of(models.load, folder)
    for content in ("{", "[]", '{"weight_map": 3}', "{}", '{"weight_map": {"a": 3}}'):
        (folder / checkpoint.INDEX).write_text(content)
        assert f"{folder / checkpoint.INDEX}: no index of shards" in message_of(models.load, folder)
    outside = folder.parent / "model-00001-of-00002.safetensors"
    outside.write_bytes((folder / outside.name).read_bytes())
    (folder / outside.name).unlink()
    (folder / checkpoint.INDEX).write_text(json.dumps({"weight_map": {"a": f"../{outside.name}"}}))
    assert f"{folder / outside.name}: no such file" in message_of(models.load, folder)


def test_an_unembedding_that_should_be_tied_is_refused(folder):
    path, model = folder / "config.json", randomise(Llama(LlamaConfig(260, 24, 2, 4, 2, 16, 20, 6, tied=False)))
    models.save(model, TOKENIZER, folder)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    assert "lm_head.weight is not tied" in message_of(models.load, folder)


def test_a_reward_model_of_an_untied_one_has_no_unembedding(tmp_path):
    model = ScalarModel(randomise(Llama(LlamaConfig(260, 24, 2, 4, 2, 16, 20, 6, tied=False))), 2)
    models.save(model, TOKENIZER, tmp_path)
    loaded, _ = models.load_scalar(tmp_path)
    assert loaded.transformer.lm_head is None
    tokens = random_tokens(260, 2, 9)
    assert torch.equal(loaded(tokens), model(tokens))


# ---- the real one ----------------------------------------------------------------------------------------------------

REAL = Path(os.environ.get("NANOPREF_MODEL", "none"))
real = pytest.mark.skipif(
    not (REAL / "config.json").is_file(), reason="NANOPREF_MODEL names no folder with a real chat model"
)


@real
def test_the_real_models_logits_are_those_of_transformers():
    theirs = transformers.AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32).eval()
    model, tokenizer = models.load(REAL)
    tokens = torch.tensor([tokenizer.encode("The first law of thermodynamics says that 1,024 ")])
    with torch.no_grad():
        torch.testing.assert_close(model.logits(tokens), theirs(tokens).logits, atol=1e-3, rtol=1e-5)


PROMPTS = ["What is 12 times 12?", "Write a haiku about rain.", "Who wrote Hamlet?", "List three fruits."]
PROMPTS += ["Why is ice slippery?"]


@real
def test_greedy_text_is_that_of_transformers(n=100):
    """Of all five prompts at once here and one by one there."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32).eval()
    model, tokenizer = models.load(REAL)
    prompts = [encode_prompt(tokenizer, Dialogue([("user", text)])) for text in PROMPTS]
    found = generate(model.eval(), prompts, n, ends=tokenizer.ends, temperature=0)
    for prompt, sample in zip(prompts, found, strict=True):
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=n, do_sample=False)[0, len(prompt) :]
        assert sample.tokens == expected.tolist()
