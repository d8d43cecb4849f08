"""Any file as --data: its rows are read and can be learnt from, or one sentence names the file."""

import gzip
import io
import json
import math
import tempfile
from functools import cache
from pathlib import Path

import pytest
from chat_templates import chat_tokenizer
from fuzzing import examples, how_it_ends, tried
from hypothesis import given
from hypothesis import strategies as st

from nanopref.data.formats import read, read_feedback, read_prompts, read_to_imitate
from nanopref.data.groups import encode
from nanopref.data.tokenizer import Tokenizer
from nanopref.data.votes import AGGREGATES, WINNERS
from nanopref.evaluation.agreement import conclude
from nanopref.feedback.ballots import read_pairs, read_votes
from nanopref.learning.objectives import OBJECTIVES, SCORES, kinds
from nanopref.running import flags

# ---- rows: those of every kind, and what becomes of them when a field or two change ----------------------------------

ODD = ["", " ", "\0", "\ud800", "\x1b[2J\r\b\a", "\u202e\u009b", "\ufeff", "\n\nHuman: a\n\nAssistant:", "w" * 5000]
TEXTS = st.text(max_size=8) | st.sampled_from([*ODD, *(f"{word} " * 40 + "end." for word in "ab")])
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "", "x" * 5000])
MESSAGES = st.lists(st.fixed_dictionaries({"role": ROLES, "content": TEXTS}), max_size=4)
TALK = MESSAGES.map(lambda found: [{"role": "user", "content": "?"}, *found, {"role": "assistant", "content": "!"}])
ASKED = st.just([{"role": "user", "content": "?"}])
SAID = TEXTS | TALK | st.builds(lambda text: [{"role": "assistant", "content": text}], TEXTS)
PROMPT = TEXTS | ASKED
NUMBERS = st.sampled_from([0, 1, True, False, -1, 0.5, 1e14, 1e308])
RAW = st.sampled_from(["NaN", "-Infinity", "1e999", "9" * 5000, "9" * 400, "[" * 9999, '{"a":' * 9999, "-", '"\\ud8'])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | RAW.map(lambda raw: f"@{raw}@")
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXTS, v, max_size=2), max_leaves=4)
KINDS = {
    "pairs": {"prompt": PROMPT, "chosen": SAID, "rejected": SAID},
    "margins": {"prompt": PROMPT, "chosen": TEXTS, "rejected": TEXTS, "margin": NUMBERS},
    "dialogues": {"chosen": TALK, "rejected": TALK},
    "rankings": {"prompt": PROMPT, "responses": st.lists(SAID, min_size=2, max_size=3)},
    "ratings": {"prompt": PROMPT, "responses": st.tuples(SAID, SAID), "scores": st.tuples(NUMBERS, NUMBERS)},
    "labels": {"prompt": PROMPT, "completion": SAID, "label": st.sampled_from([0, 1, True, False])},
    "labelled texts": {"text": TEXTS, "label": st.sampled_from([0, 1])},
    "responses": {"prompt": PROMPT, "response": SAID},
    "text": {"text": TEXTS},
    "messages": {"messages": TALK},
    "prompts": {"prompt": PROMPT},
    "votes": {"prompt": TEXTS, "a": TEXTS, "b": TEXTS, "winner": st.sampled_from(WINNERS),
              "annotator": st.sampled_from(["ada", "bob", ""]), "shown_left": st.sampled_from("ab"),
              "seconds": NUMBERS, "models": st.just(["m", "n"])},
}  # fmt: skip
NAMES = sorted({name for row in KINDS.values() for name in row} | {"id", "time", "why"})


def places(value) -> list:
    """(container, key) of all that a row holds."""
    found = []
    for key in value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found += [(value, key), *places(value[key])]
    return found


@st.composite
def tables(draw) -> list:
    """Rows of a kind, up to three things in them changed."""
    row = st.fixed_dictionaries(KINDS[draw(st.sampled_from(sorted(KINDS)))])
    rows = json.loads(json.dumps(draw(st.lists(row, min_size=1, max_size=4))))
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3]))):
        if not (known := places(rows)):
            break
        container, key = draw(st.sampled_from(known))
        how = draw(st.sampled_from(["replace", "replace", "remove", "add", "wrap"]))
        if how == "remove":
            del container[key]
        elif how == "wrap":
            container[key] = [container[key]]
        else:
            container = container[key] if how == "add" and isinstance(container[key], dict) else container
            container[draw(st.sampled_from(NAMES)) if how == "add" and isinstance(container, dict) else key] = draw(
                VALUES
            )
    return rows


# ---- files: whole, and damaged ---------------------------------------------------------------------------------------


def as_bytes(rows: list, array: bool, end: str, ascii: bool, encoding: str) -> bytes:
    """JSON Lines or a JSON array, in which "@x@" stands for what json.dumps would not write."""
    lines = [json.dumps(row, ensure_ascii=ascii) for row in rows]
    text = "[" + ",".join(lines) + "]" if array else end.join(lines)
    for raw in ("NaN", "-Infinity", "1e999", "9" * 5000, "9" * 400, "[" * 9999, '{"a":' * 9999, "-", '"\\ud8'):
        text = text.replace(json.dumps(f"@{raw}@"), raw)
    return text.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")


JSON = st.builds(
    as_bytes, tables(), st.booleans(), st.sampled_from(["\n", "\r\n", "\n\n", "\r"]), st.booleans(),
    st.sampled_from(["utf-8"] * 5 + ["utf-8-sig", "utf-16", "latin-1"]),
)  # fmt: skip


