"""Dropout: of the seed, the row and the place alone, however a batch is cut; and as random as it should be."""

import pytest
import torch
from small_models import random_tokens, randomise

from nanopref.data.packing import pack
from nanopref.models import dropout, language
from nanopref.models.dropout import BITS, drop, drop_pairs, fork, mix, streams
from nanopref.models.gpt2 import GPT, GPTConfig
from nanopref.models.language import Seen, attend
from nanopref.models.llama import Llama, LlamaConfig

CONFIGS = {"gpt2": GPTConfig(260, 12, 2, 2, 8, 0.3), "llama": LlamaConfig(260, 12, 2, 4, 2, 16, 32, 4, 0.3)}
LENGTHS = (12, 5, 9, 1, 7)
families = pytest.mark.parametrize("family", CONFIGS)


def new(family: str, p: float = 0.3) -> torch.nn.Module:
    config = type(CONFIGS[family])(**{**vars(CONFIGS[family]), "dropout": p})
    return randomise((GPT if family == "gpt2" else Llama)(config)).double().train()


def padded(lengths=LENGTHS) -> torch.Tensor:
    """Rows of these lengths, 0 behind them."""
    tokens = random_tokens(259, len(lengths), max(lengths)) + 1
    return tokens * (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])


def gradients(model, tokens, cuts) -> tuple[float, list[torch.Tensor]]:
    """Of the loss summed over the rows' tokens, a part of the rows at a time, each padded as it needs."""
    total = 0.0
    for part in tokens.split(cuts):
        part = part[:, : int((part > 0).sum(1).max())]
        counts = (part > 0) & (part.roll(-1, 1) > 0) & (torch.arange(part.shape[1]) < part.shape[1] - 1)
        loss = -model(part, part.roll(-1, 1), counts.double()).sum()
        loss.backward()
        total += loss.item()
    return total, [p.grad for p in model.parameters()]


def kept(x: torch.Tensor) -> torch.Tensor:
    return (x != 0).double()


# ---- whose the masks are ---------------------------------------------------------------------------------------------


@families
def test_the_same_losses_and_gradients_however_the_batch_is_cut(family):
    tokens, found = padded(), []
    for cuts in (5, [1] * 5, [2, 3], [4, 1]):
        torch.manual_seed(7)
        torch.rand(len(found))  # what was drawn before is nothing to it
        found.append(gradients(new(family), tokens, cuts))
    expected, wanted = found[0]
    for total, grads in found[1:]:
        assert total == pytest.approx(expected, rel=1e-12)
        assert all(torch.allclose(a, b, atol=1e-12, rtol=0) for a, b in zip(grads, wanted, strict=True))
    plain, _ = gradients(new(family, 0.0), tokens, 5)
    assert abs(plain - expected) > 0.1


@families
def test_a_row_says_the_same_alone_and_among_others(family):
    model, tokens = new(family), padded()
    together = model.hidden(tokens)
    for i, n in enumerate(LENGTHS):
        torch.testing.assert_close(model.hidden(tokens[i : i + 1, :n])[0], together[i, :n])
    torch.testing.assert_close(model.hidden(tokens.flip(0)).flip(0), together)
    changed = tokens.clone()
    changed[0, 6] = 3  # what comes later is nothing to what came before, and something to itself
    again = model.hidden(changed)
    torch.testing.assert_close(again[0, :6], together[0, :6])
    assert ((again - together)[0, 6:].abs().amax(-1) > 1e-3).all()


@families
def test_rows_that_share_a_prompt_say_the_same_packed(family):
    tokens, lengths = padded([12, 11, 9, 10, 12, 8]), [12, 11, 9, 10, 12, 8]
    tokens[1:3, :6], tokens[4:, :7] = tokens[0, :6], tokens[3, :7]
    packed = pack(tokens, lengths, [3, 3])
    model = new(family)
    for i, (a, b) in enumerate(zip(model.hidden(tokens), model.hidden(tokens, packed=packed), strict=True)):
        torch.testing.assert_close(a[: lengths[i]], b[: lengths[i]])


