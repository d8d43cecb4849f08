"""Direct preference optimisation (Rafailov et al. 2023) and its kin, from nothing to a report: `python train_dpo.py`

Without --data: film reviews (nanopref/data/reviews.py). A small GPT learns to write them and answers each prompt twice,
simulated people say which answer is better, and DPO moves the GPT towards what they prefer. With --data: your pairs,
rankings, ratings or labels. --reward names who judges instead of people, --loss the objective, a row of the tables in
nanopref/learning/objectives.py. With --rounds the policy answers anew in each: online DPO.
"""

import nanopref  # noqa: F401, I001  (first, because it sets how torch's threads wait, which torch reads when loaded)

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nanopref import models
from nanopref.data.formats import read_feedback
from nanopref.data.groups import Batch, Encoded, encode, grouped, micro_batches, prepare, unrelated
from nanopref.evaluation.compare import compare, new_prompts, setting_of
from nanopref.evaluation.report import DPO_CURVES, conclude
from nanopref.evaluation.samples import watch
from nanopref.feedback import rewards
from nanopref.feedback.collect import asked_in_rounds, best_possible, ensure_feedback
from nanopref.learning import objectives
from nanopref.learning.objectives import LOGPROBS, OBJECTIVES, Knobs
from nanopref.models.language import LM
from nanopref.models.inference import reference_logprobs
from nanopref.running import flags, optim, parallel
from nanopref.running.flags import (
    CODE, FeedbackFlags, LearningFlags, ObjectiveFlags, RewardFlags, RunFlags, SamplingFlags, StartFlags, flag, require,
)  # fmt: skip
from nanopref.running.folder import Run
from nanopref.running.sharding import accumulated
from nanopref.sft import ensure_sft


@dataclass
class Config(SamplingFlags, LearningFlags, ObjectiveFlags, FeedbackFlags, RewardFlags, StartFlags, RunFlags):
    """Train a GPT on preferences with DPO and its kin: on the built-in film reviews, or on a file.

    Example: python train_dpo.py --data pairs.jsonl --init gpt2 --out out/mine
    """

    out: str = "out/dpo"
    loss: str = flag(
        "dpo", "the formulas: README, 'Every other loss'; or a function f(h, beta) of your own, h being the margin of "
        "the log-ratios of the pairs, that gives their losses", among=(*OBJECTIVES, CODE),
    )  # fmt: skip
    beta: float | None = flag(None, "pull towards the reference: smaller moves further (default: by --loss)", above=0)
    logprobs: str | None = flag(None, "rewards by their sum, mean or odds (by --loss)", among=tuple(LOGPROBS))
    reference: str | None = flag(None, "whether π_ref is taken off (by --loss)", among=("model", "none"))
    likelihood: float | None = flag(None, "weight of the chosen answer's loss, nats a token (by --loss)", least=0)
    rounds: int = flag(1, "of answering, judging and learning, which share the --prompts: online DPO", least=1)
    fresh_reference: bool = flag(False, "hold each round to the policy that it began with, not to the run's first")
    epochs: int = flag(1, "passes over the data, in each round", least=1)
    batch_size: int = 32
    lr: float | None = flag(None, "peak learning rate", above=0, task=1e-3, file=2e-4, pretrained=5e-6, adapters=5e-5)
    eval_every: int = 40


class Part(NamedTuple):
    rows: Encoded
    baseline: Tensor  # of each row: what π_ref makes of it


