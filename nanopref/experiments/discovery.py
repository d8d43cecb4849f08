"""Margin losses that are searched for instead of derived: `python -m nanopref.experiments.discovery`

DiscoPOP was found by a language model that wrote one loss after the other and was told how each had done (Lu et al.
2024). Here small expressions of z = βh (expressions.py) are mutated: of those that have done best some are drawn, the
best of these has a child, and a short run of `train_dpo.py --loss` says what the child is worth. What counts is what
RLHF maximises, reward less a price for each nat of KL: by reward alone whoever goes far from π_ref would win. DPO and
DiscoPOP are tried at several β on the same pairs, the best of them meet the best that was found on fresh seeds.
"""

import itertools
import json
import math
import random
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from kernels.reference import MARGIN_LOSSES
from nanopref.experiments import expressions, figures, runs
from nanopref.experiments.expressions import KNOWN, Tree
from nanopref.experiments.figures import with_error
from nanopref.experiments.runs import ExperimentFlags, Variant
from nanopref.running import flags
from nanopref.running.files import read_object, write_atomic
from nanopref.running.flags import flag, require

DERIVED = {"dpo": "sigmoid", "discopop": "discopop"}  # what is met, and its row of MARGIN_LOSSES
BETAS = (0.15, 0.3, 0.5, 1.0, 2.0)
SURVIVORS, TOURNAMENT = 20, 3  # the best that may have children, and how many of them are drawn for each
SHORT, LONG = 128, 512  # prompts that a run answers for its report, in the search and on fresh seeds


@dataclass
class Config(ExperimentFlags):
    """Margin losses bred from small expressions; the best beside DPO and DiscoPOP on fresh seeds.

    Example: python -m nanopref.experiments.discovery --candidates 40
    """

    out: str = "out/discovery"
    seeds: int = flag(3, "how many fresh seeds, from 1; the search has 0", least=1)
    prompts: int = 640
    candidates: int = flag(100, "losses that are tried", least=1)
    generation: int = flag(10, "how many are bred at once, from all before", least=1)
    search_seed: int = flag(0, "of what is bred", least=0)
    beta: float = flag(0.5, "of the margin that they see; a factor of z is another", above=0)
    kl_price: float = flag(0.1, "what a nat of KL costs, in std of the true reward", least=0)
    best: int = flag(3, "how many go on to the fresh seeds, which are no relatives in shape", least=1)
    fresh_prompts: int = flag(1280, "prompts there whose answers are judged", least=20)


def run_of(loss: str, beta: float, prompts: int) -> Variant:
    return Variant(["--loss", loss, "--beta", f"{beta:g}", "--eval-prompts", str(prompts)])


def run_of_own(config: Config, name: str, prompts: int) -> Variant:
    return run_of(f"{Path(config.out).absolute()}/candidates/{name}.py:loss", config.beta, prompts)


def measured(folders: list[Path], price: float) -> list[dict]:
    """Gain, KL and fitness of each run that came to figures."""
    found = [runs.read_report(folder) for folder in folders]
    rows = [{k: run[k] for k in ("gain", "kl")} | {"fitness": run["gain"] - price * run["kl"]} for run in found]
    return [row for row in rows if math.isfinite(row["fitness"])]


# ---- the search ------------------------------------------------------------------------------------------------------


def fitness(candidate: dict) -> float:
    """-∞ of one whose run has failed."""
    return candidate.get("fitness", -math.inf)


def dpo_at(config: Config, beta: float) -> Tree:
    """DPO of another β, as an expression of z."""
    return expressions.folded(("neg", ("logsigmoid", ("mul", beta / config.beta, "z"))))


def bred(known: list[dict], n: int, rng: random.Random) -> list[Tree]:
    """So many losses of new shapes, each a mutation of the winner of a tournament among the best so far."""
    found, others = [], [x["tree"] for x in known]
    parents = sorted((x for x in known if fitness(x) > -math.inf), key=fitness, reverse=True)[:SURVIVORS]
    while len(found) < n:
        child = max(rng.sample(parents, min(TOURNAMENT, len(parents))), key=fitness)["tree"]
        for _ in range(rng.choice((1, 1, 2, 3))):
            child = expressions.mutated(child, rng)
        if expressions.is_new(child, [*others, *found]):
            found.append(child)
    return found


