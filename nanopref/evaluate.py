"""How good is a policy? Its responses beside the reference's, to the same prompts: `python -m nanopref.evaluate`

Where the task has a true reward, both are judged by it. The KL is measured on the policy's own responses,
KL(π_θ, π_ref) = E_{y ~ π_θ} log π_θ(y|x) - log π_ref(y|x), in nats per response.
"""

import itertools
import math
import random
import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import tyro
from torch import Tensor

import kernels
from nanopref import data, reviews, run
from nanopref.data import Row, encode_prompt
from nanopref.generate import generate_all, response_text
from nanopref.model import GPT, ScalarGPT, load_pretrained
from nanopref.run import progress, say, write_atomic
from nanopref.tokenizer import Tokenizer

matplotlib.use("agg")  # a picture needs no screen
import matplotlib.pyplot as plt


@torch.no_grad()
def response_logprobs(
    model: GPT,
    rows: Sequence[Row],
    description: str = "log-probs",
    batch_size: int = 64,
    temperature: float = 1.0,
) -> Tensor:
    """log π(response | prompt) of (prompt, response) tokens -> [N] on the CPU, with dropout off.

    Rows alike in length share a batch, so little of it is padding.
    """
    training = model.training
    model.eval()
    result = torch.empty(len(rows))
    lengths = [len(prompt) + len(response) for prompt, response in rows]
    with progress(description, len(rows)) as bar:
        for indices in data.micro_batches(list(range(len(rows))), lengths, batch_size):
            inputs, targets, mask = data.collate([rows[i] for i in indices]).to(model.device)
            with run.autocast(model.device):
                logprobs = kernels.sequence_logprobs(
                    model.hidden(inputs), model.unembedding, targets, mask, temperature=temperature
                )
            result[indices] = logprobs.float().cpu()
            bar.update(len(indices))
    model.train(training)
    return result


def last_scores(model: ScalarGPT, rows: Sequence[Row]) -> Tensor:
    """What a reward model says of (prompt, response) tokens at the response's last token: [B, heads], float32."""
    sequences = [prompt + response for prompt, response in rows]
    last = torch.tensor([len(sequence) - 1 for sequence in sequences], device=model.device)
    with run.autocast(model.device):
        scores = model(data.pad(sequences).to(model.device))
    return scores[torch.arange(len(rows), device=model.device), last].float()


@torch.no_grad()
def response_scores(model: ScalarGPT, rows: Sequence[Row], batch_size: int = 64, description: str = "scores") -> Tensor:
    """`last_scores` of any number of rows -> [N, heads] on the CPU, with dropout off."""
    training = model.training
    model.eval()
    result = torch.empty(len(rows), len(model.score.weight))
    lengths = [len(prompt) + len(response) for prompt, response in rows]
    with progress(description, len(rows)) as bar:
        for indices in data.micro_batches(list(range(len(rows))), lengths, batch_size):
            result[indices] = last_scores(model, [rows[i] for i in indices]).cpu()
            bar.update(len(indices))
    model.train(training)
    return result


def mean_scores(model: ScalarGPT, rows: Sequence[Row]) -> list[float]:
    """`response_scores`, the mean over the heads of each row [N]."""
    return response_scores(model, rows).mean(1).tolist()


def load_reward_model(name: str | Path, policy: GPT, tokenizer: Tokenizer) -> ScalarGPT:
    """The reward model of a folder, on the policy's device. Raises UserError where it cannot judge what that writes."""
    model, other = load_pretrained(name, kind=ScalarGPT)
    run.require(other == tokenizer, f"--reward {name}: its tokenizer is not the policy's, so it would misread it")
    model.to(policy.device).eval()
    longest, needed = model.config.block_size, policy.config.block_size
    run.require(longest >= needed, f"--reward {name}: its context of {longest} is less than the policy's {needed}")
    said = response_scores(model, [([tokenizer.end_of_text], [tokenizer.end_of_text])])
    run.require(bool(said.isfinite().all()), f"--reward {name}: gives a score that is no finite number")
    return model


def is_right(gap):
    """1 where the better of two is ahead, 1/2 at a tie: a tensor or an array of differences -> one like it."""
    return (gap > 0) * 1.0 + (gap == 0) * 0.5


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's: the correlation of the ranks, equal values sharing theirs; 0 where one of the two is constant."""

    def ranks(values: Sequence[float]) -> np.ndarray:
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(count) - (count - 1) / 2)[place]

    x, y = ranks(x), ranks(y)
    return float(np.corrcoef(x, y)[0, 1]) if x.std() and y.std() else 0.0


