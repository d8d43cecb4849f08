"""Pools of processes that stay together, as torchrun would have started them, and do one job after the other: to start
them and to let them meet takes longer than a small run."""

import contextlib
import faulthandler
import importlib
import io
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import by_hand
import torch
from helpers import forks, results
from safetensors.torch import load_file
from small_runs import COMMANDS

from nanopref import models
from nanopref.data.tokenizer import Tokenizer
from nanopref.evaluation import report
from nanopref.models.gpt2 import GPT, GPTConfig
from nanopref.models.llama import Llama, LlamaConfig

SECONDS = 60.0  # for a job; one that takes longer has processes that wait for one another
GRACE = 3.0  # for the others where one has failed, who may fail as well, or wait for it


class Pool:
    """n processes, which are killed and started anew where a job fails in one of them or takes too long."""

    def __init__(self, n: int, folder: Path):
        self.n, self.folder, self.workers = n, folder, []

    def run(self, job: Callable[..., None], *args: Any) -> None:
        """Let each process carry out a function of a module with these arguments; AssertionError with what each says of
        it, and where those are that say nothing."""
        if not self.workers:
            self._start()
        for _, pipe in self.workers:
            pipe.send((job.__module__, job.__qualname__, args))
        answers, end = {}, time.monotonic() + SECONDS
        while len(answers) < self.n and time.monotonic() < end:
            waited_for = {pipe: i for i, (_, pipe) in enumerate(self.workers) if i not in answers}
            for pipe in wait([*waited_for], max(0.0, end - time.monotonic())):
                i = waited_for[pipe]
                try:
                    answers[i] = pipe.recv()
                except EOFError:
                    answers[i] = "this process has ended\n"
                end = min(end, time.monotonic() + GRACE) if answers[i] else end
        if len(answers) == self.n and not any(answers.values()):
            return
        for i, (process, _) in enumerate(self.workers):
            if i not in answers and process.is_alive():
                os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.3)
        logs = [(self.folder / f"process {i} of {self.n}").read_text()[-6000:] for i in range(self.n)]
        self.close()
        raise AssertionError("".join(f"\n--- process {i} ---\n{answers.get(i, logs[i])}" for i in range(self.n)))

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(self.n)}
        for i in range(self.n):
            here, there = forks.Pipe()
            environment = common | {"RANK": str(i), "LOCAL_RANK": str(i)}
            log = self.folder / f"process {i} of {self.n}"
            process = forks.Process(target=_work, args=(there, log, environment), daemon=True)
            process.start()
            there.close()
            self.workers.append((process, here))

    def close(self) -> None:
        for process, pipe in self.workers:
            process.kill()
            process.join()
            pipe.close()
        self.workers = []


def _work(jobs: Connection, log: Path, environment: dict[str, str]) -> None:
    """What a process does: a job after the other, until nobody is there who could ask for one."""
    torch.set_num_threads(1)
    os.environ.update(environment)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    report.plot = _nothing
    with contextlib.suppress(EOFError, OSError):
        while True:
            module, name, args = jobs.recv()
            try:
                quietly(getattr(importlib.import_module(module), name), *args)
                jobs.send("")
            except BaseException:
                jobs.send(traceback.format_exc())
            sys.stderr.flush()


def _nothing(*_: Any) -> None:
    """No picture: matplotlib takes longer than so small a run."""


