"""Direct preference optimisation (Rafailov et al. 2023), from nothing to a report: `python train_dpo.py`

Without --data: film reviews (nanopref/data/reviews.py). A small GPT learns to write them and answers each prompt twice,
simulated people say which answer is better, and DPO moves the GPT towards what they prefer. With --data: your pairs.
With --reward: a reward model compares the answers instead of people.
"""

import nanopref  # noqa: F401, I001  (first, because it sets how torch's threads wait, which torch reads when loaded)

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nanopref import models
from nanopref.data.formats import read_comparisons
from nanopref.data.groups import Encoded, grouped, micro_batches, prepare, split
from nanopref.evaluation.compare import compare, new_prompts
from nanopref.evaluation.report import conclude
from nanopref.feedback import rewards
from nanopref.feedback.collect import ensure_pairs
from nanopref.feedback.voting import best_accuracy
from nanopref.learning import objectives
from nanopref.learning.objectives import OBJECTIVES, ranked_right
from nanopref.models.gpt2 import GPT
from nanopref.models.inference import response_logprobs
from nanopref.running import flags, optim, parallel
from nanopref.running.flags import (
    FeedbackFlags, LearningFlags, RunFlags, SamplingFlags, StartFlags, UserError, flag, require,
)  # fmt: skip
from nanopref.running.folder import Run, write_atomic
from nanopref.sft import ensure_sft


@dataclass
class Config(SamplingFlags, LearningFlags, FeedbackFlags, StartFlags, RunFlags):
    """Train a GPT on preferences with DPO: on the built-in film reviews, or on a file.

    Example: python train_dpo.py --data pairs.jsonl --init gpt2 --out out/mine
    """

    out: str = "out/dpo"
    loss: str = flag(
        "sigmoid",
        "sigmoid is DPO's own, hinge SLiC's, ipo IPO's; plackett-luce takes rankings",
        among=tuple(OBJECTIVES),
    )
    beta: float | None = flag(None, "pull towards the reference: smaller moves further", above=0, task=0.5, file=0.1)
    label_smoothing: float = flag(0.0, "share of labels taken to be wrong (conservative DPO)", least=0, below=0.5)
    reward: str = flag("", "a reward model (of train_rm.py) compares the answers instead of people")
    epochs: int = flag(1, "passes over the pairs", least=1)
    batch_size: int = 32
    lr: float | None = flag(None, "peak learning rate", above=0, task=1e-3, file=2e-4, pretrained=5e-6)
    eval_every: int = 40


def train(config: Config) -> None:
    # What can be wrong is found before anything is written.
    flags.check(config)
    device = parallel.start(config.device, config.seed)
    config.init = config.init or rewards.made_from(config.reward)
    policy, tokenizer, origin = models.load_init(config.init)
    config = flags.resolve(config, origin)
    flags.require_odd(config.annotators)
    objectives.check(config.loss, config.label_smoothing)
    run = Run(config)
    sampled = bool(config.reward or not config.data)
    if not sampled:
        groups, held_out_groups, notes = read_comparisons(config.data)  # the same tenth that SFT holds out
        objectives.check_sizes(config.loss, groups + held_out_groups, ": --loss plackett-luce takes them")
    prompts = new_prompts(config.data, config.eval_prompts, config.seed)
    reward, reward_model = rewards.true_reward, None
    if config.reward:
        models.find(config.reward)  # so that a missing folder is called that
        require(policy is not None, "--reward: name the policy that it was trained for with --init")
        reward_model = rewards.load_model(config.reward, policy.to(device), tokenizer)
        reward = rewards.model_reward(reward_model, batch_size=4 * config.micro_batch)
    run.begin()

    # 1. π_SFT: where the policy starts, and the reference that it is held to.
    if policy is None:
        policy, tokenizer = models.load(ensure_sft(run))
    policy.to(device)

    # 2. Pairs y_w ≻ y_l: two responses of π_SFT to each prompt, and a label.
    if sampled:
        groups, notes = ensure_pairs(run, policy, tokenizer, reward)
        groups, held_out_groups = split(groups)
    data, held_out = prepare("DPO", groups, held_out_groups, notes, tokenizer, policy.config.block_size)

    # 3. log π_ref of the responses of every group, once. After this no reference model is held.
    with run.stage("reference"):
        path = run.folder / "reference.safetensors"
        reference = reference_logprobs(path, policy, data, held_out, batch_size=4 * config.micro_batch)
        reference, held_out_reference = (x.to(device) for x in reference)

    # 4. Descend -log σ(β log π_θ(y_w|x)/π_ref(y_w|x) - β log π_θ(y_l|x)/π_ref(y_l|x)).
    optimizer = optim.OPTIMIZERS[config.optimizer](policy, config.lr, config.weight_decay, betas=(0.9, 0.99))
    size, lengths = optim.batch_size(config.batch_size, len(data)), data.lengths()
    steps = optim.steps_of(len(data), size, config.epochs)
    with run.stage("dpo"):
        for step, batch in run.steps("DPO", len(data), size, steps, policy, optimizer):
            began = time.monotonic()
            lr = optim.set_lr(optimizer, step, steps, config.warmup)
            totals = torch.zeros(4, device=device)
            for piece in micro_batches(batch, lengths, config.micro_batch, share=True):
                losses, sums = preference_losses(policy, data, reference, piece, config)
                (losses.sum() / len(batch)).backward()  # a mean over the batch of all pieces and processes
                totals += sums
            loss, accuracy, best, worst = (parallel.sum_processes(totals) / len(batch)).tolist()
            (norm,) = run.update(loss, config.grad_clip, list(policy.parameters()))

            metrics = {"loss": loss, "accuracy": accuracy, "margin": best - worst, "chosen_reward": best}
            metrics |= {"rejected_reward": worst, "grad_norm": norm, "lr": lr}
            tokens = int(data.row_lengths[data.rows(batch)].sum())
            metrics["tokens_per_second"] = tokens / (time.monotonic() - began)
            if (step + 1) % config.eval_every == 0 or step + 1 == steps:
                n = len(held_out) if step + 1 == steps else 256  # on the way a part is enough
                metrics |= held_out_metrics(policy, held_out, held_out_reference, n, config)
            run.log(metrics)

    # 5. What came of it.
    if parallel.rank() == 0:
        models.save(policy, tokenizer, run.folder / "model")
        report(run, policy, tokenizer, prompts, held_out_groups, dict(notes), reward if reward_model else None)


