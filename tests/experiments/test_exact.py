"""The optimum that the experiment holds methods against, beside sums written out; and the losses that find it."""

import json
import math
from pathlib import Path

import by_hand
import pytest
import torch

import train_ppo
from nanopref import models
from nanopref.experiments import enumerated, exact, runs
from nanopref.experiments.enumerated import RESPONSES, N, World, kl, logprobs, optimum
from nanopref.feedback import rewards
from nanopref.models.sampling import Answer
from nanopref.running import flags

BETA = 0.7


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exact") / "seed-0"
    enumerated.make_world(folder, 0)
    return folder


@pytest.fixture(scope="module")
def world(folder) -> World:
    return enumerated.make_world(folder, 0)


@pytest.fixture(scope="module")
def known(world) -> dict[str, enumerated.Case]:
    return enumerated.cases(world, BETA)


def test_every_response_is_there_once_and_has_the_models_log_prob(folder, world):
    """The token that ends it included; and together they have all the probability there is."""
    assert len({tuple(y) for y in RESPONSES}) == N == 1 + 4 + 16 + 64 + 256
    torch.testing.assert_close(world.reference.exp().sum(1), torch.ones(3, dtype=torch.float64))
    policy, tokenizer = by_hand.in_float64(folder / "init")
    for i in (0, 3, 20, 84, 85, 340):
        for k, prompt in enumerate("abc"):
            expected = by_hand.logprob(policy, tokenizer.encode(prompt), RESPONSES[i]).item()
            assert world.reference[k, i].item() == pytest.approx(expected, rel=1e-9)


