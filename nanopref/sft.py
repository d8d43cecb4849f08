"""Supervised fine-tuning: make the responses of a data set likely. `python -m nanopref.sft`"""

import gc
import math
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nanopref import models
from nanopref.data import reviews
from nanopref.data.formats import read_to_imitate
from nanopref.data.groups import Encoded, Group, encode, micro_batches, split
from nanopref.data.tokenizer import Tokenizer
from nanopref.evaluation import report
from nanopref.evaluation.samples import watch
from nanopref.models.inference import evaluating
from nanopref.models.language import LM
from nanopref.running import flags, optim, parallel
from nanopref.running.flags import LearningFlags, ModelFlags, RunFlags, UserError, flag, require
from nanopref.running.folder import Run
from nanopref.running.parallel import say
from nanopref.running.sharding import accumulated


@dataclass
class Config(LearningFlags, ModelFlags, RunFlags):
    """Supervised fine-tuning of a GPT: from nothing with a tokenizer of its own, or from --init; on the film reviews of
    the built-in task, or on a file of text, of prompts and responses, of conversations (what the assistant says in
    them), or of preferences, whose best side it learns.

    Example: python -m nanopref.sft --data text.jsonl.gz --preset small --out out/mine
    """

    out: str = "out/sft"
    data: str = flag("", "JSON Lines (.gz or not), Parquet, or a data set's name on the hub: text, prompt/completion, "
                     "messages, or preferences; default: film reviews")  # fmt: skip
    init: str = flag("", "start from this model (a folder, or a name on the hub) instead of from nothing")
    preset: str = flag("tiny", "size of a model that starts from nothing", among=tuple(models.PRESETS))
    vocab_size: int | None = flag(
        None, "tokens of a tokenizer trained here", least=257, most=1_000_000, task=1024, file=4096
    )
    block_size: int | None = flag(
        None, "longest sequence in tokens; with --init the model's, at most 1024", least=2, task=96, file=256
    )
    steps: int | None = flag(None, "optimiser steps", least=1, task=480, file=500)
    dropout: float = flag(0.0, "on embeddings, attention and residuals", least=0, below=1)
    batch_size: int = 16
    lr: float | None = flag(None, "peak learning rate", above=0, task=4e-3, file=1e-3, pretrained=5e-5, adapters=5e-4)
    warmup: int = 20
    weight_decay: float = 0.1
    eval_every: int = 100


