"""Reward model (Ouyang et al. 2022, section 3.5) from preferences, from nothing to a report: `python train_rm.py`

Without --data: film reviews (nanopref/data/reviews.py). A small GPT learns to write them and answers each prompt twice,
and simulated people say which answer is better. With --data: your pairs. A copy of that GPT, with a scalar head read at
the response's last token, learns to score the better answer higher.
"""

import nanopref  # noqa: F401, I001  (first, because it sets how torch's threads wait, which torch reads when loaded)

from dataclasses import dataclass

import torch
from torch import Tensor

from nanopref import models
from nanopref.data.formats import read_comparisons
from nanopref.data.groups import Encoded, grouped, micro_batches, prepare, split
from nanopref.evaluation.reward_model import conclude
from nanopref.feedback import rewards
from nanopref.feedback.collect import ensure_pairs
from nanopref.generate import pack, respond
from nanopref.learning import objectives
from nanopref.learning.objectives import OBJECTIVES, ranked_right
from nanopref.models.inference import response_scores
from nanopref.models.scalar import ScalarModel
from nanopref.running import flags, optim, parallel
from nanopref.running.flags import FeedbackFlags, LearningFlags, RunFlags, SamplingFlags, StartFlags, flag
from nanopref.running.folder import Run
from nanopref.running.parallel import say
from nanopref.sft import ensure_sft


@dataclass
class Config(SamplingFlags, LearningFlags, FeedbackFlags, StartFlags, RunFlags):
    """Train a reward model on preferences: on the built-in film reviews, or on a file.

    Example: python train_rm.py --data pairs.jsonl --init out/sft --heads 4
    """

    out: str = "out/rm"
    margin: float = flag(0.0, "ask the better answer to score higher by this much, times the pair's `margin`", least=0)
    heads: int = flag(
        1,
        "scalar heads, each from its own resampling of the pairs; their mean is the score, their spread its doubt",
        least=1,
        most=64,
    )
    epochs: int | None = flag(None, "passes over the pairs", least=1, task=2, file=1)
    lr: float | None = flag(None, "peak learning rate", above=0, task=1e-3, file=1e-4, pretrained=1e-5)
    optimizer: str = "adamw"
    pairs: int = 8192
    eval_every: int = 44
    eval_prompts: int = flag(512, "training prompts that the reference answers, to scale the scores", least=2)


def train(config: Config) -> None:
    # What can be wrong is found before anything is written.
    flags.check(config)
    device = parallel.start(config.device, config.seed)
    reference, tokenizer, origin = models.load_init(config.init)
    config = flags.resolve(config, origin)
    flags.require_odd(config.annotators)
    run = Run(config)
    if config.data:
        groups, held_out_groups, notes = read_comparisons(config.data, labels=True)
        objectives.check_sizes("sigmoid", groups + held_out_groups)
    run.begin()

    # 1. π_SFT, where the reward model starts and whose responses it is to judge.
    if reference is None:
        reference, tokenizer = models.load(ensure_sft(run))
    reference.to(device)

    # 2. Pairs y_w ≻ y_l: two responses of π_SFT to each prompt, and a label.
    if not config.data:
        groups, notes = ensure_pairs(run, reference, tokenizer, rewards.true_reward)
        groups, held_out_groups = split(groups)
    data, held_out = prepare("reward model", groups, held_out_groups, notes, tokenizer, reference.config.block_size)
    margins = torch.zeros(len(data), 2, device=device)
    margins[:, 0] = config.margin * torch.tensor([group.margin for group in groups])

    # 3. Responses of the reference, over which the scores will have mean 0 and standard deviation 1.
    with run.stage("reference"):
        prompts = list(dict.fromkeys(prompt for group in groups for prompt in group.asked()))[: config.eval_prompts]
        setting = {"max_new_tokens": config.max_new_tokens, "batch_size": config.sample_batch, "seed": config.seed}
        baseline = pack(respond(reference, tokenizer, prompts, stream="reference", **setting))

    # 4. Descend -log σ(r(x, y_w) - r(x, y_l) - m).
    torch.manual_seed(config.seed)
    model = ScalarModel(reference, config.heads).to(device)  # from here on the reference's weights are the model's
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
            totals = torch.zeros(3, device=device)
            for piece in micro_batches(batch, lengths, config.micro_batch, share=True):
                scores, there = group_scores(model, data, piece)  # [G, K, heads]
                losses = bradley_terry(scores, margins[piece], there) * counts[piece]  # [G, heads]
                (losses.mean(1).sum() / len(batch)).backward()  # a mean over the batch of all pieces and processes
                totals += figures(losses, scores, there)
            loss, accuracy, gap = (parallel.sum_processes(totals) / len(batch)).tolist()
            (norm,) = run.update(loss, config.grad_clip, list(model.parameters()))

            metrics = {"loss": loss, "accuracy": accuracy, "score_gap": gap, "grad_norm": norm, "lr": lr}
            if (step + 1) % config.eval_every == 0 or step + 1 == steps:
                n = len(held_out) if step + 1 == steps else 256  # on the way a part is enough
                metrics |= held_out_metrics(model, held_out, n, config)
            run.log(metrics)

    # 5. What came of it; then the scale, folded into the weights so that whoever opens the folder has it too.
    if parallel.rank() == 0:
        scores = response_scores(model, baseline, "scores of the reference", 4 * config.micro_batch)
        shift = scores.mean(0)  # of each head; but one scale for all, that of their mean, which is the score
        spread = scores.mean(1).std(correction=0)
        scale = torch.where(spread > 1e-6, spread, 1.0).expand_as(shift)  # responses that all score alike have no scale
        model.rescale(shift.to(device), scale.to(device))
        result = {"score_shift": shift.tolist(), "score_scale": scale.tolist()}
        models.save(model, tokenizer, run.folder / "model", **result)
        with run.stage("evaluation"):
            scores = response_scores(model, held_out, "scores of held-out pairs", 4 * config.micro_batch)
        conclude(run, scores, held_out_groups, held_out, scale.tolist(), result | {"data": dict(notes)})


