"""What is printed is seen and not obeyed, in any encoding; a process is alone unless torchrun says all; Ctrl-C."""

import io
import os
import signal
import sys
import threading
from dataclasses import dataclass

import pytest
import torch.distributed as dist

from nanopref import generate
from nanopref.evaluation import report
from nanopref.running import flags, parallel, terminal
from nanopref.running.flags import UserError, flag
from nanopref.running.parallel import say

OBEYED = "\x1b[2J\x1b]0;title\a\r\b\x7f\x9b31m\u202egnp.exe\u2066"
SHOWN = r"\x1b[2J\x1b]0;title\x07\x0d\x08\x7f\x9b31m\u202egnp.exe\u2066".replace(r"\x0d", r"\r")
SAMPLE = {"prompt": f"a film{OBEYED}", "reference": f"good{OBEYED} 漢", "policy": "π\ttheta\nbad 👩‍👩‍👧"}


@dataclass
class Config:
    """What it does."""

    text: str = flag("", "a text")
    names: tuple[str, ...] = flag((), "texts")
    steps: int = flag(1, "how many", least=1)
    rate: float = flag(1.0, "how much", above=0)


def ends(command, words=(), code: int = 2) -> None:
    with pytest.raises(SystemExit) as stop:
        flags.main(command, Config, list(words))
    assert stop.value.code == code


# ---- text ------------------------------------------------------------------------------------------------------------


def test_what_a_terminal_would_obey_is_shown(capsys):
    """In what is said, in samples, in the description of a bar, and in errors."""
    assert terminal.shown(OBEYED) == SHOWN and terminal.shown("a\tb\n漢 👩‍👩‍👧\xa0é") == "a\tb\n漢 👩‍👩‍👧\xa0é"
    say(OBEYED)
    report.print_samples([SAMPLE])
    bar = parallel.progress(OBEYED, 10)
    bar.printed -= 60
    bar.update()

    def command(config):
        raise UserError(f"{OBEYED}\nerror: all is well")

    ends(command)
    printed = capsys.readouterr()
    assert not any(letter in printed.out + printed.err for letter in "\x1b\a\r\b\x7f\x9b\u202e\u2066")
    assert printed.out.startswith(f"{SHOWN}\n") and printed.out.count(r"\x1b[2J") == 3 and "👩‍👩‍👧" in printed.out
    bar, error = printed.err.splitlines()
    assert bar.startswith(r"\x1b[2J") and error == rf"error: {SHOWN}\nerror: all is well"


def test_an_answer_is_shown_at_a_terminal_and_as_it_is_elsewhere(capsys, monkeypatch):
    generate.write(OBEYED)
    assert capsys.readouterr().out == OBEYED
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    generate.write(OBEYED)
    assert capsys.readouterr().out == SHOWN


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_any_encoding_prints_tables_and_samples(encoding, monkeypatch):
    out, errors = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", errors)

    def command(config):
        report.print_samples([SAMPLE])
        say(report.table([("β", "±1"), ("漢", "\udcff")], ("θ", "π")))
        generate.write("漢")
        raise UserError("no 漢.jsonl")

    ends(command)
    out.flush(), errors.flush()
    out, errors = (stream.buffer.getvalue().decode(encoding) for stream in (out, errors))
    wide = encoding == "utf-8"
    assert ("│" if wide else "|") in out and ("───" if wide else "---") in out
    assert ("漢" if wide else r"\u6f22") in out and r"\udcff" in out
    assert errors == ("error: no 漢.jsonl\n" if wide else "error: no \\u6f22.jsonl\n")


def test_help_in_any_encoding(monkeypatch):
    import train_dpo

    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit):
        flags.main(print, train_dpo.Config, ["--help"])
    out.flush()
    assert rb"pi_ref" in out.buffer.getvalue()


def test_streams_that_are_closed_swallow_what_they_are_given(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)

    def command(config):
        say("a")
        parallel.progress("b", 2).update()
        raise UserError("c")

    ends(command)


def test_a_line_of_megabytes_keeps_both_ends(capsys):
    assert terminal.line("a" * 1200) == "a" * 1200

    def command(config):
        raise UserError(f"{'here/' * 20}d.jsonl, line 3: 'role' must be text, not {'x' * 10**7}\x1b, or else")

    ends(command)
    error = capsys.readouterr().err
    assert len(error) < 1300 and error.startswith(f"error: {'here/' * 20}d.jsonl, line 3: 'role' must be text, not xxx")
    assert error.endswith("xxx\\x1b, or else\n")


