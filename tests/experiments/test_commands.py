"""The runs that experiments ask for are runs that the scripts would start; nothing is trained here."""

from contextlib import suppress
from pathlib import Path

import pytest

import train_dpo
import train_ppo
import train_rm
from nanopref.data import reviews
from nanopref.experiments import active, constitution, credit, front, online, relatives, runs
from nanopref.feedback import rewards
from nanopref.learning import objectives
from nanopref.learning.objectives import OBJECTIVES, SCORES
from nanopref.running import flags

CHECKS = {
    "train_dpo.py": (train_dpo.Config, lambda c: objectives.resolve(flags.resolve(c), OBJECTIVES[c.loss])),
    "train_rm.py": (train_rm.Config, lambda c: objectives.resolve(flags.resolve(c), SCORES[c.loss])),
    "train_ppo.py": (train_ppo.Config, lambda c: train_ppo.resolve(c, "")),
}
PAIR = {"prompt": "p", "chosen": " Nora Vale plays the captain.", "rejected": " It is good. It is bad."}


@pytest.mark.parametrize(
    "experiment, expected",
    [(active, 7), (constitution, 2), (credit, 5), (front, 15), (online, 11), (relatives, 6)],
    ids=lambda x: getattr(x, "__name__", "").rpartition(".")[2],
)
def test_each_run_has_flags_that_its_script_takes(experiment, expected, tmp_path, monkeypatch):
    asked: dict[Path, list[str]] = {}
    monkeypatch.setattr(runs, "launch", lambda commands, jobs: asked.update(commands))
    monkeypatch.setattr(runs, "is_done", lambda run: True)
    monkeypatch.setattr(constitution, "revised", lambda *_: None)
    monkeypatch.setattr(runs, "sampled", lambda *_: tmp_path / "pairs.jsonl")
    (tmp_path / "pairs.jsonl").write_text(str(PAIR).replace("'", '"') + "\n")
    (tmp_path / "out" / "seed-0").mkdir(parents=True)
    config = experiment.Config(out=str(tmp_path / "out"), seeds=1)
    with suppress(FileNotFoundError, flags.UserError):  # of reports, and of models, that nobody made
        experiment.main(config)
    asked = {out: words for out, words in asked.items() if words[0] != "-m"}
    assert len(asked) == expected
    for out, (script, *words) in asked.items():
        Config, resolve = CHECKS[Path(script).name]
        found = flags.parse(Config, words)
        flags.check(found)
        resolved = resolve(found)
        flags.check_people(resolved)
        assert resolved.seed in (0, 1000) and resolved.init.startswith(str(out.parent)), out
        for word in [*(resolved.reward or ()), *(getattr(resolved, "chooser", None) or ())]:
            name, weight = rewards.parse(word)
            known = name in rewards.TASK or name in ("rules", "implicit") or Path(name) in asked
            assert known and weight > 0, word


def test_modpos_margin_is_the_difference_of_the_other_objective():
    (row,) = front.with_margins([PAIR], None, 5.0)
    assert row == PAIR | {"margin": 5.0 * (reviews.specificity(PAIR["chosen"]) - 0)} and row["margin"] == 5
    (turned,) = front.with_margins([{**PAIR, "chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}], None, 5.0)
    assert turned["margin"] == -5


def test_which_share_breaks_a_rule_by_round(tmp_path):
    rounds = '[{"score a": -0.75, "score b": -0.5}, {"score a": -0.25, "score b": 0.0}]'
    after = '{"score a": {"policy": -0.125}, "score b": {"policy": 0.0}}'
    (tmp_path / "report.json").write_text(f'{{"rounds": {rounds}, "scores": {after}}}')
    assert constitution.broken_by_round(tmp_path, ["a", "b"]) == [[0.75, 0.5], [0.25, 0.0], [0.125, 0.0]]
