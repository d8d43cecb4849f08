"""Conversations in files: lists of messages in every field, Parquet, and data sets of the hub."""

import json
import sys
from pathlib import Path

import pytest
from chat_templates import chat_tokenizer
from files import jsonl, refusal

from nanopref.data.dialogues import Dialogue, as_prompt
from nanopref.data.files import read_rows
from nanopref.data.formats import ONE_TURN, PART_EARLIER, read, read_feedback, read_prompts, read_to_imitate
from nanopref.data.groups import Group, write_groups
from nanopref.learning.objectives import OBJECTIVES, kinds
from nanopref.running.flags import UserError


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content, "tool_calls": None}  # other fields are ignored


SYSTEM = {"role": "system", "content": "s"}
ASKED = [SYSTEM, user("a"), assistant("b"), user("c")]
DIALOGUE = Dialogue([("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")])
TEXT = "\n\nSystem: s\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
ROWS = {  # a row, its kind, and the group that it makes
    "pair": (
        {"prompt": ASKED, "chosen": [assistant("x")], "rejected": [assistant("y")]}, "pairs",
        Group(DIALOGUE, (" x", " y")),
    ),
    "pair whose prompt is a transcript": (
        {"prompt": TEXT, "chosen": " x", "rejected": " y"}, "pairs", Group(DIALOGUE, (" x", " y")),
    ),
    "pair of text and messages": (
        {"prompt": ASKED, "chosen": " x", "rejected": [assistant("y")], "margin": 2}, "pairs",
        Group(DIALOGUE, (" x", " y"), margin=2.0),
    ),
    "pair that shares its prompt": (
        {"chosen": [*ASKED, assistant("x")], "rejected": [*ASKED, assistant("y")]}, "pairs",
        Group(DIALOGUE, (" x", " y"), turns=True),
    ),
    "pair whose answers repeat the prompt, which is text": (
        {"prompt": "a", "chosen": [user("a"), assistant("x")], "rejected": [user("a"), assistant("y")]}, "pairs",
        Group(Dialogue([("user", "a")]), (" x", " y"), turns=True),
    ),
    "pair whose answers repeat the prompt": (
        {"prompt": ASKED, "chosen": [*ASKED, assistant("x")], "rejected": [*ASKED, assistant("y")]}, "pairs",
        Group(DIALOGUE, (" x", " y"), turns=True),
    ),
    "pair of a text and answers that are messages": (
        {"prompt": "a", "chosen": [assistant("x")], "rejected": [assistant("y")]}, "pairs",
        Group(Dialogue([("user", "a")]), (" x", " y")),
    ),
    "ranking": (
        {"prompt": ASKED, "responses": [[assistant("x")], [assistant("y")], " z"]}, "rankings",
        Group(DIALOGUE, (" x", " y", " z")),
    ),
    "rating": (
        {"prompt": ASKED, "responses": [[assistant("x")], [assistant("y")]], "scores": [1, 2]}, "ratings",
        Group(DIALOGUE, (" y", " x"), scores=(2.0, 1.0)),
    ),
    "label": (
        {"prompt": ASKED, "completion": [assistant("x")], "label": True}, "labels",
        Group(DIALOGUE, (" x",), scores=(1.0,)),
    ),
    "response": ({"prompt": ASKED, "response": [assistant("x")]}, "responses", Group(DIALOGUE, (" x",))),
    "response with its prompt": (
        {"completion": [*ASKED, assistant("x")]}, "responses", Group(DIALOGUE, (" x",), turns=True),
    ),
    "messages": ({"messages": [*ASKED, assistant("x")]}, "messages", Group(DIALOGUE, (" x",), turns=True)),
    "prompt": ({"prompt": ASKED}, "prompts", Group(DIALOGUE, ())),
}  # fmt: skip


def same(groups: list[Group], expected: list[Group]) -> bool:
    """Messages included, of which `==` of texts knows nothing."""
    asked = [[getattr(group.prompt, "messages", None) for group in part] for part in (groups, expected)]
    return groups == expected and asked[0] == asked[1]


@pytest.mark.parametrize("case", ROWS)
def test_messages_may_stand_in_every_field(write, case):
    row, kind, group = ROWS[case]
    found, groups, notes = read(write(jsonl(row, row)))
    assert found == kind and same(groups, [group] * 2) and not notes


@pytest.mark.parametrize("case", ROWS)
def test_what_is_written_is_read_back(write, case):
    _, kind, group = ROWS[case]
    if kind in ("messages", "prompts"):
        return
    groups = [group, group._replace(prompt=as_prompt("\n\nHuman:  two spaces\n\nAssistant:"))]
    assert same(read(write(write_groups(groups).encode()))[1], [g._replace(turns=False) for g in groups])


