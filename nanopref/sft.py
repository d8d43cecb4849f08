"""Supervised fine-tuning: make the responses of a data set likely. `python -m nanopref.sft`

Without --data it learns to write the film reviews of the built-in task; with it, any text, prompts with responses, or
the chosen side of preference pairs. A model starts from nothing, with a tokenizer trained on the same data, or from
--init.
"""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

import kernels
from nanopref import data, evaluate, reviews, run
from nanopref.generate import response_text
from nanopref.model import GPT, PRESETS, load_pretrained, preset, save_pretrained
from nanopref.run import Run, require, say
from nanopref.tokenizer import Tokenizer


@dataclass
class Config(run.Options):
    """Supervised fine-tuning of a GPT, on the built-in film reviews or on a file."""

    out: str = "out/sft"
    """the run's folder: model, metrics, report, and the state to resume from"""
    data: str = ""
    """JSON Lines (.gz or not) with text, prompt/response or chosen/rejected; default: the built-in film reviews"""
    init: str = ""
    """start from this model (a folder, or a name on the hub) instead of from nothing"""
    preset: str = "tiny"
    """size of a model that starts from nothing: tiny, small, gpt2, gpt2-medium, gpt2-large, gpt2-xl"""
    vocab_size: int | None = None
    """tokens of a tokenizer trained here; default: 1024 on the built-in task, 4096 on a file"""
    block_size: int | None = None
    """longest sequence in tokens; default: 96 on the built-in task, 256 on a file, that of --init"""
    steps: int | None = None
    """optimiser steps; default: 800 on the built-in task, 500 on a file"""
    batch_size: int = 16
    """sequences a step, over all processes"""
    micro_batch: int = 16
    """sequences in memory at once; more steps of this size are accumulated"""
    lr: float | None = None
    """peak learning rate; default: 3e-3 on the built-in task, 1e-3 on a file, 5e-5 from --init"""
    warmup: int = 20
    """steps of linear warm-up"""
    weight_decay: float = 0.1
    """AdamW's, on matrices"""
    dropout: float = 0.0
    """on embeddings, attention and residuals"""
    grad_clip: float = 1.0
    """largest norm of the gradient"""
    eval_every: int = 100
    """steps between two looks at the held-out tenth (the first 256 sequences of it; all at the end)"""

    def check(self) -> None:
        super().check()
        run.require_at_least_one(self, "steps", "batch_size", "micro_batch", "eval_every")
        run.require_positive(self, "lr", "grad_clip")
        run.require_not_negative(self, "warmup", "weight_decay")
        require(not (self.init and self.vocab_size), "--vocab-size is for a model that starts from nothing, not --init")
        require(0 <= self.dropout < 1, f"--dropout must be at least 0 and below 1, not {self.dropout}")
        require(self.init or self.preset in PRESETS, f"--preset {self.preset}: choose one of {', '.join(PRESETS)}")
        require(
            self.vocab_size is None or self.vocab_size >= 257, "--vocab-size must be at least 257: 256 bytes and one"
        )
        require(self.block_size is None or self.block_size >= 2, "--block-size must be at least 2")

    def resolved(self) -> "Config":
        """The defaults that depend on other flags, filled in."""
        task = {"vocab_size": 1024, "block_size": 96, "steps": 800, "lr": 3e-3}
        file = {"vocab_size": 4096, "block_size": 256, "steps": 500, "lr": 1e-3}
        defaults = file if self.data else task
        if self.init:
            defaults |= {"vocab_size": None, "block_size": None, "lr": 5e-5}  # the checkpoint's own sizes
        return replace(self, **{k: v for k, v in defaults.items() if getattr(self, k) is None})


