"""Losses that are bred: expressions that can be run, and a search that ends the same whatever happens on its way."""

import hashlib
import json
import random
import subprocess
from pathlib import Path

import pytest
import torch
from small_models import message_of

import train_dpo
from kernels.reference import MARGIN_LOSSES
from nanopref.experiments import discovery, expressions, runs
from nanopref.experiments.expressions import KNOWN, as_tree, folded, formula, is_new, mutated, shape, values
from nanopref.learning import objectives
from nanopref.running import flags, functions

DPO = ("neg", ("logsigmoid", "z"))


def line_of(seed: int, n: int = 40) -> list:
    """A loss and what becomes of it, change by change."""
    rng, found = random.Random(seed), [DPO]
    for _ in range(n):
        found.append(mutated(found[-1], rng))
    return found


def test_a_seed_always_gives_the_same_changes():
    assert line_of(3) == line_of(3) != line_of(4)
    assert len({*line_of(3)}) > 20


@pytest.mark.parametrize("seed", range(6))
def test_every_expression_is_python_that_says_what_the_tree_says(seed, tmp_path):
    z = torch.linspace(-5, 5, 101, requires_grad=True)
    for n, tree in enumerate(line_of(seed)):
        assert expressions.size(tree) <= expressions.MOST and folded(tree) == tree
        assert as_tree(json.loads(json.dumps(tree))) == tree
        (tmp_path / f"e{n}.py").write_text(expressions.file_of(tree))
        if "z" in expressions.nodes(tree):
            loss = functions.load("--loss", f"{tmp_path}/e{n}.py:loss")
            torch.testing.assert_close(loss(2 * z, 0.5), values(tree, z), rtol=1e-5, atol=1e-6, equal_nan=True)
        if shape(tree) is not None:
            (slopes,) = torch.autograd.grad(values(tree, z).sum(), z)
            assert slopes.isfinite().all() and slopes.min() < 0 and slopes[50] != 0


@pytest.mark.parametrize(
    "tree, short",
    [
        (("neg", ("neg", "z")), "z"),
        (("add", ("exp", 0.0), ("add", "z", 2.0)), ("add", 3.0, "z")),
        (("mul", ("mul", "z", 2.0), ("neg", 3.0)), ("mul", -6.0, "z")),
        (("mul", 2.0, ("neg", "z")), ("mul", -2.0, "z")),
        (("neg", ("mul", 1.0, "z")), ("neg", "z")),
        (("exp", ("add", -1.0, ("add", 1.0, "z"))), ("exp", "z")),
        (("neg", ("add", 1.0, "z")), ("neg", ("add", 1.0, "z"))),
        (("tanh", ("log", ("square", 2.0))), 0.883),
    ],
)
def test_what_is_the_same_is_written_in_short(tree, short):
    assert folded(tree) == short


def test_a_formula_is_readable():
    found = [formula(tree) for tree in (DPO, *KNOWN, ("mul", -2.0, ("square", ("add", "z", ("neg", "z")))))]
    assert found == ["-log σ(z)", "max(0, 1 - z)", "exp(-z)", "(-0.5 + z)²", "-2·(z - z)²"]


def test_known_losses_are_those_of_the_table():
    h, beta = torch.linspace(-4, 4, 9, dtype=torch.float64), 0.3
    for name, tree in zip(("hinge", "exponential", "ipo"), KNOWN, strict=True):
        factor = beta**2 if name == "ipo" else 1.0
        torch.testing.assert_close(values(tree, beta * h), factor * MARGIN_LOSSES[name](h, beta, 0.0))
    config = discovery.Config(beta=0.5)
    tree = discovery.dpo_at(config, beta)
    torch.testing.assert_close(values(tree, config.beta * h), MARGIN_LOSSES["sigmoid"](h, beta, 0.0))
    assert discovery.dpo_at(config, 0.5) == DPO


@pytest.mark.parametrize(
    "tree",
    ["z", 1.0, ("exp", "z"), ("log", "z"), ("square", "z"), ("exp", ("exp", ("mul", -2.0, "z"))), ("relu", -1.0)],
    ids=formula,
)
def test_what_is_no_loss_gets_no_run(tree):
    """Rising, constant, not finite, flat where a run begins."""
    assert shape(tree) is None and not is_new(tree, [])


def test_the_same_up_to_a_factor_and_a_constant_is_not_new():
    assert is_new(DPO, []) and is_new(DPO, [*KNOWN]) and is_new(("neg", ("logsigmoid", ("mul", 2.0, "z"))), [DPO])
    alike = ("softplus", ("neg", "z")), ("add", 7.0, ("mul", 3.0, DPO)), ("mul", 0.1, DPO), DPO
    assert not any(is_new(tree, [*KNOWN, DPO]) for tree in alike)
    assert is_new(("mul", -1.0, ("exp", "z")), [("exp", ("neg", "z"))])  # a factor below 0 is another loss