def test_answers_are_one_turn(write):
    more = [user("d"), assistant("e")]
    rows = [
        {"prompt": ASKED, "chosen": [assistant("x"), *more], "rejected": [assistant("y")]},
        {"prompt": ASKED, "chosen": [assistant("x"), *more], "rejected": [assistant("x")]},
        {"chosen": [*ASKED, assistant("x"), user("1")], "rejected": [*ASKED, assistant("x"), user("2")]},
        {"chosen": [*ASKED, assistant("x"), *more], "rejected": [*ASKED, assistant("y"), *more]},
    ]
    _, groups, notes = read(write(jsonl(*rows)))
    assert same(groups, [Group(DIALOGUE, (" x", " y")), Group(DIALOGUE, (" x", " y"), turns=True)])
    assert notes == {ONE_TURN: 6, "rows dropped: two answers are equal": 2}


def test_what_nobody_answers_is_left_out_of_messages(write):
    path = write(jsonl({"messages": [*ASKED, assistant("x"), user("bye")]}, {"messages": [user("a"), assistant(" ")]}))
    groups, notes = read_to_imitate(path)
    assert same(groups, [Group(DIALOGUE, (" x",), turns=True)])
    assert notes == {"messages dropped that nobody answers": 1, "rows dropped: no text": 1}


