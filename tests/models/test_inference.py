"""What a model says of many rows at once, against one row at a time."""

import pytest
import torch
from helpers import beginning
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from small_models import message_of, random_tokens, randomise

from nanopref.data.groups import Encoded
from nanopref.models.gpt2 import GPT, GPTConfig
from nanopref.models.inference import evaluating, reference_logprobs, response_logprobs, response_scores
from nanopref.models.scalar import ScalarModel

V, BLOCK = 50, 24
row_lengths = st.tuples(st.integers(1, 10), st.integers(1, 14))
mixed = st.lists(
    st.sampled_from([1, 2, 4]).flatmap(lambda k: st.lists(row_lengths, min_size=k, max_size=k)), max_size=6
)


def rows_of(lengths: list[list[tuple[int, int]]]) -> list[list[tuple[list[int], list[int]]]]:
    """Groups of rows of random tokens, of these lengths of prompt and answer."""
    tokens = iter(random_tokens(V, 2000).tolist())
    return [[([next(tokens) for _ in range(x)], [next(tokens) for _ in range(y)]) for x, y in g] for g in lengths]


def slow_logprob(model: GPT, x: list[int], y: list[int], temperature: float) -> float:
    """log π(y|x) token by token from the logits of the row alone."""
    logp = (model.logits(torch.tensor([x + y]))[0].double() / temperature).log_softmax(-1)
    return sum(logp[len(x) - 1 + i, token].item() for i, token in enumerate(y))


@pytest.fixture(scope="module")
def policy() -> GPT:
    return randomise(GPT(GPTConfig(V, BLOCK, 2, 2, 16, dropout=0.5)), std=0.3)


@settings(deadline=None, max_examples=40)
@given(lengths=mixed, batch_size=st.integers(1, 7), temperature=st.sampled_from([1.0, 0.6]))
def test_log_probs_of_mixed_groups_are_those_of_one_row_at_a_time(policy, lengths, batch_size, temperature):
    groups = rows_of(lengths)
    policy.train()
    found = response_logprobs(policy, Encoded.pack(groups), batch_size=batch_size, temperature=temperature)
    assert policy.training and not found.requires_grad  # dropout, 0.5, is back on
    policy.eval()
    with torch.no_grad():
        expected = [slow_logprob(policy, x, y, temperature) for group in groups for x, y in group]
    assert found.dtype == torch.float32 and found.tolist() == pytest.approx(expected, abs=1e-4)


@settings(deadline=None, max_examples=20)
@given(lengths=mixed, batch_size=st.integers(1, 7), heads=st.integers(1, 3))
def test_scores_of_mixed_groups_are_what_the_last_token_says(policy, lengths, batch_size, heads):
    torch.manual_seed(0)
    model, groups = ScalarModel(policy, heads), rows_of(lengths)
    model.train()
    found = response_scores(model, Encoded.pack(groups), batch_size=batch_size)
    assert model.training
    model.eval()
    rows = [row for group in groups for row in group]
    for (x, y), scores in zip(rows, found, strict=True):
        torch.testing.assert_close(scores, model(torch.tensor([x + y]))[0, -1], atol=1e-5, rtol=1e-5)


def test_the_references_log_probs_are_kept_for_the_same_data_alone(policy, tmp_path):
    """Part by part, of parts without a row too; the second time no model is asked."""
    path = tmp_path / "run" / "reference.safetensors"
    first, second = rows_of([[(3, 4), (3, 2)], [(1, 1)]]), rows_of([[(2, 6)]])
    parts = Encoded.pack(first, said=[0.0, -1.0, 1.0]), Encoded.pack([]), Encoded.pack(second)
    run = beginning(path.parent)
    found = [part.clone() for part in reference_logprobs(run, policy, *parts, batch_size=2)]  # not of the file
    assert [len(part) for part in found] == [3, 0, 1]
    for part, logprobs in zip(parts, found, strict=True):
        torch.testing.assert_close(logprobs, response_logprobs(policy, part))
    for a, b in zip(found, reference_logprobs(run, None, *parts), strict=True):
        assert torch.equal(a, b)
    flipped = Encoded.pack(first, said=[0.0, -1.0, 0.0])
    for others in ((flipped, *parts[1:]), parts[:2], (parts[2], parts[1], parts[0])):
        assert "not the same rows" in message_of(reference_logprobs, run, None, *others)
    for content in (b"", path.read_bytes()[:-3], save({"logprobs": torch.zeros(4)})):
        path.write_bytes(content)
        assert "remove" in (said := message_of(reference_logprobs, run, None, *parts)) and str(path) in said
    path.unlink()
    for a, b in zip(found, reference_logprobs(run, policy, *parts, batch_size=2), strict=True):
        assert torch.equal(a, b)
    path.unlink()  # what is made anew is what counts from then on; a state that depends on the other would refuse it
    assert not any(part.any() for part in reference_logprobs(run, None, *parts))
    assert not any(part.any() for part in reference_logprobs(run, policy, *parts))


def test_dropout_is_back_on_after_an_error(policy):
    policy.train()
    with pytest.raises(KeyboardInterrupt), evaluating(policy):
        assert not policy.training
        raise KeyboardInterrupt
    assert policy.training
    policy.eval()
    with evaluating(policy):
        pass
    assert not policy.training
