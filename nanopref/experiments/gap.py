"""What does PPO have that DPO lacks? `python -m nanopref.experiments.gap`

In Rafailov et al. 2023, figure 2, DPO is ahead of PPO at every KL; in `frontier`, from the same pairs, it need not be.
PPO differs in the loss, in that its reward model labels as many answers as one likes, and in that these are the
policy's own. So DPO is given these, one by one: more passes; labels by the same reward model, which has not seen these
answers, as few and more; the same in rounds, of the policy's own answers; and labels by the truth.
"""

from dataclasses import dataclass

from nanopref.experiments import figures, runs
from nanopref.experiments.frontier import at_equal_kl
from nanopref.experiments.runs import ExperimentFlags, Variant
from nanopref.running import flags
from nanopref.running.flags import flag

LABELS = {  # what a run is given, and how it looks
    "people": "people's pairs",
    "ppo": "ppo",  # with that reward model
    "passes": "people's pairs, four passes",
    "rm": "as many by PPO's reward model",
    "rm-many": "four times as many by it",
    "rm-own": "as many as these, of its own answers",
    "true-many": "four times as many by the truth",
}


@dataclass
class Config(ExperimentFlags):
    """DPO with what PPO has: more labels, by its reward model, on answers of its own.

    Example: python -m nanopref.experiments.gap --seeds 1
    """

    out: str = "out/gap"
    prompts: int = 1280
    betas: tuple[float, ...] = flag((0.1, 0.3, 1.0), "of DPO and PPO", above=0)
    iterations: int = flag(24, "rounds of PPO", least=1)


def measure(config: Config) -> dict:
    runs.results(config, {"rm": Variant(runs.FEW_PAIRS, script="train_rm.py")})
    others = ["--seed", "100NUMBER"]  # prompts that the reward model was not fitted on
    few, many = [*others, "--prompts", str(config.prompts)], [*others, "--prompts", str(4 * config.prompts)]
    given = {  # flags, and the kind of feedback that is read
        "people": ([], "pairs"),
        "passes": (["--epochs", "4"], "pairs"),
        "rm": (["--reward", "SEED/rm", *few], ""),
        "rm-many": (["--reward", "SEED/rm", *many], ""),
        "rm-own": (["--reward", "SEED/rm", *many, "--rounds", "8"], ""),
        "true-many": (["--reward", "true", *many], ""),
    }
    variants = {
        f"{name} {beta:g}": Variant([*runs.FEW, *words, "--beta", f"{beta:g}"], kind)
        for name, (words, kind) in given.items()
        for beta in config.betas
    }
    for beta in config.betas:
        words = [*runs.FEW, "--reward", "SEED/rm", "--iterations", str(config.iterations), "--beta", f"{beta:g}"]
        variants[f"ppo {beta:g}"] = Variant(words, kind="", script="train_ppo.py")
    return runs.by_setting(runs.results(config, variants))


def show(found: dict) -> tuple[str, list]:
    named = {label: found[name] for name, label in LABELS.items() if name in found}
    betas = {beta: f"β = {beta}" for rows in found.values() for beta in rows}
    table = runs.markdown(figures.table(named, head=figures.GAIN, sign="+", columns=betas))
    table += "\n" + runs.markdown(figures.table(named, head="KL, nats", y="kl", digits=1, columns=betas))
    words = {"title": "what DPO lacks", "xlabel": "KL to the reference, nats", "ylabel": figures.GAIN}
    return table + "\n" + runs.markdown(at_equal_kl(named, (2, 4, 6))), [figures.panel(named, x="kl", **words)]


main = runs.experiment(measure, show)

if __name__ == "__main__":
    flags.main(main, Config)
