"""The optimum, known exactly: `python -m nanopref.experiments.exact`

A GPT that answers with at most four of four letters, and the token that ends it: 341 responses, all of which can be
asked. So π* ∝ π_ref e^{r/β} is known, and so is how far from it each method comes. A loss is descended as its
expectation over all comparisons there are, by a policy that has a logit for each token behind each beginning, and so
can be any; PPO, RLOO and TRPO are train_ppo.py on the GPT.

Two do not come to 1e-3 nats. KTO's loss is flat where a good response has become rare (σ has no slope there), so that
some stay rare; its figure is KL(optimum‖π_θ), as its optimum has zeros. And DPO's at β = 1/8: π* is 17 nats away, and
pairs drawn from π_ref hardly hold what it is on, so that the loss says little of it.

Three worlds take 15 minutes on two cores of which others use most; of processor time the fits take 5, the runs 10.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nanopref import models
from nanopref.data.formats import read_prompts
from nanopref.experiments import figures, runs
from nanopref.experiments.enumerated import (
    STEPS,
    TOKENS,
    Case,
    N,
    World,
    cases,
    expected_loss,
    fit,
    fit_slowly,
    kl,
    logprobs,
    make_world,
    objective,
    optimum,
    pairs,
    soft_value,
    table_of,
)  # fmt: skip
from nanopref.experiments.figures import mean_error
from nanopref.experiments.runs import FigureFlags
from nanopref.learning.objectives import Knobs
from nanopref.running import flags
from nanopref.running.flags import flag

COMMON = ["--missing-end", "0", "--max-new-tokens", str(STEPS), "--batch-size", "384", "--minibatch", "128"]
COMMON += ["--micro-batch", "384", "--eval-prompts", "1", "--device", "cpu"]
STEPPED = ["--epochs", "2", "--lr", "3e-3"]
SAMPLED = {  # flags of train_ppo.py
    "ppo": [*STEPPED, "--iterations", "120", "--value-clip", "10"],
    "rloo": [*STEPPED, "--iterations", "120", "--advantage", "rloo", "--group", "8"],
    "trpo": ["--iterations", "45", "--update", "trpo", "--advantage", "rloo", "--group", "8"],
}
SAMPLED["trpo"] += ["--trust-region", "0.05", "--cg-steps", "5"]
STRENGTHS = (0.0, 1.0, 2.0, 4.0)  # of what no reward explains, in logits


@dataclass
class Config(FigureFlags):
    """Each method's distance from the optimum of its objective, where that is known in closed form.

    Example: python -m nanopref.experiments.exact --seeds 1 --beta 1
    """

    out: str = "out/exact"
    seeds: int = flag(3, "how many worlds, from 0: each a reference, a reward and the runs' seed", least=1)
    jobs: int = flag(2, "runs at once", least=1)
    beta: float = flag(1.0, "price of a nat of KL", above=0, most=1)
    betas: tuple[float, ...] = flag((0.125, 0.25, 0.5, 1.0, 2.0), "those at which DPO and RLHF are fitted too", above=0)


# ---- what is measured ------------------------------------------------------------------------------------------------


def figures_of(policy: Tensor, best: Tensor, world: World, beta: float) -> dict[str, float]:
    """Of log-probs [X, N]: the KL to its optimum (from it, where the optimum has zeros), J, and how far the implicit
    reward is from r, less the one number of a prompt by which it may be."""
    _, reference, r = world
    zeros = bool((best == -torch.inf).any())
    off = beta * (policy - reference) - r
    off = off - (best.exp().nan_to_num(0) * off).sum(1, keepdim=True)
    spread = (best.exp() * off**2).sum(1).mean().sqrt()
    found = {
        "kl": kl(best, policy) if zeros else kl(policy, best),
        "way": kl(best, reference) if zeros else kl(reference, best),
    }
    found |= {"J": objective(policy, reference, r, beta).item(), "off": spread.item()}
    return found | {"largest": off.abs().max().item()}


def fitted(world: World, case: Case, steps: int = 60) -> tuple[Tensor, list[tuple[int, Tensor]]]:
    """Descend a case's loss from π_ref."""

    def loss(table: Tensor) -> Tensor:
        return expected_loss(case.loss, logprobs(table), world.reference + case.z0, case.feedback, case.knobs)

    return fit_slowly(world.start, loss) if case.loss == "kto" else fit(world.start, loss, steps)


def ascended(world: World, beta: float, start: Tensor) -> tuple[Tensor, list[tuple[int, Tensor]]]:
    """Ascend J itself."""
    return fit(start, lambda table: -objective(logprobs(table), world.reference, world.rewards, beta))


def exact_methods(world: World, beta: float) -> dict[str, dict]:
    """Of each whose optimum is known the figures, and the KL over gradients."""
    known, found = cases(world, beta), {}
    runs_ = {"rlhf": (known["dpo"].best, lambda: ascended(world, beta, world.start))}
    runs_ |= {name: (case.best, partial(fitted, world, case)) for name, case in known.items()}
    for name, (best, run) in runs_.items():
        table, path = run()
        curve = [(asked, figures_of(logprobs(x), best, world, beta)["kl"]) for asked, x in path]
        found[name] = figures_of(logprobs(table), best, world, beta) | {"curve": curve}
    return found


