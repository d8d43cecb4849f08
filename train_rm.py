"""Reward model (Ouyang et al. 2022, section 3.5) from preference pairs, from nothing to a report: `python train_rm.py`

Without --data: film reviews (nanopref/reviews.py). A small GPT learns to write them and answers each prompt twice, and
simulated people say which answer is better. With --data: your pairs. A copy of that GPT, with a scalar head read at the
response's last token, learns to score the better answer higher.
"""

import nanopref  # noqa: F401  (first, because it sets how torch's threads wait, which torch reads when it is loaded)

# isort: split
import shlex
from dataclasses import dataclass, replace

import numpy as np
import torch
import tyro

from nanopref import data, evaluate, feedback, losses, reviews, run, sft
from nanopref.data import Pair
from nanopref.model import ScalarGPT, load_pretrained, save_pretrained
from nanopref.run import Run, require, say


@dataclass
class Config(run.Options):
    """Train a reward model on preference pairs: on the built-in film reviews, or on a file."""

    out: str = "out/rm"
    """the run's folder: model, metrics, report, and the state to resume from"""
    init: str = ""
    """the model to start from, whose responses have mean score 0; default: an SFT model is trained first, in OUT/sft"""
    sft_steps: int | None = None
    """steps of that SFT model (default: its own); `python -m nanopref.sft --help` has the rest"""
    data: str = ""
    """JSON Lines: pairs (prompt, chosen, rejected; or dialogues), or labelled texts (text, label); default: sampled"""
    pairs: int = 8192
    """built-in task: pairs to sample"""
    annotators: int = 3
    """built-in task: people who vote on each pair (odd)"""
    noise: float = 0.5
    """built-in task: how often people err, on the scale of the true reward; 0: never"""
    margin: float = 0.0
    """ask the better answer to score higher by this much, times the pair's own `margin` where the file has one"""
    heads: int = 1
    """scalar heads, each trained on its own resampling of the pairs; the score is their mean, their spread its doubt"""
    epochs: int | None = None
    """passes over the pairs; default: 2 on the built-in task, 1 on a file"""
    batch_size: int = 64
    """pairs a step, over all processes"""
    micro_batch: int = 16
    """pairs in memory at once; more steps of this size are accumulated"""
    lr: float | None = None
    """peak learning rate; default: 1e-3 on the built-in task, 1e-4 on a file, 1e-5 for a file with --init"""
    warmup: int = 10
    """steps of linear warm-up"""
    weight_decay: float = 0.0
    """AdamW's, on matrices"""
    grad_clip: float = 1.0
    """largest norm of the gradient"""
    eval_every: int = 22
    """steps between two looks at the held-out tenth"""
    eval_prompts: int = 512
    """prompts of the training pairs that the reference answers, to set the scale of the scores"""
    max_new_tokens: int = 64
    """longest response that is sampled"""

    def check(self) -> None:
        super().check()
        counts = ("sft_steps", "pairs", "annotators", "heads", "epochs", "batch_size", "micro_batch", "eval_every")
        run.require_at_least_one(self, *counts, "eval_prompts", "max_new_tokens")
        run.require_positive(self, "lr", "grad_clip")
        run.require_not_negative(self, "noise", "margin", "warmup", "weight_decay")
        require(self.pairs >= 20, f"--pairs must be at least 20, so that some can be held out, not {self.pairs}")
        require(self.eval_prompts > 1, "--eval-prompts must be at least 2: the spread of scores is measured")
        require(self.heads <= 64, f"--heads must be at most 64, not {self.heads}")
        require(self.annotators % 2 == 1, f"--annotators must be odd, so that a vote cannot tie, not {self.annotators}")

    def resolved(self) -> "Config":
        """The defaults that depend on other flags, filled in."""
        task = {"epochs": 2, "lr": 1e-3}
        file = {"epochs": 1, "lr": 1e-5 if self.init else 1e-4}
        defaults = file if self.data else task
        return replace(self, **{k: v for k, v in defaults.items() if getattr(self, k) is None})