def train(config: Config) -> None:
    """Run the whole stage. Raises UserError before anything is written where flags, data or checkpoint do not fit."""
    flags.check(config)
    require(not (config.init and config.vocab_size), "--vocab-size is for a model that starts from nothing, not --init")
    require(
        bool(config.init) or not config.lora, "--lora: adapters are for a model that has learnt something; name --init"
    )
    device = parallel.start(config.device, config.seed, config.dtype, config.parallel)
    model, tokenizer, origin = models.load_init(config, device)
    given = config.vocab_size, config.block_size
    config = flags.resolve(config, origin)
    if model is not None:  # which has sizes of its own
        config.vocab_size, config.block_size = given
    run = Run(config)
    groups, notes = read_to_imitate(config.data, tokenizer) if config.data else (sample_reviews(config), Counter())
    train_groups, held_out_groups = split(groups)
    run.begin()

    if model is None:
        with run.stage("tokenizer"):
            tokenizer = ensure_tokenizer(run, train_groups, config.vocab_size)
        torch.manual_seed(config.seed)
        sizes = {"vocab_size": tokenizer.vocab_size, "block_size": config.block_size, "dropout": config.dropout}
        model = models.new(config.preset, **sizes)
        models.set_up(model, config)
        models.placed(model, device)
    data, cut = encode(train_groups, tokenizer, model.context)
    held_out, cut_held_out = encode(held_out_groups, tokenizer, model.context)
    notes += cut + cut_held_out
    run.pin("rows", data, held_out)
    counted, parameters = int(data.response_lengths.sum()), sum(p.numel() for p in model.parameters())
    say(f"SFT: {len(data):,} sequences, {counted:,} tokens that count; a model of {parameters / 1e6:.2f}M parameters")
    for note, count in notes.items():
        say(f"  {count:,} {note}")

    optimizer = optim.OPTIMIZERS[config.optimizer](model, config.lr, config.weight_decay)
    longest, prompts = min(64, model.config.block_size // 2), [group.prompt for group in held_out_groups]
    show_samples = watch(run, model, tokenizer, prompts, max_new_tokens=longest, beside_first=False)
    lengths, size = data.lengths(), optim.batch_size(config.batch_size, len(data))
    with run.stage("sft"):
        for step, rows in run.steps("SFT", len(data), size, config.steps, model, optimizer, lengths):
            lr = optim.set_lr(optimizer, step, config.steps, config.warmup)
            count, loss = data.response_lengths[rows].sum(), torch.zeros((), device=device)
            for piece in accumulated(model, micro_batches(rows, lengths, config.micro_batch, share=True)):
                micro_loss = -summed_logprobs(model, data, piece) / count  # a mean over the whole batch's tokens
                micro_loss.backward()
                loss += micro_loss.detach()
            loss = parallel.sum_processes(loss).item()
            (norm,) = run.update(loss, config.grad_clip, optim.learning(model))

            metrics = {"loss": loss, "grad_norm": norm, "lr": lr}
            if step + 1 == config.steps:
                metrics["held_out_loss"] = held_out_loss(model, held_out, len(held_out), config.micro_batch)
            elif (step + 1) % config.eval_every == 0:  # on the way a part is enough
                metrics["held_out_loss"] = held_out_loss(model, held_out, 256, config.micro_batch)
            run.log(metrics)
            if "held_out_loss" in metrics:
                show_samples()

    models.save(model, tokenizer, run.folder / "model")
    conclude(run, notes)


def summed_logprobs(model: LM, data: Encoded, groups: list[int]) -> Tensor:
    """Σ log π of the response tokens of these groups, 0-dim."""
    batch = data.collate(groups).to(model.device)
    with parallel.autocast(model):
        return model(batch.inputs, batch.targets, batch.mask).sum()


@torch.no_grad()
def held_out_loss(model: LM, data: Encoded, n: int, micro_batch: int) -> float:
    """Mean -log π of a response token of the first n groups, in nats; each process takes its share."""
    groups = range(min(n, len(data)))
    total = torch.zeros((), device=model.device)
    with evaluating(model):
        for piece in micro_batches(groups, data.lengths(), 4 * micro_batch, share=True):
            total -= summed_logprobs(model, data, piece)
    return (parallel.sum_processes(total) / data.response_lengths[data.rows(groups)].sum()).item()


def ensure_tokenizer(run: Run, groups: list[Group], vocab_size: int) -> Tokenizer:
    """The tokenizer in OUT/model: trained now, on these texts, if there is none yet."""
    names = ("tokenizer_config.json", "tokenizer.json")

    def make() -> list[str | bytes]:
        found = Tokenizer.train((group.prompt + group.responses[0] for group in groups), vocab_size).files()
        return [found[name] for name in names]

    path, _ = run.keep(make, *(f"model/{name}" for name in names))
    try:
        return Tokenizer.load(path.parent)
    except ValueError as error:  # of another file there, as of a run that was killed at its end
        raise UserError(f"{error}; remove {path.parent}, and --resume makes it again") from None


def ensure_sft(run: Run) -> Path:
    """Where a run without --init begins: an SFT model in OUT/sft, trained now if it is not there yet.

    The run's config has the flags data and sft_steps; the seconds that SFT took are added to those of the run.
    """
    config, folder = run.config, run.folder / "sft"
    if made := not run.has_made(folder):
        say(f"no --init: supervised fine-tuning first, in {folder}")
        names = ("data", "seed", "device", "kernels", "resume", "save_seconds", "tensorboard", "micro_batch")
        names += tuple(
            name for name in flags.OF_MODELS if name != "lora"
        )  # which is for a model that has learnt something
        train(Config(out=str(folder), steps=config.sft_steps, **{name: getattr(config, name) for name in names}))
        gc.collect()  # a model whose gradients are summed holds itself
    run.pin_file(folder / "model", made=made, remove=folder)
    run.add_seconds(folder, "sft")
    return folder


def sample_reviews(config: Config) -> list[Group]:
    """Reviews of the built-in task, so many that none is seen twice with a tenth of the prompts held out."""
    rng = random.Random(f"reviews {config.seed}")
    prompts = [reviews.sample_prompt(rng) for _ in range(config.steps * config.batch_size * 9 // 8)]
    return [Group(prompt, (reviews.sample_response(rng, prompt),)) for prompt in prompts]


def conclude(run: Run, notes: Counter) -> None:
    """Write report.json and report.png, print the losses."""
    metrics, said = run.metrics(), run.logs.rows("samples.jsonl")
    step, loss = metrics[-1]["step"], metrics[-1]["held_out_loss"]
    panel = report.curves(metrics, {"loss": "training", "held_out_loss": "held out"}, "SFT loss, nats per token")
    report.plot([panel], run.folder / "report.png")
    samples = [{"prompt": row["prompt"], "response": row["policy"]} for row in said if row["step"] == step]
    result = {"held_out_loss": loss, "perplexity": math.exp(loss), "data": dict(notes), "samples": samples}
    run.report(result)
    say(f"SFT: held-out loss {loss:.3f} nats per token (perplexity {math.exp(loss):.2f})")
    say(f"SFT: {report.model_line(run)}")


if __name__ == "__main__":
    flags.main(train, Config)