def calibration(gap: np.ndarray, bins: int = 10) -> list[dict[str, float]]:
    """Pairs by how sure a model is, |gap| apart, which of two is better: what it says, σ(|gap|), and how often it is
    right. Bins of equally many pairs, the least sure first; `gap` [N] is positive where the model is right."""
    ordered = np.array(sorted(gap, key=abs), dtype=np.float64)
    return [
        {
            "says": float(np.mean(0.5 * (1 + np.tanh(np.abs(part) / 2)))),
            "right": float(np.mean(is_right(part))),
            "pairs": len(part),
        }
        for part in np.array_split(ordered, min(bins, len(ordered)))
    ]


def win_rate(policy: Sequence[float], reference: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Share of prompts on which the policy's reward is higher, a tie counting half, and Wilson's 95% interval."""
    policy, reference = np.asarray(policy, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    n, z = len(policy), 1.959964
    rate = float(np.mean(is_right(policy - reference)))
    centre, half = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    return rate, (max(low, 0.0), min(high, 1.0))  # rounding may end beyond: 0 of 7 gives -4e-17


def respond(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    seed: int,
    description: str,
    temperature: float = 1.0,
) -> list[Row]:
    """A response to each prompt: (prompt, response) tokens.

    A prompt loses its beginning where it would not leave `max_new_tokens`, but never more than half the context.
    """
    room = max(model.config.block_size - max_new_tokens, model.config.block_size // 2)
    encoded = [encode_prompt(tokenizer, prompt)[-room:] for prompt in prompts]
    with run.autocast(model.device):
        samples = generate_all(
            model.eval(),
            encoded,
            max_new_tokens,
            end_of_text=tokenizer.end_of_text,
            temperature=temperature,
            generator=run.generator(seed, description, model.device),
            description=description,
        )
    return [(prompt, sample.tokens) for prompt, sample in zip(encoded, samples, strict=True)]


def compare(
    policy: GPT,
    reference: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    seed: int,
    *,
    true_reward: Callable[[str], float] | None = None,
    score: Callable[[list], list[float]] | None = None,
    temperature: float = 1.0,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Both models answer all prompts -> (the report's figures, one row a prompt with both answers).

    `true_reward` judges a response's text, `score` the (prompt, response) tokens of all; where both are there, the
    former says who wins. Without them KL and length are what is measured.
    """
    answers = {
        name: respond(model, tokenizer, prompts, max_new_tokens, seed, f"{name} answers", temperature)
        for name, model in (("policy", policy), ("reference", reference))
    }
    log_ratio = response_logprobs(
        policy, answers["policy"], "policy's log-probs", temperature=temperature
    ) - response_logprobs(reference, answers["policy"], "reference's log-probs", temperature=temperature)
    tokens = {name: [response for _, response in rows] for name, rows in answers.items()}
    texts = {name: [response_text(response, tokenizer) for response in rows] for name, rows in tokens.items()}
    ended = {name: [tokenizer.end_of_text in response for response in rows] for name, rows in tokens.items()}
    report: dict[str, Any] = {
        "prompts": len(prompts),
        "prompts_cut": sum(
            x != encode_prompt(tokenizer, p) for p, (x, _) in zip(prompts, answers["policy"], strict=True)
        ),
        "kl": log_ratio.mean().item(),
        "kl_standard_error": (log_ratio.std(correction=0) / math.sqrt(len(prompts))).item(),
        "response_length": {name: float(np.mean([len(r) for r in rows])) for name, rows in tokens.items()},
        "ended": {name: float(np.mean(rows)) for name, rows in ended.items()},
    }
    rows = [
        {"prompt": prompt, "reference": r, "policy": p}
        for prompt, r, p in zip(prompts, texts["reference"], texts["policy"], strict=True)
    ]
    rewards: dict[str, list[float]] = {}
    if score:
        rewards = {name: score(answers[name]) for name in answers}
        report["score"] = {name: float(np.mean(rewards[name])) for name in rewards}
    if true_reward:
        rewards = {name: [true_reward(text) for text in texts[name]] for name in texts}
        report["true_reward"] = {
            "reference": float(np.mean(rewards["reference"])),
            "policy": float(np.mean(rewards["policy"])),
            "reference_std": float(np.std(rewards["reference"])),
            "policy_std": float(np.std(rewards["policy"])),
        }
        for i, row in enumerate(rows):
            row["reference_true_reward"], row["policy_true_reward"] = rewards["reference"][i], rewards["policy"][i]
    if rewards:
        report["win_rate"], report["win_rate_95"] = win_rate(rewards["policy"], rewards["reference"])
    return report, rows


# ---- what the user sees ----------------------------------------------------------------------------------------------


def table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...]) -> str:
    """Columns as wide as they need to be: the first to the left, the others to the right."""
    cells = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    ]
    return "\n".join([lines[0], "─" * len(lines[0]), *lines[1:]])


