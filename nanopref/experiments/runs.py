"""What the experiments share: many runs of the scripts from the same beginnings, and a table of what came of them.

A run that is done is not run again, so an experiment that was stopped goes on when it is started again. One that fails
is said and left out, and the same command tries it anew.
"""

import inspect
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import nanopref
from nanopref import models
from nanopref.data.formats import read_rows
from nanopref.data.groups import write_groups
from nanopref.evaluation import report
from nanopref.evaluation.best_of_n import by_prompt, curve
from nanopref.evaluation.compare import new_prompts
from nanopref.feedback import rewards
from nanopref.feedback.collect import collect, training_prompts
from nanopref.learning.objectives import ANSWERS
from nanopref.models.sampling import Answer, respond
from nanopref.running import flags, terminal
from nanopref.running.files import read_object, write_atomic
from nanopref.running.flags import flag, require
from nanopref.running.parallel import progress, say, start

SCRIPTS = Path(nanopref.__file__).parent.parent


FEW = ["--eval-prompts", "256"]  # for a report that is a point of a figure
PASSES = ["--epochs", "3"]  # over a thousand pairs, of policies and reward models alike
FEW_PAIRS = ["--batch-size", "16", *PASSES]  # train_rm.py's own defaults are for several thousand
FREE = ("out", "seeds", "jobs", "redraw", "losses", "candidates")  # flags with which an experiment goes on


@dataclass
class FigureFlags:
    out: str = flag("", "the experiment's folder: its runs, table.md, results.json and plot.png")
    redraw: bool = flag(False, "run nothing: draw again what results.json in --out says")


@dataclass
class ExperimentFlags(FigureFlags):
    seeds: int = flag(3, "how many seeds, from 0", least=1)
    jobs: int = flag(os.cpu_count() or 1, "runs at once, which share the processor's cores", least=1)
    prompts: int = flag(2560, "prompts whose answers are judged", least=20)
    annotators: int = flag(3, "who vote on each answer (odd)", least=1)
    noise: float = flag(0.5, "how often they err, in units of reward; 0: never", least=0)


class Variant(NamedTuple):
    """A run of a script: its flags, the kind of feedback that it reads and what is done to that before; or no kind,
    where it asks for itself. SEED in a flag is the folder of the runs of its seed, NUMBER that seed."""

    words: list[str]
    kind: str = "pairs"
    change: Callable[[list[dict], random.Random], list[dict]] = lambda rows, rng: rows
    script: str = "train_dpo.py"


def results(
    config: ExperimentFlags, variants: dict[str, Variant], seeds: Sequence[int] | None = None
) -> dict[str, list[Path]]:
    """The folders of finished runs, OUT/seed-…/NAME, of each variant; what failed is left out."""
    flags.require_odd(config.annotators)
    root, commands = claim(config), {}
    seeds = range(config.seeds) if seeds is None else seeds
    for seed in seeds:
        folder = root / f"seed-{seed}"
        launch({folder / "sft": ["-m", "nanopref.sft", "--seed", str(seed)]}, 1)
        for name, variant in variants.items() if is_done(folder / "sft") else ():
            words = ["--seed", str(seed), "--init", str(folder / "sft")]
            if variant.kind:
                feedback, judged = sampled(config, folder / "sft", seed, variant.kind), folder / f"{name}.jsonl"
                rows = variant.change([row for _, row in read_rows(feedback)], random.Random(seed))
                write_atomic(judged, "".join(json.dumps(row) + "\n" for row in rows))
                words += ["--judged", str(judged)]
            elif variant.script != "train_ppo.py":
                words += ["--prompts", str(config.prompts)]
            words += [word.replace("SEED", str(folder)).replace("NUMBER", str(seed)) for word in variant.words]
            commands[folder / name] = [str(SCRIPTS / variant.script), *words]
    launch(commands, config.jobs)
    everywhere = [root / f"seed-{seed}" for seed in seeds]
    return {name: [folder / name for folder in everywhere if is_done(folder / name)] for name in variants}


def claim(config: FigureFlags) -> Path:
    """The experiment's folder. Raises UserError where that holds another, or one with other flags."""
    root = Path(config.out).absolute()
    settings = {name: value for name, value in asdict(config).items() if name not in FREE}
    settings["experiment"] = Path(inspect.getfile(type(config))).stem
    path, content = root / "config.json", json.dumps(settings, indent=2) + "\n"
    same = not path.exists() or path.read_text() == content
    require(same, f"--out {root}: holds runs of another experiment, or with other flags; choose another, or remove it")
    root.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content)
    return root


