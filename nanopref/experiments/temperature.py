"""Win rate over the temperature of sampling (Rafailov et al. 2023, figure 2, right):
`python -m nanopref.experiments.temperature`

The policies of `frontier`, each method with the setting that came nearest to so many nats, answer new prompts at
temperatures from 0 to 1; best-of-n takes one of 16, which at 0 are all the same. Against each answer stands a review
that the grammar wrote, as human summaries do in the paper; the true reward says which wins.
"""

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanopref import models
from nanopref.data import reviews
from nanopref.evaluation.compare import new_prompts
from nanopref.evaluation.metrics import win_rate
from nanopref.experiments import figures, runs
from nanopref.experiments.runs import FigureFlags
from nanopref.feedback import rewards
from nanopref.running import flags
from nanopref.running.files import read_object, write_atomic
from nanopref.running.flags import flag, require
from nanopref.running.parallel import progress, start

BEST_OF = 16  # answers of which best-of-n takes one


@dataclass
class Config(FigureFlags):
    """How often each method of `frontier` beats the reviews that SFT learnt from, by the temperature.

    Example: python -m nanopref.experiments.temperature --frontier out/frontier
    """

    out: str = "out/temperature"
    frontier: str = flag("out/frontier", "the folder of nanopref.experiments.frontier, which has to be finished")
    temperatures: tuple[float, ...] = flag((0.0, 0.25, 0.5, 0.75, 1.0), "of sampling; 0: the likeliest token", least=0)
    kl: float = flag(4.0, "nats: the setting of each method that came nearest is taken", above=0)
    answers: int = flag(256, "prompts", least=2)


def measure(config: Config) -> dict:
    """{method: {temperature: [figures, one a seed]}}"""
    root, found = Path(config.frontier).absolute(), {}
    measured = read_object(root / "results.json")
    require(bool(measured), f"--frontier {root}: nothing was measured there; run nanopref.experiments.frontier first")
    out, chosen, kls = runs.claim(config), {"sft": "sft", "best-of-n": "rm"}, {"sft": 0.0}
    for method, settings in measured.items():
        nats = {setting: float(np.mean([run["kl"] for run in seeds])) for setting, seeds in settings.items() if seeds}
        if method == "best-of-n":
            kls[method] = nats.get(str(BEST_OF), float("nan"))
        elif nats:
            setting = min(nats, key=lambda setting: abs(nats[setting] - config.kl))
            chosen[method], kls[method] = f"{method} {setting}", nats[setting]
    places = [(method, run) for method, name in chosen.items() for run in sorted(root.glob(f"seed-*/{name}"))]
    places = [(method, run) for method, run in places if runs.is_done(run)]
    with progress("policies", len(places), "model") as bar:
        for method, run in places:
            path = out / f"{run.parent.name} {run.name}.json"
            made = hashlib.sha256((run / "report.json").read_bytes()).hexdigest()
            rows = read_object(path)
            if rows.get("report") != made:  # none yet, or of a run that was made anew
                rows = {"report": made, "rows": [wins(config, run, x) for x in config.temperatures]}
                write_atomic(path, json.dumps(rows) + "\n")
            for temperature, row in zip(config.temperatures, rows["rows"], strict=True):
                row |= {"run": run.name, "kl": kls[method]}
                found.setdefault(method, {}).setdefault(f"{temperature:g}", []).append(row)
            bar.update()
    return found


def wins(config: Config, run: Path, temperature: float) -> dict:
    """How often a run's policy, or the best of its reference's answers by its reward model, beats the grammar."""
    seed = runs.seed_of(run)
    prompts = new_prompts("", config.answers, seed)
    rng = random.Random(f"reviews {seed}")
    written = np.array([reviews.true_reward(reviews.sample_response(rng, prompt)) for prompt in prompts])
    if run.name == "rm":
        policy, tokenizer = models.load(run.parent / "sft")
        policy.to(start("auto", seed))
        asked = tuple(prompt for prompt in prompts for _ in range(BEST_OF))
        said = runs.answers(run.parent / "sft", seed, temperature=temperature, prompts=asked)
        scores = rewards.model_reward(rewards.load_model(run, policy, tokenizer))(said).view(-1, BEST_OF)
        said = [said[BEST_OF * i + int(row.argmax())] for i, row in enumerate(scores)]
    else:
        said = runs.answers(run, seed, temperature=temperature, prompts=tuple(prompts))
    true = rewards.true_reward(said).numpy()
    return {"win_rate": win_rate(true, written)[0], "true_reward": float(true.mean())}


def show(found: dict) -> tuple[str, list]:
    words = {"xlabel": "temperature of sampling", "ylabel": "win rate against the grammar's reviews"}
    lines = figures.table(found, head="win rate at temperature", y="win_rate")
    named = {"rm": f"best of {BEST_OF}", "sft": "SFT"}
    of = [["run", "KL at 1, nats"]]
    for rows in found.values():
        first = next(iter(rows.values()))[0]
        of.append([named.get(first["run"], first["run"]), f"{first['kl']:.1f}"])
    panel = figures.panel(found, title="is it robust to temperature?", y="win_rate", **words)
    return runs.markdown([[*line, *run] for line, run in zip(lines, of, strict=True)]), [panel]


main = runs.experiment(measure, show)

if __name__ == "__main__":
    flags.main(main, Config)
