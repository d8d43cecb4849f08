"""Flags: ranges that stand beside them, defaults that depend on others, help in groups, errors in one sentence."""

import importlib
import math
from dataclasses import dataclass, fields

import pytest
import torch

from nanopref.running import flags
from nanopref.running.flags import LearningFlags, RunFlags, UserError, flag

COMMANDS = ["train_dpo", "train_rm", "train_ppo", "nanopref.sft", "nanopref.generate", "nanopref.evaluate"]


@dataclass
class Config(LearningFlags, RunFlags):
    """What it does.

    Example: python it.py --data x
    """

    out: str = "out/it"
    data: str = flag("", "a file")
    share: float = flag(0.5, "of something", above=0, below=1)
    kind: str = flag("a", "which", among=("a", "b"))
    weights: tuple[float, ...] = flag((), "some")
    many: tuple[str, ...] | None = flag(None, "names")
    steps: int | None = flag(None, "how many", least=1, most=9, task=3, file=5, pretrained=7)
    lr: float | None = flag(None, "peak learning rate", above=0, task=0.1, pretrained=0.01)


def test_words_become_values_and_the_rest_keeps_its_default():
    words = ["--steps", "4", "--kind", "b", "--resume", "--weights", "1", "2.5", "--out", "x", "--batch-size", "3"]
    assert flags.parse(Config, words) == Config(
        steps=4, kind="b", resume=True, weights=(1.0, 2.5), out="x", batch_size=3
    )
    assert flags.parse(Config, []) == Config()
    assert flags.parse(Config, ["--many"]).many == () and flags.parse(Config, ["--many", "a"]).many == ("a",)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"share": 0.0}, "--share must be above 0, not 0.0"),
        ({"share": 1.0}, "--share must be below 1, not 1.0"),
        ({"share": math.nan}, "--share must be a finite number, not nan"),
        ({"weights": (1.0, math.inf)}, "--weights must be a finite number, not inf"),
        ({"steps": 0}, "--steps must be at least 1, not 0"),
        ({"steps": 10}, "--steps must be at most 9, not 10"),
        ({"kind": "c"}, "--kind must be one of a, b, not c"),
        ({"lr": -1.0}, "--lr must be above 0, not -1.0"),  # changed in the subclass
        ({"batch_size": 0}, "--batch-size must be at least 1, not 0"),  # inherited
        ({"seed": 2**32}, "--seed must be below 4294967296"),
    ],
)
def test_a_value_out_of_its_range_is_refused(settings, message):
    flags.check(Config())
    with pytest.raises(UserError, match=message):
        flags.check(Config(**settings))


def test_triton_without_a_gpu_is_refused(monkeypatch):
    import kernels

    monkeypatch.setattr(kernels, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--kernels triton: kernels: asked for Triton, but there is no GPU"):
        flags.check(Config(kernels="triton"))


def test_defaults_follow_from_the_situation_and_what_is_given_stays():
    assert (flags.resolve(Config()).steps, flags.resolve(Config()).lr) == (3, 0.1)
    assert (flags.resolve(Config(data="x")).steps, flags.resolve(Config(data="x")).lr) == (5, None)
    assert (flags.resolve(Config(data="x"), "pretrained").steps, flags.resolve(Config(), "pretrained").lr) == (7, 0.01)
    assert flags.resolve(Config(steps=2), "pretrained").steps == 2


def help_of(Config, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        flags.parse(Config, ["--help"])
    assert stop.value.code == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_help_says_ranges_in_groups_and_defaults_as_they_are(capsys):
    text = help_of(Config, capsys)
    assert "test_flags options" in text.replace("-", "_") and "learning options" in text and "run options" in text
    assert "(default: 3 on the built-in task; 5 with --data; 7 from a pretrained model)" in text
    assert "--share FLOAT of something (default: 0.5)" in text and "--steps INT how many" in text
    assert text.index("--share") < text.index("--batch-size") < text.index("--seed")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_commands_help_is_readable_and_has_one_example(name, capsys):
    config = importlib.import_module(name).Config
    text = help_of(config, capsys)
    assert text.count("Example: python") == 1 and "None" not in text and "{}" not in text and "MISSING" not in text
    for f in fields(config):
        assert f"--{f.name.replace('_', '-')}" in text
        assert flags._rules(config, f.name)["help"], f.name
    flags.check(config())


def test_a_flag_that_two_commands_have_has_one_range():
    """But for PPO's β and the temperature of sampling, which may be 0, and for train_rm.py, which needs a spread."""
    seen = {}
    for name in COMMANDS:
        config = importlib.import_module(name).Config
        for f in fields(config):
            bounds = {k: v for k, v in flags._rules(config, f.name).items() if k in flags.BOUNDS}
            if f.name not in ("beta", "eval_prompts", "temperature"):
                assert seen.setdefault(f.name, bounds) == bounds, (f.name, name)


@pytest.mark.parametrize(
    "error, code, words",
    [
        (UserError("no such thing"), 2, "error: no such thing\n"),
        (
            OSError(28, "No space left on device"),
            2,
            "error: [Errno 28] No space left on device; make room, and --resume goes",
        ),
        (KeyboardInterrupt("3 of 9 steps"), 130, "\nstopped: 3 of 9 steps\n"),
        (MemoryError(), 2, "error: out of memory: lower --micro-batch (now 16)"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "error: out of memory: lower --micro-batch (now 16)"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 2, "out of memory"),
        (RuntimeError("unable to mmap 123 bytes from file: Cannot allocate memory (12)"), 2, "out of memory: lower"),
        (RuntimeError("can't start new thread"), 2, "out of memory: lower"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), 2, "out of memory: lower"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), 2, "out of memory: lower"),
        (OSError(12, "Cannot allocate memory"), 2, "error: out of memory: lower"),
        (ImportError("libx.so: failed to map segment from shared object"), 2, "error: out of memory: lower"),
        (SystemError("std::bad_alloc"), 2, "error: out of memory: lower"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(error, code, words, capsys):
    def command(config):
        raise error

    with pytest.raises(SystemExit) as stop:
        flags.execute(command, Config())
    errors = capsys.readouterr().err
    assert stop.value.code == code and words in errors and len(errors.strip().splitlines()) == 1


def test_a_process_that_runs_out_of_memory_says_so_whichever_it_is(capsys, monkeypatch):
    """What all processes say alike, the first says; memory runs out where the longest rows are."""
    torchrun = {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, str(value))
    for error, said in ((MemoryError(), "out of memory"), (UserError("no such file"), "")):

        def command(config, error=error):
            raise error

        with pytest.raises(SystemExit):
            flags.execute(command, Config())
        errors = capsys.readouterr().err
        assert (said in errors) if said else errors == ""


def test_another_error_keeps_its_traceback():
    def command(config):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        flags.execute(command, Config())