def is_done(run: Path) -> bool:
    return (run / "report.json").exists()


def seed_of(run: Path) -> int:
    """Of a run's folder, OUT/seed-…/NAME."""
    return int(run.parent.name.removeprefix("seed-"))


def sampled(config: ExperimentFlags, sft: Path, seed: int, kind: str) -> Path:
    """What people say of answers of the SFT model: as train_dpo.py would sample it, but once for all variants."""
    path = sft.parent / f"{kind}.jsonl"
    if not path.exists():
        policy, tokenizer = models.load(sft)
        prompts = training_prompts("", config.prompts, f"pairs {seed}")
        groups, _ = collect(
            policy.to(start("auto", seed)), tokenizer, prompts, rewards.alone(rewards.true_reward), feedback=kind,
            answers=ANSWERS[kind], noise=config.noise, annotators=config.annotators, max_new_tokens=64,
            sample_batch=512, seed=seed,
        )  # fmt: skip
        write_atomic(path, write_groups(groups))
    return path


def launch(commands: dict[Path, list[str]], jobs: int) -> None:
    """Run Python with these words for each folder that has no report yet, so many at once. What fails is said, and does
    not end the others."""
    waiting = {out: words for out, words in commands.items() if not is_done(out)}
    if not waiting:
        return
    # as many threads however many of these runs are left, since they decide how sums are rounded
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // min(jobs, len(commands))))}

    def run(out: Path) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        log = out.parent / f"{out.name}.log"
        with log.open("w") as f:
            command = [sys.executable, *waiting[out], "--out", str(out), "--resume"]
            subprocess.run(command, stdout=f, stderr=f, env=os.environ | threads, cwd=SCRIPTS, check=False)
        if is_done(out):
            shutil.rmtree(out / "state", ignore_errors=True)  # nobody goes on with it
        else:
            last = terminal.line(log.read_text(errors="replace").strip().rpartition("\n")[2])
            failed.append(f"{out.parent.name}/{out.name} failed ({last or 'without a word'}); all of it: {log}")
            say(failed[-1])
        bar.update()

    failed: list[str] = []
    with ThreadPoolExecutor(jobs) as pool, progress("runs", len(waiting), "run") as bar:
        try:
            list(pool.map(run, waiting))
        finally:  # Ctrl-C, which the runs under way have heard themselves
            pool.shutdown(cancel_futures=True)
    if failed:
        say(f"{len(failed)} of {len(waiting)} runs failed and are left out; the same command tries them again")


def experiment(
    measure: Callable[[Any], dict], show: Callable[[dict], tuple[str, Sequence[report.Panel]]]
) -> Callable[[Any], None]:
    """What an experiment does with its flags: measure, and show what was found as a table and panels; with --redraw
    what results.json says. `measure` gives what JSON can hold."""

    def main(config: FigureFlags) -> None:
        flags.check(config)
        path = Path(config.out) / "results.json"
        if not config.redraw:
            found = measure(config)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(found, indent=2) + "\n")
        found = read_object(path)
        require(bool(found), f"--redraw: {path}: nothing was measured there yet; leave the flag out")
        table, panels = show(found)
        report.plot(panels, Path(config.out) / "plot.png")
        write_atomic(Path(config.out) / "table.md", table)
        say(f"\n{table}\nin {config.out}: table.md, results.json, plot.png")

    return main


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table of which the first line is the header."""
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


@cache
def answers(
    folder: Path, seed: int, n: int = 512, *, temperature: float = 1.0, prompts: tuple[str, ...] = ()
) -> list[Answer]:
    """What the model in a folder says to these prompts, or to n on which none is trained."""
    policy, tokenizer = models.load(folder)
    sampling = {"max_new_tokens": 64, "batch_size": 512, "seed": seed, "temperature": temperature}
    asked = list(prompts) or new_prompts("", n, seed)
    return respond(policy.to(start("auto", seed)), tokenizer, asked, stream="compared", **sampling)


def reference_reward(sft: Path, seed: int) -> tuple[float, float]:
    """Mean and deviation of the SFT model's true reward, from which gains are counted."""
    found = rewards.true_reward(answers(sft, seed))
    return float(found.mean()), float(found.std(correction=0))


