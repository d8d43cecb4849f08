"""RLHF against DPO, in numbers instead of adjectives: `python -m nanopref.experiments.compare`

What is said of the two, simpler, cheaper, more stable, more robust, is measured on one task: stages, seconds, memory
and tokens of a run of each; how much a grid of learning rates and β spreads what comes of it; and how both fare on
prompts of another kind than they were trained on. True reward at equal KL, labels needed and wrong labels are read
from `frontier`, `scaling` and `noise`, where these were run.
"""

import json
import math
import random
import re
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from nanopref.data import reviews
from nanopref.evaluation.compare import new_prompts
from nanopref.evaluation.report import Panel
from nanopref.experiments import figures, frontier, runs
from nanopref.experiments.figures import mean_error, with_error
from nanopref.experiments.runs import ExperimentFlags, Variant
from nanopref.feedback import rewards
from nanopref.running import flags
from nanopref.running.files import read_object
from nanopref.running.flags import flag

NAMES = {"dpo": "DPO", "ppo": "RLHF: reward model and PPO"}
GRID = {  # learning rates and β, each around what works
    "dpo": ((3e-4, 1e-3, 3e-3), (0.15, 0.5, 1.5)),
    "ppo": ((1.3e-4, 4e-4, 1.2e-3), (0.03, 0.1, 0.3)),
}
ON_FRONTIER = {"dpo": "dpo-passes", "ppo": "ppo"}  # its methods that learn from the pairs as these do
NETWORKS = {
    "dpo": "1 (π_θ; π_ref is read once, before)",
    "ppo": "4 (π_θ, π_ref, reward model, critic)",
}
NEW_GENRES = "documentary satire biopic fable".split()


@dataclass
class Config(ExperimentFlags):
    """Cost, sensitivity and robustness of DPO and of RLHF with PPO, from the same pairs.

    Example: python -m nanopref.experiments.compare --seeds 1
    """

    out: str = "out/compare"
    prompts: int = 1280
    iterations: int = flag(16, "rounds of PPO", least=1)
    frontier: str = flag("out/frontier", "the folder of that experiment, for reward at equal KL")
    scaling: str = flag("out/scaling", "for labels that are needed")
    wrong: str = flag("out/noise", "for labels that are wrong")


def measure(config: Config) -> dict:
    words = {
        "dpo": [*runs.FEW, *runs.PASSES],
        "ppo": [*runs.FEW, "--reward", "SEED/rm", "--iterations", str(config.iterations)],
    }
    settings = {
        f"{method} {lr:g},{beta:g}": Variant(
            [*words[method], "--lr", f"{lr:g}", "--beta", f"{beta:g}"],
            **({"kind": "", "script": "train_ppo.py"} if method == "ppo" else {}),
        )
        for method, (lrs, betas) in GRID.items()
        for lr in lrs
        for beta in betas
    }
    middle = {method: f"{method} {lrs[1]:g},{betas[1]:g}" for method, (lrs, betas) in GRID.items()}
    # one at a time, since their seconds count; of no use to the grid, whose runs have another number of threads
    alone = replace(config, jobs=1)
    rms = runs.results(alone, {"rm": Variant(runs.FEW_PAIRS, script="train_rm.py")})["rm"]
    timed = runs.results(alone, {f"{method} timed": settings[name] for method, name in middle.items()})
    folders = runs.results(config, settings)
    of_both = [[rm, run] for run in timed["ppo timed"] for rm in rms if rm.parent == run.parent]
    stages = {"dpo": [[run] for run in timed["dpo timed"]], "ppo": of_both}
    elsewhere = {name: read_object(Path(getattr(config, name)) / "results.json") for name in
                 ("frontier", "scaling", "wrong")}  # fmt: skip
    return {
        "grid": runs.by_setting(folders),
        "tried": {method: config.seeds * len(lrs) * len(betas) for method, (lrs, betas) in GRID.items()},
        "cost": {method: [cost(of_seed) for of_seed in stages[method]] for method in NAMES},
        "prompts": {
            kind: {method: [gain(run, kind) for run in folders[middle[method]]] for method in NAMES} for kind in KINDS
        },
        **elsewhere,
    }  # fmt: skip


def cost(stages: list[Path]) -> dict:
    """Of runs that follow one another, without their evaluation: seconds a stage, answers that a model gave, and the
    largest peak of memory, which is that of whole runs."""
    seconds: dict[str, float] = {}
    answers, memory = 0, 0.0
    for run in stages:
        report, settings = json.loads((run / "report.json").read_text()), runs.flags_of(run)
        for stage, spent in report["seconds"].items():
            seconds[stage] = seconds.get(stage, 0) + (spent if stage != "evaluation" else 0)
        memory = max(memory, report["peak_memory_MiB"])
        answers += settings["iterations"] * settings["batch_size"] if "iterations" in settings else 0
        answers += settings["eval_prompts"] if "heads" in settings else 0  # to scale a reward model's scores by
    return {
        "seconds": {stage: spent for stage, spent in seconds.items() if spent},
        "answers": answers,
        "memory": memory,
    }


# ---- prompts of another kind ----------------------------------------------------------------------------------------


def as_trained(prompt: str, rng: random.Random) -> str:
    return prompt


def of_new_genres(prompt: str, rng: random.Random) -> str:
    return re.sub(rf"\b({'|'.join(reviews.GENRES)})\b", lambda _: rng.choice(NEW_GENRES), prompt)


def shorter(prompt: str, rng: random.Random) -> str:
    """A title alone."""
    return f"The {rng.choice(reviews.TITLE_ADJECTIVES)} {rng.choice(reviews.TITLE_NOUNS)}."


def longer(prompt: str, rng: random.Random) -> str:
    return f"{prompt} I had waited years for it."


