"""Models that are held: what they say stays the same to the last bit, and their memory is half or shared."""

import pytest
import torch
from small_models import SMALL, random_tokens, randomise

from nanopref import models
from nanopref.data.tokenizer import Tokenizer
from nanopref.models import llama
from nanopref.models.gpt2 import GPT
from nanopref.models.sampling import generate
from nanopref.models.scalar import ScalarModel
from nanopref.running import parallel
from nanopref.running.parallel import autocast

TOKENIZER = Tokenizer.train(["aaa bb, aaa bb"], SMALL.vocab_size)
UNTIED = llama.LlamaConfig(260, 12, 2, 4, 2, 16, 32, 4, tied=False)


def new(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    made = {"gpt2": lambda: GPT(SMALL), "llama": lambda: llama.Llama(UNTIED), "scalar": lambda: ScalarModel(GPT(SMALL))}
    return randomise(made[family]()).train()


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request, monkeypatch) -> str:
    monkeypatch.setattr(parallel, "_dtype", request.param)
    return request.param


def said(model, tokens) -> torch.Tensor:
    with torch.no_grad(), autocast(model):
        if isinstance(model, ScalarModel):
            return model(tokens)
        return torch.stack([model(tokens, tokens.roll(-1, 1), torch.ones(tokens.shape)), model.logits(tokens)[..., 0]])


@pytest.mark.parametrize("family", ["gpt2", "llama", "scalar"])
def test_what_a_frozen_model_says_does_not_change_by_a_bit(family, dtype):
    model, tokens = new(family), random_tokens(260, 5, 12)
    before, size = said(model, tokens), sum(p.nbytes for p in model.blocks.parameters())
    assert models.frozen(model) is model and not model.training
    assert torch.equal(said(model, tokens), before)
    assert not any(p.requires_grad for p in model.parameters())
    now = sum(p.nbytes for p in model.blocks.parameters())
    assert now < 0.6 * size if dtype == "bfloat16" else now == size
    if family == "llama":  # whose unembedding is multiplied alone; its embedding is looked up
        assert model.unembedding.dtype == getattr(torch, dtype) and model.embed_tokens.weight.dtype == torch.float32
    if family == "scalar":
        assert model.score.weight.dtype == torch.float32


def test_sampling_from_a_frozen_model_draws_the_same(dtype):
    model, answers = new("llama"), []
    for held in (model.eval(), models.frozen(models.twin(model))):
        with autocast(held):
            random = torch.Generator().manual_seed(0)
            answers.append(generate(held, [[5, 7], [9]], 8, ends={0}, generator=random))
    assert answers[0] == answers[1]


def test_a_twin_shares_what_is_frozen_and_copies_what_learns():
    model = new("gpt2")
    model.h[0].requires_grad_(False)
    copied = models.twin(model)
    for (name, p), q in zip(model.named_parameters(), copied.parameters(), strict=True):
        assert (p is q) == name.startswith("h.0.") and torch.equal(p, q) and p.requires_grad == q.requires_grad


def test_a_policy_and_its_reference_are_alike_at_first(dtype, tmp_path):
    """Ratios begin at exactly 1, whether the reference is a copy or read again."""
    policy, tokens = new("gpt2"), random_tokens(260, 5, 12)
    policy.context = 9  # as --block-size makes it
    for start in ("", str(tmp_path)):
        if start:
            models.save(policy, TOKENIZER, tmp_path)
        reference = models.reference(policy, start)
        assert torch.equal(said(policy, tokens), said(reference, tokens)) and policy.wte.weight.requires_grad
        assert reference.context == 9
        assert all(p is not q for p, q in zip(policy.parameters(), reference.parameters(), strict=True))
