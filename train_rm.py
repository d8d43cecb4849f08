"""Reward model (Ouyang et al. 2022, section 3.5) from preferences, from nothing to a report: `python train_rm.py`

Without --data: film reviews (nanopref/data/reviews.py). A small GPT learns to write them and answers each prompt twice,
and simulated people say which answer is better. With --data: your pairs, rankings, ratings or labels. A copy of that
GPT, with a scalar head read at the response's last token, learns to score the better answer higher.
"""

import nanopref  # noqa: F401, I001  (first, because it sets how torch's threads wait, which torch reads when loaded)

import gc
from dataclasses import dataclass

import torch
from torch import Tensor

from nanopref import models
from nanopref.data.formats import read_feedback
from nanopref.data.groups import Encoded, grouped, micro_batches, prepare
from nanopref.evaluation.reward_model import conclude
from nanopref.feedback import rewards
from nanopref.feedback.collect import ensure_feedback
from nanopref.models.sampling import pack, respond
from nanopref.learning import objectives
from nanopref.learning.objectives import LOSSES, SCORES, Knobs
from nanopref.models.inference import response_scores
from nanopref.models.scalar import ScalarModel
from nanopref.running import flags, optim, parallel
from nanopref.running.flags import (
    FeedbackFlags, LearningFlags, ObjectiveFlags, RewardFlags, RunFlags, SamplingFlags, StartFlags, flag,
)  # fmt: skip
from nanopref.running.folder import Run
from nanopref.running.parallel import say
from nanopref.running.sharding import accumulated
from nanopref.sft import ensure_sft


@dataclass
class Config(SamplingFlags, LearningFlags, ObjectiveFlags, FeedbackFlags, RewardFlags, StartFlags, RunFlags):
    """Train a reward model on preferences: on the built-in film reviews, or on a file.

    Example: python train_rm.py --data pairs.jsonl --init out/sft --heads 4
    """

    out: str = "out/rm"
    loss: str = flag("bradley-terry", "of pairs; binary takes labels, regression ratings", among=tuple(SCORES))
    heads: int = flag(
        1,
        "scalar heads, each from its own resampling of the pairs; their mean is the score, their spread its doubt",
        least=1,
        most=64,
    )
    epochs: int | None = flag(None, "passes over the pairs", least=1, task=2, file=1)
    lr: float | None = flag(None, "peak learning rate", above=0, task=1e-3, file=1e-4, pretrained=1e-5, adapters=1e-4)
    optimizer: str = "adamw"
    prompts: int = 8192
    eval_every: int = 44
    eval_prompts: int = flag(512, "training prompts that the reference answers, to scale the scores", least=2)


def train(config: Config) -> None:
    # What can be wrong is found before anything is written.
    flags.check(config)
    device = parallel.start(config.device, config.seed, config.dtype, config.parallel)
    config.init = config.init or rewards.made_from([*(config.reward or ()), *(config.chooser or ())])
    reference, tokenizer, origin = models.load_init(config, device)
    config = objectives.resolve(flags.resolve(config, origin), SCORES[config.loss])
    flags.check_people(config)
    run, kinds = Run(config), objectives.kinds(SCORES)
    if file := config.judged or ("" if config.reward else config.data):
        groups, held_out_groups, notes = read_feedback(file, kinds, config.loss, config.votes, tokenizer, meet=True)
    judge, chooser = rewards.who(config, reference, tokenizer)
    run.begin()

    # 1. π_SFT, where the reward model starts and whose responses it is to judge.
    if reference is None:
        reference, tokenizer, _ = models.load_init(config, device, ensure_sft(run))
        judge, chooser = rewards.who(config, reference, tokenizer)

    # 2. Groups: some responses of π_SFT to each prompt, and what is said of them; as pairs y_w ≻ y_l.
    if not file:
        groups, held_out_groups, notes = ensure_feedback(run, reference, tokenizer, judge, chooser, kinds)
    data, held_out = prepare("reward model", groups, held_out_groups, notes, tokenizer, reference.context)
    run.pin("rows", data, held_out)
    knobs = objectives.knobs(config, groups)

    # 3. Responses of the reference, over which the scores will have mean 0 and standard deviation 1.
    with run.stage("reference"):
        prompts = list(dict.fromkeys(prompt for group in groups for prompt in group.asked()))[: config.eval_prompts]
        setting = {"max_new_tokens": config.max_new_tokens, "batch_size": config.sample_batch, "seed": config.seed}
        baseline = pack(respond(reference, tokenizer, prompts, stream="reference", **setting))

    # 4. Descend the objective, as Bradley and Terry's -log σ(r(x, y_w) - r(x, y_l) - m).
    torch.manual_seed(config.seed)
    model = models.placed(ScalarModel(reference, config.heads), device)  # from here on it has the reference's weights
    # Each head counts each pair 0, 1, 2 … times, as often as a resampling of all pairs would (Osband et al. 2016).
    counts = torch.ones(len(data), config.heads, device=device)
    if config.heads > 1:
        counts = torch.poisson(counts, parallel.generator(config.seed, "heads", device))
    optimizer = optim.OPTIMIZERS[config.optimizer](model, config.lr, config.weight_decay, betas=(0.9, 0.99))
    size, lengths = optim.batch_size(config.batch_size, len(data)), data.lengths()
    steps = optim.steps_of(len(data), size, config.epochs)
    with run.stage("reward model"):
        for step, batch in run.steps("reward model", len(data), size, steps, model, optimizer):
            lr = optim.set_lr(optimizer, step, steps, config.warmup)
            totals = torch.zeros(7, device=device)
            for piece in accumulated(model, micro_batches(batch, lengths, config.micro_batch, share=True)):
                scores, there, margins, said = group_scores(model, data, piece)  # [G, K, heads], the others [G, K]
                losses = by_head(scores, config.margin * margins, there, said, config.loss, knobs) * counts[piece]
                (losses.mean(1).sum() / len(batch)).backward()  # a mean over the batch of all pieces and processes
                totals += objectives.figures(losses.mean(1), scores.mean(2), there, said)
            found = objectives.averages(totals, len(batch))
            (norm,) = run.update(found["loss"], config.grad_clip, optim.learning(model))

            names = {"loss": "loss", "accuracy": "accuracy", "margin": "score_gap"}
            metrics = {name: found[k] for k, name in names.items() if k in found} | {"grad_norm": norm, "lr": lr}
            if (step + 1) % config.eval_every == 0 or step + 1 == steps:
                n = len(held_out) if step + 1 == steps else 256  # on the way a part is enough
                metrics |= held_out_metrics(model, held_out, n, config, knobs)
            run.log(metrics)

    # 5. What came of it; then the scale, folded into the weights so that whoever opens the folder has it too.
    scores = response_scores(model, baseline, "scores of the reference", 4 * config.micro_batch)
    shift = scores.mean(0)  # of each head; but one scale for all, that of their mean, which is the score
    spread = scores.mean(1).std(correction=0)
    scale = torch.where(spread > 1e-6, spread, 1.0).expand_as(shift)  # responses that all score alike have no scale
    model.rescale(shift.to(device), scale.to(device))
    result = {"score_shift": shift.tolist(), "score_scale": scale.tolist()}
    models.save(model, tokenizer, run.folder / "model", **result)
    with run.stage("evaluation"):
        scores = response_scores(model, held_out, "scores of held-out answers", 4 * config.micro_batch)
    conclude(run, scores, held_out_groups, held_out, result | {"data": dict(notes)})


