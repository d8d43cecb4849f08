"""The same DPO run here and in TRL, on a real model and real pairs: `python -m nanopref.experiments.beside_trl`

Same folder, same pairs, whole (those that fit into --block-size tokens), batch, precision, rate and AdamW; log π_ref is
made before the first step in both. Held-out loss, tokens a second of a step, and what a process held in memory at most.
"""

import io
import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch

from nanopref import models
from nanopref.data.dialogues import Dialogue
from nanopref.data.formats import read
from nanopref.data.groups import Group, encode, split, write_groups
from nanopref.evaluation import report
from nanopref.experiments.runs import SCRIPTS
from nanopref.running import flags, parallel
from nanopref.running.files import write_atomic
from nanopref.running.flags import flag, require
from nanopref.running.folder import read_metrics
from nanopref.running.parallel import most_memory, say

CUDA = torch.cuda.is_available()
WARM_UP = 2  # steps whose time does not count


@dataclass
class Config:
    """Train a model by DPO with train_dpo.py and with TRL's DPOTrainer, one after the other, and compare.

    Example: python -m nanopref.experiments.beside_trl --model SmolLM2-135M-Instruct --data hh_harmless.jsonl.gz
    """

    out: str = flag("out/beside_trl", "the folder of both runs, table.md and results.json")
    model: str = flag("", "a model's folder, which both start from")
    data: str = flag("", "pairs (README)")
    pairs: int = flag(96, "how many of those that fit, a tenth of them held out", least=20)
    block_size: int = flag(256, "tokens of the longest pair", least=16)
    batch_size: int = flag(8, "pairs a step, all at once", least=1)
    lr: float = flag(2e-5, "peak learning rate", above=0)
    seeds: int = flag(1, "how many seeds, from 0", least=1)
    dtype: str = flag("float32", "precision of both", among=("float32", "bfloat16"))


def own_run(out: Path, **settings: Any) -> dict[str, Any]:
    """train_dpo.py with these flags in a process of its own: the rates of its steps and what its report says."""
    words = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    fixed = ["--out", str(out), "--max-new-tokens", "1", "--eval-prompts", "1", "--save-seconds", "1e6", "--overwrite"]
    command = [sys.executable, str(SCRIPTS / "train_dpo.py"), *words, *fixed]
    done = subprocess.run(command, capture_output=True, text=True)
    require(done.returncode == 0, f"{shlex.join(command)} failed: {done.stderr[-2000:]}")
    rates = [row["tokens_per_second"] for row in read_metrics(out)]
    return {"rates": rates, **json.loads((out / "report.json").read_text())}


def trl_run(
    model: str, groups: Sequence[Group], held_out: Sequence[Group], out: str, **settings: Any
) -> dict[str, Any]:
    """TRL's DPOTrainer on these pairs, with settings of its DPOConfig; to be called in a process of its own. The rates
    of its steps, how many tokens it saw in all, MiB, and, of pairs that are held out, loss and accuracy."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import datasets
    import transformers
    import trl

    ends, counts = [], [[]]

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())  # without waiting for the GPU, as in train_dpo.py
            counts.append([])

    class Trainer(trl.DPOTrainer):
        def compute_loss(self, model, inputs, *arguments, **options):
            counts[-1].append(inputs["attention_mask"].sum())
            return super().compute_loss(model, inputs, *arguments, **options)

    usual = {"precompute_ref_log_probs": True, "num_train_epochs": 1, "use_cpu": not CUDA, "report_to": "none"}
    usual |= {"logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": CUDA}
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        trainer = Trainer(
            model,
            args=trl.DPOConfig(out, **usual | settings),
            train_dataset=datasets.Dataset.from_list([_for_trl(group) for group in groups]),
            eval_dataset=datasets.Dataset.from_list([_for_trl(group) for group in held_out]) if held_out else None,
            processing_class=transformers.AutoTokenizer.from_pretrained(model),
            callbacks=[Clock()],
        )
        ends.append(time.perf_counter())
        trainer.train()
        tokens = [int(sum(step)) for step in counts[:-1]]
        rates = [n / (end - start) for n, (start, end) in zip(tokens, itertools.pairwise(ends), strict=True)]
        figures = trainer.evaluate() if held_out else {}
    used = torch.cuda.max_memory_allocated() or most_memory()
    names = {"eval_loss": "loss", "eval_rewards/accuracies": "accuracy"}
    figures = {names[name]: value for name, value in figures.items() if name in names}
    return {"rates": rates, "tokens": sum(tokens), "peak_memory_MiB": used / 2**20, **figures}


def _for_trl(group: Group) -> dict[str, Any]:
    """A pair in TRL's format: text, or messages."""
    if not isinstance(group.prompt, Dialogue):
        return dict(zip(("prompt", "chosen", "rejected"), (str(group.prompt), *group.responses), strict=True))
    said = [[{"role": "assistant", "content": text.strip()}] for text in group.responses]
    asked = [{"role": role, "content": content} for role, content in group.prompt.messages]
    return dict(zip(("prompt", "chosen", "rejected"), (asked, *said), strict=True))


