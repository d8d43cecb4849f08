"""What is done to feedback before it is learnt from, and how many runs become a table."""

import json
import random
import shutil
import subprocess
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_models import message_of

import train_dpo
from nanopref.data.formats import read
from nanopref.experiments import imbalance, losses, margins, rankings, runs
from nanopref.learning.objectives import OBJECTIVES
from nanopref.running import flags
from nanopref.running.flags import UserError

RANKINGS = [{"prompt": f"p{i}", "responses": [f"{place}{i}" for place in "abcd"]} for i in range(50)]


def test_a_ranking_holds_six_pairs_and_each_is_in_order():
    every, one = rankings.all_pairs(RANKINGS, random.Random(0)), rankings.one_pair(RANKINGS, random.Random(0))
    assert len({(row["chosen"], row["rejected"]) for row in every}) == 6 * 50 and len(one) == 50
    for row in every + one:
        assert row["chosen"][0] < row["rejected"][0] and row["prompt"][1:] == row["chosen"][1:] == row["rejected"][1:]
    assert [row["prompt"] for row in one] == [row["prompt"] for row in RANKINGS]
    assert len({row["chosen"][0] + row["rejected"][0] for row in one}) == 6
    assert [row["prompt"] for row in every[:6]] != ["p0"] * 6


def answers(good: int, bad: int) -> list[dict]:
    rows = [{"prompt": "p", "completion": str(i), "label": int(i < good)} for i in range(good + bad)]
    return random.Random(1).sample(rows, len(rows))


@pytest.mark.parametrize(
    "rows, bad, left",
    [
        (answers(100, 100), 9, 11),
        (answers(100, 100), 1, 100),
        (answers(60, 100), 1, 60),  # there are no more
        (answers(100, 60), 1, 60),
        (answers(100, 3), 9, 1),
    ],
)
def test_so_many_bad_answers_stand_beside_each_good_one(rows, bad, left):
    found = imbalance.few_good(rows, random.Random(0), bad)
    assert [row for row in found if not row["label"]] == [row for row in rows if not row["label"]]
    good = [row["completion"] for row in found if row["label"]]
    assert len(good) == left and set(good) <= {row["completion"] for row in rows if row["label"]}


@pytest.mark.parametrize("bad", [1, 9])
def test_as_many_answers_of_the_usual_mixture_are_each_taken_once(bad):
    rows = answers(100, 80)
    found = imbalance.as_many(rows, random.Random(0), bad)
    assert len(found) == 80 + 80 // bad == len({row["completion"] for row in found})
    assert abs(sum(row["label"] for row in found) / len(found) - 100 / 180) < 0.1


CURVES = {("dpo", 0): [0.25] * 40, ("dpo", 1): [0.75] * 37, ("ipo", 0): [1.0] * 20 + [2.0] * 20, ("ipo", 1): [1.0] * 40}


def test_margins_are_a_mean_over_seeds_as_far_as_the_shortest_goes(tmp_path, monkeypatch):
    """In nats, that is by β; seeds differ by a few pairs and so by a step."""
    folders = {name: [tmp_path / name / str(seed) for seed in range(2)] for name in ("dpo", "ipo")}
    curves = {tmp_path / name / str(seed): curve for (name, seed), curve in CURVES.items()}
    lines, variants = [], []
    monkeypatch.setattr(runs, "results", lambda config, found: variants.append(found) or folders)
    figures = {"gain": 1.0, "kl": 2.0, "win_rate": 0.5, "tokens": 30.0}
    monkeypatch.setattr(runs, "read_report", lambda run: figures)
    monkeypatch.setattr(margins, "read_metrics", lambda folder: [{"margin": margin} for margin in curves[folder]])
    found = margins.measure(margins.Config(out=str(tmp_path), beta=0.25, epochs=3))
    assert {name: variant.words for name, variant in variants[0].items()} == {
        name: ["--loss", name, "--beta", "0.25", "--epochs", "3"] for name in folders
    }
    said, (_, draw) = margins.show(found)
    nowhere = dict.fromkeys(("axhline", "set", "legend"), lambda *_, **__: None)
    draw(SimpleNamespace(plot=lambda margin, label: lines.append((label, margin.tolist())), **nowhere))
    assert dict(lines) == {"dpo": [2.0] * 37, "ipo": [4.0] * 20 + [6.0] * 20}
    table = [line.strip("| ").split(" | ") for line in said.splitlines()]
    assert ["dpo"] + ["2.0"] * 5 in table  # the last twenty steps before 20%, 40% … of the way
    assert ["ipo", "4.0", "4.0", f"{4 + 2 * 4 / 20:.1f}", "5.2", "6.0"] in table