# ---- the search ------------------------------------------------------------------------------------------------------


def figures_of(words: list[str]) -> dict:
    """Of a run that is not made: by chance, but always the same of a loss on a seed."""
    loss, beta, seed = (words[words.index(f"--{name}") + 1] for name in ("loss", "beta", "seed"))
    text = functions.file_of(loss).read_text() if flags.is_code(loss) else loss
    chance = random.Random(hashlib.sha256(f"{text} {beta} {seed}".encode()).hexdigest())
    true = {"policy": chance.random(), "reference": 0.0, "reference_std": 1.0, "win_rate": 0.5}
    return {"true_reward": true, "kl": 3 * chance.random(), "response_length": {"policy": 30}, "ended": {"policy": 1.0}}


@pytest.fixture
def fake(monkeypatch):
    """Runs that leave a report and nothing else; each that was started is noted."""
    started, state = [], {"failing": (), "stop": None}

    def run(command, *, stdout, **_):
        out = Path(command[command.index("--out") + 1])
        if len(started) == state["stop"]:
            raise KeyboardInterrupt
        started.append(f"{out.parent.parent.name}/{out.parent.name}/{out.name}")
        if out.name in state["failing"]:
            stdout.write("error: loss became nan after step 3\n")
            return
        out.mkdir(parents=True, exist_ok=True)
        found = {} if command[1] == "-m" else figures_of(command[2:])
        (out / "report.json").write_text(json.dumps(found))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(runs, "sampled", lambda *_: Path("none.jsonl"))
    monkeypatch.setattr(runs, "read_rows", lambda path: [])
    return started, state


SMALL = {"candidates": 11, "generation": 4, "seeds": 2, "best": 2, "jobs": 1}