# ---- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [["--steps", "x" * 10**6], [f"--steps={'x' * 10**6}"], [f"--{'x' * 10**6}"], ["--steps", "\x1b[2J\n"], ["\x9b"],
     ["--steps", "9" * 10**5], ["--steps", "1e400"], ["--steps", "1\udcff"]],
)  # fmt: skip
def test_words_that_do_not_fit_are_not_repeated_at_length_nor_obeyed(words, capsys):
    ends(lambda config: None, words)
    error = capsys.readouterr().err
    assert len(error) < 4000 and "\x1b" not in error and "\x9b" not in error and "\udcff" not in error


def test_words_that_are_long_or_odd_arrive_as_they_are():
    words = ["a\nb", r"a\nb", "x" * 10**5, "x" * 10**5 + "y", "\x1b", "漢\xa0", "--text"]
    for word in words[:-1]:
        assert flags.parse(Config, ["--text", word]).text == flags.parse(Config, [f"--text={word}"]).text == word
    assert flags.parse(Config, ["--names", *words[:-1], "--text", "a\nb"]) == Config(names=(*words[:-1],), text="a\nb")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--text", "a\udcff"], "--text holds bytes that are no text"),
        (["--names", "a", "\ud800"], "--names holds bytes that are no text"),
        (["--steps", "2147483648"], "--steps must be at most 2147483647, not 2147483648"),
        (["--steps", "9" * 400], "--steps must be at most 2147483647, not 999"),
        (["--rate", "9" * 400], "--rate must be a finite number, not inf"),
        (["--rate", "1e400"], "--rate must be a finite number, not inf"),
    ],
)
def test_values_beyond_all_measure_are_refused(words, message, capsys):
    ends(flags.check, words)
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1 and len(error) < 1300


# ---- alone or one of several -----------------------------------------------------------------------------------------

TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
LEFT_OVER = {
    **{f"without {name}": {k: v for k, v in TORCHRUN.items() if k != name} for name in TORCHRUN},
    **{f"{name} alone": {name: value} for name, value in TORCHRUN.items()},
    "a word": TORCHRUN | {"RANK": "one"},
    "nothing": TORCHRUN | {"LOCAL_RANK": ""},
    "a negative number": TORCHRUN | {"RANK": "-1"},
    "a rank beyond all": TORCHRUN | {"RANK": "2"},
    "no number of processes": TORCHRUN | {"WORLD_SIZE": "²"},
}


@pytest.mark.parametrize("what", LEFT_OVER)
def test_what_is_left_in_the_environment_joins_nobody_and_hides_nothing(what, monkeypatch, capsys):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in LEFT_OVER[what].items():
        monkeypatch.setenv(name, value)

    def command(config):
        parallel.start("cpu", 0)
        assert not dist.is_initialized()
        say("at work")
        raise UserError("no such file")

    ends(command)
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("at work\n", "error: no such file\n")


def test_torchrun_is_taken_at_its_word(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert terminal.place() == (1, 1)


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------


def test_an_interrupt_that_becomes_another_error_is_one_all_the_same(capsys):
    before = signal.getsignal(signal.SIGINT)

    def command(config):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("numpy could not be imported") from None

    ends(command, code=130)
    assert capsys.readouterr().err == "\nstopped: start the same command to continue\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_one_ends_the_process_at_once(monkeypatch):
    said = []

    def stop_at_once(words):
        said.append(words)
        sys.exit(130)

    monkeypatch.setattr(terminal, "stop_at_once", stop_at_once)

    def command(config):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:  # swallowed
            os.kill(os.getpid(), signal.SIGINT)

    ends(command, code=130)
    assert said == ["\nstopped: start the same command to continue"]


def test_where_ctrl_c_is_ignored_or_another_thread_works_it_stays_so(monkeypatch):
    seen = []
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        flags.main(lambda config: seen.append(signal.getsignal(signal.SIGINT)), Config, [])
    finally:
        signal.signal(signal.SIGINT, before)
    thread = threading.Thread(target=flags.main, args=(lambda config: seen.append("thread"), Config, []))
    thread.start(), thread.join()
    assert seen == [signal.SIG_IGN, "thread"]
