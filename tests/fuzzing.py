"""What the fuzzers in tests/fuzz share: how many examples they try, what is counted, and how a command may end.

`pytest tests/fuzz` tries the same examples each time, for about a minute; `python tests/fuzzing.py --minutes 60` new
ones, from seeds that are printed, until the time is over.
"""

import argparse
import contextlib
import io
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from hypothesis import HealthCheck, settings

SCALE, LOG = "NANOPREF_FUZZ_SCALE", "NANOPREF_FUZZ_LOG"


def examples(n: int) -> settings:
    """Try n examples, the same in each run of the suite; by the command more, and others each time."""
    scale = float(os.environ.get(SCALE, 1))
    quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(
        max_examples=max(1, round(scale * n)), deadline=None, derandomize=scale == 1, database=None,
        suppress_health_check=quiet, print_blob=True,
    )  # fmt: skip


@contextlib.contextmanager
def tried(area: str) -> Iterator[None]:
    """Count an example, and whether it held."""
    outcome = "failed"
    try:
        yield
        outcome = "held"
    finally:
        if log := os.environ.get(LOG):
            with open(log, "a") as f:
                f.write(f"{area}\t{outcome}\n")


def how_it_ends(command, *args) -> tuple[int, str, str]:
    """Call a command that may end by itself: its exit code, what it said, and its error, which must be one sentence."""
    code, said, errors = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        try:
            command(*args)
        except SystemExit as stop:
            code = stop.code or 0
    error = "\n".join(line for line in errors.getvalue().splitlines() if line.startswith("error: "))
    if code:
        assert code == 2 and error, (code, errors.getvalue())
        assert len(error) < 2000 and error.count("\n") == 0 and error.isprintable(), error
    return code, said.getvalue(), error


def main() -> None:
    parser = argparse.ArgumentParser(description="Look for inputs that end in a traceback, or as a false success.")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first pass; the next ones count on")
    parser.add_argument("--scale", type=float, default=6.0, help="times as many examples a pass as the suite tries")
    parser.add_argument("pytest", nargs="*", help="more words for pytest, behind --, as -k folders")
    config = parser.parse_args()
    end, counts, broken = time.monotonic() + 60 * config.minutes, Counter(), []
    command = [sys.executable, "-m", "pytest", Path(__file__).parent / "fuzz", "-p", "no:cacheprovider", "--tb=short"]
    command += ["--show-capture=no", *config.pytest]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        environment = os.environ | {SCALE: str(config.scale), LOG: str(log)}
        for seed in itertools.takewhile(lambda _: time.monotonic() < end, itertools.count(config.seed)):
            print(f"seed {seed}", flush=True)
            log.write_text("")
            again = [*command, f"--hypothesis-seed={seed}"]
            result = subprocess.run(again, env=environment, text=True, capture_output=True)
            counts.update(log.read_text().splitlines())
            if result.returncode:
                broken.append(seed)
                print(result.stdout[-20_000:], flush=True)
            for area in sorted({line.split("\t")[0] for line in counts}):
                held, failed = counts[f"{area}\theld"], counts[f"{area}\tfailed"]
                print(f"  {area}: tried {held + failed:,}, held {held:,}, failed {failed:,} (shrinking included)")
    sys.exit(f"failed with seeds {', '.join(map(str, broken))}" if broken else 0)


if __name__ == "__main__":
    main()