def train(config: Config) -> None:
    """Run the whole stage. Raises UserError before anything is written where flags, data or checkpoint do not fit."""
    config.check()
    config = config.resolved()
    this = Run(config)
    device = run.start(config.device, config.seed)
    rows, notes = data.read_responses(config.data) if config.data else (sample_reviews(config), Counter())
    model, tokenizer = load_pretrained(config.init, dropout=config.dropout) if config.init else (None, None)
    require(
        model is None or config.block_size is None or config.block_size <= model.config.block_size,
        f"--block-size {config.block_size} is more than the context of {config.init}",
    )
    rows, held_out_rows = data.split(rows)
    this.begin()

    with this.stage("tokenizer"):
        if model is None:
            folder = this.folder / "model"
            if run.rank() == 0 and not (folder / "tokenizer.json").exists():
                folder.mkdir(exist_ok=True)
                texts = (row.prompt + row.response for row in rows)
                Tokenizer.train(texts, config.vocab_size).save(folder)
            run.barrier()
            tokenizer = Tokenizer.load(folder)
            sizes = {"vocab_size": tokenizer.vocab_size, "block_size": config.block_size, "dropout": config.dropout}
            torch.manual_seed(config.seed)
            model = GPT(preset(config.preset, **sizes))
    model.to(device)
    block_size = config.block_size or model.config.block_size
    train_rows, cut = data.encode_responses(rows, tokenizer, block_size)
    held_out, cut_held_out = data.encode_responses(held_out_rows, tokenizer, block_size)
    notes += cut + cut_held_out
    tokens = sum(len(response) for _, response in train_rows)
    parameters = sum(p.numel() for p in model.parameters())
    say(
        f"SFT: {len(train_rows):,} sequences, {tokens:,} tokens that count; a GPT of {parameters / 1e6:.2f}M parameters"
    )
    for note, count in notes.items():
        say(f"  {count:,} {note}")

    optimizer = run.adamw(model, config.lr, config.weight_decay)
    lengths = [len(prompt) + len(response) for prompt, response in train_rows]
    start = this.load(model, optimizer)
    batches = run.batches(len(train_rows), config.batch_size, config.steps, config.seed, start)
    with this.stage("sft"), kernels.use(config.kernels):
        for step, batch in this.steps(batches, config.steps, model, optimizer, "SFT"):
            lr = run.set_lr(optimizer, config.lr, step, config.steps, config.warmup)
            count = sum(len(train_rows[i][1]) for i in batch)
            loss = torch.zeros((), device=device)
            for piece in data.my_micro_batches(batch, lengths, config.micro_batch):
                inputs, targets, mask = data.collate([train_rows[i] for i in piece]).to(device)
                with run.autocast(device):
                    logprobs = kernels.sequence_logprobs(model.hidden(inputs), model.unembedding, targets, mask)
                micro_loss = -logprobs.sum() / count  # a mean over the tokens of the whole batch, not of this piece
                micro_loss.backward()
                loss += micro_loss.detach()
            run.sum_gradients(model)
            run.sum_processes(loss)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            this.stop_if_not_finite(step, loss + norm, model, optimizer)
            optimizer.step()
            optimizer.zero_grad()

            metrics = {"loss": loss.item(), "grad_norm": norm.item(), "lr": lr}
            if step + 1 == config.steps:
                metrics["held_out_loss"] = token_loss(model, held_out)
            elif (step + 1) % config.eval_every == 0:  # on the way a part is enough
                metrics["held_out_loss"] = token_loss(model, held_out[:256])
            this.log(step + 1, metrics)

    if run.rank() == 0:
        save_pretrained(model, tokenizer, this.folder / "model")
        report(this, model, tokenizer, held_out_rows, notes)


def first(config: run.Options, this: Run) -> Path:
    """Where a run without --init begins: an SFT model in OUT/sft, trained now if it is not there yet.

    `config` has the fields data and sft_steps; the seconds that SFT took are added to those of the run.
    """
    folder = this.folder / "sft"
    if not (folder / "report.json").exists():
        say(f"no --init: supervised fine-tuning first, in {folder}")
        names = ("data", "seed", "device", "kernels", "resume", "save_every")
        train(Config(out=str(folder), steps=config.sft_steps, **{name: getattr(config, name) for name in names}))
    run.barrier()
    this.add_seconds(folder, "sft")
    return folder


def sample_reviews(config: Config) -> list[data.Response]:
    """Reviews of the built-in task, so many that none is seen twice with a tenth of the prompts held out."""
    rng = random.Random(f"reviews {config.seed}")
    prompts = [reviews.sample_prompt(rng) for _ in range(config.steps * config.batch_size * 9 // 8)]
    return [data.Response(prompt, reviews.sample_response(rng, prompt)) for prompt in prompts]


def token_loss(model: GPT, rows: Sequence[tuple[list[int], list[int]]]) -> float:
    """Mean -log π of a response token, in nats."""
    return -evaluate.response_logprobs(model, rows, "held-out loss").sum().item() / sum(len(y) for _, y in rows)


def report(this: Run, model: GPT, tokenizer: Tokenizer, held_out, notes: Counter) -> None:
    """Write report.json and report.png, print the losses and three samples."""
    metrics = this.metrics()
    loss = metrics[-1]["held_out_loss"]
    prompts = [row.prompt for row in held_out[:3]]
    answers = evaluate.respond(model, tokenizer, prompts, min(64, model.config.block_size // 2), 0, "samples")
    texts = [response_text(response, tokenizer) for _, response in answers]
    evaluate.plot(
        [evaluate.curves(metrics, {"loss": "training", "held_out_loss": "held out"}, "SFT loss, nats per token")],
        this.folder / "report.png",
    )
    this.report(
        {
            "held_out_loss": loss,
            "perplexity": math.exp(loss),
            "data": dict(notes),
            "samples": [{"prompt": p, "response": r} for p, r in zip(prompts, texts, strict=True)],
        }
    )
    say(f"SFT: held-out loss {loss:.3f} nats per token (perplexity {math.exp(loss):.2f}); samples:")
    for prompt, text in zip(prompts, texts, strict=True):
        say(f"  {' '.join(prompt.split())}→{' '.join(text.split())}"[:300])


if __name__ == "__main__":
    run.main(train, tyro.cli(Config, description=__doc__))