def comparison_table(report: dict[str, Any]) -> str:
    """Before (the reference) and after (the policy), for the terminal."""
    length, ended = report["response_length"], report["ended"]
    rows = []
    if reward := report.get("true_reward"):
        gain, std = reward["policy"] - reward["reference"], reward["reference_std"]
        note = f"{gain / std:+.2f} std" if std > 0 else ""  # a reference that says nothing has no spread
        rows.append(("true reward", f"{reward['reference']:.2f}", f"{reward['policy']:.2f}", note))
    if score := report.get("score"):
        rows.append(("score", f"{score['reference']:.2f}", f"{score['policy']:.2f}", ""))
    if "win_rate" in report:
        low, high = report["win_rate_95"]
        judge = "true reward" if reward else "score"
        rows.append((f"win rate by {judge}", "", f"{report['win_rate']:.1%}", f"95%: {low:.1%} to {high:.1%}"))
    rows += [
        ("KL to the reference, nats", "0", f"{report['kl']:.2f}", f"± {report['kl_standard_error']:.2f}"),
        ("response length, tokens", f"{length['reference']:.1f}", f"{length['policy']:.1f}", ""),
        ("responses that end", f"{ended['reference']:.1%}", f"{ended['policy']:.1%}", ""),
    ]
    if report["prompts_cut"]:
        rows.append(("prompts cut on the left", "", f"{report['prompts_cut']}", f"of {report['prompts']}"))
    if held_out := report.get("held_out"):
        best = f"{held_out['best_accuracy']:.1%} at best" if "best_accuracy" in held_out else ""
        rows.append(("held-out pairs ranked right", "", f"{held_out['accuracy']:.1%}", best))
        rows.append(("held-out loss", "", f"{held_out['loss']:.3f}", ""))
    return table(rows, ("", "before", "after", ""))


def seconds_line(seconds: dict[str, float]) -> str:
    """Where the time went."""
    parts = " · ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    return f"seconds: {parts} · together {sum(seconds.values()):.0f}"


def side_by_side(row: dict[str, Any], width: int) -> str:
    """One prompt with both answers in two columns."""
    column = (width - 3) // 2
    cells = []
    for name, title in (("reference", "before"), ("policy", "after")):
        reward = row.get(f"{name}_true_reward")
        head = title if reward is None else f"{title}, true reward {reward:.2f}"
        paragraphs = row[name].strip().splitlines() or ["(empty)"]
        cells.append([head, *(line for p in paragraphs for line in textwrap.wrap(p, column) or [""])])
    prompt = textwrap.wrap(row["prompt"].strip()[-3 * width :], width)
    pairs = itertools.zip_longest(*cells, fillvalue="")
    return "\n".join([*prompt, *(f"{left.ljust(column)} │ {right}".rstrip() for left, right in pairs)])


def print_samples(rows: Sequence[dict[str, Any]]) -> None:
    """The prompts with both answers."""
    width = min(120, shutil.get_terminal_size((100, 20)).columns)
    for row in rows:
        say(f"\n{side_by_side(row, width)}")