KINDS = {"as trained": as_trained, "new genres": of_new_genres, "a title alone": shorter, "longer": longer}


def gain(run: Path, kind: str, n: int = 256) -> float:
    """The gain in true reward on prompts of a kind, in deviations of the reference on the usual ones."""
    seed, sft = runs.seed_of(run), run.parent / "sft"
    rng = random.Random(f"{kind} {seed}")
    prompts = tuple(KINDS[kind](prompt, rng) for prompt in new_prompts("", n, seed))
    before, after = (rewards.true_reward(runs.answers(x, seed, prompts=prompts)).mean() for x in (sft, run))
    return float(after - before) / runs.reference_reward(sft, seed)[1]


# ---- the table ------------------------------------------------------------------------------------------------------


def labels_for(rows: dict[str, list[dict]], gain: float) -> str:
    """How many pairs bring this gain first, between the numbers that were tried, on a log scale."""
    points = sorted((int(n), mean_error([run["gain"] for run in seeds])[0]) for n, seeds in rows.items() if seeds)
    if points and gain <= points[0][1]:
        return f"under {points[0][0]:,}"
    for (n, low), (more, high) in pairwise(points):
        if low <= gain <= high:
            return f"{math.exp(np.interp(gain, (low, high), np.log((n, more)))):,.0f}"
    return f"over {points[-1][0]:,}" if points else ""


def column(found: dict, method: str) -> dict[str, str]:
    """What the table says of a method."""
    costs, grid, said = found["cost"][method], found["grid"][method], {}
    stages = dict.fromkeys(stage for run in costs for stage in run["seconds"])
    seconds = {stage: with_error([run["seconds"].get(stage, 0.0) for run in costs], 0) for stage in stages}
    said["stages after SFT and pairs, and their seconds"] = ", ".join(f"{x} {spent}" for x, spent in seconds.items())
    said["seconds together"] = with_error([sum(run["seconds"].values()) for run in costs], 0)
    said["answers sampled while it learns"] = with_error([run["answers"] for run in costs], 0)
    said["peak memory of the whole run, MiB"] = with_error([run["memory"] for run in costs], 0)
    said["networks held while it learns"] = NETWORKS[method]
    for kl in (2, 4, 8) if found["frontier"] else ():
        said[f"gain at {kl} nats, std"] = (
            with_error(frontier.gain_at(found["frontier"][ON_FRONTIER[method]], kl), sign="+") or "–"
        )
    for wanted in (0.5, 1.0, 1.5) if found["scaling"] else ():
        said[f"pairs for a gain of {wanted} std"] = labels_for(found["scaling"]["pairs"][method], wanted)
    means: dict[str, list[float]] = {}  # by β, which says how far a run may go: what the learning rate does to it
    for setting, seeds in grid.items():
        if seeds:
            means.setdefault(setting.partition(",")[2], []).append(mean_error([run["gain"] for run in seeds])[0])
    ranges = (f"{max(gains) - min(gains):.2f}" for gains in means.values())
    said["gain, highest less lowest over learning rates, at each β"] = ", ".join(ranges)
    everything = [gain for gains in means.values() for gain in gains] or [float("nan")]
    said["lowest and highest gain of the grid"] = f"{min(everything):+.2f} to {max(everything):+.2f}"
    tried = found["tried"][method]
    said["runs of the grid that failed"] = f"{tried - sum(map(len, grid.values()))} of {tried}"
    for share, seeds in found["wrong"].get(method, {}).items():
        if share in found["wrong"].get("ppo", {}):
            said[f"gain with {float(share):.0%} of labels wrong"] = with_error([run["gain"] for run in seeds], sign="+")
    for kind, gains in found["prompts"].items():
        said[f"gain on prompts: {kind}"] = with_error(gains[method], sign="+")
    return said


def show(found: dict) -> tuple[str, list]:
    columns = [column(found, method) for method in NAMES]
    lines = [["", *NAMES.values()], *([says, *(said.get(says, "") for said in columns)] for says in columns[0])]
    bars = [
        (method, f"{NAMES[method].partition(':')[0]}\n{kind}".replace(" ", "\n"), gains[method])
        for kind, gains in found["prompts"].items()
        for method in NAMES
    ]
    panels = [heat(found["grid"][method], f"{name.partition(':')[0]}: gain, std") for method, name in NAMES.items()]
    return runs.markdown(lines), [*panels, figures.bars(bars, title="prompts of another kind", ylabel=figures.GAIN)]


def heat(settings: dict[str, list[dict]], title: str) -> Panel:
    """A panel with the mean gain at each learning rate and β, and the KL that it cost."""
    points = {tuple(map(float, name.split(","))): seeds for name, seeds in settings.items()}
    lrs, betas = (sorted({point[i] for point in points}) for i in (0, 1))

    def said(seeds: list[dict]) -> str:
        gains, kls = ([run[name] for run in seeds] for name in ("gain", "kl"))
        return f"{with_error(gains, sign='+')}\n{np.mean(kls):.1f} nats" if seeds else "failed"

    def names(numbers: list[float]) -> list[str]:
        return [f"{x:g}" for x in numbers]

    def draw(axis) -> None:
        cells = [[points.get((lr, beta), []) for lr in lrs] for beta in betas]
        gains = [[np.mean([run["gain"] for run in seeds] or np.nan) / 3 for seeds in row] for row in cells]
        figures.heat(axis, gains, [[said(seeds) for seeds in row] for row in cells], names(lrs), names(betas), size=8)
        axis.set(title=title, xlabel="learning rate", ylabel="β")

    return draw


main = runs.experiment(measure, show)

if __name__ == "__main__":
    flags.main(main, Config)
