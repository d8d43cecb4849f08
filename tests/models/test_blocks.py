"""Blocks that are computed again, or compiled: the same log-probs, the same gradients, the same answers."""

import pytest
import torch
from small_models import SMALL, random_tokens, randomise
from torch import nn

from nanopref import models
from nanopref.models import llama
from nanopref.models.gpt2 import GPT
from nanopref.models.sampling import generate
from nanopref.running import optim, parallel
from nanopref.running.flags import ModelFlags
from nanopref.running.parallel import autocast

CONFIGS = {"gpt2": SMALL, "llama": llama.LlamaConfig(260, 12, 2, 4, 2, 16, 32, 4)}


def new(family: str, **flags) -> torch.nn.Module:
    torch.manual_seed(0)
    model = randomise(GPT(CONFIGS[family]) if family == "gpt2" else llama.Llama(CONFIGS[family]))
    config = ModelFlags(**flags)
    config.seed = 0
    models.set_up(model, config)
    return model


def gradients(model, tokens) -> tuple[torch.Tensor, list[torch.Tensor]]:
    with autocast(model):
        logprobs = model(tokens, tokens.roll(-1, 1), torch.ones(tokens.shape))
    logprobs.sum().backward()
    return logprobs.detach(), [p.grad for p in optim.learning(model)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("family", CONFIGS)
def test_computed_again_the_gradients_are_the_same(family, rank, dtype, monkeypatch):
    monkeypatch.setattr(parallel, "_dtype", dtype)
    tokens, calls = random_tokens(260, 3, 12), []
    expected, wanted = gradients(new(family, lora=rank), tokens)
    model = new(family, lora=rank, checkpoint_activations=True)
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    found, got = gradients(model, tokens)
    assert torch.equal(found, expected) and len(calls) == 2  # forward, and again in the backward pass
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    with torch.no_grad(), autocast(model):
        model.hidden(tokens)
    assert len(calls) == 3  # without gradient there is nothing to compute again


@pytest.fixture
def traced(monkeypatch) -> list[torch.fx.GraphModule]:
    """Compiling stops at the graphs, which are run as they are: whole ones, or it fails."""
    graphs, ordinary = [], nn.Module.compile

    def note(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", lambda m, **how: ordinary(m, backend=note, fullgraph=True, **how))
    torch.compiler.reset()
    yield graphs
    torch.compiler.reset()


@pytest.mark.parametrize("family", CONFIGS)
def test_compiled_blocks_say_the_same_at_any_length_from_few_graphs(family, traced):
    model, plain = new(family, compile=True), new(family)
    for length in (12, 7, 9, 5):
        tokens = random_tokens(260, 3, length)
        (found, got), (expected, wanted) = gradients(model, tokens), gradients(plain, tokens)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(got, wanted, strict=True))
    assert 1 <= len(traced) <= 3  # all blocks and lengths share them
    before = len(traced)
    answers = [generate(m, [[5, 7], [9]], 8, ends={0}, temperature=0) for m in (model, plain)]
    assert [a.tokens for a in answers[0]] == [a.tokens for a in answers[1]] and len(traced) == before