@families
def test_another_step_drops_others_and_leaves_torchs_generator_alone(family):
    model, tokens = new(family), padded()
    found = []
    for seed in (0, 1, 2**32, 2**64 - 1, 0):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(model.hidden(tokens))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found[0], found[-1])
    assert all((a - b).abs().mean() > 0.05 for i, a in enumerate(found[:-1]) for b in found[:i])


@families
def test_computed_again_the_masks_are_the_same(family):
    tokens = padded()
    counts, found = torch.ones(tokens.shape), []
    for again in (False, True):
        model = new(family)
        model.checkpoint_activations = again
        torch.manual_seed(0)
        loss = model(tokens, tokens, counts).sum()
        torch.manual_seed(1)  # the next step's
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@families
def test_compiled_the_masks_are_the_same(family):
    torch.compiler.reset()
    model, plain, graphs = new(family), new(family), []

    def note(graph, _):
        graphs.append(graph)
        return graph.forward

    for block in model.blocks:
        block.compile(backend=note, fullgraph=True, dynamic=True)
    for seed, length in ((0, 12), (1, 12), (1, 7)):
        torch.manual_seed(seed)
        tokens = padded()[:, :length]
        torch.testing.assert_close(model.hidden(tokens), plain.hidden(tokens))
    assert 1 <= len(graphs) <= 3  # all blocks and seeds share them
    torch.compiler.reset()


# ---- where it stands -------------------------------------------------------------------------------------------------


@families
def test_in_training_it_stands_on_embedding_attention_and_branches_each_with_a_mask_of_its_own(family, monkeypatch):
    model, tokens, calls, masked = new(family), padded([12] * 40), [], dropout._masked

    def see(x, p, numbers):
        calls.append((p, masked(torch.ones_like(x), p, numbers)))
        return masked(x, p, numbers)

    monkeypatch.setattr(dropout, "_masked", see)
    model.hidden(tokens)
    heads, width, layers = model.config.n_head, model.config.n_embd, model.config.n_layer
    shapes = [(40, 12, width), *[(40, heads, 12, 12), (40, 12, width), (40, 12, width)] * layers]
    assert [(p, tuple(x.shape)) for p, x in calls] == [(0.3, shape) for shape in shapes]
    for i, (_, a) in enumerate(calls):
        for _, b in calls[:i]:
            if a.shape == b.shape:  # independent: both or neither kept in 0.7² + 0.3² of the places
                assert abs((kept(a) == kept(b)).double().mean() - 0.58) < 5 * (0.25 / a.numel()) ** 0.5
    calls.clear()
    with torch.no_grad():
        model.hidden(tokens, model.new_cache(40, 12, dtype=torch.float64))  # sampling has none
        model.eval().hidden(tokens)
    new(family, 0.0).hidden(tokens)
    assert calls == []


