"""Experiments from their runs to table and picture: runs are made up, but by commands that the scripts would take."""

import itertools
import json
import random
import re
import shutil
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import message_of

import train_dpo
import train_ppo
import train_rm
from nanopref import sft
from nanopref.data import reviews
from nanopref.evaluation import report
from nanopref.experiments import (
    active,
    compare,
    degeneration,
    figures,
    frontier,
    gap,
    labels,
    noise,
    overoptimisation,
    runs,
    scaling,
    temperature,
)
from nanopref.learning import objectives
from nanopref.learning.objectives import OBJECTIVES, SCORES
from nanopref.models.sampling import Answer
from nanopref.running import flags

SCRIPTS = {
    "train_dpo.py": (train_dpo.Config, lambda c: objectives.resolve(flags.resolve(c), OBJECTIVES[c.loss])),
    "train_rm.py": (train_rm.Config, lambda c: objectives.resolve(flags.resolve(c), SCORES[c.loss])),
    "train_ppo.py": (train_ppo.Config, lambda c: train_ppo.resolve(c, "")),
    "nanopref.sft": (sft.Config, flags.resolve),
}


@cache
def _settings(words: tuple[str, ...]) -> dict:
    Config, resolve = SCRIPTS[Path(words[0]).name]
    config = flags.parse(Config, words[1:])
    flags.check(config)
    return asdict(resolve(config))


def in_place(value, folder: Path):
    """With the folder of a seed where SEED stood for it."""
    if isinstance(value, tuple):
        return tuple(in_place(x, folder) for x in value)
    return value.replace("SEED", str(folder)) if isinstance(value, str) else value