def ended(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def bred_in(out: Path) -> dict:
    return {path.stem: path.read_text() for path in out.glob("candidates/*.py")}


def test_a_search_that_is_stopped_goes_on_with_the_same_losses(fake, tmp_path, no_picture):
    """Wherever it was; and runs that are done are not made again."""
    started, state = fake
    discovery.main(discovery.Config(out=str(tmp_path / "whole"), **SMALL))
    made = len(started)
    assert made == len({*started}) == 1 + 10 + 11 + 2 * (1 + 4)
    config = discovery.Config(out=str(tmp_path / "stopped"), **SMALL)
    for stop in (3, 14, 15, 20, 25):
        started.clear()
        before = sum(1 for _ in (tmp_path / "stopped").rglob("report.json"))
        state["stop"] = stop - before
        with pytest.raises(KeyboardInterrupt):
            discovery.main(config)
        assert sum(1 for _ in (tmp_path / "stopped").rglob("report.json")) == stop
    started.clear()
    state["stop"] = None
    discovery.main(config)
    assert len(started) == made - 25
    assert ended(tmp_path / "stopped") == ended(tmp_path / "whole")
    assert bred_in(tmp_path / "stopped") == bred_in(tmp_path / "whole")
    assert len(bred_in(tmp_path / "whole")) == 11
    discovery.main(discovery.Config(out=str(tmp_path / "other"), search_seed=1, **SMALL))
    assert bred_in(tmp_path / "other") != bred_in(tmp_path / "whole")


def test_the_script_takes_what_is_asked_for(fake, tmp_path, monkeypatch, no_picture):
    """DPO at a β, and a loss that was bred, which it finds to be one."""
    asked, ordinary = {}, runs.launch
    monkeypatch.setattr(runs, "launch", lambda commands, jobs: asked.update(commands) or ordinary(commands, jobs))
    discovery.main(discovery.Config(out=str(tmp_path), beta=0.7, **SMALL))
    for name, loss, beta in (
        ("dpo 0.3", "dpo", 0.3),
        ("g02-2", f"{tmp_path}/candidates/g02-2.py:loss", 0.7),
    ):
        config = flags.parse(train_dpo.Config, asked[tmp_path / "seed-0" / name][1:])
        config = objectives.resolve(flags.resolve(config), objectives.named(config.loss))
        assert (config.loss, config.beta, config.eval_prompts, config.seed) == (loss, beta, 128, 0)
        assert config.init == f"{tmp_path}/seed-0/sft" and config.judged == f"{tmp_path}/seed-0/{name}.jsonl"
    assert all("512" in words for out, words in asked.items() if "fresh" in str(out) and out.name != "sft")


def test_more_candidates_can_be_asked_for(fake, tmp_path, no_picture):
    started, _ = fake
    discovery.main(discovery.Config(out=str(tmp_path), **SMALL))
    before, n = bred_in(tmp_path), len(started)
    discovery.main(discovery.Config(out=str(tmp_path), **SMALL | {"candidates": 15}))
    after = bred_in(tmp_path)
    assert len(after) == 15 and before.items() <= after.items() and n + 4 <= len(started) <= n + 4 + 2 * 2
    assert {path.split("/")[2] for path in started[n:] if "seed-0" in path} == after.keys() - before.keys()


def test_a_loss_whose_run_fails_is_told_of_and_has_no_children(fake, tmp_path, capsys, no_picture):
    _, state = fake
    state["failing"] = ("g00-0", "g01-2")
    discovery.main(discovery.Config(out=str(tmp_path), **SMALL))
    found = ended(tmp_path)
    assert [x["name"] for x in found["candidates"] if "fitness" not in x] == ["g00-0", "g01-2"]
    assert len(found["candidates"]) == 11 and not {"g00-0", "g01-2"} & found["fresh"].keys()
    said = capsys.readouterr().out
    assert "seed-0/g00-0 failed (error: loss became nan after step 3)" in said
    assert "Of 11 losses tried, 2 failed." in said


def test_without_a_run_of_dpo_there_is_nothing_to_compare_with(fake, tmp_path):
    _, state = fake
    state["failing"] = [f"dpo {beta:g}" for beta in discovery.BETAS]
    config = discovery.Config(out=str(tmp_path), **SMALL)
    assert "every run of DPO failed there" in message_of(discovery.main, config)


def test_the_best_meet_dpo_and_discopop_at_their_best(fake, tmp_path, no_picture):
    """By gain less the price of KL; the best are no relatives in shape."""
    discovery.main(discovery.Config(out=str(tmp_path), kl_price=0.2, **SMALL))
    found = ended(tmp_path)
    rows = {x["name"]: x for x in found["candidates"]} | found["derived"]
    assert all(x["fitness"] == pytest.approx(x["gain"] - 0.2 * x["kl"]) for x in rows.values())
    first, second, *best = found["fresh"]
    for loss, name in (("dpo", first), ("discopop", second)):
        assert rows[name]["fitness"] == max(x["fitness"] for x in found["derived"].values() if x["loss"] == loss)
    assert rows[best[0]]["fitness"] >= rows[best[1]]["fitness"] and all(len(x) == 2 for x in found["fresh"].values())
    a, b = (shape(as_tree(rows[name]["tree"])) for name in best)
    assert (a - b).abs().max() > 0.15
    others = [x for x in found["candidates"] if x["fitness"] > rows[best[0]]["fitness"]]
    near = [shape(discovery.dpo_at(discovery.Config(), beta)) for beta in discovery.BETAS]
    assert all(min((shape(as_tree(x["tree"])) - y).abs().max() for y in near) <= 0.15 for x in others)


def test_parents_are_the_better_ones(monkeypatch):
    """None is beyond the survivors, none has failed, and of the survivors those ahead have more children."""
    asked = []
    monkeypatch.setattr(expressions, "mutated", lambda tree, rng: asked.append(tree) or ("neg", tree))
    monkeypatch.setattr(expressions, "is_new", lambda *_: True)
    known = [{"tree": float(i), "fitness": float(i)} for i in range(30)] + [{"tree": 99.0}]
    discovery.bred(known, 300, random.Random(0))
    places = [tree for tree in asked if isinstance(tree, float)]
    assert len(places) == 300 < len(asked) and min(places) >= 10 and max(places) == 29
    assert 22 < sum(places) / 300 < 26.5  # the best of three of the places 10 to 29: 24.25


def test_what_was_found_is_drawn_again_without_a_run(fake, tmp_path):
    started, state = fake
    state["failing"] = ("g00-1",)
    discovery.main(discovery.Config(out=str(tmp_path), **SMALL))
    before, n = (tmp_path / "table.md").read_text(), len(started)
    (tmp_path / "table.md").unlink(), (tmp_path / "plot.png").unlink()
    discovery.main(discovery.Config(out=str(tmp_path), redraw=True, **SMALL))
    assert (tmp_path / "table.md").read_text() == before and (tmp_path / "plot.png").exists() and len(started) == n
    lines = before.splitlines()
    assert len(lines) == 2 + 4 + 2 and lines[2].startswith("| DPO |") and "` | 0.5 | " in lines[4] and "±" in lines[5]
