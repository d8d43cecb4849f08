"""`python -m nanopref.generate` as its users meet it."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import scripted

from nanopref import models
from nanopref.data.tokenizer import Tokenizer
from nanopref.generate import Config, main
from nanopref.running import flags


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["aaa bb, aaa bb"], 260)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A model that goes on after a prompt of two tokens with text in which every character is cut between tokens."""
    script = [0, *tokenizer.encode("é🎬 ok".encode()), tokenizer.end_of_text]
    assert len(script) == 11  # a token a byte
    folder = tmp_path_factory.mktemp("scripted")
    models.save(scripted(script, 24), tokenizer, folder)
    return folder


def command(*arguments):
    arguments = [sys.executable, "-m", "nanopref.generate", *map(str, arguments)]
    return subprocess.run(arguments, capture_output=True, cwd=Path(__file__).parents[1], timeout=120)


def test_the_command_answers(folder):
    done = command("--model", folder, "--prompt", "xy", "--temperature", 0, "--device", "cpu")
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, "xyé🎬 ok\n", b"")


def test_the_command_refuses_a_missing_model():
    done = command("--model", "out/no such run", "--prompt", "xy")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode().startswith("error: out/no such run: no model folder") and b"Trace" not in done.stderr


class Terminal(io.StringIO):
    """Remembers what had been written at each flush."""

    def __init__(self):
        super().__init__()
        self.flushed = []

    def flush(self):
        self.flushed.append(self.getvalue())


def answer(monkeypatch, folder, prompt="xy", **kwargs) -> list[str]:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    main(Config(prompt=prompt, model=str(folder), temperature=0, device="cpu", **kwargs))
    monkeypatch.undo()
    return [*terminal.flushed, terminal.getvalue()]


def test_the_answer_streams_character_by_character(monkeypatch, folder):
    shown = answer(monkeypatch, folder)
    assert list(dict.fromkeys(shown)) == ["xy", "xyé", "xyé🎬", "xyé🎬 ", "xyé🎬 o", "xyé🎬 ok", "xyé🎬 ok\n"]
    assert not any("\ufffd" in text for text in shown)


def test_an_answer_cut_within_a_character_says_so(monkeypatch, folder):
    assert answer(monkeypatch, folder, max_new_tokens=4)[-1] == "xyé\ufffd\n"


def test_an_empty_prompt_starts_from_end_of_text(monkeypatch, folder):
    assert answer(monkeypatch, folder, prompt="", max_new_tokens=1)[-1] == "\0\n"


def refusal(capsys, **kwargs) -> str:
    with pytest.raises(SystemExit) as stop:
        flags.execute(main, Config(**({"device": "cpu"} | kwargs)))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_the_command_refuses_bad_folders_and_prompts(tmp_path, folder, capsys):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save({"wte.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    assert "not a safetensors file" in refusal(capsys, prompt="a", model=str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    Tokenizer.train(["aaa bb, aaa bb, aaa bb"], 262).save(tmp_path)
    assert "the tokenizer has 262 tokens and the model only 260" in refusal(capsys, prompt="a", model=str(tmp_path))
    assert "leaves no room" in refusal(capsys, prompt="x" * 24, model=str(folder))
    assert "--top-p" in refusal(capsys, prompt="a", model=str(folder), top_p=0)
    assert "--device nonsense" in refusal(capsys, prompt="a", model=str(folder), device="nonsense")


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_the_command_refuses_a_seed_out_of_range(folder, capsys, seed):
    assert "--seed" in refusal(capsys, prompt="a", model=str(folder), seed=seed)