def train(config: Config) -> None:
    # What can be wrong is found before anything is written.
    config.check()
    config = config.resolved()
    this = Run(config)
    device = run.start(config.device, config.seed)
    if config.data:
        pairs, held_out_pairs, notes = data.read_comparisons(config.data)  # the tenth that SFT and DPO hold out
    if config.init:
        reference, tokenizer = load_pretrained(config.init)
    this.begin()

    # 1. π_SFT, where the reward model starts and whose responses it is to judge.
    if not config.init:
        reference, tokenizer = load_pretrained(sft.first(config, this))
    reference.to(device)

    # 2. Pairs y_w ≻ y_l: two responses of π_SFT to each prompt, and a label.
    if not config.data:
        pairs, notes = feedback.collected(config, this, reference, tokenizer)
        pairs, held_out_pairs = data.split(pairs)
    train_pairs, cut = data.encode_pairs(pairs, tokenizer, reference.config.block_size)
    held_out, cut_held_out = data.encode_pairs(held_out_pairs, tokenizer, reference.config.block_size)
    margins = config.margin * torch.tensor([pair.margin for pair in pairs], device=device)
    notes += cut + cut_held_out
    say(f"reward model: {len(train_pairs):,} pairs, {len(held_out):,} more held out")
    for note, count in notes.items():
        say(f"  {count:,} {note}")

    # 3. Responses of the reference, over which the scores will have mean 0 and standard deviation 1.
    with this.stage("reference"):
        prompts = list(dict.fromkeys(prompt for pair in pairs for prompt in pair.prompts))[: config.eval_prompts]
        baseline = evaluate.respond(reference, tokenizer, prompts, config.max_new_tokens, config.seed, "reference")

    # 4. Descend -log σ(r(x, y_w) - r(x, y_l) - m).
    torch.manual_seed(config.seed)
    model = ScalarGPT(reference, config.heads).to(device)  # from here on the reference's weights are the model's
    # Each head counts each pair 0, 1, 2 … times, as often as a resampling of all pairs would (Osband et al. 2016).
    counts = torch.ones(len(train_pairs), config.heads, device=device)
    if config.heads > 1:
        counts = torch.poisson(counts, run.generator(config.seed, "heads", device))
    optimizer = run.adamw(model, config.lr, config.weight_decay, betas=(0.9, 0.99))  # a long memory: labels are noisy
    steps = config.epochs * -(-len(train_pairs) // config.batch_size)
    lengths = data.pair_lengths(train_pairs)
    start = this.load(model, optimizer)
    batches = run.batches(len(train_pairs), config.batch_size, steps, config.seed, start)
    with this.stage("reward model"):
        for step, rows in this.steps(batches, steps, model, optimizer, "reward model"):
            lr = run.set_lr(optimizer, config.lr, step, steps, config.warmup)
            totals = torch.zeros(3, device=device)
            for piece in data.my_micro_batches(rows, lengths, config.micro_batch):
                chosen, rejected = pair_scores(model, [train_pairs[i] for i in piece])  # [b, heads]
                loss = losses.bradley_terry_loss(chosen, rejected, margins[piece, None]) * counts[piece]
                (loss.mean(1).sum() / len(rows)).backward()  # a mean over the batch of all pieces and processes
                gap = (chosen - rejected).detach().mean(1)
                totals += torch.stack([loss.detach().mean(1).sum(), evaluate.is_right(gap).sum(), gap.sum()])
            run.sum_gradients(model)
            loss, accuracy, gap = (run.sum_processes(totals) / len(rows)).tolist()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).item()
            this.stop_if_not_finite(step, loss + norm, model, optimizer)
            optimizer.step()
            optimizer.zero_grad()

            metrics = {"loss": loss, "accuracy": accuracy, "score_gap": gap, "grad_norm": norm, "lr": lr}
            if (step + 1) % config.eval_every == 0 or step + 1 == steps:
                chosen, rejected = held_out_scores(model, held_out).mean(2).unbind(1)
                metrics["held_out_loss"] = losses.bradley_terry_loss(chosen, rejected).mean().item()
                metrics["held_out_accuracy"] = evaluate.is_right(chosen - rejected).mean().item()
            this.log(step + 1, metrics)

    # 5. What came of it; then the scale, folded into the weights so that whoever opens the folder has it too.
    if run.rank() == 0:
        scores = evaluate.response_scores(model, baseline)
        shift = scores.mean(0)  # of each head; but one scale for all, that of their mean, which is the score
        spread = scores.mean(1).std(correction=0)
        scale = torch.where(spread > 1e-6, spread, 1.0).expand_as(shift)  # responses that all score alike have no scale
        model.rescale(shift.to(device), scale.to(device))
        constants = {"score_shift": shift.tolist(), "score_scale": scale.tolist()}
        save_pretrained(model, tokenizer, this.folder / "model", **constants)
        report(config, this, model, held_out_pairs, held_out, constants | {"data": dict(notes)})


