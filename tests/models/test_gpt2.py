"""GPT-2 against the one of `transformers`, and what it computes."""

import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import SMALL, message_of, random_tokens, randomise

from nanopref import models
from nanopref.data.tokenizer import Tokenizer
from nanopref.models.gpt2 import GPT, PRESETS, GPTConfig, preset

TOKENIZERS = {n: Tokenizer.train(["aaa bb, aaa bb"], n) for n in (257, 260)}


@st.composite
def configs(draw):
    n_head = draw(st.integers(1, 4))
    width = n_head * draw(st.integers(1, 8))
    return GPTConfig(
        draw(st.sampled_from([*TOKENIZERS])), draw(st.integers(1, 20)), draw(st.integers(1, 3)), n_head, width
    )


# ---- against transformers --------------------------------------------------------------------------------------------


def theirs(config: GPTConfig):
    from transformers import GPT2Config, GPT2LMHeadModel

    ours = ("block_size", "dropout", "from_scratch")
    sizes = {k: v for k, v in vars(config).items() if k not in ours}
    return GPT2LMHeadModel(GPT2Config(n_positions=config.block_size, bos_token_id=0, eos_token_id=0, **sizes))


@settings(deadline=None, max_examples=15)
@given(configs())
def test_the_same_logits_as_transformers_both_ways(config):
    from transformers import GPT2LMHeadModel

    tokens, tokenizer = random_tokens(config.vocab_size, 3, config.block_size), TOKENIZERS[config.vocab_size]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        other = randomise(theirs(config))
        other.save_pretrained(folder)
        tokenizer.save(Path(folder))
        ours, _ = models.load(folder)
        assert ours.config == config
        torch.testing.assert_close(ours.eval().logits(tokens), other(tokens).logits, atol=1e-5, rtol=0)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        ours = randomise(GPT(config))
        models.save(ours, tokenizer, folder)
        other, info = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        torch.testing.assert_close(ours.logits(tokens), other.eval()(tokens).logits, atol=1e-5, rtol=0)


def test_transformers_opens_a_saved_policy_by_its_folder_alone(tmp_path):
    """Which classes, which tokenizer and where a text ends: all is said there."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours, tokenizer = randomise(GPT(SMALL)), TOKENIZERS[260]
    models.save(ours, tokenizer, tmp_path)
    other, reader = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(other).__name__ == "GPT2LMHeadModel"
    assert other.config.eos_token_id == reader.eos_token_id == tokenizer.end_of_text
    tokens = reader("aaa bb", return_tensors="pt")["input_ids"]
    assert tokens[0].tolist() == tokenizer.encode("aaa bb")
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(tokens).logits, ours.logits(tokens), atol=1e-5, rtol=0)


# ---- what the model computes -----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(configs(), st.booleans(), st.floats(0.2, 3))
def test_the_log_probs_are_those_of_the_logits(config, entropy, temperature):
    """And the entropies; 0 where the mask is 0, whatever the target there."""
    model, T = randomise(GPT(config)), config.block_size
    tokens, targets = (random_tokens(config.vocab_size, 3, T, seed=i) for i in (1, 2))
    mask = (torch.rand(3, T, generator=torch.Generator().manual_seed(0)) < 0.6).float()
    logp = (model.logits(tokens).double() / temperature).log_softmax(-1)
    expected = logp.gather(-1, targets[..., None])[..., 0] * mask
    targets[mask == 0] = -7
    found = model(tokens, targets, mask, temperature, entropy)
    found, entropies = found if entropy else (found, None)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)
    if entropy:
        torch.testing.assert_close(entropies.double(), -(logp.exp() * logp).sum(-1) * mask, atol=1e-4, rtol=0)


@settings(deadline=None, max_examples=30)
@given(configs(), st.data())
def test_right_padding_cannot_change_real_tokens(config, data):
    model = randomise(GPT(config)).double()
    n = data.draw(st.integers(1, config.block_size))
    tokens = random_tokens(config.vocab_size, 2, config.block_size)
    padded = torch.cat([tokens[:, :n], random_tokens(config.vocab_size, 2, config.block_size - n, seed=1)], dim=1)
    assert torch.equal(model.logits(tokens)[:, :n], model.logits(padded)[:, :n])  # the same shapes: bit for bit
    torch.testing.assert_close(model.logits(tokens[:, :n]), model.logits(padded)[:, :n], atol=1e-12, rtol=0)


def test_every_token_of_the_past_counts():
    model, tokens = randomise(GPT(SMALL), std=0.6), random_tokens(SMALL.vocab_size, 1, 12)
    before = model.logits(tokens)[0, -1]
    for t in range(12):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % SMALL.vocab_size
        assert (model.logits(changed)[0, -1] - before).abs().max() > 1e-3


def test_logits_are_hidden_states_times_the_tied_unembedding():
    model, tokens = randomise(GPT(SMALL)), random_tokens(SMALL.vocab_size, 2, 7)
    assert model.unembedding is model.wte.weight and model.hidden(tokens).shape == (2, 7, 8)
    torch.testing.assert_close(model.logits(tokens), model.hidden(tokens) @ model.wte.weight.T, atol=1e-6, rtol=0)
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
    assert "gpt2-xl" in message_of(lambda: models.new("huge", vocab_size=5, block_size=7))