def test_what_a_run_is_paid_is_the_worlds_reward(folder, world):
    policy, tokenizer = models.load(folder / "init")
    score = rewards.load([f"{folder / 'reward.py'}:score"], policy, tokenizer, train_ppo.Config())
    said = [tokenizer.decode([t for t in y if t != enumerated.END]) for y in RESPONSES]
    for k, prompt in enumerate("abc"):
        answers = [Answer([k], y, [], text, True, prompt) for y, text in zip(RESPONSES, said, strict=True)]
        torch.testing.assert_close(score(answers).double(), world.rewards[k], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beta", [0.05, 0.7, 3.0])
def test_no_policy_is_worth_more_than_beta_log_z(world, beta):
    """J(π*) = β log Z, and of any other policy J(π*) - J(π) = β KL(π‖π*)."""
    _, reference, r = world
    best = optimum(reference, r, beta)
    most = 0.0
    for p, row in zip(reference.exp().tolist(), r.tolist(), strict=True):
        most += beta * math.log(sum(p * math.exp(x / beta) for p, x in zip(p, row, strict=True))) / 3
    assert enumerated.objective(best, reference, r, beta).item() == pytest.approx(most, abs=1e-6)
    generator = torch.Generator().manual_seed(0)
    for other in (reference, torch.randn(r.shape, generator=generator, dtype=torch.float64).log_softmax(1)):
        value = enumerated.objective(other, reference, r, beta).item()
        assert most - value == pytest.approx(beta * kl(other, best), abs=1e-6) and value < most


ON_PI_STAR = ("dpo", "robust", "plackett-luce", "infonca", "binary", "regression")


def test_a_known_optimum_is_where_its_loss_has_no_slope(world, known):
    """In every direction that a policy can go; and the reference is no such place."""
    assert known.keys() == {*ON_PI_STAR, "exponential", "ipo", "kto"}
    for name, case in known.items():
        slopes = []
        for policy in (case.best, world.reference):
            values = policy.clamp(min=-200).requires_grad_()
            baseline = world.reference + case.z0
            loss = enumerated.expected_loss(case.loss, values.log_softmax(1), baseline, case.feedback, case.knobs)
            slopes.append(torch.autograd.grad(loss, values)[0].abs().max().item())
        assert slopes[0] < 1e-7 < 1e-4 < slopes[1], (name, slopes)
        assert name not in ON_PI_STAR or torch.equal(case.best, optimum(world.reference, world.rewards, BETA)), name


def test_optima_that_are_not_pi_star(world, known):
    """IPO's by Azar et al. 2023, theorem 1 and eq. 10; KTO gives nothing to what is bad more often than good."""
    _, reference, r = world
    k, i = 1, 17
    p = reference[k].exp()
    wins = [sum(p[j] * torch.sigmoid(r[k, i] - r[k, j]) for j in range(N)) for i in (i, 200)]
    log_ratios = (known["ipo"].best - reference)[k, [i, 200]]
    assert (log_ratios[0] - log_ratios[1]).item() == pytest.approx(((wins[0] - wins[1]) / BETA).item(), rel=1e-9)
    found = known["kto"].best
    assert ((found == -torch.inf) == (r <= 0)).all()
    assert kl(found, reference) == pytest.approx(known["kto"].z0, rel=1e-3)  # z₀ is its own KL


@pytest.mark.parametrize("name", ["dpo", "binary", "kto"])
def test_a_loss_is_descended_to_its_optimum(name, world):
    small = World(*(x[:1] for x in world))
    case = enumerated.cases(small, BETA)[name]
    table, _ = exact.fitted(small, case, steps=12)
    found = exact.figures_of(logprobs(table), case.best, small, BETA)
    assert found["way"] > 0.3 and 0 <= found["kl"] < (0.1 if name == "kto" else 2e-3)
    assert name == "kto" or found["off"] < 0.1


def test_rlhf_ascends_to_the_optimum(world):
    table, _ = exact.ascended(world, BETA, world.start)
    found = exact.figures_of(logprobs(table), best := optimum(world.reference, world.rewards, BETA), world, BETA)
    assert 0 <= found["kl"] < 1e-3
    assert found["J"] == pytest.approx(
        enumerated.soft_value(world.reference, world.rewards, BETA).mean().item(), abs=1e-3
    )
    still = exact.figures_of(best, best, world, BETA)
    assert still["off"] < 1e-9 and still["largest"] < 1e-9


def test_in_circles_dpo_is_rlhf_with_a_reward_model_of_the_same_pairs_alone(world):
    small = World(*(x[:1] for x in world))
    found = exact.beyond_bradley_terry(small, 1.0, 4.0)
    assert found["same"] < 2e-3 and found["even"] > 0.02 and found["own"] > 0.02
    assert 0.5 < found["wins_dpo"] < found["wins_most"] and found["to_most"] > 1e-4


def test_each_run_has_flags_that_its_script_takes_and_the_table_says_what_was_found(tmp_path, monkeypatch, capsys):
    asked = {}
    monkeypatch.setattr(runs, "launch", lambda commands, jobs: asked.update(commands))
    row = {"kl": 0.01, "way": 1.0, "J": 0.5, "off": 0.1, "largest": 0.2, "curve": [[k, 1 / k] for k in range(1, 21)]}
    monkeypatch.setattr(exact, "exact_methods", lambda world, beta: {"rlhf": row, "dpo": row, "kto": row})
    monkeypatch.setattr(exact, "at_every_beta", lambda world, betas: {"1": {"rlhf": 1e-4, "dpo": 1e-5}})
    keys = ("same", "even", "own", "wins_dpo", "wins_most", "to_most", "nats")
    monkeypatch.setattr(exact, "beyond_bradley_terry", lambda world, beta, strength: dict.fromkeys(keys, 0.25))
    exact.main(exact.Config(out=str(tmp_path), seeds=2))
    assert len(asked) == 6
    for out, (_, *words) in asked.items():
        config = flags.parse(train_ppo.Config, words)
        flags.check(config)
        assert train_ppo.resolve(config, "").init == str(out.parent / "init") and config.seed == int(
            out.parent.name[-1]
        )
    assert {"results.json", "plot.png", "table.md"} <= {path.name for path in tmp_path.iterdir()}
    assert (
        abs((best := json.loads((tmp_path / "results.json").read_text())["best"][0])["J"] - best["beta_log_Z"]) < 1e-6
    )
    table = capsys.readouterr().out
    assert "| `dpo` | π* | 1.00 | 1.0e-02 ± 0e+00 | 0.001 |" in table and "25.0%" in table
