"""Every named objective on a real policy against its paper's formula, of log-probs of one answer at a time, in float64.

And that it does not matter how a batch is cut: into micro-batches, over processes. KTO's reference point is that of the
whole batch. Heads of a reward model learn apart.
"""

import copy
import random
from types import SimpleNamespace
from typing import NamedTuple

import by_hand
import pytest
import torch
from paper_formulas import ALONE, CHANGED, GROUPS, KINDS, PAIRS, Answer, logistic, reward, shares
from torch import Tensor

import train_dpo
import train_rm
from nanopref.data.groups import Encoded, Group, as_labels, encode, grouped, micro_batches, unrelated
from nanopref.learning import objectives
from nanopref.learning.objectives import OBJECTIVES, SCORES, Knobs
from nanopref.models.scalar import ScalarModel
from nanopref.running import parallel


class Case(NamedTuple):
    """Seven groups of one kind, and what is known of each of their answers by hand."""

    groups: list[Group]
    rows: Encoded
    answers: list[list[Answer]]
    strangers: list[Answer]  # to each prompt the answer of another group


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """With more, tensors this small wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """In float64, and its tokenizer."""
    return by_hand.in_float64(by_hand.tiny_model(tmp_path_factory.mktemp("policy")))


@pytest.fixture(scope="module")
def cases(policy) -> dict[str, Case]:
    model, tokenizer = policy
    rng = random.Random(2)

    def group(k: int, *rest) -> Group:
        return Group(by_hand.text(rng, 1, 6), tuple(by_hand.text(rng, 1, 9) for _ in range(k)), *rest)

    ratings = [sorted((rng.randint(-8, 8) / 4 for _ in range(k)), reverse=True) for k in (2, 4, 3, 4, 2, 3, 4)]
    kinds = {
        "pairs": [group(2, margin) for margin in (1.0, -0.5, 2.25, 0.0, 1.0, -1.5, 0.75)],
        "rankings": [group(k) for k in (2, 3, 4, 2, 4, 4, 3)],
        "ratings": [group(len(scores), 1.0, tuple(scores)) for scores in ratings],
        "labels": [*as_labels([group(2) for _ in range(3)]), group(1, 1.0, (0.0,))],
    }
    return {kind: case(model, tokenizer, groups) for kind, groups in kinds.items()}


def case(model, tokenizer, groups: list[Group]) -> Case:
    draw = torch.Generator().manual_seed(4)

    def answer(prompt: str, text: str, said: float) -> Answer:
        y = [*tokenizer.encode(text), tokenizer.end_of_text]
        p = by_hand.logprob(model, tokenizer.encode(prompt), y)
        return Answer(p, p.item() + 3 * torch.randn((), dtype=torch.float64, generator=draw), len(y), said)

    answers = [
        [
            answer(group.prompt, text, group.scores[k] if group.scores else -1e30 * k)
            for k, text in enumerate(group.responses)
        ]
        for group in groups
    ]
    others = unrelated(groups) if len(groups[0].responses) == 1 else []
    strangers = [answer(group.prompt, group.responses[0], 0.0) for group in others]
    apart = (4.0, -2.0, 3.0, -1.5, 2.5, -3.0, 5.0)  # of which some are below 0 and the mean is not
    strangers = [y._replace(q=y.p.detach() - nats) for y, nats in zip(strangers, apart, strict=False)]
    assert all(a.prompt == b.prompt and a.responses != b.responses for a, b in zip(groups, others, strict=False))
    rows, notes = encode(groups, tokenizer, 48)
    assert not notes
    return Case(groups, rows, answers, strangers)


def settings(name: str, groups: list[Group], **flags):
    config = objectives.resolve(train_dpo.Config(loss=name, data="some", **flags), OBJECTIVES[name])
    return config, objectives.knobs(config, groups)


def part(name: str, rows: Encoded, answers: list[Answer]) -> train_dpo.Part:
    """With the baselines as train_dpo.py makes them: none, log π_ref, or its mean over tokens."""
    q = [0.0 * y.q if name in ALONE else y.q / y.n if name == "ipo-mean" else y.q for y in answers]
    return train_dpo.Part(rows, torch.stack(q))


def processes(monkeypatch, call, n: int) -> list:
    """What `call` returns on each of n processes, which take turns: `sum_processes` adds up what all of them gave."""
    given: list[list[Tensor]] = [[] for _ in range(n)]
    for finished in (False, True):
        found = []
        for rank in range(n):
            calls = iter(range(99))

            def total(x, rank=rank, calls=calls, finished=finished):
                i = next(calls)
                if not finished:
                    given[rank].append(x.clone())
                return sum(x[i] for x in given) if finished else x

            monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
            monkeypatch.setattr(parallel, "world_size", lambda: n)
            monkeypatch.setattr(parallel, "sum_processes", total)
            found.append(call())
        if n == 1:
            break
    monkeypatch.undo()
    return found


def step(monkeypatch, model, data, z0: Tensor, config, knobs, size: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """As a step of train_dpo.py on all groups: losses in order, summed figures and the gradient."""
    G, losses, totals = len(data.rows), [], torch.zeros(7)
    model.zero_grad()
    for rank in range(n):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(parallel, "world_size", lambda: n)
        for piece in micro_batches(range(G), data.rows.lengths(), size, share=True):
            found, sums = train_dpo.preference_losses(model, data, z0, piece, config, knobs)
            losses += zip(piece, found.detach(), strict=True)
            totals += sums
            (found.sum() / G).backward()
    monkeypatch.undo()
    assert sorted(g for g, _ in losses) == list(range(G))
    return torch.stack([loss for _, loss in sorted(losses)]), totals, gradient(model)


def gradient(model) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_every_objective_has_a_formula_here():
    assert OBJECTIVES.keys() == {*PAIRS, *GROUPS}


@pytest.mark.parametrize("flags", ["published", "changed"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_figures_and_gradients_are_those_of_the_paper_however_a_batch_is_cut(
    name, flags, policy, cases, monkeypatch
):
    """Micro-batches of one, three and all; the shares of two processes; the flags as published and all of them off."""
    model, found = policy[0], cases[KINDS.get(name, "pairs")]
    published, formula = PAIRS.get(name) or GROUPS[name]
    changed = {flag: CHANGED[flag] for flag in published} if flags == "changed" else {}
    c, (config, knobs) = SimpleNamespace(**published | changed), settings(name, found.groups, **changed)
    data, z0 = part(name, found.rows, [y for ys in found.answers for y in ys]), torch.tensor(0.0)
    if name == "kto":
        strangers = part(name, encode(unrelated(found.groups), policy[1], 48)[0], found.strangers)
        z0 = train_dpo.reference_point(model, strangers, range(7), config)
        assert z0 > 0.1
    losses = torch.stack(
        [
            formula(*ys, group.margin, c) if name in PAIRS else formula(ys, c, z0)
            for ys, group in zip(found.answers, found.groups, strict=True)
        ]
    )
    slopes = torch.autograd.grad(losses.sum() / 7, list(model.parameters()), retain_graph=True)
    expected = torch.cat([g.flatten() for g in slopes])
    rewards = [[reward(name, y, c, z0).item() for y in ys] for ys in found.answers]
    assert losses.min() < losses.max() and expected.norm() > 1e-3
    for size, n in ((1, 1), (3, 1), (7, 1), (3, 2)) if flags == "published" else ((3, 1),):
        got, sums, slope = step(monkeypatch, model, data, z0, config, knobs, size, n)
        torch.testing.assert_close(got, losses.detach(), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())
        assert sums.tolist() == pytest.approx(figures(losses, rewards, found.answers), rel=1e-5, abs=1e-5)


def figures(losses: Tensor, rewards: list[list[float]], answers: list[list[Answer]]) -> list[float]:
    right, best, worst = 0.0, [], []  # here every group says what is right
    for r, ys in zip(rewards, answers, strict=True):
        if len(ys) == 1:
            right += r[0] > 0 if ys[0].said else r[0] < 0
            (best if ys[0].said else worst).append(r[0])
            continue
        pairs = [(r[i], r[j]) for i in range(len(ys)) for j in range(len(ys)) if ys[i].said > ys[j].said]
        right += sum(a > b for a, b in pairs) / len(pairs) if pairs else 0.0
        best.append(r[0])
        worst.append(r[-1])
    return [losses.sum().item(), right, sum(best), sum(worst), len(best), len(worst), len(answers)]


# ---- KTO's reference point -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, n", [(1, 1), (3, 1), (7, 1), (2, 2), (7, 2)])
@pytest.mark.parametrize("shift", [0.0, 20.0], ids=["above 0", "clamped"])
def test_the_reference_point_is_of_the_whole_batch(size, n, shift, policy, cases, monkeypatch):
    """max(0, mean over the batch of log π_θ(y'|x)/π_ref(y'|x)) (Ethayarajh et al. 2024, section 4.1): not of a
    micro-batch or of a process, some of which are below 0 here; without a gradient, which is not taken through it."""
    model, tokenizer = policy
    labels = cases["labels"]
    rows, batch = encode(unrelated(labels.groups), tokenizer, 48)[0], [5, 0, 3, 6, 1]
    y = [y._replace(q=y.q + shift) for y in labels.strangers]
    ratios = torch.stack([a.p - a.q for a in y]).detach()
    config, _ = settings("kto", labels.groups, micro_batch=size)
    strangers = part("kto", rows, y)
    found = processes(monkeypatch, lambda: train_dpo.reference_point(model, strangers, batch, config), n)
    expected = max(0.0, ratios[batch].mean().item())
    assert [z0.item() for z0 in found] == pytest.approx([expected] * n, rel=1e-6)
    assert not any(z0.requires_grad for z0 in found)
    apart = [ratios[piece].mean().clamp(min=0) for piece in micro_batches(batch, rows.lengths(), 2)]
    assert shift or (min(apart) == 0 and abs(torch.stack(apart).mean() - expected) > 0.1 and expected > 0.1)


def test_objectives_without_strangers_have_no_reference_point(policy, cases):
    config, _ = settings("binary", cases["labels"].groups)
    nobody = train_dpo.Part(encode([], policy[1], 48)[0], torch.zeros(0))
    assert train_dpo.reference_point(policy[0], nobody, [1, 2], config) == 0


def test_the_reference_point_is_a_mean_over_what_the_value_is(policy, cases):
    """With --logprobs mean it is nats a token that rewards are counted in, and so is z₀."""
    labels = cases["labels"]
    config, _ = settings("kto", labels.groups, logprobs="mean")
    q = torch.stack([y.q / y.n for y in labels.strangers])
    strangers = train_dpo.Part(encode(unrelated(labels.groups), policy[1], 48)[0], q)
    z0 = train_dpo.reference_point(policy[0], strangers, range(7), config)
    expected = sum((y.p - y.q).item() / y.n for y in labels.strangers) / 7
    assert z0.item() == pytest.approx(max(0.0, expected), rel=1e-6)


# ---- looks at the held-out part --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2])
def test_held_out_metrics_are_means_over_the_first_groups(n, policy, cases, monkeypatch):
    pairs = cases["pairs"]
    config, knobs = settings("simpo", pairs.groups, micro_batch=2)
    data = part("simpo", pairs.rows, [y for ys in pairs.answers for y in ys])
    losses, rewards = [], []
    for ys, group in list(zip(pairs.answers, pairs.groups, strict=True))[:5]:
        losses.append(PAIRS["simpo"][1](*ys, group.margin, SimpleNamespace(beta=2.0, margin=1.0)).item())
        rewards.append([2.0 * y.p.item() / y.n for y in ys])
    expected = {
        "held_out_loss": sum(losses) / 5,
        "held_out_accuracy": sum(w > r for w, r in rewards) / 5,
        "held_out_margin": sum(w - r for w, r in rewards) / 5,
    }

    def look():
        return train_dpo.held_out_metrics(policy[0], data, torch.tensor(0.0), 5, config, knobs)

    for found in processes(monkeypatch, look, n):
        assert found == pytest.approx(expected, rel=1e-5)


# ---- reward models ---------------------------------------------------------------------------------------------------

SCORE_FORMULAS = {  # of the scores r [K] of one head, margins m and what was said s; for α = 2, weights 0.6 and 1.5
    "bradley-terry": lambda r, m, s: logistic(r[0] - r[1] - m[0]),  # Touvron et al. 2023, eq. 2
    "plackett-luce": lambda r, m, s: -sum(torch.log(shares(r[k:])[0]) for k in range(len(r))),
    "regression": lambda r, m, s: ((r - s) ** 2).sum() / len(r),
    "binary": lambda r, m, s: 0.6 * logistic(r[0]) if s[0] == 1 else 1.5 * logistic(-r[0]),
    "infonca": lambda r, m, s: -(shares(s / 2) * torch.log(shares(r))).sum(),
    "nca": lambda r, m, s: (shares(s / 2) * logistic(r) + logistic(-r) / len(r)).sum(),
}


def test_every_loss_of_scores_has_a_formula_here():
    assert SCORES.keys() == SCORE_FORMULAS.keys()


@pytest.mark.parametrize("name", SCORES)
def test_each_head_has_the_loss_that_it_would_have_alone(name, cases):
    """Of four groups and three heads; what is asked for as a margin is off the scores."""
    kind = {"bradley-terry": "pairs", "binary": "labels"}.get(name) or KINDS[name]
    batch = cases[kind].rows.collate([2, 0, 5, 1])
    draw = torch.Generator().manual_seed(0)
    flat = torch.randn(sum(batch.sizes), 3, dtype=torch.float64, generator=draw)
    (scores, there), margins, s = (
        grouped(flat, batch.sizes),
        grouped(batch.margins, batch.sizes)[0] * (name == "bradley-terry"),
        grouped(batch.said, batch.sizes)[0],
    )
    scores, knobs = scores.requires_grad_(), Knobs(1.0, 0.0, 2.0, 0.6, 1.5)
    found = train_rm.by_head(scores, margins, there, s, name, knobs)
    for h in range(3):
        alone = train_rm.by_head(scores[..., h : h + 1], margins, there, s, name, knobs)[:, 0]
        expected = torch.stack(
            [
                SCORE_FORMULAS[name](scores[g, :k, h], margins[g, :k], s[g, :k].double())
                for g, k in enumerate(batch.sizes)
            ]
        )
        torch.testing.assert_close(found[:, h], expected, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(alone, expected, rtol=1e-6, atol=1e-9)
        (slopes,) = torch.autograd.grad(found[:, h].sum(), scores, retain_graph=True)
        assert (slopes[..., h][there] != 0).any() and (slopes.sum(2) == slopes[..., h]).all()


@pytest.mark.parametrize("n", [1, 2])
def test_held_out_metrics_are_of_the_heads_mean_and_without_margins(n, policy, cases, monkeypatch):
    model, tokenizer = policy
    judge, pairs = by_hand.lively(ScalarModel(copy.deepcopy(model), 2), 3).double(), cases["pairs"]
    config = train_rm.Config(loss="bradley-terry", data="some", margin=0.7, micro_batch=2)
    config = objectives.resolve(config, SCORES["bradley-terry"])
    ahead = []
    for group in pairs.groups[:5]:
        scores = []
        for text in group.responses:
            row = torch.tensor([[*tokenizer.encode(group.prompt), *tokenizer.encode(text), tokenizer.end_of_text]])
            hidden = judge.transformer.hidden(row)[0, -1]
            scores.append((judge.score.weight @ hidden).mean())
        ahead.append(scores[0] - scores[1])
    ahead = torch.stack(ahead)
    expected = {"held_out_loss": logistic(ahead).mean().item(), "held_out_accuracy": (ahead > 0).sum().item() / 5}

    def look():
        return train_rm.held_out_metrics(judge, pairs.rows, 5, config, objectives.knobs(config, []))

    for found in processes(monkeypatch, look, n):
        assert found == pytest.approx(expected, rel=1e-5)