def test_an_experiment_goes_on_with_the_same_flags_alone(tmp_path, monkeypatch):
    """More seeds, more objectives and other jobs are no other flags."""
    (tmp_path / "some.jsonl").write_text("")
    monkeypatch.setattr(
        runs, "launch", lambda commands, jobs: [out.mkdir(parents=True, exist_ok=True) for out in commands]
    )
    monkeypatch.setattr(runs, "sampled", lambda *_: tmp_path / "some.jsonl")
    monkeypatch.setattr(runs, "is_done", lambda run: True)
    variants = {"dpo": runs.Variant(["--loss", "dpo"])}

    def start(**settings) -> dict[str, list[Path]]:
        return runs.results(rankings.Config(**{"out": str(tmp_path / "out"), "seeds": 1} | settings), variants)

    start()
    assert len(start(seeds=3, jobs=7)["dpo"]) == 3 and len(start()["dpo"]) == 1
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json*")}
    for other in ({"prompts": 64}, {"noise": 0.0}, {"annotators": 1}, {"prompts": 65}):
        assert "holds runs of another experiment, or with other flags; choose another, or remove it" in message_of(
            partial(start, **other)
        )
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json*")}
    assert "must be odd" in message_of(partial(start, annotators=2, out=str(tmp_path / "new")))
    assert not (tmp_path / "new").exists()
    for chosen in (("dpo",), ("dpo", "ipo")):
        runs.results(losses.Config(out=str(tmp_path / "losses"), losses=chosen), variants)


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


def fake(monkeypatch, failing: set[str]) -> list[str]:
    """Runs that only leave a report, but for those that fail; the names of all that were started."""
    started = []

    def run(command, *, stdout, **_):
        out = Path(command[command.index("--out") + 1])
        started.append(f"{out.parent.name}/{out.name}")
        if started[-1] in failing:
            stdout.write("some lines\nerror: the disk is full\n")
        else:
            (out / "state").mkdir(parents=True)
            (out / "report.json").write_text("{}")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(runs, "sampled", lambda *_: Path(__file__).parent / "none.jsonl")
    monkeypatch.setattr(runs, "read_rows", lambda path: [])
    return started


def test_a_run_that_fails_is_told_of_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    """The same command starts it again, and nothing that is done."""
    variants = {name: runs.Variant([]) for name in ("a", "b", "c")}
    started = fake(monkeypatch, failing={"seed-0/b"})
    config = rankings.Config(out=str(tmp_path), seeds=2, jobs=1)
    found = runs.results(config, variants)
    assert {name: [runs.seed_of(run) for run in found[name]] for name in found} == {"a": [0, 1], "b": [1], "c": [0, 1]}
    said = capsys.readouterr().out
    assert f"seed-0/b failed (error: the disk is full); all of it: {tmp_path}/seed-0/b.log" in said
    assert "1 of 6 runs failed and are left out; the same command tries them again" in said
    assert len(started) == 8 and not list(tmp_path.glob("*/*/state"))
    started = fake(monkeypatch, failing=set())
    assert len(runs.results(config, variants)["b"]) == 2 and started == ["seed-0/b"]


def test_a_seed_without_a_beginning_is_left_out(tmp_path, monkeypatch, capsys):
    started = fake(monkeypatch, failing={"seed-1/sft"})
    found = runs.results(rankings.Config(out=str(tmp_path), seeds=3, jobs=1), {"a": runs.Variant([])})
    assert [runs.seed_of(run) for run in found["a"]] == [0, 2] and "seed-1/a" not in started
    assert "seed-1/sft failed" in capsys.readouterr().out


def test_what_was_measured_is_drawn_again_without_running_anything(tmp_path, capsys, no_picture):
    measured = []

    def measure(config) -> dict:
        measured.append(1)
        return {"a": (1, 2.5)}

    def show(found: dict) -> tuple[str, list]:
        return f"table of {found}\n", []

    main = runs.experiment(measure, show)
    main(rankings.Config(out=str(tmp_path)))
    before = (tmp_path / "table.md").read_text()
    assert before == "table of {'a': [1, 2.5]}\n"  # as it is read, the second time too
    (tmp_path / "table.md").unlink()
    main(rankings.Config(out=str(tmp_path), redraw=True))
    assert measured == [1] and (tmp_path / "table.md").read_text() == before
    with pytest.raises(UserError, match="nothing was measured there yet; leave the flag out"):
        main(rankings.Config(out=str(tmp_path / "new"), redraw=True))


def test_what_was_measured_is_kept_where_it_cannot_be_shown(tmp_path, no_picture):
    main = runs.experiment(lambda config: {"a": 1}, lambda found: found["b"])
    with pytest.raises(KeyError):
        main(rankings.Config(out=str(tmp_path)))
    assert json.loads((tmp_path / "results.json").read_text()) == {"a": 1}


def test_every_objective_is_in_the_table_but_for_the_one_that_is_another():
    assert len({(o.loss, *o[2:]) for name, o in OBJECTIVES.items() if name != "sigmoid"}) == len(OBJECTIVES) - 1