def preference_losses(
    policy: GPT, data: Encoded, reference: Tensor, groups: list[int], config: Config
) -> tuple[Tensor, Tensor]:
    """The objective on the implicit rewards β log π_θ(y|x)/π_ref(y|x) of these groups: losses [G]; and the sums over
    them, [4], of loss, share of pairs ranked right, and the rewards of the best and of the worst answer."""
    batch = data.collate(groups).to(policy.device)
    with parallel.autocast(policy.device):
        logprobs = policy(batch.inputs, batch.targets, batch.mask).sum(-1)  # log π_θ(y|x) of each row
    values, there = grouped(logprobs, batch.sizes)  # [G, K]
    baseline, _ = grouped(reference[data.rows(groups)], batch.sizes)
    losses = OBJECTIVES[config.loss].losses(  # a row of nanopref/learning/objectives.py or kernels/reference.py
        values, baseline, there, beta=config.beta, label_smoothing=config.label_smoothing
    )
    with torch.no_grad():
        implicit_rewards = config.beta * (values - baseline)
        worst = implicit_rewards.gather(1, there.sum(1, keepdim=True) - 1)[:, 0]
        figures = losses, ranked_right(implicit_rewards, there), implicit_rewards[:, 0], worst
        return losses, torch.stack([x.sum() for x in figures])


@torch.no_grad()
def held_out_metrics(policy: GPT, data: Encoded, reference: Tensor, n: int, config: Config) -> dict[str, float]:
    """Loss, accuracy and margin of the implicit rewards on the first n groups; each process takes its share."""
    groups, totals = range(min(n, len(data))), torch.zeros(4, device=policy.device)
    for piece in micro_batches(groups, data.lengths(), config.micro_batch, share=True):
        totals += preference_losses(policy, data, reference, piece, config)[1]
    loss, accuracy, best, worst = (parallel.sum_processes(totals) / len(groups)).tolist()
    return {"held_out_loss": loss, "held_out_accuracy": accuracy, "held_out_margin": best - worst}


def reference_logprobs(path: Path, model: GPT, *parts: Encoded, batch_size: int = 64) -> tuple[Tensor, ...]:
    """log π_ref(y|x) of each row of each part; kept in a file, so that a resumed run needs no reference model.

    Raises UserError where the file was made for other data.
    """
    digest = hashlib.sha256("".join(part.digest() for part in parts).encode()).hexdigest()
    if parallel.rank() == 0 and not path.exists():
        logprobs = torch.cat([response_logprobs(model, part, "log π_ref", batch_size) for part in parts])
        write_atomic(path, save({"logprobs": logprobs}, metadata={"data": digest}))
    parallel.barrier()
    try:
        with safe_open(path, "pt") as file:
            found, logprobs = file.metadata()["data"], file.get_tensor("logprobs")
    except (SafetensorError, TypeError, KeyError):
        raise UserError(f"{path}: damaged; remove it and --resume makes it again") from None
    require(found == digest, "--resume: the data are not those that this run began with; start again with --overwrite")
    return logprobs.split([len(part.row_lengths) for part in parts])


def report(
    run: Run, policy: GPT, tokenizer, prompts, held_out_groups, notes: dict, score: rewards.Reward | None
) -> None:
    """Let policy and reference answer the same new prompts; write report.json and report.png, print the table."""
    config = run.config
    reference, _ = models.load(config.init or run.folder / "sft")
    with run.stage("evaluation"):
        result, answers = compare(
            policy, reference.to(policy.device), tokenizer, prompts, max_new_tokens=config.max_new_tokens,
            seed=config.seed, sample_batch=config.sample_batch, batch_size=4 * config.micro_batch,
            true=not config.data, score=score,
        )  # fmt: skip
    last = run.metrics()[-1]
    result |= {"held_out": {name: last[f"held_out_{name}"] for name in ("loss", "accuracy", "margin")}, "data": notes}
    if not config.data and not config.reward:
        truth = rewards.true_rewards(held_out_groups).T
        result["held_out"]["best_accuracy"] = best_accuracy(*truth, noise=config.noise, annotators=config.annotators)
    curves = {
        "DPO loss": {"loss": "training", "held_out_loss": "held out"},
        "pairs ranked right": {"accuracy": "training", "held_out_accuracy": "held out"},
        "implicit reward": {"chosen_reward": "chosen", "rejected_reward": "rejected"},
    }
    conclude(run, result, answers, curves)


if __name__ == "__main__":
    flags.main(train, Config)