def search(config: Config, dpo: list[dict]) -> list[dict]:
    """All candidates in order: name, generation, tree, and figures where its run has come to an end. The first are
    known losses, and mutations of `dpo`, which is DPO at each β. What was bred is in OUT/candidates.json before it
    runs, so that a search that was killed goes on with the same."""
    root, found, number = Path(config.out), [], 0
    while len(found) < config.candidates:
        n = min(config.generation, config.candidates - len(found))
        generations = read_object(root / "candidates.json").get("generations", [])
        if number == len(generations):
            rng = random.Random(f"discovery {config.search_seed} {number}")
            first = [] if number else KNOWN[:n]
            generations.append([*first, *bred([*dpo, *found, *({"tree": x} for x in first)], n - len(first), rng)])
            write_atomic(root / "candidates.json", json.dumps({"generations": generations}) + "\n")
        trees = {f"g{number:02}-{i}": expressions.as_tree(tree) for i, tree in enumerate(generations[number][:n])}
        (root / "candidates").mkdir(exist_ok=True)
        for name, tree in trees.items():
            write_atomic(root / "candidates" / f"{name}.py", expressions.file_of(tree))
        folders = runs.results(config, {name: run_of_own(config, name, SHORT) for name in trees}, [0])
        for name, tree in trees.items():
            (figures_of,) = measured(folders[name], config.kl_price) or ({},)
            found.append({"name": name, "generation": number, "tree": tree} | figures_of)
        number += 1
    return found


def winners(config: Config, candidates: list[dict], dpo: list[dict]) -> list[dict]:
    """The best, each of another shape than those before it, and than DPO."""
    found: list[dict] = []
    for candidate in sorted(candidates, key=fitness, reverse=True):
        apart = expressions.is_new(candidate["tree"], [x["tree"] for x in (*dpo, *found)], 0.15)
        if apart and fitness(candidate) > -math.inf and len(found) < config.best:
            found.append(candidate)
    return found


def measure(config: Config) -> dict:
    settings = {f"{loss} {beta:g}": (loss, beta) for loss in DERIVED for beta in BETAS}
    folders = runs.results(config, {name: run_of(*setting, SHORT) for name, setting in settings.items()}, [0])
    derived = {
        name: {"loss": settings[name][0], "beta": settings[name][1]} | row
        for name in folders
        for row in measured(folders[name], config.kl_price)
    }
    dpo = [row | {"tree": dpo_at(config, row["beta"])} for row in derived.values() if row["loss"] == "dpo"]
    require(bool(dpo), f"--out {config.out}: every run of DPO failed there; their logs say why")
    candidates = search(config, dpo)
    best, going = winners(config, candidates, dpo), {}
    for loss in DERIVED:  # with the β that did best on the pairs on which the others were found
        alike = sorted((-row["fitness"], name) for name, row in derived.items() if row["loss"] == loss)
        going |= {name: run_of(*settings[name], LONG) for _, name in alike[:1]}
    going |= {x["name"]: run_of_own(config, x["name"], LONG) for x in best}
    fresh = replace(config, out=str(Path(config.out) / "fresh"), prompts=config.fresh_prompts)
    folders = runs.results(fresh, going, range(1, config.seeds + 1))
    return {
        "beta": config.beta,
        "kl_price": config.kl_price,
        "derived": derived,
        "candidates": candidates,
        "fresh": {name: measured(found, config.kl_price) for name, found in folders.items()},
    }


# ---- what is shown ---------------------------------------------------------------------------------------------------


