"""Decoding with the cache against the whole forward pass."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import SMALL, random_tokens, randomise

from nanopref.models.gpt2 import GPT, GPTConfig
from nanopref.models.sampling import generate


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.lists(st.integers(1, 4), max_size=4), st.data())
def test_decoding_in_chunks_equals_the_whole(prompts, chunks, data):
    length = max(prompts) + sum(chunks)
    config = GPTConfig(17, length + data.draw(st.integers(0, 2)), 2, 2, 8)
    model = randomise(GPT(config)).double()
    tokens = random_tokens(17, len(prompts), length)
    whole = model.hidden(tokens)
    cache = model.new_cache(len(prompts), length, dtype=torch.float64)
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
        model.logits(tokens)
    for room in (5, 30):  # the cache is what is full, or the context
        cache = model.new_cache(2, room)
        limit = min(room, SMALL.block_size)
        model.logits(tokens[:, : limit - 1], cache)
        cache.lengths = torch.tensor([1, limit - 1])
        model.logits(tokens[:, :1], cache)
        lengths, keys = cache.lengths.clone(), cache.keys.clone()
        with pytest.raises(ValueError, match=f"{limit + 1} tokens"):
            model.logits(tokens[:, :1], cache)
        assert torch.equal(cache.lengths, lengths) and torch.equal(cache.keys, keys)


def test_prompts_of_very_different_lengths_are_read_apart_and_answered_alike(monkeypatch):
    model = randomise(GPT(GPTConfig(260, 200, 2, 2, 8)))
    prompts = [random_tokens(260, n, seed=n).tolist() for n in (3, 150, 5, 1, 90, 40, 151)]
    read = []
    ordinary = model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens, *a: read.append(tokens.numel()) or ordinary(tokens, *a))
    together = generate(model, prompts, 4, ends=(), temperature=0)
    assert sum(n for n in read if n > len(prompts)) < 1.6 * sum(map(len, prompts))  # and not 7 times 151
    monkeypatch.undo()
    assert [x.tokens for x in together] == [
        generate(model, [prompt], 4, ends=(), temperature=0)[0].tokens for prompt in prompts
    ]