def group_scores(model: ScalarModel, data: Encoded, groups: list[int]) -> list[Tensor]:
    """r(x, y) of each response of these groups, by each head: [G, K, heads]; a mask of what is there, the margins, and
    what was said, [G, K]."""
    batch = data.collate(groups).to(model.device)
    with parallel.autocast(model):
        scores, there = grouped(model(batch.tokens, batch.last, batch.packed), batch.sizes)
    return [scores, there, *(grouped(x, batch.sizes)[0] for x in (batch.margins, batch.said))]


def by_head(scores: Tensor, margins: Tensor, there: Tensor, said: Tensor, loss: str, knobs: Knobs) -> Tensor:
    """The objective on the scores [G, K, heads] of each head: [G, heads]."""
    G, K, heads = scores.shape
    alike = (x.repeat(heads, 1) for x in (margins, there, said))
    losses = LOSSES[SCORES[loss].loss].losses(scores.movedim(2, 0).reshape(heads * G, K), *alike, knobs)
    return losses.view(heads, G).T


@torch.no_grad()
def held_out_metrics(model: ScalarModel, data: Encoded, n: int, config: Config, knobs: Knobs) -> dict[str, float]:
    """Loss, without margins, and accuracy of the mean score on the first n groups; each process takes its share."""
    groups, totals = range(min(n, len(data))), torch.zeros(7, device=model.device)
    for piece in micro_batches(groups, data.lengths(), config.micro_batch, share=True):
        scores, there, margins, said = group_scores(model, data, piece)
        score = scores.mean(2)
        losses = by_head(score[..., None], 0 * margins, there, said, config.loss, knobs)[:, 0]
        totals += objectives.figures(losses, score, there, said)
    found = objectives.averages(totals, len(groups))
    return {f"held_out_{name}": found[name] for name in ("loss", "accuracy")}


def ensure_reward_model(run: Run) -> str:
    """The reward model of a run of train_ppo.py without --reward, in OUT/rm: trained now if it is not there yet."""
    folder, config = run.folder / "rm", run.config
    if made := not run.has_made(folder):
        say(f"no --reward: a reward model first, in {folder}")
        names = ("data", "prompts", "annotators", "noise", "voters", "votes", "seed", "device", "kernels", "resume")
        names += ("save_seconds", "tensorboard", "max_new_tokens", "sample_batch", "micro_batch", *flags.OF_MODELS)
        same = {name: getattr(config, name) for name in names}
        train(Config(out=str(folder), init=config.init or str(run.folder / "sft"), **same))
        gc.collect()  # a model whose gradients are summed holds itself
    run.pin_file(folder / "model", made=made, remove=folder)
    run.add_seconds(folder, "reward model")
    return str(folder)


if __name__ == "__main__":
    flags.main(train, Config)