def at_every_beta(world: World, betas: tuple[float, ...]) -> dict[str, dict[str, float]]:
    """KL to π* of DPO from π_ref, and of RLHF from where the larger β before it ended: from π_ref, a small β finds
    itself where all but one response are too rare to have a gradient. The reward is a number for each response."""
    r = torch.randn(world.rewards.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    world, found, table = world._replace(rewards=r), {}, world.start
    better = torch.sigmoid(r[:, :, None] - r[:, None, :])
    for beta in sorted(betas, reverse=True):
        best = optimum(world.reference, r, beta)
        table, _ = ascended(world, beta, table)
        dpo, _ = fitted(world, Case("sigmoid", pairs(world.reference, better), best, Knobs(beta=beta)))
        found[f"{beta:g}"] = {"rlhf": kl(logprobs(table), best), "dpo": kl(logprobs(dpo), best)}
    return found


def beyond_bradley_terry(world: World, beta: float, strength: float) -> dict[str, float]:
    """Where people prefer in circles too: paper, scissors and stone by the first token, so much on top of r.

    DPO beside RLHF with a reward model fitted to the same pairs, to pairs drawn evenly, and to pairs of DPO's policy;
    and how often DPO wins against π_ref, beside the most that any policy of its KL can (Azar et al. 2023)."""
    _, reference, r = world
    kind = TOKENS[:, 0] % 3
    circle = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64)[(kind[:, None] - kind[None, :]) % 3]
    better = torch.sigmoid(r[:, :, None] - r[:, None, :] + strength * circle)
    dpo = logprobs(fitted(world, Case("sigmoid", pairs(reference, better), reference, Knobs(beta=beta)))[0])

    def reward_model(drawn: Tensor) -> Tensor:
        feedback, zero = pairs(drawn, better), torch.zeros_like(reference)
        return fit(zero, lambda scores: expected_loss("sigmoid", scores, zero, feedback, Knobs()))[0]

    evenly = torch.full_like(reference, 1 / N).log()
    drawn = {"same": reference, "even": evenly, "own": dpo}
    found = {name: kl(dpo, optimum(reference, reward_model(x), beta)) for name, x in drawn.items()}
    wins = (better * reference.exp()[:, None, :]).sum(2)
    low, high = 1e-3, 1e3  # β of the policy that wins most, at DPO's KL
    for _ in range(60):
        middle = (low * high) ** 0.5
        far = kl(optimum(reference, wins, middle), reference) > kl(dpo, reference)
        low, high = (middle, high) if far else (low, middle)
    most = optimum(reference, wins, high)
    rates = {name: (x.exp() * wins).sum(1).mean().item() for name, x in (("dpo", dpo), ("most", most))}
    return found | {"to_most": kl(dpo, most), "nats": kl(dpo, reference)} | {f"wins_{k}": v for k, v in rates.items()}


def measure(config: Config) -> dict:
    root, folders = runs.claim(config), {}
    worlds = [make_world(root / f"seed-{seed}", seed) for seed in range(config.seeds)]
    for seed in range(config.seeds):
        folder = root / f"seed-{seed}"
        words = ["--init", str(folder / "init"), "--data", str(folder / "prompts.jsonl"), "--seed", str(seed)]
        words += ["--reward", f"{folder / 'reward.py'}:score", "--beta", f"{config.beta:g}", *COMMON]
        for name, more in SAMPLED.items():
            folders[folder / name] = [str(runs.SCRIPTS / "train_ppo.py"), *words, *more]
    runs.launch(folders, config.jobs)
    found: dict = {"beta": config.beta, "methods": {}, "best": [], "betas": {}, "circles": {}}
    with ThreadPoolExecutor(config.jobs) as pool:
        of_seeds = list(pool.map(partial(of_seed, config), range(config.seeds), worlds))
    for row in of_seeds:
        found["best"].append(row.pop("best"))
        for table, figures_ in row.items():
            for name, values in figures_.items():
                found[table].setdefault(name, []).append(values)
    return found


def of_seed(config: Config, seed: int, world: World) -> dict[str, dict]:
    """Everything that is fitted in one world, and what came of its runs."""
    _, reference, r = world
    root = Path(config.out).absolute() / f"seed-{seed}"
    best, most = optimum(reference, r, config.beta), soft_value(reference, r, config.beta).mean().item()
    methods, prompts = exact_methods(world, config.beta), read_prompts(root / "prompts.jsonl")[0]
    for name in SAMPLED:
        if runs.is_done(root / name):
            policy, tokenizer = models.load(root / name)
            table = table_of(policy, [tokenizer.encode(x) for x in prompts])
            rows = map(json.loads, (root / name / "metrics.jsonl").read_text().splitlines())
            # J(π*) - J(π) = β KL(π‖π*), and J is what a round has measured
            curve = [(x["step"], (most - x["score"] + config.beta * x["kl"]) / config.beta) for x in rows]
            methods[name] = figures_of(logprobs(table), best, world, config.beta) | {"curve": curve}
    return {
        "best": {"J": objective(best, reference, r, config.beta).item(), "beta_log_Z": most},
        "methods": methods,
        "betas": at_every_beta(world, config.betas),
        "circles": {f"{c:g}": beyond_bradley_terry(world, config.beta, c) for c in STRENGTHS},
    }