def train(config: Config) -> None:
    # What can be wrong is found before anything is written.
    flags.check(config)
    device = parallel.start(config.device, config.seed, config.dtype, config.parallel)
    config.init = config.init or rewards.made_from([*(config.reward or ()), *(config.chooser or ())])
    policy, tokenizer, origin = models.load_init(config, device)
    objective = objectives.named(config.loss)
    config = objectives.resolve(flags.resolve(config, origin), objective)
    flags.check_people(config)
    run, kinds = Run(config), objectives.kinds(OBJECTIVES | {config.loss: objective})
    if file := config.judged or ("" if config.reward else config.data):
        groups, held_out_groups, notes = read_feedback(file, kinds, config.loss, config.votes, tokenizer)
    prompts = new_prompts(config.data, config.eval_prompts, config.seed, tokenizer)
    require(not file or config.rounds == 1, "--rounds asks who judges anew, and here a file is read")
    require(not config.fresh_reference or config.rounds > 1, "--fresh-reference: one round has but one reference")
    require(config.prompts >= 20 * config.rounds, f"--prompts: at least 20 for each of the {config.rounds} --rounds")
    judge, chooser = rewards.who(config, policy, tokenizer)
    run.begin()

    # 1. π_SFT: where the policy starts, and the reference that it is held to.
    start = config.init or ensure_sft(run)
    if policy is None:
        policy, tokenizer, _ = models.load_init(config, device, start)
        judge, chooser = rewards.who(config, policy, tokenizer)
    show_samples = watch(run, policy, tokenizer, prompts)

    for round in run.rounds(config.rounds):
        # 2. Groups: some responses of the policy to each prompt, and what is said of them; as pairs y_w ≻ y_l.
        if not file:
            asked = ensure_feedback(run, policy, tokenizer, judge, chooser, kinds, round, config.rounds)
            groups, held_out_groups, notes = asked
        rows = prepare("DPO", groups, held_out_groups, notes, tokenizer, policy.context)
        for known in (groups, held_out_groups):  # for KTO each prompt also meets the answer to another
            met = unrelated(known) if objectives.loss_of(objective).reference_point else []
            rows += encode(met, tokenizer, policy.context)[:1]

        # 3. What is taken off the value of each row, log π_ref, once. After this no reference model is held.
        with run.stage("reference"):
            reference = policy if config.fresh_reference or round == 0 else models.reference(policy, start)
            reference = reference if config.reference == "model" else None
            logprobs = reference_logprobs(run, reference, *rows, batch_size=4 * config.micro_batch)
        values = [LOGPROBS[config.logprobs](y, x.response_lengths) for x, y in zip(rows, logprobs, strict=True)]
        baselines = [(y if reference else torch.zeros_like(y)).to(device) for y in values]
        del reference

        # 4. Fit them.
        fit(run, policy, *map(Part, rows, baselines), objectives.knobs(config, groups), show_samples)

    # 5. What came of it.
    models.save(policy, tokenizer, run.folder / "model")
    report(run, policy, tokenizer, prompts, held_out_groups, dict(notes), judge if config.reward else None)


def fit(
    run: Run, policy: LM, data: Part, held_out: Part, strangers: Part, held_out_strangers: Part, knobs: Knobs,
    show_samples: Callable[[], None],
) -> None:  # fmt: skip
    """Descend the objective, as DPO's -log σ(β log π_θ(y_w|x)/π_ref(y_w|x) - β log π_θ(y_l|x)/π_ref(y_l|x))."""
    config, device = run.config, policy.device
    optimizer = optim.OPTIMIZERS[config.optimizer](policy, config.lr, config.weight_decay, betas=(0.9, 0.99))
    n, lengths = len(data.rows), data.rows.lengths()
    size = optim.batch_size(config.batch_size, n)
    steps = optim.steps_of(n, size, config.epochs)
    with run.stage("dpo"):
        for step, batch in run.steps("DPO", n, size, steps, policy, optimizer):
            began = time.monotonic()
            lr = optim.set_lr(optimizer, step, steps, config.warmup)
            z0 = reference_point(policy, strangers, batch, config)  # KTO's, of the whole batch; for others 0
            totals = torch.zeros(7, device=device)
            for piece in accumulated(policy, micro_batches(batch, lengths, config.micro_batch, share=True)):
                losses, sums = preference_losses(policy, data, z0, piece, config, knobs)
                (losses.sum() / len(batch)).backward()  # a mean over the batch of all pieces and processes
                totals += sums
            metrics = objectives.averages(totals, len(batch))
            (norm,) = run.update(metrics["loss"], config.grad_clip, optim.learning(policy))

            metrics |= {"grad_norm": norm, "lr": lr}
            tokens = int(data.rows.row_lengths[data.rows.rows(batch)].sum())
            metrics["tokens_per_second"] = tokens / (time.monotonic() - began)
            if (step + 1) % config.eval_every == 0 or step + 1 == steps:
                looked_at = len(held_out.rows) if step + 1 == steps else min(256, len(held_out.rows))
                z0 = reference_point(policy, held_out_strangers, range(looked_at), config)
                metrics |= held_out_metrics(policy, held_out, z0, looked_at, config, knobs)
                show_samples()
            run.log(metrics)