def show(found: dict) -> tuple[str, list]:
    candidates = {x["name"]: x | {"tree": expressions.as_tree(x["tree"])} for x in found["candidates"]}
    header = ["", "loss of z = βh", "β", "fitness in the search", "on fresh seeds", "gain there, std", "KL, nats"]
    lines = []
    for name, seeds in found["fresh"].items():
        row = found["derived"].get(name) or candidates[name] | {"beta": found["beta"]}
        text = f"`{expressions.formula(row['tree'])}`" if "tree" in row else ""
        line = [figures.look(row.get("loss", name)).label, text, f"{row['beta']:g}", f"{row['fitness']:+.2f}"]
        for figure, digits, sign in (("fitness", 2, "+"), ("gain", 2, "+"), ("kl", 1, "")):
            line.append(with_error([x[figure] for x in seeds], digits, sign) if seeds else "failed")
        lines.append(line)
    failed = sum("fitness" not in x for x in candidates.values())
    note = f"\nFitness is gain less {found['kl_price']:g} a nat. Of {len(candidates)} losses tried, {failed} failed.\n"
    panels = [partial(population, found=found), partial(shapes, found=found, candidates=candidates)]
    return runs.markdown([header, *lines]) + note, panels


def population(axis, found: dict) -> None:
    """Gain over KL of all that were tried on the search's seed, by generation; a grey line joins what is as good."""
    rows = [x | {"kl": max(0.01, x["kl"])} for x in found["candidates"] if "fitness" in x]  # an estimate may be below 0
    derived = [x | {"kl": max(0.01, x["kl"])} for x in found["derived"].values()]
    colours = [x["generation"] for x in rows]
    points = axis.scatter([x["kl"] for x in rows], [x["gain"] for x in rows], c=colours, s=14, cmap="viridis")
    axis.figure.colorbar(points, ax=axis, label="generation")
    for loss in DERIVED:
        figures.curve(axis, loss, [(x["kl"], [x["gain"]]) for x in derived if x["loss"] == loss], in_order=True)
    going = sorted((x for x in rows if x["name"] in found["fresh"]), key=lambda x: x["kl"])
    for x, place in zip(going, itertools.cycle(((-32, 6), (6, -11), (6, 6)))):  # apart, since they lie close together
        axis.scatter(x["kl"], x["gain"], s=70, facecolors="none", edgecolors="#D55E00", linewidths=1.3)
        axis.annotate(x["name"], (x["kl"], x["gain"]), place, textcoords="offset points", fontsize=7)
    kl = np.geomspace(0.01, 1.3 * max(x["kl"] for x in rows + derived), 200)
    bottom, top = axis.get_ylim()
    for level in np.arange(-1, top, 0.25):
        axis.plot(kl, level + found["kl_price"] * kl, color="grey", linewidth=0.3, zorder=0)
    axis.set(title="the population", xlabel="KL to the reference, nats a response", xscale="log", ylim=(bottom, top))
    figures.plain_log_ticks(axis.xaxis)
    axis.set_xlim(0.8 * min(x["kl"] for x in rows + derived), kl[-1])
    axis.set_ylabel("gain in true reward, std of the reference")
    axis.legend(frameon=False, fontsize=7)


def shapes(axis, found: dict, candidates: dict[str, dict]) -> None:
    """The losses that went on to fresh seeds: 0 where a run begins, and of one deviation, see `expressions.shape`."""
    h = torch.linspace(-10, 10, 201)
    for number, name in enumerate(found["fresh"]):
        if row := found["derived"].get(name):
            y, look = MARGIN_LOSSES[DERIVED[row["loss"]]](h, row["beta"], 0.0), figures.look(row["loss"])
        else:
            y, look = expressions.values(candidates[name]["tree"], found["beta"] * h), figures.look(name, number)
        axis.plot(h, (y - y[100]) / y.std(), color=look.color, linestyle=look.line, linewidth=1.3, label=look.label)
    axis.set(title="the losses", xlabel="margin h of the log-ratios, nats", ylabel="shifted and scaled")
    axis.legend(frameon=False, fontsize=7)


main = runs.experiment(measure, show)

if __name__ == "__main__":
    flags.main(main, Config)