def group_scores(model: ScalarModel, data: Encoded, groups: list[int]) -> tuple[Tensor, Tensor]:
    """r(x, y) of each response of these groups, by each head: [G, K, heads], and a mask [G, K] of what is there."""
    batch = data.collate(groups).to(model.device)
    with parallel.autocast(model.device):
        return grouped(model(batch.tokens, batch.last), batch.sizes)


def bradley_terry(scores: Tensor, margins: Tensor, there: Tensor) -> Tensor:
    """-log σ(r(x, y_w) - r(x, y_l) - m) of each head: [G, heads]."""
    G, K, heads = scores.shape
    by_head = scores.movedim(2, 0).reshape(heads * G, K), margins.repeat(heads, 1), there.repeat(heads, 1)
    return OBJECTIVES["sigmoid"].losses(*by_head, beta=1.0).view(heads, G).T


@torch.no_grad()
def figures(losses: Tensor, scores: Tensor, there: Tensor) -> Tensor:
    """Sums over groups [3]: loss, share of pairs that the mean score ranks right, and its gap between best and next."""
    score = scores.mean(2)
    return torch.stack([losses.mean(1).sum(), ranked_right(score, there).sum(), (score[:, 0] - score[:, 1]).sum()])


@torch.no_grad()
def held_out_metrics(model: ScalarModel, data: Encoded, n: int, config: Config) -> dict[str, float]:
    """Loss, without margins, and accuracy of the mean score on the first n pairs; each process takes its share."""
    groups, totals = range(min(n, len(data))), torch.zeros(3, device=model.device)
    for piece in micro_batches(groups, data.lengths(), config.micro_batch, share=True):
        scores, there = group_scores(model, data, piece)
        score = scores.mean(2, keepdim=True)
        totals += figures(bradley_terry(score, torch.zeros_like(score[..., 0]), there), score, there)
    loss, accuracy, _ = (parallel.sum_processes(totals) / len(groups)).tolist()
    return {"held_out_loss": loss, "held_out_accuracy": accuracy}


def ensure_reward_model(run: Run) -> str:
    """The reward model of a run of train_ppo.py without --reward, in OUT/rm: trained now if it is not there yet."""
    folder, config = run.folder / "rm", run.config
    if not (folder / "report.json").exists():
        say(f"no --reward: a reward model first, in {folder}")
        names = ("data", "pairs", "annotators", "noise", "seed", "device", "kernels", "resume", "save_seconds")
        same = {name: getattr(config, name) for name in (*names, "max_new_tokens", "sample_batch", "micro_batch")}
        train(Config(out=str(folder), init=config.init or str(run.folder / "sft"), **same))
    run.add_seconds(folder, "reward model")
    return str(folder)


if __name__ == "__main__":
    flags.main(train, Config)
