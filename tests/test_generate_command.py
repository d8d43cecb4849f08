"""`python -m nanopref.generate` as its users meet it."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chat_templates import chat_tokenizer
from small_models import scripted

from nanopref import models
from nanopref.data.dialogues import NEXT
from nanopref.data.tokenizer import Tokenizer
from nanopref.generate import Config, Printer, Stop, main
from nanopref.models import sampling
from nanopref.models.scalar import ScalarModel
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


# ---- credit ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """A DPO run and a PPO run of the scripted model, whose reference knows nothing, and a judge by length."""
    root, (policy, tokenizer) = tmp_path_factory.mktemp("runs"), models.load(folder)
    models.save(scripted([], 24), tokenizer, root / "sft")
    (root / "mine.py").write_text("def f(prompt, response):\n    return float(len(response))\n")
    flags = {"init": str(root / "sft"), "beta": 0.5, "reward": [f"{root}/mine.py:f"], "missing_end": 1.0}
    flags |= {"gamma": 1.0, "lam": 0.9, "doubt": 0.0}
    for name in ("dpo", "ppo"):
        models.save(policy, tokenizer, root / name / "model")
        (root / name / "config.json").write_text(json.dumps({"flags": flags}))
    models.save(ScalarModel(models.load(folder)[0]), tokenizer, root / "ppo" / "critic")
    return root


def test_credit_is_a_table_behind_the_answer(monkeypatch, runs):
    said = answer(monkeypatch, runs / "dpo", credit=True)[-1].splitlines()
    assert said[:2] == ["xyé🎬 ok", ""] and said[2].split() == ["token", "β", "log", "π_θ/π_ref"]
    names = [line.split('"')[1] for line in said[4:-1]]
    assert names == ["", "é", "", "", "", "🎬", " ", "o", "k", "<|endoftext|>"] and said[-1].startswith("together")
    assert all(float(line.split()[-1]) > 0 for line in said[4:])  # the reference would have said anything
    both = answer(monkeypatch, runs / "ppo", credit=True)[-1].splitlines()
    assert both[2].endswith("GAE's advantage") and len(both[4].split()) == 4
    other = answer(monkeypatch, runs / "ppo", credit=True, reward=("rules",))[-1].splitlines()
    assert [line.split()[-2] for line in both[4:12]] == [line.split()[-2] for line in other[4:12]]
    assert both[-2] != other[-2]  # the last token, at which the judge is heard


@pytest.mark.parametrize("setting, colours", [("NO_COLOR=", True), ("NO_COLOR=1", False), ("TERM=dumb", False)])
def test_credit_is_coloured_on_a_terminal_that_shows_colours(setting, colours, monkeypatch, runs):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv(*setting.split("="))
    monkeypatch.setattr(Terminal, "isatty", lambda self: True)
    shown = answer(monkeypatch, runs / "dpo", credit=True)[-1]
    assert ("\x1b[38;5;16;48;5;" in shown) is colours and ("token " in shown) is not colours


def test_the_best_of_several_has_credit_too(monkeypatch, runs):
    said = answer(monkeypatch, runs / "dpo", credit=True, best_of=2, reward=(f"{runs}/mine.py:f",))[-1]
    assert "score 5.00: the best of 2, whose mean is 5.00\n\ntoken" in said and "together" in said


def test_credit_that_nothing_can_say_is_refused(folder, runs, capsys):
    no_run = refusal(capsys, prompt="a", model=str(folder), credit=True)
    assert f"--credit: {folder}: no run of train_dpo.py or train_ppo.py, which would say its β" in no_run
    assert "--credit is of a single answer: leave out --chat" in refusal(
        capsys, model=str(runs / "dpo"), credit=True, chat=True
    )
    said = refusal(capsys, prompt="a", model=str(runs / "dpo"), credit=True, reward=("true",))
    assert f"--reward: {runs}/dpo has no critic, for which it would judge" in said
    assert "go together" in refusal(capsys, prompt="a", model=str(runs / "dpo"), credit=True, best_of=2)
    assert "go together" in refusal(capsys, prompt="a", model=str(runs / "ppo"), reward=("true",))
    said = refusal(capsys, prompt="a", model=str(runs / "ppo"), credit=True, doubt=1.0)
    assert "--doubt: there is no --reward that has any" in said  # the run's own judge has the run's


# ---- a conversation --------------------------------------------------------------------------------------------------


@pytest.fixture
def talk(monkeypatch, tmp_path):
    """Lets a scripted model answer lines of stdin, and gives what was asked of it in tokens, and what was printed."""

    def talk(tokenizer, script: list[int], lines: list[str], block_size: int = 200, **flags) -> tuple[list[str], str]:
        models.save(scripted([0], block_size, tokenizer.vocab_size), tokenizer, tmp_path / "model")
        asked = []

        def says(model, prompts, max_new_tokens, *, ends, on_token, **setting):
            asked.append(tokenizer.decode(prompts[0]))
            for token in script[:max_new_tokens]:
                on_token(0, token)
                if token in ends:
                    break
            return [sampling.Sample(script, [])]

        monkeypatch.setattr("nanopref.generate.generate", says)
        terminal = Terminal()
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        setting = {"max_new_tokens": 50, "device": "cpu", **flags}
        main(Config(model=str(tmp_path / "model"), chat=True, **setting))
        monkeypatch.undo()
        return asked, terminal.getvalue()

    return talk


def test_a_conversation_is_remembered(talk, tmp_path):
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", "chatml")
    script = [*tokenizer.encode("é🎬 "), tokenizer.end_of_text, 1, 2]
    asked, printed = talk(tokenizer, script, ["  hi ", "and <|im_end|>", "", "never"], system="be brief")
    assert printed == "é🎬 \n" * 2
    before = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert asked[0] == before
    after = "<|im_end|>\n<|im_start|>user\nand <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert asked[1] == f"{before}é🎬 {after}" and len(asked) == 2


def test_a_conversation_that_is_full_loses_its_oldest_turns(talk, tmp_path):
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", "chatml")
    script = [*tokenizer.encode("ok"), tokenizer.end_of_text]
    asked, _ = talk(tokenizer, script, [f"line {i}" for i in range(9)], block_size=120, system="s")
    assert len(asked) == 9 and all("system\ns<|im_end|>\n<|im_start|>user\nline" in text for text in asked)
    assert "line 0" not in asked[-1] and "line 7" in asked[-1] and "line 8" in asked[-1]


def test_without_a_template_it_is_a_transcript(talk):
    tokenizer = Tokenizer.train(["aaa bb, aaa bb"], 260)
    script = tokenizer.encode(" I am\n\nHuma not\n\nHuman: who?")
    asked, printed = talk(tokenizer, script, ["you?", "and?"])
    assert printed == "I am\n\nHuma not\n" * 2
    assert asked[1] == "\n\nHuman: you?\n\nAssistant: I am\n\nHuma not\n\nHuman: and?\n\nAssistant:"


def test_what_may_be_the_next_turn_is_held_back_until_it_is_known(monkeypatch, tokenizer):
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    printer = Printer(tokenizer, frozenset({tokenizer.end_of_text}), stop=NEXT, strip=True)
    for token in tokenizer.encode(" a\n\nHum"):
        printer.show(0, token)
    assert terminal.getvalue() == "a"
    for token in tokenizer.encode("s"):
        printer.show(0, token)
    assert terminal.getvalue() == "a\n\nHums"
    with pytest.raises(Stop):
        for token in tokenizer.encode(" b\n\nHuman: c"):
            printer.show(0, token)
    said = printer.finish()
    monkeypatch.undo()
    assert said == "a\n\nHums b" and terminal.getvalue() == "a\n\nHums b\n"


def test_chat_and_a_prompt_are_two_things(folder, capsys):
    assert "--chat asks for what you say" in refusal(capsys, model=str(folder), chat=True, prompt="a")
    assert "--system goes with --chat" in refusal(capsys, model=str(folder), system="a")


def test_a_real_chat_model_talks():
    real = Path(os.environ.get("NANOPREF_MODEL", "absent"))
    if not (real / "model.safetensors").is_file():
        pytest.skip("NANOPREF_MODEL names no folder with a real chat model")
    words = ["--model", str(real), "--chat", "--temperature", "0", "--max-new-tokens", "12", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "nanopref.generate", *words], input=b"What is 2+2?\nAnd 3+3?\n", capture_output=True,
        cwd=Path(__file__).parents[1], timeout=280,
    )  # fmt: skip
    first, second = done.stdout.decode().splitlines()[:2]
    assert done.returncode == 0 and done.stderr == b"" and "4" in first and second
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(real, dtype=torch.float32)
    names = transformers.AutoTokenizer.from_pretrained(real)
    prompt = names.apply_chat_template([{"role": "user", "content": "What is 2+2?"}], add_generation_prompt=True,
                                       return_tensors="pt")  # fmt: skip
    found = theirs.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert names.decode(found[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).startswith(first)