# ---- what is shown ---------------------------------------------------------------------------------------------------

TARGETS = dict.fromkeys(SAMPLED, 0.02)  # in nats, of methods that sample; of the others:
TARGET = 1e-3
OWN = {"exponential": "π_ref e^{r/2β}", "ipo": "π_ref e^{P(y≻π_ref)/β}", "kto": "what is good, most"}


def show(found: dict) -> tuple[str, list]:
    methods, beta = found["methods"], found["beta"]
    value = mean_error([row["beta_log_Z"] for row in found["best"]])[0]
    gap = max(abs(row["J"] - row["beta_log_Z"]) for row in found["best"])
    header = ["", "its optimum", "KL of π_ref to it", "KL to it, nats", "target", "J", "|r̂ - r|: of π*, largest"]
    lines = [["π*", "", "", "0", "", f"{value:.4f}", f"J(π*) - β log Z: {gap:.0e}"]]
    for name, rows in methods.items():
        mean, error = mean_error([row["kl"] for row in rows])
        way, value, off, largest = (mean_error([row[key] for row in rows])[0] for key in ("way", "J", "off", "largest"))
        distance = f"{mean:.1e} ± {error:.0e}" if error == error else f"{mean:.1e}"
        explained = "–" if name in OWN else f"{off:.3f}, {largest:.2f}"
        best, target = OWN.get(name, "π*"), TARGETS.get(name, TARGET)
        lines.append([f"`{name}`", best, f"{way:.2f}", distance, f"{target:g}", f"{value:.4f}", explained])
    betas = [["β", "RLHF, KL to π*", "DPO, KL to π*"]]
    for name, rows in sorted(found["betas"].items(), key=lambda item: float(item[0])):
        betas.append([name, *(f"{mean_error([row[key] for row in rows])[0]:.1e}" for key in ("rlhf", "dpo"))])
    apart = ["KL of DPO to RLHF, its reward model fitted to the same pairs", "to even pairs", "to DPO's own"]
    circles = [
        ["strength of the circle, logits", *apart, "wins against π_ref: DPO", "the most at its KL", "KL to that"]
    ]
    for name, rows in found["circles"].items():
        mean = {key: mean_error([row[key] for row in rows])[0] for key in rows[0]}
        kls = (f"{mean[key]:.1e}" if key == "same" else f"{mean[key]:.3f}" for key in ("same", "even", "own"))
        rates = (f"{mean[key]:.1%}" for key in ("wins_dpo", "wins_most"))
        circles.append([name, *kls, *rates, f"{mean['to_most']:.3f}"])

    def draw(names, title: str, xlabel: str, smooth: int):
        def panel(axis) -> None:
            for number, name in enumerate(names):
                shape = figures.look(name, number)
                for i, row in enumerate(methods.get(name, ())):
                    x, y = torch.tensor(row["curve"], dtype=torch.float64).T.unfold(1, smooth, smooth).mean(2)
                    label = shape.label.split(",")[0] if i == 0 else None
                    axis.plot(x, y, color=shape.color, linestyle=shape.line, linewidth=1.2, label=label)
            axis.axhline(TARGETS.get(names[0], TARGET), color="grey", linewidth=0.5, label="target")
            axis.set(title=title, xlabel=xlabel, ylabel="KL to its optimum, nats", yscale="log")
            if any(name in methods for name in names):
                axis.legend(frameon=False, fontsize=7)

        return panel

    def draw_circles(axis) -> None:
        labels = {"same": "RLHF, the same pairs", "even": "RLHF, even pairs", "own": "RLHF, pairs of DPO's policy"}
        labels["to_most"] = "the most wins at its KL"
        for number, (key, label) in enumerate(labels.items()):
            points = [(float(name), [row[key] for row in rows]) for name, rows in found["circles"].items()]
            figures.curve(axis, label, points, number)
        axis.set(title="preferences in circles", xlabel="strength, logits", ylabel="KL(DPO‖what is named), nats")
        axis.set_yscale("symlog", linthresh=1e-4)
        axis.legend(frameon=False, fontsize=7)

    exact = [name for name in methods if name not in SAMPLED]
    panels = [
        draw(exact, f"expected losses, β = {beta:g} (a line a world)", "gradients", 1),
        draw(list(SAMPLED), f"by sampling, β = {beta:g}", "round", 5),
        draw_circles,
    ]
    return "\n".join(runs.markdown(rows) for rows in ([header, *lines], betas, circles)), panels


main = runs.experiment(measure, show)


if __name__ == "__main__":
    flags.main(main, Config)
