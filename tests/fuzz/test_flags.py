"""Any words on a command line: the command gets as far as it would write, or says in a sentence what is wrong."""

import contextlib
import importlib
import io
import json
import os
import random
from dataclasses import asdict, fields
from pathlib import Path
from typing import get_args

import by_hand
import pytest
from fuzzing import examples, how_it_ends, tried
from hypothesis import given
from hypothesis import strategies as st

from nanopref import people
from nanopref.running import flags
from nanopref.running.folder import Run

COMMANDS = ["train_dpo", "train_rm", "train_ppo", "nanopref.sft", "nanopref.generate", "nanopref.evaluate"]
COMMANDS += ["nanopref.people"]
CONFIGS = {name: importlib.import_module(name).Config for name in COMMANDS}

# ---- words -----------------------------------------------------------------------------------------------------------

# what is large but allowed would be drawn, or held, before anything is written
WHOLE = ["0", "1", "2", "3", "16", "40", "-1", "-9" + "9" * 400, "2147483648", "9" * 400, "9" * 5000, "1e3", "1_0", "٣"]
REAL = ["0", "0.5", "1", "-0.0", "1e-320", "1e308", "1e400", "-inf", "nan", "9" * 400, "0x1p3", ".", "0,5"]
TEXT = ["", " ", ".", "..", "/", "~", "*0.5", ":", "a:b:c", "x*", "a/b", "a/b/c:d", "-", "--", "None", "x" * 300,
        "y" * 100_000, "\x1b[2J\r\b\a", "\u202e", "\udcff", "a\nerror: b", "{}", "[1]", "true", "$HOME"]  # fmt: skip
PLACES = ["here/pairs.jsonl", "here/chat.jsonl", "here/prompts.jsonl", "here/labels.jsonl", "here/model", "here/rm"]
PLACES += ["here/empty", "here/run", "here/judge.py:score", "here/judge.py:none", "new/folder"]
JUDGES = ["true", "specificity", "rules", "rules:here/x.toml", "here/rm*-2", "true*nan", "asks:here/model",
          "rates:here/model:x.toml", "implicit:here/model", "here/judge.py:score*1e400", "implicit"]  # fmt: skip


def values(name: str, f) -> st.SearchStrategy[list[str]]:
    """What may stand behind a flag: mostly something of its kind."""
    kinds = {f.type, *get_args(f.type)}
    if bool in kinds:
        return st.sampled_from([[]] * 9 + [["True"]])
    rules = flags._rules(CONFIGS[name], f.name)
    several = any(getattr(kind, "__origin__", kind) is tuple for kind in kinds)
    fit, odd = (WHOLE[1:6], WHOLE) if int in kinds else (REAL[:5], REAL) if "float" in str(f.type) else (PLACES, TEXT)
    fit = rules.get("among") or {"device": ["auto", "cpu"], "reward": JUDGES, "chooser": JUDGES}.get(f.name, fit)
    one = st.integers(0, 11).flatmap(lambda n: st.sampled_from(list(fit) if n > 1 else [*odd] if n else TEXT))
    return st.lists(one, max_size=3) if several else one.map(lambda word: [word])


HERE = [["--data", "here/pairs.jsonl"], ["--data", "here/chat.jsonl", "--init", "here/model"], ["--init", "here/rm"]]
STARTS = dict.fromkeys(COMMANDS, HERE) | {  # words that let some examples come further
    "nanopref.generate": [["--best-of", "2", "--reward", "here/rm"], ["--chat"]],
    "nanopref.evaluate": [["--reward", "here/rm"], ["--tournament", "here/model"]],
    "nanopref.people": [["--model", "here/model"], ["--data", "here/pairs.jsonl"], ["--report", "here/run"]],
}


@st.composite
def commands(draw) -> tuple[str, list[str]]:
    name = draw(st.sampled_from(COMMANDS))
    words = [
        *(["--out", "new/run"] if "out" in vars(CONFIGS[name]()) else []),
        *draw(st.sampled_from([[], *STARTS[name]])),
    ]
    for f in draw(st.lists(st.sampled_from(fields(CONFIGS[name])), max_size=6)):
        given = draw(values(name, f))
        option = f"--{f.name.replace('_', draw(st.sampled_from('---_')))}"
        words += [f"{option}={given[0]}"] if len(given) == 1 and not draw(st.integers(0, 4)) else [option, *given]
    if not draw(st.integers(0, 9)):
        words.insert(draw(st.integers(0, len(words))), draw(st.sampled_from([*TEXT, "--help", "--no-such", "-x"])))
    return name, words


# ---- a folder to stand in, and where a command ends ------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the words may name."""
    found = tmp_path_factory.mktemp("flags")
    here, rng = found / "here", random.Random(0)
    for name in ("empty", "run"):
        (here / name).mkdir(parents=True)
    asked = [by_hand.text(rng, 1, 3) for _ in range(40)]
    user, says = ([{"role": role, "content": "x"}] for role in ("user", "assistant"))
    rows = {
        "pairs": [{"prompt": x, "chosen": " a", "rejected": " b"} for x in asked],
        "chat": [{"prompt": user, "chosen": says, "rejected": " b"} for _ in asked],
        "prompts": [{"prompt": x} for x in asked],
        "labels": [{"prompt": x, "completion": " a", "label": len(x) % 2} for x in asked],
    }
    for name, lines in rows.items():
        by_hand.write(here / f"{name}.jsonl", lines)
    for model in (here / "model", found / "out" / "dpo", found / "out" / "dpo" / "sft"):
        by_hand.tiny_model(model)
    by_hand.tiny_judge(here / "rm", here / "model", heads=2)
    (here / "run" / "config.json").write_text(json.dumps({"flags": {}, "versions": {}}))
    (here / "judge.py").write_text("none = None\ndef score(prompt, response): return len(response)\n")
    return found


class Begun(SystemExit):
    """Flags and data fit: what follows would write, train, sample or serve."""


@pytest.fixture
def nothing_begins(folder, monkeypatch) -> None:
    def begin(run: Run) -> None:
        json.dumps(asdict(run.config))  # as it will be written
        raise Begun(0)

    def begun(*_, **__) -> None:
        raise Begun(0)

    def offline(*_, **__) -> None:
        raise OSError("there is no network")

    monkeypatch.chdir(folder)
    monkeypatch.setattr(Run, "begin", begin)
    for module, name in (("nanopref.generate", "sample"), ("nanopref.generate", "converse"),
                         ("nanopref.evaluate", "compare"), ("nanopref.evaluate", "respond"),
                         ("nanopref.people", "listen"), ("nanopref.people.agreement", "conclude")):  # fmt: skip
        monkeypatch.setattr(f"{module}.{name}", begun)
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    monkeypatch.setattr(people, "announce", begun)


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in str(path)}


@examples(80)
@given(command=commands())
def test_any_command_line(command, folder, nothing_begins):
    name, words = command
    module, before = importlib.import_module(name), files(folder)
    with tried(f"flags, {name}"):
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                config = flags.parse(CONFIGS[name], words)
        except SystemExit as stop:  # tyro's own box
            assert stop.code in (0, 2) and len(said.getvalue()) < 20_000, said.getvalue()
            return
        run = module.train if hasattr(module, "train") else module.main
        how_it_ends(flags.execute, run, config)
        assert files(folder) == before and Path(os.getcwd()) == folder