@families
def test_without_dropout_training_is_as_it_was_to_the_bit(family, monkeypatch):
    monkeypatch.setattr(language, "_attend_to_some", None)
    tokens, plain = padded(), new(family, 0.0)
    assert torch.equal(plain.hidden(tokens), plain.eval().hidden(tokens))
    model = new(family).eval()
    assert torch.equal(plain.hidden(tokens), model.hidden(tokens))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_written_out_is_attention(dtype, masked):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, heads, 9, 6).to(dtype) for heads in (4, 2, 2))
    mask = (torch.rand(3, 1, 9, 9) < 0.6) | torch.eye(9, dtype=torch.bool) if masked else None
    rows = streams(random_tokens(260, 3, 9), torch.arange(9))
    found, expected = attend(q, k, v, Seen(mask, streams=rows), 1e-12), attend(q, k, v, Seen(mask))
    assert found.dtype == dtype and found.shape == (3, 9, 24)
    close = {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(found, expected, **close)
    values = torch.eye(9, dtype=dtype).expand(3, 2, 9, 9)  # which show the probabilities
    some, all_ = (attend(q, k, values, seen, 0.5).view(3, 9, 4, 9) for seen in (Seen(mask, streams=rows), Seen(mask)))
    torch.testing.assert_close(some, torch.where(some == 0, 0, 2 * all_), **close)
    assert 0.3 < (some[all_ > 0] == 0).double().mean() < 0.7


# ---- whether it is random --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_a_share_p_is_dropped_and_the_mean_stays(p):
    """Of everything, and of each feature, head, token and distance by itself: within 5 standard errors."""
    rows = streams(random_tokens(50, 60, 40), torch.arange(40))
    for x in (drop(torch.ones(60, 40, 64), p, rows), drop_pairs(torch.ones(60, 4, 40, 40), p, rows)):
        assert torch.equal(x.unique(), torch.tensor([0, 1 / (1 - p)]))
        for dims in (None, 0, 1, 2, -1, (0, 1), (0, 2), (0, -1), (-2, -1)):
            shares = kept(x).mean(dims)
            n = x.numel() / shares.numel()
            error = (p * (1 - p) / n) ** 0.5
            far = ((shares - (1 - p)).abs() / error).square()
            assert abs(kept(x).mean() - (1 - p)) < 5 * (p * (1 - p) / x.numel()) ** 0.5
            m = shares.numel()  # squares of m standard normals: a chi-square of m degrees
            if n > 30 and m > 1:
                assert abs(far.sum() - m) < 6 * (2 * m) ** 0.5 + 6 * (m / n / (p * (1 - p))) ** 0.5, (p, dims)
        assert x.mean() == pytest.approx(1, abs=5 * (p / (1 - p) / x.numel()) ** 0.5)


def test_neighbours_are_uncorrelated():
    """Features, tokens, heads, rows, layers and steps one and two apart, and the same places of all of them."""
    tokens = random_tokens(3, 50, 40)  # alike, as texts are
    torch.manual_seed(0)
    rows = streams(tokens, torch.arange(40))
    torch.manual_seed(1)
    after = streams(tokens, torch.arange(40))
    x = torch.stack([drop(torch.ones(50, 40, 64), 0.5, fork(s, i)) for s in (rows, after) for i in range(4)])
    pairs = torch.stack([drop_pairs(torch.ones(50, 4, 40, 40), 0.5, fork(s, i)) for s in (rows, after) for i in (0, 1)])
    for signs in (x - 1, pairs - 1):
        assert set(signs.unique().tolist()) == {-1, 1}
        for dim in range(signs.dim()):
            for lag in (1, 2, 16):
                if signs.shape[dim] > lag:
                    a, b = signs.narrow(dim, lag, signs.shape[dim] - lag), signs.narrow(dim, 0, signs.shape[dim] - lag)
                    keep = slice(3 if dim == 1 else 0, None)  # rows begin alike by chance
                    product = (a * b).movedim(2 if signs is not pairs else 3, 0)[keep]
                    assert abs(product.double().mean()) < 5 / product.numel() ** 0.5, (dim, lag)


def test_streams_differ_where_rows_do():
    tokens = padded([40] * 50)
    assert streams(tokens, torch.arange(40))[:, 3:].unique().numel() == 50 * 37  # rows begin alike by chance
    same = torch.ones(2, 40, dtype=torch.long)  # a token again and again: its place tells
    found = streams(same, torch.arange(40))
    assert torch.equal(found[0], found[1]) and found[0].unique().numel() == 40
    swapped = torch.tensor([[5, 7, 9], [7, 5, 9]])
    assert (streams(swapped, torch.arange(3))[0] != streams(swapped, torch.arange(3))[1]).all()


def test_each_bit_turns_half_of_the_others():
    x = torch.randint(2**32, (20_000,), generator=torch.Generator().manual_seed(0))
    bits = torch.arange(32)
    for i in range(32):
        turned = ((mix(x) ^ mix(x ^ (1 << i)))[:, None] >> bits & 1).double().mean(0)
        assert (turned - 0.5).abs().max() < 0.03, i
    assert mix(5) == mix(torch.tensor(5)) and 0 <= mix(x).min() and mix(x).max() <= BITS