def quietly(job: Callable[..., None], *args: Any) -> None:
    """What it prints is of no use."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        job(*args)


# ---- what any number of processes must make the same of --------------------------------------------------------------


def carry_out(name: str, settings: dict[str, Any]) -> None:
    """A command with these settings."""
    COMMANDS[name].train(COMMANDS[name].Config(**settings))


def prepare(root: Path) -> Path:
    """A folder with data, models of both families that end an answer soon, and who judges."""
    write(root / "data.jsonl", 24, 3)
    write(root / "rankings.jsonl", 20, 2, kinds=4)
    (root / "mine.py").write_text(JUDGE)
    tokenizer = Tokenizer.train([" ".join(["", *by_hand.WORDS])], 330)
    V, end = tokenizer.vocab_size, tokenizer.end_of_text
    llama, untied = (Llama(LlamaConfig(V, 48, 2, 2, 1, 16, 24, 8, from_scratch=True, tied=x)) for x in (True, False))
    gpt2 = GPT(GPTConfig(V, 48, 2, 2, 16, from_scratch=True))
    for name, model in {"llama": llama, "untied": untied, "gpt2": gpt2}.items():
        by_hand.lively(model, 0)
        embedding = model.wte if name == "gpt2" else model.embed_tokens
        embedding.weight.data[:, 0] += 0.5  # so that all that is said has some of that, which speaks for the end
        model.unembedding.data[end, 0] = 3.0
        models.save(model, tokenizer, root / name)
    by_hand.tiny_judge(root / "judge", str(root / "llama"), 2)
    return root


def write(path: Path, n: int, most: int, seed: int = 0, kinds: int = 1) -> str:
    """n groups of answers, some of which begin alike, to prompts of various lengths, in words up to `most` and four
    times that: pairs, or rankings of as many kinds as there are numbers of answers."""
    rng, rows = random.Random(seed), []
    for i in range(n):
        common, words = by_hand.text(rng, 0, most), rng.sample(by_hand.WORDS, 2 + i % kinds)
        said = [f"{common} {word}{by_hand.text(rng, 0, most)}" for word in words]
        told = {"responses": said} if kinds > 1 else {"chosen": said[0], "rejected": said[1]}
        rows.append({"prompt": f"{i}{by_hand.text(rng, 1, 4 * most)}"} | told)
    return by_hand.write(path, rows)


# of no answer 0, on which and on whose advantage only rounding would stand, and Adam makes steps of that
JUDGE = "def f(prompts, responses):\n    return [sum(map(ord, x)) % 13 - 5.63 for x in responses]\n"
LEARNING = {"device": "cpu", "batch_size": 7, "micro_batch": 2, "lr": 1e-4, "save_seconds": 1e9, "init": "llama"}
FITTED = LEARNING | {"warmup": 1, "epochs": 1, "eval_every": 2, "optimizer": "adamw", "data": "data.jsonl"}
SAMPLED = {"max_new_tokens": 6, "eval_prompts": 5}
ROUNDS = {"iterations": 2, "minibatch": 4, "value_warmup": 0, "max_kl": 1e4, "reward": ("mine.py:f",)}
USUAL: dict[str, dict[str, Any]] = {
    "sft": FITTED | {"steps": 3, "epochs": None, "dropout": 0.2},
    "dpo": FITTED | SAMPLED,
    "rm": FITTED | SAMPLED,
    "ppo": LEARNING | SAMPLED | ROUNDS | {"data": "data.jsonl"},
}


def settings_of(root: Path, name: str, **more: Any) -> dict[str, Any]:
    """Of a run that takes a second; files in `root` by their names, and nothing that is None."""
    given = {key: x for key, x in (USUAL[name] | more).items() if x is not None}
    given |= {key: str(root / given[key]) for key in ("data", "init") if given.get(key)}
    return given | ({"reward": tuple(f"{root}/{x}" for x in given["reward"])} if "reward" in given else {})


class Outcome:
    """What a run has left: rows of metrics; the report, with what was said on the way; the weights of its models."""

    def __init__(self, folder: Path):
        self.rows, self.report = results(folder)
        found = sorted(path for path in folder.rglob("*.safetensors") if path.parent.name in ("model", "critic"))
        self.weights = {f"{path.relative_to(folder)} {k}": x for path in found for k, x in load_file(path).items()}

    def __repr__(self) -> str:
        return "Outcome()"


def outcome(
    folder: Path, name: str, settings: dict[str, Any], pool: Pool | None = None, engine: str = "ddp"
) -> Outcome:
    """Of a run by the processes of a pool, or by this one."""
    out = Path(tempfile.mkdtemp(dir=folder), "run")
    (pool.run if pool else quietly)(carry_out, name, settings | {"out": str(out), "parallel": engine})
    return Outcome(out)


def same(found: Outcome, expected: Outcome, tolerance: float = 1e-5, said: bool = True) -> None:
    """All figures and weights are equal to this; and unless a token may be another, all that was `said`."""
    off = {}
    for row, other in zip(found.rows, expected.rows, strict=True):
        row, other = without_chance(row, tolerance), without_chance(other, tolerance)
        off |= differences(row, other, f"step {row['step']}")
    off |= differences(found.report, expected.report, "report") if said else {}
    assert found.weights.keys() == expected.weights.keys()
    for name, x in expected.weights.items():  # a reward model's head is divided by the spread of few scores
        off[name] = ((found.weights[name] - x).abs() / x.abs().clamp(min=1)).max().item()
    wrong = {name: x for name, x in off.items() if not x <= tolerance}
    assert not wrong, sorted(wrong.items(), key=lambda item: -item[1])[:12]


def without_chance(row: dict[str, float], tolerance: float) -> dict[str, float]:
    """Of rewards that are 0 but for rounding, as before the first step, any number may be right."""
    rewards = [abs(row[name]) for name in ("chosen_reward", "rejected_reward") if name in row]
    return {name: x for name, x in row.items() if name != "accuracy" or max(rewards, default=1.0) > tolerance}


def differences(a: Any, b: Any, place: str) -> Iterator[tuple[str, float]]:
    """Of each number in what JSON can hold, by its place: how far it is from the other, or as a share of that where
    that is above 1."""
    assert type(a) is type(b), place
    if isinstance(a, dict):
        assert a.keys() == b.keys(), place
        for key in a:
            yield from differences(a[key], b[key], f"{place} {key}")
    elif isinstance(a, list):
        assert len(a) == len(b), place
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differences(x, y, f"{place} {i}")
    elif isinstance(a, float):
        yield place, abs(a - b) / max(1.0, abs(b))
    else:
        assert a == b, (place, a, b)
