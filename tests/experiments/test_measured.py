"""Experiments from their runs to table and picture: runs are made up, but by commands that the scripts would take."""

import json
import random
import re
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
from small_models import message_of

import train_dpo
import train_ppo
import train_rm
from nanopref import sft
from nanopref.data import reviews
from nanopref.evaluation import report
from nanopref.experiments import (
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
        path = sft.parent / f"{kind}.jsonl"
        path.write_text("".join(f'{{"prompt": "{i}", "chosen": "a", "rejected": "b"}}\n' for i in range(40)))
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
    monkeypatch.setattr(scaling, "parameters", lambda root, size: {"nano": 0.1, "tiny": 0.9, "mini": 3.7}[size])
    curve = {"kl": [0.0, 0.2, 0.6], "score": [0.0, 0.5, 0.9], "gain": [0.0, 0.4, 0.5]}
    rows = [{"n": n, "kl": 0.3 * n, "gain": 0.2 * n} for n in (2, 4)]
    monkeypatch.setattr(overoptimisation, "pool", lambda config, rm: curve)
    monkeypatch.setattr(frontier, "pool", lambda config, rm: rows)
    return found


EXPECTED = {  # runs of one seed, besides SFT
    frontier: 1 + 6 * 4 - 1 + 3 + 3 + 2 * 4, noise: 2 + 4 * 4 + 3 * 2, labels: 7 + 1 + 4, degeneration: 3,
    scaling: 3 * 3 + 4 * 3, gap: 1 + 7 * 2, overoptimisation: 4 + 4 + 2 * 4, compare: 1 + 18,
}  # fmt: skip


@pytest.mark.parametrize("experiment", EXPECTED, ids=lambda x: x.__name__.rpartition(".")[2])
def test_from_runs_to_a_table_and_a_picture_and_again_without_runs(experiment, made_up, tmp_path, capsys):
    out = tmp_path / "out"
    config = partial(experiment.Config, out=str(out), seeds=2, **elsewhere(experiment, tmp_path))
    experiment.main(config())
    of_first = [name for name in made_up.started if name.startswith("out/seed-0/") and not name.endswith("/sft")]
    assert len(of_first) == EXPECTED[experiment] and len(made_up.started) == 2 * (len(of_first) + 1)
    for name, settings in made_up.started.items():
        assert settings["seed"] == int(name.split("/")[1].removeprefix("seed-"))
    made = {name: (out / name).read_bytes() for name in ("table.md", "results.json", "plot.png")}
    assert made["plot.png"][:4] == b"\x89PNG" and "nan" not in made["table.md"].decode()
    assert "±" in made["table.md"].decode()
    started = len(made_up.started)
    (out / "table.md").unlink()
    experiment.main(config(redraw=True, seeds=5))
    assert len(made_up.started) == started and (out / "table.md").read_bytes() == made["table.md"]


def elsewhere(experiment, folder: Path) -> dict[str, str]:
    """Folders of other experiments that it would read, where there is nothing."""
    names = ("frontier", "scaling", "wrong") if experiment is compare else ()
    return dict.fromkeys(names, str(folder / "nothing"))


@pytest.mark.parametrize("experiment", EXPECTED, ids=lambda x: x.__name__.rpartition(".")[2])
def test_a_seed_that_lacks_a_run_is_left_out_of_that_point_alone(experiment, made_up, tmp_path, capsys, monkeypatch):
    config = experiment.Config(out=str(tmp_path / "out"), seeds=2, **elsewhere(experiment, tmp_path))
    monkeypatch.setattr(report, "plot", lambda panels, path: None)
    experiment.main(config)
    last = [name for name in made_up.started if name.startswith("out/seed-1/")][-1]
    drawn = []
    monkeypatch.setattr(report, "plot", lambda panels, path: drawn.extend(map(report.shows_something, panels)))
    made_up.failing = {last}
    for path in (tmp_path / last).iterdir():
        path.unlink()
    experiment.main(config)
    assert drawn and all(drawn) and last in made_up.started


def test_compare_takes_what_the_others_measured(made_up, tmp_path, capsys):
    for experiment in (frontier, scaling, noise):
        experiment.main(experiment.Config(out=str(tmp_path / experiment.__name__), seeds=2))
    names = {"frontier": frontier.__name__, "scaling": scaling.__name__, "wrong": noise.__name__}
    compare.main(compare.Config(out=str(tmp_path / "out"), **{k: str(tmp_path / v) for k, v in names.items()}))
    table = (tmp_path / "out" / "table.md").read_text()
    for says in ("gain at 4 nats, std", "pairs for a gain of 1.0 std", "gain with 20% of labels wrong"):
        assert says in table, says


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
    temperature.main(config())
    assert set(asked) >= {"sft", "rm", "dpo 0.5", "ppo 1", "kto 0.5"} and len(asked) == 12 * 2 * 5  # β of 4 nats: 1/2
    temperature.main(config())
    assert len(asked) == 12 * 2 * 5


# ---- what is computed from runs --------------------------------------------------------------------------------------


def test_the_gain_at_a_kl_lies_between_the_settings_on_either_side():
    """In √KL, from the reference on, which has gained nothing at 0."""
    settings = {"a": [{"kl": 4.0, "gain": 1.0}, {"kl": 4.0, "gain": 2.0}], "b": [{"kl": 16.0, "gain": 2.5}], "c": []}
    assert frontier.gain_at(settings, 4) == 1.5 and frontier.gain_at(settings, 9) == 2.0
    assert frontier.gain_at(settings, 1) == 0.75 and np.isnan(frontier.gain_at(settings, 17))


@pytest.mark.parametrize("method, peak", [("best-of-n", 2.5), ("ppo", np.exp(1.5))])
def test_the_fits_of_gao_et_al_find_what_they_were_made_of(method, peak):
    """α = 1, β = 0.2 and 0.4; the peak by hand from the derivative."""
    beta, d = (0.2, 0.4)[method == "ppo"], np.linspace(0.1, 6, 40)
    shape = d if method == "best-of-n" else np.log(d)
    seeds = [{"kl": (d[i::2] ** 2).tolist(), "gain": (d * (1 - beta * shape))[i::2].tolist()} for i in (0, 1)]
    assert overoptimisation.fit(method, seeds) == pytest.approx((1, beta, peak))
    rising = [{"kl": (d**2).tolist(), "gain": (d * (1 + 0.1 * shape)).tolist()}]
    assert overoptimisation.fit(method, rising)[2] == float("inf")


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
    """By marker and line together; and those that frontier draws by colour too."""
    drawn = [
        figures.LOOKS[name] for name in (*frontier.ON_PAIRS, "preferred", "online-dpo", "ppo", "ppo-true", "best-of-n")
    ]
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
