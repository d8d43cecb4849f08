"""Direct preference optimisation (Rafailov et al. 2023), from nothing to a report: `python train_dpo.py`

Without --data: film reviews (nanopref/reviews.py). A small GPT learns to write them and answers each prompt twice,
simulated people say which answer is better, and DPO moves the GPT towards what they prefer. With --data: your pairs.
With --reward: a reward model compares the answers instead of people.
"""

import nanopref  # noqa: F401  (first, because it sets how torch's threads wait, which torch reads when it is loaded)

# isort: split
import hashlib
import json
import shlex
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

import kernels
from nanopref import data, evaluate, feedback, reviews, run, sft
from nanopref.data import Pair
from nanopref.model import find_model, load_pretrained, save_pretrained
from nanopref.run import Run, UserError, require, say


@dataclass
class Config(run.Options):
    """Train a GPT on preference pairs with DPO: on the built-in film reviews, or on a file."""

    out: str = "out/dpo"
    """the run's folder: model, metrics, report, and the state to resume from"""
    init: str = ""
    """the model to start from, also the reference; default: what --reward was made from, else a new SFT model"""
    sft_steps: int | None = None
    """steps of a new SFT model (default: its own); `python -m nanopref.sft --help` has the rest"""
    data: str = ""
    """JSON Lines: pairs (prompt, chosen, rejected; or dialogues), or labelled texts for --reward; default: sampled"""
    reward: str = ""
    """a reward model (train_rm.py), which compares new answers of the model to the prompts of --data, or of the task"""
    pairs: int = 4096
    """pairs to sample, where --data does not hold them"""
    annotators: int | None = None
    """who vote on each sampled pair (odd); default: 3 people, or the one reward model"""
    noise: float | None = None
    """how often they err, on the scale of the rewards that they see; 0: never; default: 0.5, or 0 for a reward model"""
    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """sigmoid is DPO's own; hinge is SLiC's, ipo is IPO's"""
    beta: float | None = None
    """pull towards the reference: smaller moves further; default: 0.5 on the built-in task, 0.1 on a file"""
    label_smoothing: float = 0.0
    """share of labels taken to be wrong (conservative DPO)"""
    epochs: int | None = None
    """passes over the pairs; default: 2 on the built-in task, 1 on a file"""
    batch_size: int = 64
    """pairs a step, over all processes"""
    micro_batch: int = 16
    """pairs in memory at once; more steps of this size are accumulated"""
    lr: float | None = None
    """peak learning rate; default: 7e-4 on the built-in task, 1e-4 on a file, 5e-6 with --init or --reward too"""
    warmup: int = 10
    """steps of linear warm-up"""
    weight_decay: float = 0.0
    """AdamW's, on matrices"""
    grad_clip: float = 1.0
    """largest norm of the gradient"""
    eval_every: int = 22
    """steps between two looks at the held-out tenth"""
    eval_prompts: int = 512
    """prompts that both models answer for the report"""
    max_new_tokens: int = 64
    """longest response that is sampled"""

    def check(self) -> None:
        super().check()
        run.require_at_least_one(
            self,
            "sft_steps",
            "pairs",
            "annotators",
            "epochs",
            "batch_size",
            "micro_batch",
            "eval_every",
            "eval_prompts",
            "max_new_tokens",
        )
        run.require_positive(self, "beta", "lr", "grad_clip")
        run.require_not_negative(self, "noise", "warmup", "weight_decay")
        require(self.pairs >= 20, f"--pairs must be at least 20, so that some can be held out, not {self.pairs}")
        odd = self.annotators is None or self.annotators % 2 == 1
        require(odd, f"--annotators must be odd, so that a vote cannot tie, not {self.annotators}")
        require(0 <= self.label_smoothing < 0.5, f"--label-smoothing must be in [0, 0.5), not {self.label_smoothing}")
        require(not self.label_smoothing or self.loss == "sigmoid", "--label-smoothing belongs to --loss sigmoid alone")

    def resolved(self) -> "Config":
        """The defaults that depend on other flags, filled in."""
        init = self.init or feedback.made_from(self.reward)
        task = {"beta": 0.5, "epochs": 2, "lr": 7e-4}
        file = {"beta": 0.1, "epochs": 1, "lr": 5e-6 if init else 1e-4}
        defaults = file if self.data else task
        defaults |= {"annotators": 1, "noise": 0.0} if self.reward else {"annotators": 3, "noise": 0.5}
        return replace(self, init=init, **{k: v for k, v in defaults.items() if getattr(self, k) is None})


