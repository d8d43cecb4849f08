"""What a group's rows begin with is computed once, and nothing that is said changes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import randomise

from nanopref.data.groups import Encoded
from nanopref.data.packing import PAYS, pack
from nanopref.models.gpt2 import GPT, GPTConfig
from nanopref.models.inference import response_logprobs, response_scores
from nanopref.models.llama import Llama, LlamaConfig
from nanopref.models.scalar import ScalarModel

MODELS = [randomise(GPT(GPTConfig(20, 40, 2, 2, 8))), randomise(Llama(LlamaConfig(20, 40, 2, 4, 2, 8, 12, 4)))]
tokens = st.lists(st.integers(0, 19), min_size=1, max_size=12)
groups = st.lists(
    st.tuples(tokens, st.lists(tokens, min_size=1, max_size=3)).map(lambda g: [(g[0], y) for y in g[1]]),
    min_size=1, max_size=4,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(groups=groups, which=st.sampled_from([0, 1]))
def test_packing_changes_no_log_prob_and_no_gradient(groups, which):
    model, encoded = MODELS[which], Encoded.pack(groups)
    batch = encoded.collate(range(len(groups)))
    lengths = (batch.last + 1).tolist()
    packed = pack(batch.tokens, lengths, batch.sizes)
    if packed is None:
        return
    assert packed.tokens.numel() <= PAYS * batch.tokens.numel()
    for row, n in enumerate(lengths):  # every token of every row stands somewhere, with its position
        at = packed.places[row, :n]
        assert torch.equal(packed.tokens.flatten()[at], batch.tokens[row, :n])
        assert torch.equal(packed.positions.flatten()[at], torch.arange(n))
    found = []
    for given_packed in (None, packed):
        model.zero_grad()
        logprobs = model(batch.inputs, batch.targets, batch.mask, packed=given_packed)
        logprobs.square().sum().backward()
        found.append([logprobs.detach(), *(p.grad.clone() for p in model.parameters())])
    for plain, shared in zip(*found, strict=True):
        torch.testing.assert_close(shared, plain, atol=1e-4, rtol=1e-4)


def test_rows_of_a_group_do_not_see_each_other():
    model, prompt = MODELS[1], list(range(10))
    for other in ([11, 12, 13], [14]):
        batch = Encoded.pack([[(prompt, [5, 6, 7]), (prompt, other)]]).collate([0])
        assert batch.packed is not None and batch.packed.tokens.shape == (1, 13 + len(other))
        logprobs = model(batch.inputs, batch.targets, batch.mask, packed=batch.packed)[0]
        alone = Encoded.pack([[(prompt, [5, 6, 7])]]).collate([0])
        torch.testing.assert_close(logprobs, model(alone.inputs, alone.targets, alone.mask)[0], atol=1e-5, rtol=1e-5)


def test_rows_that_share_little_are_left_as_they_are():
    assert Encoded.pack([[([1], [2, 3, 4, 5]), ([1], [6, 7, 8, 9])]]).collate([0]).packed is None
    assert Encoded.pack([[([1, 2, 3], [4])], [([1, 2, 3], [5])]]).collate([0, 1]).packed is None  # two prompts' groups


@pytest.mark.parametrize("answer", [1, 30])
def test_what_is_said_of_many_answers_is_the_same(answer):
    """Whether prompts are long, and shared, or not."""
    generator = torch.Generator().manual_seed(0)
    found = [
        [(prompt, torch.randint(20, (answer,), generator=generator).tolist()) for _ in range(2)]
        for prompt in torch.randint(20, (9, 8), generator=generator).tolist()
    ]
    together, alone = Encoded.pack(found), Encoded.pack([[row] for group in found for row in group])
    assert (together.repeated > 1 - PAYS) == (answer == 1) and alone.repeated == 0
    model, scalar = MODELS[1], randomise(ScalarModel(MODELS[1], 2))
    torch.testing.assert_close(response_logprobs(model, together, batch_size=4), response_logprobs(model, alone))
    torch.testing.assert_close(response_scores(scalar, together, batch_size=4), response_scores(scalar, alone))
