"""Win rate over the temperature of sampling (Rafailov et al. 2023, figure 2, right):
`python -m nanopref.experiments.temperature`

The policies of `frontier`, each method with the setting that came nearest to so many nats, answer new prompts at
temperatures from 0 to 1. Against each answer stands a review that the grammar wrote, as human summaries do in the
paper; the true reward says which wins.
"""

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
from nanopref.experiments.runs import ExperimentFlags
from nanopref.feedback import rewards
from nanopref.running import flags
from nanopref.running.files import read_object, write_atomic
from nanopref.running.flags import flag, require
from nanopref.running.parallel import progress, start

BEST_OF = 16  # answers of which best-of-n takes one


@dataclass
class Config(ExperimentFlags):
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
    chosen = {"sft": "sft"}
    for method, settings in measured.items():
        kls = {setting: np.mean([run["kl"] for run in seeds]) for setting, seeds in settings.items() if seeds}
        if method != "best-of-n" and kls:
            chosen[method] = f"{method} {min(kls, key=lambda setting: abs(kls[setting] - config.kl))}"
    places = [(method, name, run) for method, name in chosen.items() for run in sorted(root.glob(f"seed-*/{name}"))]
    places += [("best-of-n", "rm", run) for run in sorted(root.glob("seed-*/rm"))]
    Path(config.out).mkdir(parents=True, exist_ok=True)
    with progress("policies", len(places), "policy") as bar:
        for method, name, run in places:
            path = Path(config.out) / f"{run.parent.name} {name}.json"
            if not path.exists():
                write_atomic(path, json.dumps([wins(config, run, x) for x in config.temperatures]) + "\n")
            for temperature, row in zip(config.temperatures, json.loads(path.read_text()), strict=True):
                found.setdefault(method, {}).setdefault(f"{temperature:g}", []).append(row | {"run": name})
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
    of = ["run", *(next(iter(rows.values()))[0]["run"] for rows in found.values())]
    panel = figures.panel(found, title="is it robust to temperature?", y="win_rate", **words)
    return runs.markdown([[*line, run] for line, run in zip(lines, of, strict=True)]), [panel]


def main(config: Config) -> None:
    flags.check(config)
    runs.present(config, lambda: measure(config), show)


if __name__ == "__main__":
    flags.main(main, Config)
