"""Which rows make a step, schedules, what decays."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanopref.models.gpt2 import GPT, GPTConfig
from nanopref.running import optim


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 30), st.integers(0, 30), st.integers(0, 5))
def test_batches_are_always_full_resume_where_they_stopped_and_see_all_rows_equally_often(n, size, steps, start, seed):
    whole = list(optim.batches(n, size, steps, seed))
    assert [step for step, _ in whole] == list(range(steps)) and all(len(rows) == size for _, rows in whole)
    assert list(optim.batches(n, size, steps, seed, start)) == whole[start:]
    drawn = [row for _, rows in whole for row in rows]
    for begin in range(0, len(drawn) - n + 1, n):  # each epoch is a permutation, wherever batches begin and end
        assert Counter(drawn[begin : begin + n]) == Counter(range(n))
    assert len(set(drawn[len(drawn) // n * n :])) == len(drawn) % n


def test_epochs_and_seeds_differ():
    first, second = (rows for _, rows in optim.batches(100, 100, 2, 0))
    (other,) = (rows for _, rows in optim.batches(100, 100, 1, 1))
    assert first != second and first != other


def test_only_whole_batches_are_steps():
    assert [optim.steps_of(n, 64, 2) for n in (129, 128, 127, 64, 20)] == [4, 4, 3, 2, 1]


def test_a_batch_larger_than_the_data_is_cut_and_said(capsys):
    assert optim.batch_size(64, 64) == 64 and capsys.readouterr().out == ""
    assert optim.batch_size(64, 9) == 9 and "batches of 9 and not 64" in capsys.readouterr().out


def test_the_schedule_warms_up_to_each_groups_peak_and_falls_to_0():
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "peak": peak} for peak in (1.0, 3.0)]
    optimizer = torch.optim.SGD(groups, lr=9.0)
    rates = []
    for step in range(100):
        last = optim.set_lr(optimizer, step, 100, 10)
        rates.append([group["lr"] for group in optimizer.param_groups])
        assert last == rates[-1][1] == pytest.approx(3 * rates[-1][0])
    first = [rate for rate, _ in rates]
    assert first[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert first[10] == 1.0 and first[55] == pytest.approx(0.5) and first[99] == pytest.approx(1 / 90)


@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_orthogonalised_keeps_the_singular_vectors_and_brings_the_values_to_about_1(n, a, b, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, a, b, generator=g, dtype=torch.float64)
    U, S, V = torch.linalg.svd(x, full_matrices=False)
    values = torch.einsum("nia,nij,nja->na", U, optim.orthogonalised(x), V.mT)
    there = S > 0.04 * S.norm(dim=1, keepdim=True)  # four steps bring up what is not much smaller than the largest
    assert ((values - 1).abs() < 0.35)[there].all()
    torch.testing.assert_close(optim.orthogonalised(x), U @ (values[:, :, None] * V), atol=1e-9, rtol=0)


def test_a_step_of_muon_by_hand():
    """Nesterov's momentum, decoupled decay, and a step whose size depends on the shape alone."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(6, 3))
    expected, momentum = p.detach().clone(), torch.zeros(6, 3)
    optimizer = optim.Muon([p], lr=0.1, weight_decay=0.5, momentum=0.8)
    for _ in range(3):
        p.grad = torch.randn(6, 3)
        momentum = 0.8 * momentum + 0.2 * p.grad
        direction = optim.orthogonalised((0.2 * p.grad + 0.8 * momentum)[None])[0]
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 6**0.5 * direction
        optimizer.step()
    torch.testing.assert_close(p.detach(), expected)
    assert (p - expected).abs().max() < 1e-6 and direction.norm() > 1


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest():
    model = GPT(GPTConfig(11, 8, 2, 2, 8))
    both = optim.muon(model, 1e-3, 0.1)
    matrices, decayed, plain = (group["params"] for group in both.param_groups)
    assert {p.shape for p in matrices} == {(24, 8), (8, 8), (32, 8), (8, 32)} and len(matrices) == 8
    assert [p.shape for p in decayed] == [(11, 8), (8, 8)] and all(p.dim() == 1 for p in plain)
    everything = [*matrices, *decayed, *plain]
    assert {id(p) for p in everything} == {id(p) for p in model.parameters()}
    assert len(everything) == len(list(model.parameters()))
    assert [group["peak"] for group in both.param_groups] == pytest.approx([2e-3, 1e-3, 1e-3])


@given(st.integers(20, 90), st.integers(1, 5), st.integers(0, 40), st.integers(0, 40))
def test_batches_of_rows_alike_resume_and_see_all_rows_too(n, size, steps, start):
    lengths = [(7 * i) % 13 for i in range(n)]
    whole = list(optim.batches(n, size, steps, 0, lengths=lengths))
    assert [step for step, _ in whole] == list(range(steps)) and all(len(rows) == size for _, rows in whole)
    assert list(optim.batches(n, size, steps, 0, start, lengths)) == whole[start:]
    bucket = size * optim.BUCKET
    plain = [row for _, rows in optim.batches(n, size, steps, 0) for row in rows]
    for begin in range(0, steps // optim.BUCKET * bucket, bucket):  # the same rows, cut otherwise
        rows = [row for _, batch in whole[begin // size : (begin + bucket) // size] for row in batch]
        assert Counter(rows) == Counter(plain[begin : begin + bucket])


def test_batches_of_rows_alike_hold_little_padding():
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 100, (1000,), generator=g).tolist()

    def padding(**more):
        batches = [[lengths[i] for i in rows] for _, rows in optim.batches(1000, 16, 62, 0, **more)]
        return 1 - sum(map(sum, batches)) / sum(16 * max(batch) for batch in batches)

    assert padding() > 0.4 and padding(lengths=lengths) < 0.12


def test_adamw_decays_matrices_only():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    groups = optim.adamw(model, 1e-3, 0.1).param_groups
    assert {tuple(p.shape) for p in groups[0]["params"]} == {(3, 3)} and groups[0]["weight_decay"] == 0.1
    assert {tuple(p.shape) for p in groups[1]["params"]} == {(3,)} and groups[1]["weight_decay"] == 0.0


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_what_is_frozen_is_left_out(name):
    model = GPT(GPTConfig(11, 8, 2, 2, 16))
    model.h[0].requires_grad_(False)
    optimizer = optim.OPTIMIZERS[name](model, 1e-3, 0.1)
    there = {p for group in optimizer.param_groups for p in group["params"]}
    assert there == set(optim.learning(model)) == set(model.parameters()) - set(model.h[0].parameters())


def test_adafactors_steps_are_as_long_as_adamws_and_it_holds_next_to_nothing():
    """Whatever the size of a weight: the elements of a step are a third of the learning rate, and it decays by it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.Linear(48, 32))
    model[0].weight.data *= 10
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = optim.adafactor(model, 1e-3, 0.5)
    assert optim.set_lr(optimizer, 0, 10, 1) > 0
    for p in model.parameters():
        p.grad = torch.randn(p.shape)
    optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        moved = p.detach() - old * (1 - 1e-3 * 0.5 * (p.dim() >= 2))
        assert moved.square().mean().sqrt() == pytest.approx(1e-3 / 3, rel=0.1)
    held = sum(x.numel() for s in optimizer.state.values() for x in s.values() if torch.is_tensor(x))
    assert held < 0.1 * sum(p.numel() for p in model.parameters())
