"""Runs of the four commands that take a second, each with all the files that a run may have."""

import contextlib
import io
import json
import random
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import by_hand
import torch
from helpers import flags, results
from safetensors.torch import load_file

import train_dpo
import train_ppo
import train_rm
from nanopref import sft
from nanopref.running import flags as command_flags

COMMANDS = {"dpo": train_dpo, "rm": train_rm, "ppo": train_ppo, "sft": sft}
SCRIPTS = {"dpo": "train_dpo.py", "rm": "train_rm.py", "ppo": "train_ppo.py", "sft": "nanopref.sft"}
JUDGE = "def f(prompts, responses):\n    return [float(sum(map(ord, x)) % 13) for x in responses]\n"
SMALL = {"batch_size": 8, "micro_batch": 8, "device": "cpu", "save_seconds": 0.0, "lr": 1e-3}
SAMPLING = {"max_new_tokens": 8, "eval_prompts": 4}


def settings(root: Path) -> dict[str, dict]:
    """Of each command, on files that are written to a folder: rounds and answers that are judged for DPO, a tokenizer
    of its own for SFT, and for PPO the stages before it, each a run in the run's folder."""
    rng = random.Random(0)
    rows = [
        {"prompt": f"{i}{by_hand.text(rng, 1, 3)}", "chosen": f" good{by_hand.text(rng, 1, 3)}", "rejected": " bad"}
        for i in range(24)
    ]
    data, init = by_hand.write(root / "pairs.jsonl", rows), by_hand.tiny_model(root / "init")
    (root / "mine.py").write_text(JUDGE)
    judged = {"data": data, "init": init, "reward": (f"{root}/mine.py:f",), "prompts": 240, "eval_every": 2}
    judged |= SMALL | SAMPLING | {"epochs": 1}
    nested = SMALL | SAMPLING | {"data": data, "sft_steps": 2, "block_size": 32, "iterations": 3, "minibatch": 8}
    return {
        "dpo": judged | {"rounds": 2},
        "rm": judged | {"heads": 2},
        "ppo": nested | {"max_kl": 1e4, "value_warmup": 0},
        "sft": SMALL | {"data": data, "block_size": 32, "vocab_size": 300, "steps": 4, "eval_every": 2},
    }


def config_of(name: str, root: Path, out: Path, **more):
    return COMMANDS[name].Config(**settings(root)[name] | {"out": str(out)} | more)


def words_of(name: str, root: Path, out: Path) -> list[str]:
    """The command line of the same run."""
    given = settings(root)[name] | {"out": str(out)}
    return flags(**{k: v[0] if isinstance(v, tuple) else v for k, v in given.items()})


def run(config) -> None:
    """As the command line would."""
    command = next(module for module in COMMANDS.values() if type(config) is module.Config)
    command_flags.execute(command.train, config)


def outcome(folder: Path) -> tuple:
    """All that a run ends with but what depends on the clock: metrics, report, samples, weights."""
    models = sorted(path for path in folder.rglob("*.safetensors") if path.parent.name in ("model", "critic"))
    weights = {str(path.relative_to(folder)): load_file(path) for path in models}
    weights = {name: {k: x.clone() for k, x in found.items()} for name, found in weights.items()}
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix != ".png"}  # not always drawn
    return *results(folder), weights, sorted(names)


def alike(a: tuple, b: tuple) -> bool:
    """Whether two runs ended the same, to the bit."""
    (*figures, weights, names), (*others, other_weights, other_names) = a, b
    return (
        json.dumps(figures) == json.dumps(others)
        and names == other_names
        and weights.keys() == other_weights.keys()
        and all(torch.equal(x, other_weights[name][k]) for name, found in weights.items() for k, x in found.items())
    )


# ---- as SIGKILL would leave them -------------------------------------------------------------------------------------

_watched: list = []  # a folder, how often something was done below it, and what happens then; or nothing


def _audit(event: str, args: tuple) -> None:
    if _watched and event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link"):
        folder, count, act = _watched[0]
        if isinstance(args[0], str | Path) and str(args[0]).startswith(folder):
            _watched.clear()
            try:
                act(count, event, args)
            finally:
                _watched.append((folder, count + 1, act))


sys.addaudithook(_audit)


def watched(folder: Path, act: Callable[[int, str, tuple], None], command: Callable, *args) -> None:
    """Call a command; and `act` before each thing that Python does with a file below this folder: with its number, and
    what it is, as auditing tells it.

    Between two of them libraries may write, but only to files that Python renames when they are done."""
    _watched.append((str(folder), 0, act))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            command(*args)
    finally:
        _watched.clear()


def killed(name: str, root: Path, moment: float, to: Path) -> None:
    """Let `to` be what a run leaves that is killed when this share of it is over."""
    out, number = root / f"{name} to be killed", int(moment * moments(name, root))
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(to, ignore_errors=True)

    def copy(count: int, *_) -> None:
        if count == number:
            shutil.copytree(out, to) if out.exists() else None

    watched(out, copy, run, config_of(name, root, out))


@cache
def moments(name: str, root: Path) -> int:
    """How often a run does something with a file."""
    counted, out = [], root / f"{name} counted"
    watched(out, lambda count, *_: counted.append(count), run, config_of(name, root, out))
    return len(counted)
