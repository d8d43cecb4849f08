"""What the tests of the three scripts share: start one, read what it left, and feed it nonsense."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanopref import run

ROOT = Path(__file__).parent.parent


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


def results(folder: Path) -> tuple[list[dict], dict]:
    """metrics.jsonl and report.json, without what depends on the clock or the GPU."""
    report = json.loads((folder / "report.json").read_text())
    report.pop("seconds")
    report.pop("peak_memory_MiB", None)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith("per_second")} for row in rows], report


def refused(train, config, message: str, capsys) -> None:
    """One sentence, exit code 2, nothing written."""
    with pytest.raises(SystemExit) as stop:
        run.main(train, config)
    errors = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in errors and "Traceback" not in errors and errors.count("\n") == 1, errors
    assert not Path(config.out).exists()


def lines(*rows) -> bytes:
    """Rows as JSON Lines."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)