def preference_losses(
    policy: LM, part: Part, z0: Tensor, groups: list[int], config: Config, knobs: Knobs
) -> tuple[Tensor, Tensor]:
    """The objective on the implicit rewards β log π_θ(y|x)/π_ref(y|x) of these groups, counted from z₀: losses [G], and
    the sums over them of `objectives.figures`."""
    batch, logprobs, values, baseline = response_values(policy, part, groups, config)
    values, there = grouped(values, batch.sizes)  # [G, K]
    per_token, baseline, margins, said = (
        grouped(x, batch.sizes)[0] for x in (logprobs / batch.mask.sum(-1), baseline + z0, batch.margins, batch.said)
    )
    offset = baseline + margins * (config.margin / config.beta)  # β(values - offset) is the reward less its margin γ
    losses = objectives.loss_of(objectives.named(config.loss)).losses(values, offset, there, said, knobs)
    losses = losses - config.likelihood * per_token[:, 0]  # of the chosen answer (Pang et al. 2024, eq. 1)
    return losses, objectives.figures(losses, config.beta * (values - baseline), there, said)


@torch.no_grad()
def reference_point(policy: LM, strangers: Part, groups: Sequence[int], config: Config) -> Tensor:
    """z₀ = max(0, mean of log π_θ(y'|x)/π_ref(y'|x)) over a whole batch, y' being the answer to another prompt: how far
    the policy has gone from π_ref (Ethayarajh et al. 2024, section 4.1). 0 for objectives that have no such answers."""
    total = torch.zeros((), device=policy.device)
    if not len(strangers.rows):
        return total
    for piece in micro_batches(groups, strangers.rows.row_lengths, config.micro_batch, share=True):
        _, _, values, baseline = response_values(policy, strangers, piece, config)
        total += (values - baseline).sum()
    return (parallel.sum_processes(total) / len(groups)).clamp(min=0)


def response_values(policy: LM, part: Part, groups: list[int], config: Config) -> tuple[Batch, Tensor, Tensor, Tensor]:
    """The rows of these groups; and of each [B] log π_θ(y|x), what --logprobs makes of that, and the baseline."""
    batch = part.rows.collate(groups).to(policy.device)
    with parallel.autocast(policy):
        logprobs = policy(batch.inputs, batch.targets, batch.mask, packed=batch.packed).sum(-1)
    values = LOGPROBS[config.logprobs](logprobs, batch.mask.sum(-1))
    return batch, logprobs, values, part.baseline[part.rows.rows(groups)]


@torch.no_grad()
def held_out_metrics(policy: LM, part: Part, z0: Tensor, n: int, config: Config, knobs: Knobs) -> dict[str, float]:
    """Loss, accuracy and margin of the implicit rewards on the first n groups; each process takes its share."""
    totals = torch.zeros(7, device=policy.device)
    for piece in micro_batches(range(n), part.rows.lengths(), config.micro_batch, share=True):
        totals += preference_losses(policy, part, z0, piece, config, knobs)[1]
    found = objectives.averages(totals, n)
    return {f"held_out_{name}": found[name] for name in ("loss", "accuracy", "margin") if name in found}


def report(
    run: Run, policy: LM, tokenizer, prompts, held_out_groups, notes: dict, score: rewards.Rewards | None
) -> None:
    """Let policy and reference answer the same new prompts; write report.json and report.png, print the table."""
    config = run.config
    run.pin_what_is_read()  # π_ref is read again
    reference = models.reference(policy, config.init or run.folder / "sft")
    with run.stage("evaluation"):
        result, answers = compare(policy, reference, tokenizer, prompts, score=score, **setting_of(config))
    last = run.metrics()[-1]
    held_out = {k.removeprefix("held_out_"): v for k, v in last.items() if k.startswith("held_out_")}
    result |= {"held_out": held_out, "data": notes, "rounds": asked_in_rounds(run)}
    if best := best_possible(config, held_out_groups):
        result["held_out"]["best_accuracy"] = best
    conclude(run, result, answers, DPO_CURVES)


if __name__ == "__main__":
    flags.main(train, Config)