def train(config: Config) -> None:
    # What can be wrong is found before anything is written.
    config.check()
    config = config.resolved()
    this = Run(config)
    device = run.start(config.device, config.seed)
    new_prompts = evaluate.new_prompts(config.data, config.eval_prompts, config.seed)
    sampled = bool(config.reward or not config.data)
    if not sampled:
        pairs, notes = data.read_pairs(config.data)
        pairs, held_out_pairs = data.split(pairs)  # the same tenth that SFT holds out
    if config.init:
        policy, tokenizer = load_pretrained(config.init)
        policy.to(device)
    reward_model = None
    if config.reward:
        find_model(config.reward)  # so that a missing folder is called that
        require(config.init, "--reward: name the policy that it was trained for with --init")
        reward_model = evaluate.load_reward_model(config.reward, policy, tokenizer)
    this.begin()

    # 1. π_SFT: where the policy starts, and the reference that it is held to.
    if not config.init:
        policy, tokenizer = load_pretrained(sft.first(config, this))
        policy.to(device)

    # 2. Pairs y_w ≻ y_l: two responses of π_SFT to each prompt, and a label.
    if sampled:
        pairs, notes = feedback.collected(config, this, policy, tokenizer, reward_model)
        pairs, held_out_pairs = data.split(pairs)
    train_pairs, cut = data.encode_pairs(pairs, tokenizer, policy.config.block_size)
    held_out, cut_held_out = data.encode_pairs(held_out_pairs, tokenizer, policy.config.block_size)
    notes += cut + cut_held_out
    say(f"DPO: {len(train_pairs):,} pairs, {len(held_out):,} more held out")
    for note, count in notes.items():
        say(f"  {count:,} {note}")

    # 3. log π_ref of both responses of every pair, once. After this no reference model is held.
    with this.stage("reference"), kernels.use(config.kernels):
        reference = reference_logprobs(this.folder / "reference.safetensors", policy, train_pairs + held_out)
        reference, held_out_reference = reference.to(device).split([len(train_pairs), len(held_out)])

    # 4. Descend -log σ(β log π_θ(y_w|x)/π_ref(y_w|x) - β log π_θ(y_l|x)/π_ref(y_l|x)).
    optimizer = run.adamw(policy, config.lr, config.weight_decay, betas=(0.9, 0.99))  # a long memory: labels are noisy
    steps = config.epochs * -(-len(train_pairs) // config.batch_size)
    lengths = data.pair_lengths(train_pairs)
    tokens = [sum(len(x) + len(y) for x, y in pair) for pair in train_pairs]
    start = this.load(policy, optimizer)
    batches = run.batches(len(train_pairs), config.batch_size, steps, config.seed, start)
    with this.stage("dpo"), kernels.use(config.kernels):
        for step, rows in this.steps(batches, steps, policy, optimizer, "DPO"):
            began = time.monotonic()
            lr = run.set_lr(optimizer, config.lr, step, steps, config.warmup)
            totals = torch.zeros(4, device=device)
            for piece in data.my_micro_batches(rows, lengths, config.micro_batch):
                losses, chosen, rejected = pair_losses(policy, train_pairs, reference, piece, config)
                (losses.sum() / len(rows)).backward()  # a mean over the batch of all pieces and processes
                totals += torch.stack(
                    [x.sum() for x in (losses.detach(), evaluate.is_right(chosen - rejected), chosen, rejected)]
                )
            run.sum_gradients(policy)
            loss, accuracy, chosen, rejected = (run.sum_processes(totals) / len(rows)).tolist()
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.grad_clip).item()
            this.stop_if_not_finite(step, loss + norm, policy, optimizer)
            optimizer.step()
            optimizer.zero_grad()

            metrics = {"loss": loss, "accuracy": accuracy, "margin": chosen - rejected}
            metrics |= {"chosen_reward": chosen, "rejected_reward": rejected, "grad_norm": norm, "lr": lr}
            metrics["tokens_per_second"] = sum(tokens[i] for i in rows) / (time.monotonic() - began)
            if (step + 1) % config.eval_every == 0 or step + 1 == steps:
                metrics |= judge(policy, held_out, held_out_reference, config)
            this.log(step + 1, metrics)

    # 5. What came of it.
    if run.rank() == 0:
        save_pretrained(policy, tokenizer, this.folder / "model")
        report(config, this, policy, tokenizer, new_prompts, held_out_pairs, notes, reward_model)