def in_a_new_process(function, *arguments, **options):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as new_process:
        return new_process.submit(function, *arguments, **options).result()


def main(config: Config) -> None:
    flags.check(config)
    require(bool(config.model and config.data), "--model and --data: name a model's folder and a file of pairs")
    parallel.start("auto", 0)
    _, tokenizer = models.load(config.model)
    kind, groups, _ = read(config.data)
    require(kind == "pairs", f"--data {config.data}: holds {kind} and no pairs")
    lengths = encode(groups, tokenizer, 10**6)[0].lengths()
    groups = [group for group, n in zip(groups, lengths, strict=True) if n < config.block_size][: config.pairs]
    require(len(groups) == config.pairs, f"--pairs: only {len(groups)} fit into {config.block_size} tokens")
    data = Path(config.out) / "pairs.jsonl"
    data.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(data, write_groups(groups))
    training, held_out = split(read(data)[1])
    settings = {"max_length": config.block_size, "bf16": config.dtype == "bfloat16", "learning_rate": config.lr}
    settings |= {"per_device_train_batch_size": config.batch_size, "per_device_eval_batch_size": config.batch_size}
    settings |= {"gradient_checkpointing": False, "warmup_steps": 10, "adam_beta2": 0.99, "max_grad_norm": 1.0}
    found = []
    for seed in range(config.seeds):
        for who in ("nanopref", "TRL"):
            if who == "TRL":
                out = str(Path(config.out) / f"trl-{seed}")
                run = in_a_new_process(trl_run, config.model, training, held_out, out, seed=seed, **settings)
            else:
                same = {name: getattr(config, name) for name in ("block_size", "batch_size", "lr", "dtype")}
                same |= {"init": config.model, "data": data, "micro_batch": config.batch_size, "seed": seed}
                out = Path(config.out) / f"nanopref-{seed}"
                run = own_run(out, optimizer="adamw", eval_every=10**6, **same)
                run = {"rates": run["rates"], **run["held_out"], "peak_memory_MiB": run["peak_memory_MiB"]}
            rate = median(run["rates"][WARM_UP:])
            found.append(
                {"who": who, "seed": seed, "tokens_per_second": rate} | {k: run[k] for k in run if k != "rates"}
            )
            say(found[-1])
            write_atomic(Path(config.out) / "results.json", json.dumps(found, indent=1) + "\n")
    names = ("tokens_per_second", "peak_memory_MiB", "loss", "accuracy")
    rows = [(row["who"], str(row["seed"]), *(f"{row[name]:,.4g}" for name in names)) for row in found]
    text = report.table(rows, ("", "seed", "tokens/s", "MiB", "held-out loss", "ranked right"))
    write_atomic(Path(config.out) / "table.md", text + "\n")
    say(f"\n{len(training)} pairs, {len(held_out)} held out\n\n{text}")


if __name__ == "__main__":
    flags.main(main, Config)
