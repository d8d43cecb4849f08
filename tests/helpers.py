"""What the tests of the three scripts share: start one, read what it left, and feed it nonsense."""

import importlib
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from nanopref.running import flags as command_flags
from nanopref.running.files import read_lines
from nanopref.running.folder import Run

ROOT = Path(__file__).parent.parent

# a server that has imported what the scripts need, of which each forked process is a copy that has done nothing yet
forks = multiprocessing.get_context("forkserver")
NEEDED = ["train_dpo", "train_rm", "train_ppo", "nanopref.people", "torch._dynamo", "torch.distributed.fsdp", "pytest"]
forks.set_forkserver_preload(NEEDED)


def flags(**settings) -> list[str]:
    """A dictionary of settings as command-line flags."""
    words = []
    for name, value in settings.items():
        words += [f"--{name.replace('_', '-')}"] if value is True else [f"--{name.replace('_', '-')}", str(value)]
    return words


def start(script: str, *words: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    """A script in a process of its own, with one thread, so that several at once do not fight."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, str(ROOT / script), *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    """Wait for a script that should succeed."""
    _, errors = process.communicate()
    assert process.returncode == 0, errors


class Fork(forks.Process):
    """A script in a process of its own, as from `start`, but at work at once: to import torch takes seconds."""

    def __init__(self, log: Path, script: str, *words: str, **environment: str):
        super().__init__(target=_run_script, args=(log, script, words, environment))
        self.log = log
        self.start()

    def finish(self) -> tuple[int, str]:
        """The exit code, negative where a signal ended it, and what it wrote to stdout and stderr."""
        self.join()
        return self.exitcode, self.log.read_text()

    def kill(self) -> int:
        super().kill()
        return self.finish()[0]

    def succeed(self) -> None:
        code, output = self.finish()
        assert code == 0, output


def beginning(folder: Path, **settings) -> Run:
    """A run of which there is no more than its folder, for what is made on its way."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {
        "out": str(folder),
        "resume": False,
        "overwrite": False,
        "tensorboard": False,
        "kernels": "auto",
        "save_seconds": 60.0,
    }
    return Run(SimpleNamespace(**plain, **settings))


def processes(n: int, folder: Path, script: str, *words: str, after: Fork | None = None) -> list[Fork]:
    """The script as torchrun starts it in n processes; or again `after` the first of those before."""
    if n == 1:
        return [Fork(folder / "log 0", script, *words)]
    # torchrun's, which outlives them
    meet = after.meet if after else dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(meet.port), "WORLD_SIZE": str(n)}
    common |= {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": str(int(bool(after))),
        "LOCAL_WORLD_SIZE": str(n),
    }
    forks = [Fork(folder / f"log {i}", script, *words, RANK=str(i), LOCAL_RANK=str(i), **common) for i in range(n)]
    forks[0].meet = meet
    return forks


def two_processes(folder: Path, script: str, *words: str) -> list[Fork]:
    return processes(2, folder, script, *words)


def _run_script(log: Path, script: str, words: tuple[str, ...], environment: dict[str, str]) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    sys.argv = [script, *words]
    module = importlib.import_module(script.removesuffix(".py"))
    command = module.train if hasattr(module, "train") else module.main
    command_flags.main(command, module.Config, words)


def results(folder: Path) -> tuple[list[dict], dict]:
    """metrics.jsonl, and report.json with what samples.jsonl holds; without what depends on the clock or the GPU."""
    report = json.loads((folder / "report.json").read_text())
    report.pop("seconds")
    report.pop("peak_memory_MiB", None)
    report["on the way"] = read_lines(folder / "samples.jsonl")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith("per_second")} for row in rows], report


def saved_state(folder: Path, round: int = 1) -> dict:
    """What the newest state of a run of one process holds: `model`, `optimizer`, and what is in run.json."""
    place = folder / ("state" if round == 1 else f"state-{round}")
    newest = max((path for path in place.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name))
    tensors = {name: x for path in newest.glob("*.safetensors") for name, x in load_file(path).items()}
    model = {name: x for name, x in tensors.items() if not name.startswith("optimizer.")}
    optimizer = {name.removeprefix("optimizer."): x for name, x in tensors.items() if name not in model}
    return json.loads((newest / "run.json").read_text()) | {"model": model, "optimizer": optimizer}


def board(folder: Path, reader=None) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run, through a new reader or one that looks on: {tag: (step, value) of each}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = (reader or EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})).Reload()
    return {name: [(x.step, x.value) for x in reader.Scalars(name)] for name in reader.Tags()["scalars"]}


def stopped(command, config, capsys) -> str:
    """What a command says that ends with exit code 2: a line on stderr."""
    with pytest.raises(SystemExit) as stop:
        command_flags.execute(command, config)
    errors = capsys.readouterr().err
    assert stop.value.code == 2
    assert "Traceback" not in errors and errors.count("\n") == 1, errors
    return errors


def refused(command, config, message: str, capsys) -> None:
    """One sentence, exit code 2, nothing written."""
    assert message in stopped(command, config, capsys)
    assert not Path(config.out).exists()


def lines(*rows) -> bytes:
    """Rows as JSON Lines."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)