def best_of_n(rm: Path, n: int, prompts: int) -> list[dict[str, float]]:
    """Of best-of-1, 2, 4 … n by a reward model, from 4n answers of the SFT model beside it to each prompt: n, KL, and
    the score and the gain in true reward, in deviations of the reference, by which it is ahead of n = 1."""
    path, seed, sft = rm / "pool.json", seed_of(rm), rm.parent / "sft"
    if not path.exists():
        asked = tuple(x for x in new_prompts("", prompts, seed) for _ in range(4 * n))
        said, (policy, tokenizer) = answers(sft, seed, prompts=asked), models.load(sft)
        score = rewards.model_reward(rewards.load_model(rm, policy.to(start("auto", seed)), tokenizer))
        pools = {"score": by_prompt(score(said), 4 * n), "gain": by_prompt(rewards.true_reward(said), 4 * n)}
        pools["gain"] /= reference_reward(sft, seed)[1]
        rows = curve(pools, n)
        write_atomic(path, json.dumps([row | {x: row[x] - rows[0][x] for x in pools} for row in rows]) + "\n")
    return json.loads(path.read_text())


def read_report(folder: Path) -> dict[str, float]:
    """Of a finished run: the gain in true reward, in deviations of the reference, and what it cost."""
    found = json.loads((folder / "report.json").read_text())
    true = found["true_reward"]
    gain = (true["policy"] - true["reference"]) / true["reference_std"]
    figures = {"gain": gain, "true_reward": true["policy"], "win_rate": true["win_rate"], "kl": found["kl"]}
    figures |= {"tokens": found["response_length"]["policy"], "ended": found["ended"]["policy"]}
    return figures | found.get("held_out", {})


def flags_of(run: Path) -> dict:
    """The flags with which a run was made."""
    return json.loads((run / "config.json").read_text())["flags"]


def by_setting(folders: dict[str, list[Path]], read: Callable[[Path], dict] = read_report) -> dict[str, dict]:
    """What was measured in runs called "METHOD SETTING": {method: {setting: [figures of a run, one a seed]}}."""
    found: dict[str, dict] = {}
    for name, runs in folders.items():
        method, setting = name.rsplit(" ", 1)
        found.setdefault(method, {})[setting] = [read(run) | {"seed": seed_of(run)} for run in runs]
    return found


def comparison(
    make: Callable[[Any], dict[str, list[Path]]], about: dict[str, str] | None = None
) -> Callable[[Any], None]:
    """An experiment whose runs, which `make` makes, are compared as they are: gain, win rate, KL and length of each,
    beside what it is `about`."""

    def measure(config: ExperimentFlags) -> dict[str, list[dict]]:
        return {name: [read_report(run) for run in made] for name, made in make(config).items()}

    return experiment(measure, lambda found: (gains(found, about), [over_kl(found)]))


def gains(found: dict[str, list[dict]], about: dict[str, str] | None = None) -> str:
    """A table of the figures of runs, a line a variant."""
    seeds = max(len(runs) for runs in found.values())
    head = ["", *(["what is descended"] if about else []), f"gain in true reward, std: seeds 0 to {seeds - 1}"]
    lines = [head + ["mean", "win rate", "KL, nats", "tokens"]]
    for name, runs in found.items():
        if runs:
            mean = {name: np.mean([run[name] for run in runs]) for name in ("gain", "win_rate", "kl", "tokens")}
            each = ", ".join(f"{run['gain']:+.2f}" for run in runs)
            figures = f"{mean['gain']:+.2f}", f"{mean['win_rate']:.1%}", f"{mean['kl']:.1f}", f"{mean['tokens']:.0f}"
            lines.append([f"`{name}`", *([about[name]] if about else []), each, *figures])
    return markdown(lines)


def over_kl(found: dict[str, list[dict]]) -> report.Panel:
    """Runs as points, and in a column beside them the names of their means, in order."""

    def draw(axis) -> None:
        means = {
            name: np.mean([(run["gain"], run["kl"]) for run in runs], axis=0) for name, runs in found.items() if runs
        }
        names, side = sorted(means, key=lambda name: means[name][0]), 1.5 * max(0.01, *(kl for _, kl in means.values()))
        for name, place in zip(names, np.linspace(means[names[0]][0], means[names[-1]][0], len(names)), strict=True):
            gain, kl = means[name]
            kl = max(kl, 0.01)  # an estimate may fall below 0
            axis.scatter(*([run[figure] for run in found[name]] for figure in ("kl", "gain")), s=10)
            line = {"arrowstyle": "-", "linewidth": 0.3}
            axis.annotate(name, (kl, gain), (side, place), fontsize=7, verticalalignment="center", arrowprops=line)
        axis.set(
            title="what it gains, what it costs", xlabel="KL, nats", ylabel="gain in true reward, std", xscale="log"
        )
        axis.set_xlim(right=4 * side)

    return draw