def pair_losses(policy, pairs, reference, rows, config):
    """Losses, chosen and rejected implicit rewards, each [b], of the pairs with these row numbers."""
    chosen, rejected = zip(*(pairs[i] for i in rows), strict=True)
    inputs, targets, mask = data.collate(chosen + rejected).to(policy.device)  # one forward pass for both sides
    with run.autocast(policy.device):
        logprobs = kernels.sequence_logprobs(policy.hidden(inputs), policy.unembedding, targets, mask)
    return kernels.dpo_loss(
        *logprobs.chunk(2),
        *reference[rows].unbind(1),
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        loss=config.loss,
    )


@torch.no_grad()
def judge(policy, pairs, reference, config) -> dict[str, float]:
    """Loss, accuracy and margin of the implicit rewards on held-out pairs."""
    lengths = data.pair_lengths(pairs)
    pieces = data.micro_batches(list(range(len(pairs))), lengths, config.micro_batch)
    results = [pair_losses(policy, pairs, reference, piece, config) for piece in pieces]
    losses, chosen, rejected = (torch.cat(parts) for parts in zip(*results, strict=True))
    means = torch.stack([x.mean() for x in (losses, evaluate.is_right(chosen - rejected), chosen - rejected)]).tolist()
    return dict(zip(["held_out_loss", "held_out_accuracy", "held_out_margin"], means, strict=True))


def reference_logprobs(path: Path, model, pairs) -> torch.Tensor:
    """log π_ref(y_w|x), log π_ref(y_l|x) -> [N, 2]; kept in a file, so that a resumed run needs no reference model.

    Raises UserError where the file was made for other pairs.
    """
    digest = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
    if run.rank() == 0 and not path.exists():
        chosen, rejected = zip(*pairs, strict=True)
        logprobs = evaluate.response_logprobs(model, chosen + rejected, "log π_ref")
        logprobs = torch.stack(logprobs.chunk(2), 1).contiguous()
        run.write_atomic(path, save({"logprobs": logprobs}, metadata={"pairs": digest}))
    run.barrier()
    try:
        with safe_open(path, "pt") as file:
            found, logprobs = file.metadata()["pairs"], file.get_tensor("logprobs")
    except (SafetensorError, TypeError, KeyError):
        raise UserError(f"{path}: damaged; remove it and --resume makes it again") from None
    require(found == digest, "--resume: the data are not those that this run began with; start again with --overwrite")
    return logprobs


def report(
    config: Config, this: Run, policy, tokenizer, prompts: list[str], held_out: list[Pair], notes: Counter, reward_model
) -> None:
    """Let policy and reference answer the same new prompts; write report.json and report.png, print the table."""
    reference, _ = load_pretrained(config.init or this.folder / "sft")
    true_reward = None if config.data else reviews.true_reward
    with this.stage("evaluation"), kernels.use(config.kernels):
        result, answers = evaluate.compare(
            policy,
            reference.to(policy.device),
            tokenizer,
            prompts,
            config.max_new_tokens,
            config.seed,
            true_reward=true_reward,
            score=partial(evaluate.mean_scores, reward_model) if reward_model else None,
        )
    metrics = this.metrics()
    result["held_out"] = {name: metrics[-1][f"held_out_{name}"] for name in ("loss", "accuracy", "margin")}
    if true_reward and not reward_model:
        rewards = np.array([[true_reward(pair.chosen), true_reward(pair.rejected)] for pair in held_out]).T
        best = feedback.best_accuracy(*rewards, noise=config.noise, annotators=config.annotators)
        result["held_out"]["best_accuracy"] = float(best)
    panels = [
        evaluate.curves(metrics, {"loss": "training", "held_out_loss": "held out"}, "DPO loss"),
        evaluate.curves(metrics, {"accuracy": "training", "held_out_accuracy": "held out"}, "pairs ranked right"),
        evaluate.curves(metrics, {"chosen_reward": "chosen", "rejected_reward": "rejected"}, "implicit reward"),
    ]
    if true_reward:
        rewards = {name: [row[f"{name}_true_reward"] for row in answers] for name in ("reference", "policy")}
        panels.append(evaluate.histograms(rewards, "true reward, before and after", "true reward"))
    evaluate.plot(panels, this.folder / "report.png")
    this.report({**result, "data": dict(notes), "samples": answers[:3]})
    evaluate.print_samples(answers[:3])
    say(f"\n{evaluate.comparison_table(result)}\n\n{evaluate.seconds_line(this.seconds)}")
    say(f"model, metrics, report.json and report.png are in {this.folder}; try it:")
    prompt = "your prompt" if config.data else prompts[0]
    say(f"  python -m nanopref.generate --model {shlex.quote(str(this.folder))} --prompt {shlex.quote(prompt)}")


if __name__ == "__main__":
    run.main(train, tyro.cli(Config, description=__doc__))