def pair_scores(model: ScalarGPT, pairs) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of the chosen and the rejected answers, each [b, heads], in one forward pass."""
    chosen, rejected = zip(*pairs, strict=True)
    return evaluate.last_scores(model, chosen + rejected).chunk(2)


def held_out_scores(model: ScalarGPT, pairs) -> torch.Tensor:
    """Scores of both answers of each pair, the chosen one first: [N, 2, heads]."""
    scores = evaluate.response_scores(model, [row for pair in pairs for row in pair])
    return scores.view(len(pairs), 2, -1)


def report(config: Config, this: Run, model, pairs: list[Pair], encoded, result: dict) -> None:
    """Judge the model on the held-out pairs; write report.json and report.png, print the table."""
    with this.stage("evaluation"):
        scores = held_out_scores(model, encoded)
    score, doubt = scores.mean(2).flatten().numpy(), scores.std(2, correction=0)
    gap = (score[::2] - score[1::2]) * result["score_scale"][0]  # as it was trained, when σ of it was a probability
    metrics = this.metrics()
    length = np.array([len(y) for pair in encoded for _, y in pair])
    result["held_out"] = {name: metrics[-1][f"held_out_{name}"] for name in ("accuracy", "loss")}
    result["held_out"]["pairs"] = len(pairs)
    result["calibration"] = evaluate.calibration(gap)
    result["length"] = {
        "score_per_token": float(np.polyfit(length, score, 1)[0]),
        "rank_correlation": evaluate.rank_correlation(length, score),
    }
    result["doubt"] = doubt.mean().item()
    panels = [
        evaluate.curves(metrics, {"loss": "training", "held_out_loss": "held out"}, "Bradley-Terry loss"),
        evaluate.curves(metrics, {"accuracy": "training", "held_out_accuracy": "held out"}, "pairs ranked right"),
        evaluate.reliability(result["calibration"], "is it as right as it says?"),
        evaluate.scatter(length, score, "held-out responses: score and length", "tokens", "score"),
    ]
    rows = [("held-out loss", f"{result['held_out']['loss']:.3f}", "nats a pair")]
    note = f"of {len(pairs):,}"
    if not config.data:
        rewards = np.array([[reviews.true_reward(pair.chosen), reviews.true_reward(pair.rejected)] for pair in pairs])
        best = feedback.best_accuracy(*rewards.T, noise=config.noise, annotators=config.annotators)
        result["held_out"]["best_accuracy"] = best
        note += f"; {best:.1%} at best"
        result["rank_correlation"] = evaluate.rank_correlation(rewards.flatten(), score)
        rows.append(("rank correlation with the true reward", f"{result['rank_correlation']:.3f}", ""))
        result["length"]["true_reward_rank_correlation"] = evaluate.rank_correlation(length, rewards.flatten())
        panels.append(evaluate.scatter(rewards.flatten(), score, "held-out responses", "true reward", "score"))
    by_length = f"{result['length']['score_per_token']:+.3f} a token"
    rows = [
        ("held-out pairs ranked right", f"{result['held_out']['accuracy']:.1%}", note),
        *rows,
        ("rank correlation with the length", f"{result['length']['rank_correlation']:.3f}", by_length),
    ]
    if config.heads > 1:
        rows.append(("doubt: the heads' spread", f"{result['doubt']:.3f}", "in standard deviations of the score"))
    evaluate.plot(panels, this.folder / "report.png")
    this.report(result)
    say(f"\n{evaluate.table(rows, ('', 'held out', ''))}\n\n{evaluate.seconds_line(this.seconds)}")
    say(f"model, metrics, report.json and report.png are in {this.folder}; use it:")
    reward, init = shlex.quote(str(this.folder)), shlex.quote(config.init or str(this.folder / "sft"))
    prompts = f" --data {shlex.quote(config.data)}" if config.data else ""
    say(f"  python train_ppo.py --reward {reward} --init {init}{prompts}")


if __name__ == "__main__":
    run.main(train, tyro.cli(Config, description=__doc__))