PAIR = {"prompt": ASKED, "chosen": [assistant("x")], "rejected": [assistant("y")]}
NEED = "must be text, or a list of messages with a 'role' and a 'content'"
BAD = {
    "an answer without an assistant": (
        PAIR | {"chosen": [user("x")]},
        "'chosen' must begin with what the assistant says: an assistant turn is missing",
    ),
    "conversations without one": (
        {"chosen": [user("x")], "rejected": [user("x")]},
        "'chosen': an assistant turn is missing behind what all answers share",
    ),
    "messages without one": ({"messages": [user("x")]}, "'messages': an assistant turn is missing"),
    "messages that begin with one": ({"messages": [assistant("x")]}, "'messages': an assistant turn is missing"),
    "a prompt that ends with an answer": (
        PAIR | {"prompt": ASKED[:3]},
        "'prompt' ends with an answer, to which there is none",
    ),
    "content that is no text": (
        PAIR | {"prompt": [user([{"type": "text", "text": "a"}])]},
        "'content of a message in prompt' must be text, found a list",
    ),
    "content that is null": (
        PAIR | {"rejected": [assistant(None)]},
        "'content of a message in rejected' must be text, found a NoneType",
    ),
    "a role that is none": (
        PAIR | {"prompt": [{"role": 1, "content": "a"}]},
        "'role of a message in prompt' must be text, found a int",
    ),
    "a message without a role": (PAIR | {"prompt": [{"content": "a"}]}, f"'prompt' {NEED}"),
    "a message that is text": (PAIR | {"chosen": ["x"]}, f"'chosen' {NEED}"),
    "messages that are no list": ({"messages": False}, f"'messages' {NEED}"),
    "no message": (PAIR | {"prompt": []}, "'prompt' is a list without messages"),
    "half a surrogate": (PAIR | {"chosen": [assistant("\ud83d")]}, "holds half of a surrogate pair"),
    "one conversation, one text": (
        {"prompt": "a", "chosen": [user("a"), assistant("x")], "rejected": "y"},
        "'chosen' must be a conversation for each answer, or for none",
    ),
    "no prompt": (
        {"responses": ["x", "y"]},
        "has no field 'prompt'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_refused_with_its_line_and_the_reason(write, case):
    row, reason = BAD[case]
    path = write(json.dumps({"extra": 0} | row).encode() + b"\n")
    assert reason in refusal(read, path).removeprefix(f"{path}, line 1: ")


# ---- for a model with a chat template --------------------------------------------------------------------------------

Q, A = "\n\nHuman: q", "\n\nAssistant: a"


def test_dialogues_that_run_on_are_cut_for_a_chat_model(write, tmp_path):
    rows = [
        {"chosen": Q + A + Q + A, "rejected": Q + "\n\nAssistant: b"},
        {"chosen": Q + A + Q + A, "rejected": Q + A + Q + "!" + A},
        {"chosen": Q + A, "rejected": Q + "\n\nAssistant: b"},
    ]
    path = write(jsonl(*rows))
    plain = read(path)
    assert len(plain[1]) == 3 and plain[2] == {PART_EARLIER: 2}
    _, groups, notes = read(path, tokenizer=chat_tokenizer(tmp_path / "chat", "chatml"))
    expected = Group(Dialogue([("user", "q")], f"{Q}\n\nAssistant:"), (" a", " b"), whole=True)
    assert same(groups, [expected] * 2)
    assert notes == {ONE_TURN: 3, "rows dropped: two answers are equal": 1}


def test_what_a_template_refuses_is_known_when_a_file_is_read(write, tmp_path):
    tokenizer = chat_tokenizer(tmp_path / "chat", "mistral")
    good = {"prompt": [user("a")], "chosen": "x", "rejected": "y"}
    path = write(jsonl(good, {**good, "prompt": [user("b")]}))
    read_feedback(path, kinds(OBJECTIVES), "dpo", tokenizer=tokenizer)
    path = write(jsonl(good, {**good, "prompt": ASKED}))
    for reader in (
        read_to_imitate,
        read_prompts,
        lambda *a: read_feedback(a[0], kinds(OBJECTIVES), "dpo", tokenizer=a[1]),
    ):
        assert "refuses messages of the roles system, user, assistant: Conv" in refusal(reader, path, tokenizer)


# ---- Parquet and the hub ---------------------------------------------------------------------------------------------


def parquet(path: Path, *rows: dict) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


@pytest.mark.parametrize("case", ROWS)
def test_parquet_holds_the_same(tmp_path, write, case):
    row, kind, group = ROWS[case]
    if "text and messages" in case or kind == "rankings":  # a column of Parquet is of one type
        return
    path = parquet(tmp_path / "rows.parquet", row, row)
    found, groups, notes = read(path)
    assert found == kind and same(groups, [group] * 2) and not notes
    assert [where for where, _ in read_rows(path)] == [f"{path}, row 1", f"{path}, row 2"]


@pytest.mark.parametrize("kind", ["text that is none", "a date beyond all dates"])
def test_parquet_of_what_python_cannot_hold_is_refused(tmp_path, kind):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    text = pyarrow.array([b"\xff"]).view(pyarrow.string())
    cells = text if kind == "text that is none" else pyarrow.array([2**31 - 1], pyarrow.date32())
    parquet.write_table(pyarrow.table({"prompt": ["a"], "chosen": ["b"], "when": cells}), tmp_path / "rows.parquet")
    assert "no Parquet, or damaged or cut off after row 0" in refusal(read, tmp_path / "rows.parquet")


def test_parquet_that_is_cut_off_or_none_is_refused(tmp_path):
    path = parquet(
        tmp_path / "rows.parquet", *[{"prompt": f"{i}" * 9, "chosen": "a", "rejected": "b"} for i in range(99)]
    )
    content = path.read_bytes()
    for part in (b"", content[:8], content[:-1], content[:-200], content[: len(content) // 2], b'{"prompt": "a"}\n'):
        path.write_bytes(part)
        assert "no Parquet, or damaged or cut off" in refusal(read, path)
    damaged = bytearray(content)
    damaged[20:60] = bytes(40)
    path.write_bytes(damaged)
    try:
        read(path)
    except UserError as error:
        assert "\n" not in str(error)


def test_without_the_extra_it_is_named(tmp_path, monkeypatch):
    path = parquet(tmp_path / "rows.parquet", {"prompt": "a"})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'nanopref[hub]'" in refusal(read, path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"owner/name: no such file; .* pip install 'nanopref\[hub\]'"):
        read("owner/name")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that stands for the hub's cache, and what was asked of it."""
    import huggingface_hub

    asked = []

    def download(name, **setting):
        asked.append((name, setting))
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return tmp_path / "hub", asked


def test_a_data_set_of_the_hub(hub):
    folder, asked = hub
    row = {"prompt": "a", "chosen": "x", "rejected": "y"}
    parquet(folder / "data" / "train-00000-of-00002.parquet", row)
    parquet(folder / "data" / "train-00001-of-00002-0a1b.parquet", row | {"prompt": "b"})
    parquet(folder / "data" / "train_sft-00000-of-00001.parquet", {"text": "no"})
    (folder / "train.jsonl").write_text("not this")
    assert [g.prompt for g in read("owner/some-pairs_1.0")[1]] == ["a", "b"]
    name, setting = asked[0]
    assert name == "owner/some-pairs_1.0" and setting["repo_type"] == "dataset"
    assert "*train*.parquet" in setting["allow_patterns"]
    assert read("owner/pairs:train_sft")[0] == "text"
    with pytest.raises(UserError, match="of a split 'test'; name another split as owner/pairs:split"):
        read("owner/pairs:test")


def test_a_configuration_of_a_data_set(hub):
    folder, asked = hub
    for name in ("harmless-base", "helpful-base"):
        (folder / name).mkdir(parents=True)
        (folder / name / "test.jsonl").write_bytes(jsonl({"prompt": name}))
    assert read("owner/hh/helpful-base:test")[1][0].prompt == "helpful-base"
    assert asked[0][0] == "owner/hh" and "helpful-base/*test*.jsonl" in asked[0][1]["allow_patterns"]
    with pytest.raises(
        UserError, match="several configurations; name one as owner/hh/harmless-base, of harmless-base, h"
    ):
        read("owner/hh:test")


def test_a_hub_that_gives_nothing_is_a_sentence(monkeypatch):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise OSError("404\nmuch more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"owner/name: neither a file nor a data set that the hub could give: 404$"):
        read("owner/name")
    for name in ("nowhere.jsonl", "no/such/file.jsonl", "/owner/name", "./owner/name", "../a/b", "name", "a/b.parquet"):
        with pytest.raises(UserError, match=r"no such file$"):
            read(name)
