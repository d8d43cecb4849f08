"""What is done to feedback before it is learnt from, and how many runs become a table."""

import json
import random
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

import train_dpo
from nanopref.data.formats import read
from nanopref.experiments import flips, imbalance, losses, rankings, runs
from nanopref.learning.objectives import OBJECTIVES
from nanopref.running import flags
from nanopref.running.flags import UserError

PAIRS = [{"prompt": f"p{i}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(200)]
RANKINGS = [{"prompt": f"p{i}", "responses": [f"{place}{i}" for place in "abcd"]} for i in range(50)]


def test_the_share_that_was_asked_for_is_turned_round():
    found = flips.flipped(PAIRS, random.Random(0), 0.2)
    turned = [i for i, (old, new) in enumerate(zip(PAIRS, found, strict=True)) if old != new]
    assert len(turned) == 40 and max(b - a for a, b in pairwise(turned)) < 40  # all over the place
    for i in turned:
        assert found[i] == {"prompt": f"p{i}", "chosen": f"b{i}", "rejected": f"a{i}"}


def test_a_ranking_holds_six_pairs_and_each_is_in_order():
    every, one = rankings.all_pairs(RANKINGS, random.Random(0)), rankings.one_pair(RANKINGS, random.Random(0))
    assert len({(row["chosen"], row["rejected"]) for row in every}) == 6 * 50 and len(one) == 50
    for row in every + one:
        assert row["chosen"][0] < row["rejected"][0] and row["prompt"][1:] == row["chosen"][1:] == row["rejected"][1:]
    assert [row["prompt"] for row in one] == [row["prompt"] for row in RANKINGS]
    assert len({row["chosen"][0] + row["rejected"][0] for row in one}) == 6
    assert [row["prompt"] for row in every[:6]] != ["p0"] * 6


def test_nine_bad_answers_stand_beside_each_good_one():
    rows = [{"prompt": "p", "completion": str(i), "label": i % 2} for i in range(200)]
    found = imbalance.few_good(rows, random.Random(0), 9)
    assert [row for row in found if not row["label"]] == [row for row in rows if not row["label"]]
    good = [row for row in found if row["label"]]
    assert len(good) == 11 and all(row in rows for row in good)


class OneByOne:
    """In place of threads, in which no run can listen for Ctrl-C."""

    def __init__(self, jobs):
        self.map, self.shutdown = map, lambda cancel_futures: None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def started(monkeypatch) -> list[list[str]]:
    """The commands of runs, which are made in this process and smaller than they would be."""
    commands = []

    def run(command: list[str], *, env: dict, **_) -> None:
        commands.append(command)
        assert command[1].endswith("train_dpo.py") and env["OMP_NUM_THREADS"]
        flags.main(train_dpo.train, train_dpo.Config, [*command[2:], "--eval-prompts", "8", "--device", "cpu"])

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(runs, "ThreadPoolExecutor", OneByOne)
    return commands


def test_runs_become_a_table_and_are_made_once(sft_folder, tmp_path, started, no_picture):
    shutil.copytree(sft_folder, tmp_path / "seed-0" / "sft")
    config = losses.Config(out=str(tmp_path), losses=("dpo", "ipo"), seeds=1, prompts=64)
    losses.main(config)
    made = json.loads((tmp_path / "results.json").read_text())
    assert made.keys() == {"dpo", "ipo"}
    report = json.loads((tmp_path / "seed-0" / "ipo" / "report.json").read_text())
    true, (ipo,) = report["true_reward"], made["ipo"]
    gain = (true["policy"] - true["reference"]) / true["reference_std"]
    assert (ipo["gain"], ipo["kl"], ipo["win_rate"]) == (pytest.approx(gain), report["kl"], report["win_rate"])
    table = (tmp_path / "table.md").read_text().splitlines()
    assert (
        len(table) == 4 and table[2].startswith("| `dpo` | -log σ(h)") and f"| {gain:+.2f} | {gain:+.2f} |" in table[3]
    )
    settings = [json.loads((tmp_path / "seed-0" / name / "config.json").read_text())["flags"] for name in made]
    assert [(x["loss"], x["seed"], Path(x["init"]).name) for x in settings] == [("dpo", 0, "sft"), ("ipo", 0, "sft")]
    assert read(tmp_path / "seed-0" / "dpo.jsonl") == read(tmp_path / "seed-0" / "pairs.jsonl")
    assert len(started) == 2
    losses.main(config)
    assert len(started) == 2


def test_what_a_run_says_when_it_fails_is_passed_on(tmp_path, monkeypatch):
    def fail(command, *, stdout, **_):
        stdout.write("some lines\nerror: the disk is full\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(UserError, match=r"dpo\.log: error: the disk is full"):
        runs.launch({tmp_path / "seed-0" / "dpo": ["train_dpo.py"]}, 2)


def test_every_objective_is_in_the_table_but_for_the_one_that_is_another():
    assert len({(o.loss, *o[2:]) for name, o in OBJECTIVES.items() if name != "sigmoid"}) == len(OBJECTIVES) - 1