@dataclass
class MadeUp:
    """What was started, {folder below OUT: flags}; and what fails."""

    root: Path
    started: dict[str, dict] = field(default_factory=dict)
    failing: set[str] = field(default_factory=set)

    def launch(self, commands: dict[Path, list[str]], jobs: int) -> None:
        for out, words in commands.items():
            name = str(out.relative_to(self.root))
            if runs.is_done(out) or name in self.failing:
                continue
            words = words[1:] if words[0] == "-m" else words
            found = self.settings(words) | {"seed": int(words[words.index("--seed") + 1])}
            self.started[name] = found = {k: in_place(v, out.parent) for k, v in found.items()}
            for folder in [found.get("init"), *(found.get("reward") or ())]:
                assert folder in (None, "", "true") or runs.is_done(Path(folder)), f"{name} needs {folder} first"
            self.make(out, found, random.Random(name))

    def settings(self, words: list[str]) -> dict:
        """What the script makes of these words, with SEED in place of the folder and the number of a seed."""
        alike = [re.sub(r"/[^ ]*/seed-\d+", "SEED", word) for word in words]
        alike[alike.index("--seed") + 1] = "0"
        return _settings(tuple(alike))

    def make(self, out: Path, settings: dict, rng: random.Random) -> None:
        """Files as a run would leave them; the further β lets it go, the more it gains, up to a point."""
        out.mkdir(parents=True)
        kl = 2 / (settings.get("beta") or 1) * rng.uniform(0.9, 1.1)
        said = {"true_reward": {"reference": 0.1, "policy": 0.1 + np.sqrt(kl), "reference_std": 1.2, "win_rate": 0.7}}
        said |= {"kl": kl, "response_length": {"policy": 30 + kl}, "ended": {"policy": 1.0}, "peak_memory_MiB": 700.0}
        said |= {"held_out": {"accuracy": 0.7, "loss": 0.6}, "seconds": {"ppo" if "clip" in settings else "dpo": 9.0}}
        (out / "report.json").write_text(json.dumps(said))
        (out / "config.json").write_text(json.dumps({"flags": settings}))
        rows = [{"step": i, "kl": kl * i / 20, "score": i / 20, "true_reward": (i / 20) ** 0.5, "response_length": 30.0,
                 "chosen_reward": i / 10, "rejected_reward": -i / 10} for i in range(20)]  # fmt: skip
        (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def sampled(self, config, sft: Path, seed: int, kind: str) -> Path:
        """As many rows as prompts, twice as many labels."""
        path, n = sft.parent / f"{kind}.jsonl", config.prompts * (2 if kind == "labels" else 1)
        row = {"pairs": {"chosen": "a", "rejected": "b"}, "labels": {"completion": "a", "label": 1}}.get(kind)
        row = json.dumps(row or {"responses": ["a", "b", "c", "d"]})
        path.write_text("".join(f'{{"prompt": "{i}", {row[1:]}\n' for i in range(n)))
        return path


def answers(folder: Path, seed: int, n: int = 8, *, temperature: float = 1.0, prompts: tuple[str, ...] = ()):
    rng = random.Random(f"{folder.name} {seed} {temperature}")
    asked = prompts or [reviews.sample_prompt(rng) for _ in range(n)]
    return [Answer([1], [2], [0.0], reviews.sample_response(rng, x), True, x) for x in asked]


@pytest.fixture
def made_up(tmp_path, monkeypatch) -> MadeUp:
    found = MadeUp(tmp_path)
    monkeypatch.setattr(runs, "launch", found.launch)
    monkeypatch.setattr(runs, "write_atomic", lambda path, content: Path(path).write_text(content))  # many, unsynced
    monkeypatch.setattr(runs, "sampled", found.sampled)
    monkeypatch.setattr(runs, "answers", answers)
    sizes = {"sft nano": 0.1, "sft": 0.9, "sft mini": 3.7}
    monkeypatch.setattr(scaling, "parameters", lambda run: sizes[run.name])
    monkeypatch.setattr(active, "quality", lambda rm: 0.8 + runs.seed_of(rm) / 100)
    rows = [{"n": n, "kl": 0.3 * (n - 1), "score": 0.3 * (n - 1), "gain": 0.2 * (n - 1)} for n in (1, 2, 4, 16)]
    monkeypatch.setattr(runs, "best_of_n", lambda rm, n, prompts: rows)
    return found


EXPECTED = {  # runs of one seed, besides SFT
    frontier: 1 + 6 * 4 + 1 + 5 + 3 + 3 + 2 * 4, noise: 2 + 4 * 4 + 3 * 2, labels: 7 + 1 + 2, degeneration: 3,
    scaling: 2 + 3 * 2 + 4 * 3, gap: 1 + 7 * 3, overoptimisation: 4 + 4 + 2 * 4, compare: 1 + 2 + 18,
}  # fmt: skip
SMALL = {overoptimisation: {"prompts": 400, "pairs": (50, 100, 200, 400), "dpo_pairs": (50, 100)}}


def configured(experiment, folder: Path, **settings):
    """Its flags, with few pairs where it would take many, and nothing in the folders of others."""
    nowhere = dict.fromkeys(("frontier", "scaling", "wrong") if experiment is compare else (), str(folder / "nothing"))
    return experiment.Config(out=str(folder / "out"), **{"seeds": 2} | nowhere | SMALL.get(experiment, {}) | settings)


@pytest.mark.parametrize("experiment", EXPECTED, ids=lambda x: x.__name__.rpartition(".")[2])
def test_from_runs_to_a_table_and_a_picture_and_again_without_runs(experiment, made_up, tmp_path, capsys):
    out = tmp_path / "out"
    experiment.main(configured(experiment, tmp_path))
    of_first = [name for name in made_up.started if name.startswith("out/seed-0/") and not name.endswith("/sft")]
    assert len(of_first) == EXPECTED[experiment] and len(made_up.started) == 2 * (len(of_first) + 1)
    for name, settings in made_up.started.items():
        seed = int(name.split("/")[1].removeprefix("seed-"))
        assert settings["seed"] in (seed, 1000 + seed)
    made = {name: (out / name).read_bytes() for name in ("table.md", "results.json", "plot.png")}
    assert made["plot.png"][:4] == b"\x89PNG" and "nan" not in made["table.md"].decode()
    assert "±" in made["table.md"].decode()
    started = len(made_up.started)
    (out / "table.md").unlink()
    experiment.main(configured(experiment, tmp_path, redraw=True, seeds=5))
    assert len(made_up.started) == started and (out / "table.md").read_bytes() == made["table.md"]


@pytest.mark.parametrize("experiment", EXPECTED, ids=lambda x: x.__name__.rpartition(".")[2])
def test_what_fails_is_left_out_of_table_and_picture(experiment, made_up, tmp_path, capsys, monkeypatch):
    """One run of a single seed, whichever; and then it is made after all."""
    drawn = []
    monkeypatch.setattr(report, "plot", lambda panels, path: drawn.append([report.shows_something(x) for x in panels]))
    experiment.main(configured(experiment, tmp_path, seeds=1))
    whole, table = list(made_up.started), (tmp_path / "out" / "table.md").read_text()
    for name in [x for x in whole if not x.endswith("/sft")][:: 1 if len(whole) < 15 else 4]:
        made_up.failing = {name}
        shutil.rmtree(tmp_path / name)
        experiment.main(configured(experiment, tmp_path, seeds=1))
        without = (tmp_path / "out" / "table.md").read_text()
        made_from = ("rm", "base")  # those that began there are done
        assert without != table or any(x in name for x in made_from), name
        made_up.failing = set()
        experiment.main(configured(experiment, tmp_path, seeds=1))
        assert (tmp_path / "out" / "table.md").read_text() == table, name
    assert any(map(any, drawn))


def rows_of(folder: Path, name: str) -> int:
    return len((folder / "out" / "seed-0" / f"{name}.jsonl").read_text().splitlines())


def test_as_many_judgements_for_each_kind_of_feedback(made_up, tmp_path, capsys, no_picture):
    labels.main(configured(labels, tmp_path, judgements=1000))
    costs = {"dpo pairs": 1, "kto labels": 1, "plack": 5, "infonca ratings": 4, "dpo base": 1, "kto base": 1}
    costs["plackett-luce rankings"] = costs.pop("plack")
    for name, cost in costs.items():
        assert rows_of(tmp_path, name) * cost == 1000, name
        assert made_up.started[f"out/seed-0/{name}"]["batch_size"] == max(1, 32 // cost)
    few = partial(labels.main, configured(labels, tmp_path / "few", prompts=100, judgements=120))
    assert "120 rows are wanted, and their answers made but 100; ask for more" in message_of(few)


def test_as_many_steps_whatever_the_number_of_pairs(made_up, tmp_path, capsys, no_picture):
    scaling.main(configured(scaling, tmp_path))
    for n in (320, 640, 1280, 2560):
        assert rows_of(tmp_path, f"dpo {n}") == rows_of(tmp_path, f"rm {n}") == n
        assert made_up.started[f"out/seed-0/dpo {n}"]["epochs"] * n == 2560


def test_compare_takes_what_the_others_measured(made_up, tmp_path, capsys):
    for experiment in (frontier, scaling, noise):
        experiment.main(experiment.Config(out=str(tmp_path / experiment.__name__), seeds=2))
    names = {"frontier": frontier.__name__, "scaling": scaling.__name__, "wrong": noise.__name__}
    elsewhere = {k: str(tmp_path / v) for k, v in names.items()}
    compare.main(configured(compare, tmp_path, **elsewhere))
    rows = [line.strip("| ").split(" | ") for line in (tmp_path / "out" / "table.md").read_text().splitlines()]
    said = {row[0]: row[1:] for row in rows}
    measured = json.loads((tmp_path / frontier.__name__ / "results.json").read_text())
    for method, cell in zip(("dpo-passes", "ppo"), said["gain at 4 nats, std"], strict=True):
        assert cell == figures.with_error(frontier.gain_at(measured[method], 4), sign="+")
    assert {"pairs for a gain of 1.0 std", "gain with 20% of labels wrong"} < said.keys()
    assert said["runs of the grid that failed"] == ["0 of 18", "0 of 18"]


def test_what_a_run_costs_is_without_its_evaluation_and_adds_up(tmp_path):
    """Seconds of stages by the same name too; the reward model's scores are scaled over as many answers as it says."""
    for name, seconds, settings in (
        ("rm", {"reference": 2.0, "reward model": 30.0, "evaluation": 5.0}, {"heads": 1, "eval_prompts": 512}),
        ("ppo", {"reference": 1.0, "ppo": 60.0, "evaluation": 7.0}, {"iterations": 16, "batch_size": 128}),
    ):
        (tmp_path / name).mkdir()
        made = {"seconds": seconds, "peak_memory_MiB": 700.0 + len(name)}
        (tmp_path / name / "report.json").write_text(json.dumps(made))
        (tmp_path / name / "config.json").write_text(json.dumps({"flags": settings}))
    found = compare.cost([tmp_path / "rm", tmp_path / "ppo"])
    assert found["seconds"] == {"reference": 3.0, "reward model": 30.0, "ppo": 60.0}
    assert found["answers"] == 512 + 16 * 128 and found["memory"] == 703.0


def test_temperature_takes_the_setting_next_to_so_many_nats(made_up, tmp_path, capsys, monkeypatch):
    """And asks the reference's answers by their reward model; without `frontier` it says what to do first."""
    config = partial(temperature.Config, out=str(tmp_path / "out"), frontier=str(tmp_path / "there"), answers=20)
    assert "run nanopref.experiments.frontier first" in message_of(lambda: temperature.main(config()))
    frontier.main(frontier.Config(out=str(tmp_path / "there"), seeds=2))
    asked = []
    wins = temperature.wins

    def watched(config, run: Path, t: float) -> dict:
        asked.append(run.name)
        return wins(config, run if run.name != "rm" else run.parent / "sft", t)

    monkeypatch.setattr(temperature, "wins", watched)
    (tmp_path / "there" / "seed-1" / "kto 0.5" / "report.json").unlink()  # a run that is under way
    temperature.main(config())
    assert set(asked) >= {"sft", "rm", "dpo 0.5", "ppo 1", "kto 0.5"}  # at β = 1/2 a run has 4 nats, PPO at 1 has 2
    assert len(asked) == (13 * 2 - 1) * 5
    temperature.main(config())
    assert len(asked) == (13 * 2 - 1) * 5
    report_of = tmp_path / "there" / "seed-0" / "dpo 0.5" / "report.json"
    report_of.write_text(report_of.read_text() + " ")  # a run that was made anew
    temperature.main(config())
    assert len(asked) == 13 * 2 * 5 and asked[-5:] == ["dpo 0.5"] * 5
    other = partial(temperature.main, config(temperatures=(0.0, 1.0)))
    assert "holds runs of another experiment, or with other flags" in message_of(other)


def test_best_of_sixteen_is_the_answer_with_the_highest_score(made_up, tmp_path, monkeypatch):
    """And wins against the grammar's reviews as the true reward says, a tie counting half."""
    rm = tmp_path / "seed-3" / "rm"
    monkeypatch.setattr(temperature.models, "load", lambda folder: (torch.nn.Linear(1, 1), None))
    monkeypatch.setattr(temperature.rewards, "load_model", lambda *_: None)
    monkeypatch.setattr(temperature.rewards, "model_reward", lambda _: temperature.rewards.true_reward)
    found = temperature.wins(temperature.Config(answers=4), rm, 0.5)
    prompts = compare.new_prompts("", 4, 3)
    said = answers(
        tmp_path / "seed-3" / "sft", 3, temperature=0.5, prompts=tuple(x for x in prompts for _ in range(16))
    )
    best = [max(reviews.true_reward(a.text) for a in said[i : i + 16]) for i in range(0, 64, 16)]
    assert found["true_reward"] == pytest.approx(np.mean(best)) and found["win_rate"] > 0.5


def test_best_of_n_by_the_truth_itself(tmp_path, monkeypatch):
    """Its score is the true reward, so the gain is the score's over the reference's deviation; a pool is made once."""
    rm = tmp_path / "seed-3" / "rm"
    rm.mkdir(parents=True)
    asked = []
    monkeypatch.setattr(runs, "answers", lambda *words, **others: asked.append(others) or answers(*words, **others))
    monkeypatch.setattr(runs.models, "load", lambda folder: (torch.nn.Linear(1, 1), None))
    monkeypatch.setattr(runs.rewards, "load_model", lambda *_: None)
    monkeypatch.setattr(runs.rewards, "model_reward", lambda _: runs.rewards.true_reward)
    rows = runs.best_of_n(rm, 2, 3)
    said = answers(rm.parent / "sft", 3, prompts=tuple(x for x in compare.new_prompts("", 3, 3) for _ in range(8)))
    true = np.array([reviews.true_reward(answer.text) for answer in said]).reshape(3, 8)
    pairs = [row[list(two)].max() for row in true for two in itertools.combinations(range(8), 2)]
    assert [row["n"] for row in rows] == [1, 2] and rows[0]["score"] == rows[0]["gain"] == 0.0
    assert rows[1]["score"] == pytest.approx(np.mean(pairs) - true.mean(), abs=1e-6)
    deviation = np.std([reviews.true_reward(answer.text) for answer in answers(rm.parent / "sft", 3)])
    assert rows[1]["gain"] == pytest.approx(rows[1]["score"] / deviation, abs=1e-6)
    before = len(asked)
    assert runs.best_of_n(rm, 2, 3) == rows and len(asked) == before


# ---- what is computed from runs --------------------------------------------------------------------------------------


def test_the_gain_at_a_kl_lies_between_the_settings_on_either_side():
    """In √KL, one a seed that has gone so far, and not less far at every setting."""

    def run(kl: float, gain: float, seed: int) -> dict:
        return {"kl": kl, "gain": gain, "seed": seed}

    settings = {"a": [run(4.0, 1.0, 0), run(4.0, 2.0, 1)], "b": [run(16.0, 2.0, 0)], "c": []}
    assert frontier.gain_at(settings, 4) == [1.0, 2.0] and frontier.gain_at(settings, 9) == [1.5]
    assert frontier.gain_at(settings, 1) == [] == frontier.gain_at(settings, 17) == frontier.gain_at({}, 1)


@pytest.mark.parametrize("method, peak", [("best-of-n", 2.5), ("ppo", np.exp(1.5))])
def test_the_fits_of_gao_et_al_find_what_they_were_made_of(method, peak):
    """α = 1, β = 0.2 and 0.4; the peak by hand from the derivative."""
    beta, d = (0.2, 0.4)[method == "ppo"], np.linspace(0.1, 6, 40)
    shape = d if method == "best-of-n" else np.log(d)
    run = {"kl": (d**2).tolist(), "gain": (d * (1 - beta * shape)).tolist()}
    assert overoptimisation.fit(method, run) == pytest.approx((1, beta, peak))
    run["gain"] = (d * (1 + 0.1 * shape)).tolist()
    assert overoptimisation.fit(method, run)[2] == float("inf")
    run["gain"] = (-d * (1 + shape)).tolist()
    assert overoptimisation.fit(method, run)[2] == pytest.approx(0.0 if method == "best-of-n" else np.exp(-2))


def test_where_the_truth_was_highest_and_where_it_ended():
    """PPO by means over five rounds, by hand: a lone good round is no peak. Best-of-n by what it is."""
    rise_and_fall = [0.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.0, 0.0, 0.0, 0.0, 5.0]
    run = {"kl": [i**2 for i in range(12)], "score": list(range(12)), "gain": rise_and_fall}
    table, _ = overoptimisation.show({"best-of-n": {"50": [run]}, "ppo": {"50": [run]}, "dpo": {}})
    cells = [line.strip("| ").split(" | ")[5:] for line in table.splitlines()[2:4]]
    assert cells[0] == ["5.00", "11.0", "11.00", "5.00", "11.0", "11.00"]
    assert cells[1] == ["2.00", "4.0", "4.00", "1.20", "9.0", "9.00"]
    short = {name: values[:3] for name, values in run.items()}
    assert overoptimisation.smoothed("ppo", short) == [pytest.approx((1.0, 1.0, 1.0))]


def test_rounds_of_ppo_are_counted_from_the_reference(made_up, tmp_path):
    """Gain in deviations of its true reward, which other answers of it tell."""
    run = tmp_path / "seed-2" / "ppo"
    run.mkdir(parents=True)
    rows = [{"kl": 0.5 * i, "score": i / 4, "true_reward": 0.25 * i} for i in range(3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    true = [reviews.true_reward(a.text) for a in answers(tmp_path / "seed-2" / "sft", 2)]
    found = overoptimisation.rounds(run)
    assert found["kl"] == [0.0, 0.5, 1.0] and found["score"] == [0.0, 0.25, 0.5]
    assert found["gain"] == pytest.approx([(0.25 * i - np.mean(true)) / np.std(true) for i in range(3)], abs=1e-5)


def test_labels_that_are_needed_for_a_gain():
    rows = {str(n): [{"gain": gain}] for n, gain in ((100, 0.2), (400, 1.2), (200, 0.7), (800, 1.1))}
    assert compare.labels_for(rows, 0.7) == "200" and compare.labels_for(rows, 0.95) == "283"  # half way, in logs
    assert compare.labels_for(rows, 0.1) == "under 100" and compare.labels_for(rows, 1.3) == "over 800"


def test_prompts_of_another_kind():
    prompt, rng = (
        "The Silver Window is a modern musical by Ines Costa, with Nora Vale in the main role.",
        random.Random(0),
    )
    changed = compare.of_new_genres(prompt, rng)
    assert re.sub("|".join(compare.NEW_GENRES), "musical", changed) == prompt != changed
    assert not set(compare.NEW_GENRES) & set(reviews.GENRES)
    assert len(compare.shorter(prompt, rng).split()) == 3 and compare.longer(prompt, rng).startswith(prompt)


def test_words_that_repeat():
    said = ["a b c d e", "a b c d a b c d"]  # of 2 + 5 runs of four words one has been there in its answer
    found = degeneration.repeated([Answer([], [], [], text, True, "") for text in said])
    assert found == 1 / 7


def test_a_share_of_pairs_is_turned_round():
    pairs = [{"prompt": f"p{i}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(200)]
    found = noise.flipped(pairs, random.Random(0), 0.2)
    turned = [i for i, (old, new) in enumerate(zip(pairs, found, strict=True)) if old != new]
    assert len(turned) == 40 and max(np.diff(turned)) < 40  # all over the place
    assert all(found[i] == {"prompt": f"p{i}", "chosen": f"b{i}", "rejected": f"a{i}"} for i in turned)
    assert noise.flipped(pairs, random.Random(0), 0.0) == pairs


def test_a_mean_over_seeds_has_an_error_where_there_are_several():
    assert figures.mean_error([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1 / np.sqrt(3)))
    assert figures.with_error([1.0, 3.0], 1, "+") == "+2.0 ± 1.0" and figures.with_error([1.0]) == "1.00"


def test_methods_can_be_told_apart_in_grey(tmp_path):
    """By marker and line together; and those that frontier draws by colour too, DPO in its one colour."""
    drawn = [
        figures.LOOKS[name] for name in (*frontier.ON_PAIRS, "preferred", "online-dpo", "ppo", "ppo-true", "best-of-n")
    ]
    often = figures.LOOKS["dpo-passes"]
    assert often.color == figures.LOOKS["dpo"].color and often.line != figures.LOOKS["dpo"].line
    for looks in (drawn, figures.OTHERS):
        assert len({(look.marker, look.line) for look in looks}) == len({look.color for look in looks}) == len(looks)


def test_a_panel_has_a_curve_for_each_method_with_bars_of_an_error(tmp_path):
    found = {"dpo": {"2": [{"gain": 1.0}, {"gain": 3.0}], "1": [{"gain": 0.0}, {"gain": 1.0}], "3": []}, "other": {}}
    figure = report.plt.figure()
    axis = figure.add_subplot()
    figures.panel(found, title="t", xlabel="x", ylabel="y", scale="log")(axis)
    (container,) = axis.containers
    line, _, (bars,) = container
    assert line.get_xdata().tolist() == [1, 2] and line.get_ydata().tolist() == [0.5, 2.0]
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert ends == [[0.0, 1.0], [1.0, 3.0]] and line.get_color() == figures.LOOKS["dpo"].color
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["DPO"]
    report.plt.close(figure)
