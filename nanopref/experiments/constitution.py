"""Written rules instead of people (Bai et al. 2022): `python -m nanopref.experiments.constitution`

Both stages of constitutional AI on the film reviews. First self-critique: the SFT model answers, its worst-broken rule
is the critique, another answer that repairs it the revision, and SFT goes on on these. Then RLAIF: rounds of DPO on
pairs that the rules decide. Beside it stands RLAIF without the first stage.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanopref import models
from nanopref.data.formats import read_rows
from nanopref.experiments import runs
from nanopref.experiments.runs import ExperimentFlags, Variant
from nanopref.feedback import rules
from nanopref.feedback.collect import training_prompts
from nanopref.feedback.revise import revise
from nanopref.running import flags
from nanopref.running.files import write_atomic
from nanopref.running.flags import flag, require
from nanopref.running.parallel import start


@dataclass
class Config(ExperimentFlags):
    """Self-critique and SFT on the revisions, then preferences by the rules; how many answers break which rule.

    Example: python -m nanopref.experiments.constitution --rules mine.toml
    """

    out: str = "out/constitution"
    seeds: int = 1
    rules: str = flag("", "a TOML file of rules (default: nanopref/feedback/constitution.toml)")
    drafts: int = flag(2560, "answers that are criticised and revised", least=20)
    tries: int = flag(8, "new answers to each before its fault counts as past repair", least=1)
    rounds: int = flag(4, "of DPO, which share the --prompts", least=1)


def revised(config: Config, folder: Path, seed: int) -> Path:
    """The SFT model after it has learnt its own revisions."""
    path, out = folder / "revisions.jsonl", folder / "revised"
    if not path.exists():
        policy, tokenizer = models.load(folder / "sft")
        prompts = training_prompts("", config.drafts, f"revisions {seed}")
        sampling = {"max_new_tokens": 64, "batch_size": 512, "seed": seed, "tries": config.tries}
        rows = revise(policy.to(start("auto", seed)), tokenizer, prompts, rules.load(config.rules), **sampling)
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
    steps = sum(1 for _ in read_rows(path)) // 16  # each once
    words = ["--data", str(path), "--init", str(folder / "sft"), "--lr", "1e-3", "--steps", str(max(1, steps))]
    runs.launch({out: ["-m", "nanopref.sft", "--seed", str(seed), *words]}, 1)
    return out


def measure(config: Config) -> dict[str, list]:
    """{"rules": their names, way: [share of answers that break each, by round]}"""
    root, names = Path(config.out), [rule.name for rule in rules.load(config.rules)]
    require(len(names) > 1, "--rules: the pictures of one rule would be of little use; give at least two")
    judge = f"rules:{Path(config.rules).absolute()}" if config.rules else "rules"
    words = ["--reward", judge, "--rounds", str(config.rounds), "--answers", "4", "--select", "best-worst"]
    ways = {"rules": Variant(words, kind="")}
    runs.results(config, ways)
    for seed in range(config.seeds):
        revised(config, root.absolute() / f"seed-{seed}", seed)
    ways["revisions-rules"] = Variant([*words, "--init", "SEED/revised"], kind="")
    folders = runs.results(config, ways)
    found = {
        way: np.mean([broken_by_round(folder, names) for folder in paths], axis=0).tolist()
        for way, paths in folders.items()
    }
    return {"rules": names, **found}


def show(found: dict[str, list]) -> tuple[str, list]:
    names, ways = found["rules"], {way: np.array(found[way]) for way in ("rules", "revisions-rules")}

    def draw(axis) -> None:
        for i, name in enumerate(names):
            for (way, shares), style in zip(ways.items(), (":", "-"), strict=True):
                label = name if way == "revisions-rules" else None
                axis.plot(range(len(shares)), shares[:, i], style, color=f"C{i}", marker="o", label=label)
        axis.set(title="answers that break a rule (dotted: no self-critique)", xlabel="rounds of DPO", ylim=(0, None))
        axis.set_xticks(range(len(ways["rules"])))
        axis.legend(frameon=False)

    lines = [["answers that break", *(f"{way}, {when}" for way in ways for when in ("before", "after"))]]
    ends = [shares[i] for shares in ways.values() for i in (0, -1)]
    lines += [[name, *(f"{shares[i]:.1%}" for shares in ends)] for i, name in enumerate(names)]
    return runs.markdown(lines), [draw]


main = runs.experiment(measure, show)


def broken_by_round(folder: Path, names: list[str]) -> list[list[float]]:
    """Which share of answers breaks each rule: of those sampled before each round, and of those after the last."""
    last = json.loads((folder / "report.json").read_text())
    means = [{name: row[f"score {name}"] for name in names} for row in last["rounds"]]
    means.append({name: last["scores"][f"score {name}"]["policy"] for name in names})
    return [[-mean[name] for name in names] for mean in means]


if __name__ == "__main__":
    flags.main(main, Config)