def plot(panels: Sequence[Callable[[Any], None]], path: Path) -> None:
    """Draw each panel on axes of its own in a PNG that appears whole: three in a row, or four in a square."""
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    rows = -(-len(panels) // columns)
    size = (5 * columns, 3.6 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes.flat, panels, strict=False):
        axis.spines[["top", "right"]].set_visible(False)
        panel(axis)
    write_atomic(path, lambda partial: figure.savefig(partial, dpi=110, format="png"))
    plt.close(figure)


def curves(
    metrics: Sequence[dict[str, float]], names: dict[str, str], title: str, xlabel: str = "step"
) -> Callable[[Any], None]:
    """A panel with one curve for each logged name, {name: legend}, over the steps; sparse ones get markers."""

    def draw(axis) -> None:
        for name, legend in names.items():
            points = [(row["step"], row[name]) for row in metrics if name in row]
            if points:
                marker = "o" if len(points) <= 0.5 * len(metrics) or len(points) == 1 else None
                axis.plot(*zip(*points, strict=True), label=legend, marker=marker, alpha=0.9)
        axis.set(title=title, xlabel=xlabel)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(frameon=False)

    return draw


def histograms(values: dict[str, Sequence[float]], title: str, xlabel: str) -> Callable[[Any], None]:
    """A panel with one histogram for each name, on common bins."""

    def draw(axis) -> None:
        bins = np.histogram_bin_edges(np.concatenate([np.asarray(v) for v in values.values()]), bins=30)
        for name, v in values.items():
            axis.hist(v, bins, alpha=0.6, label=f"{name}, mean {np.mean(v):.2f}")
        axis.set(title=title, xlabel=xlabel, ylabel="responses")
        axis.legend(frameon=False)

    return draw


def scatter(x: Sequence[float], y: Sequence[float], title: str, xlabel: str, ylabel: str) -> Callable[[Any], None]:
    """A panel with a point for each pair of values, and their rank correlation."""

    def draw(axis) -> None:
        axis.scatter(x, y, s=6, alpha=0.35, linewidths=0)
        axis.set(title=f"{title} (ρ = {rank_correlation(x, y):.2f})", xlabel=xlabel, ylabel=ylabel)

    return draw


def reliability(bins: Sequence[dict[str, float]], title: str) -> Callable[[Any], None]:
    """A panel with the `calibration` of a model: on the diagonal it is as often right as it says."""

    def draw(axis) -> None:
        axis.plot([0.5, 1], [0.5, 1], color="grey", linestyle=":")
        axis.plot([b["says"] for b in bins], [b["right"] for b in bins], marker="o")
        axis.set(title=title, xlabel="how sure the model is", ylabel="how often it is right")

    return draw


# ---- the command -----------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Compare policies with a reference: KL, length and, on the built-in task, true reward and win rate."""

    policy: tuple[str, ...] = ("out/dpo",)
    """one or more models: run folders, Hugging Face GPT-2 folders, or names on the hub"""
    reference: str = "out/dpo/sft"
    """the model that they are held against"""
    data: str = ""
    """take the held-out prompts of this file; default: new ones of the built-in task, whose true reward is known"""
    reward: str = ""
    """let a reward model judge the answers too, preferably one that no policy was trained against"""
    prompts: int = 512
    """how many prompts all models answer"""
    max_new_tokens: int = 64
    """longest response that is sampled"""
    seed: int = 0
    """another seed, other prompts and responses"""
    device: str = "auto"
    """auto, cpu or cuda"""


def new_prompts(file: str, n: int, seed: int) -> list[str]:
    """At most n prompts that no stage trains on: of the file's held-out tenth or, without a file, of the built-in task
    (where one in some hundreds has been trained on, of the many there are)."""
    if file:
        return data.read_prompts(file)[1][:n]
    rng = random.Random(f"evaluation {seed}")
    return [reviews.sample_prompt(rng) for _ in range(n)]


def main(config: Config) -> None:
    run.check_seed(config.seed)
    run.require_at_least_one(config, "prompts", "max_new_tokens")
    run.require(len(config.policy) > 0, "--policy: name at least one policy")
    device = run.start(config.device, config.seed)
    prompts = new_prompts(config.data, config.prompts, config.seed)
    true_reward = None if config.data else reviews.true_reward
    models = {name: load_pretrained(name) for name in (config.reference, *config.policy)}
    reference, tokenizer = models[config.reference]
    for name, (_, other) in models.items():
        run.require(other == tokenizer, f"{name} and {config.reference} have different tokenizers")
        same = models[name][0].config.block_size == reference.config.block_size
        run.require(same, f"{name} and {config.reference} have contexts of different length")
    reference.to(device)
    judge = load_reward_model(config.reward, reference, tokenizer) if config.reward else None
    for name in config.policy:
        policy = models[name][0].to(device)
        report, rows = compare(
            policy,
            reference,
            tokenizer,
            prompts,
            config.max_new_tokens,
            config.seed,
            true_reward=true_reward,
            score=partial(mean_scores, judge) if judge else None,
        )
        say(f"\n{name} (after) against {config.reference} (before), {len(prompts)} prompts\n")
        say(comparison_table(report))
    print_samples(rows[:3])


if __name__ == "__main__":
    run.main(main, tyro.cli(Config, description=__doc__))