COLUMNS = {  # of types that JSON has not, in which other tools write; and their values, not all of which Python has
    "timestamp": [0, 2**62, -(2**62)], "date": [0, 2**31 - 1], "duration": [2**62], "time": [0, 86_400_000_000],
    "text": [b"a", b"\xff\xfe", b""], "bytes": [b"\0"], "map": [[("a", 1)], []], "decimal": [10**30], "half": [1e4],
    "category": ["a", None], "unsigned": [2**64 - 1], "nothing": [None],
}  # fmt: skip


def as_parquet(rows: list, name: str, kind: str, value) -> bytes:
    """Rows, and a column of this name and kind."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    found = io.BytesIO()
    types = {
        "timestamp": pa.timestamp("us"), "date": pa.date32(), "duration": pa.duration("us"), "time": pa.time64("us"),
        "bytes": pa.binary(), "map": pa.map_(pa.string(), pa.int64()), "decimal": pa.decimal128(38, 2),
        "half": pa.float32(), "category": pa.dictionary(pa.int8(), pa.string()), "unsigned": pa.uint64(),
        "nothing": pa.null(),
    }  # fmt: skip
    try:
        table = pa.Table.from_pylist([row for row in rows if isinstance(row, dict)])
        pq.write_table(table, io.BytesIO())
    except (pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError):  # what Parquet cannot hold
        table = pa.table({"text": ["a", None], "label": [b"\xff", b""]})
    cells = [value] * len(table)
    column = pa.array(cells, pa.binary()).view(pa.string()) if kind == "text" else pa.array(cells, types[kind])
    others = [c for c in table.column_names if c != name]
    pq.write_table(table.select(others).append_column(name, column), found)
    return found.getvalue()


PARQUET = st.sampled_from(sorted(COLUMNS)).flatmap(
    lambda kind: st.builds(
        as_parquet, tables(), st.sampled_from([*NAMES, *NAMES, "also"]), st.just(kind), st.sampled_from(COLUMNS[kind])
    )
)


@st.composite
def files(draw) -> tuple[str, bytes]:
    """A name and what is in it."""
    name = draw(st.sampled_from(["d.jsonl", "d.json", "d.jsonl.gz", "d.parquet", "d\x1b[2J.jsonl", "d\nerror: .json"]))
    content = draw(PARQUET if name == "d.parquet" else JSON | st.binary())
    if name.endswith(".gz") and draw(st.integers(0, 9)):
        content = gzip.compress(content, 1)
    how = draw(st.sampled_from(["whole"] * 4 + ["cut", "changed", "longer", "twice"]))
    if content and how in ("cut", "changed"):
        at = draw(st.integers(0, len(content) - 1))
        content = content[:at] if how == "cut" else content[:at] + draw(st.binary(max_size=3)) + content[at + 1 :]
    return name, content + {"longer": b"\0garbage", "twice": content}.get(how, b"")


# ---- readers ---------------------------------------------------------------------------------------------------------


@cache
def tokenizers() -> list[Tokenizer]:
    """Without a chat template, and with one that takes any role or only some."""
    with tempfile.TemporaryDirectory() as folder:
        chat = [chat_tokenizer(Path(folder, name), name) for name in ("chatml", "mistral", "llama3")]
        return [Tokenizer.train(["a b c"], 257), *chat]


def learn(groups: list, tokenizer: Tokenizer) -> None:
    """What is read has to be usable: text that can be written, finite numbers, tokens."""
    for group in groups:
        assert all(text.encode() is not None for text in (*group.asked(), *group.responses))
        assert all(map(math.isfinite, (*group.scores, group.margin)))
    rows, _ = encode([group for group in groups if group.responses], tokenizer, 32)
    assert max(rows.row_lengths.tolist(), default=0) <= 32


def as_feedback(path, tokenizer, loss: str, votes: str) -> None:
    known = kinds(OBJECTIVES) if loss in OBJECTIVES else kinds(SCORES)
    training, held_out, _ = read_feedback(path, known, loss, votes, tokenizer, meet=loss not in OBJECTIVES)
    learn([*training, *held_out], tokenizer)


def as_ballots(path, _tokenizer, _loss, votes: str) -> None:
    """The same as what a folder of nanopref.people holds, of which --report tells."""
    for name in ("votes.jsonl", "pairs.jsonl")[: 1 if votes == "count" else 2]:
        path.with_name(name).write_bytes(path.read_bytes())
    conclude(path.parent, read_pairs(path.parent), read_votes(path.parent))


READERS = {
    "read": lambda path, tokenizer, *_: learn(read(path, tokenizer=tokenizer)[1], tokenizer),
    "to imitate": lambda path, tokenizer, *_: learn(read_to_imitate(path, tokenizer)[0], tokenizer),
    "prompts": lambda path, tokenizer, *_: read_prompts(path, tokenizer),
    "feedback": as_feedback,
    "ballots": as_ballots,
}


@examples(400)
@given(
    file=files(), reader=st.sampled_from(sorted(READERS)), which=st.integers(0, 3),
    loss=st.sampled_from([*OBJECTIVES, *SCORES]), votes=st.sampled_from(sorted(AGGREGATES)),
)  # fmt: skip
def test_any_file_of_data(file, reader, which, loss, votes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    name, content = file
    path = folder / name
    path.write_bytes(content)
    tokenizer = tokenizers()[which]
    with tried(f"data, {reader}"):
        code, _, error = how_it_ends(flags.execute, lambda _: READERS[reader](path, tokenizer, loss, votes), None)
        assert not code or str(folder) in error or "only one prompt" in error, error
