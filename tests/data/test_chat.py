"""Conversations in tokens: as `transformers` has them, but that nothing people say is a special token."""

import copy
import os
import pickle
import time
import unicodedata
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from chat_templates import ENDS, QWEN3, TEMPLATES, chat_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from nanopref import models
from nanopref.data import chat
from nanopref.data.chat import encode_answer, encode_prompt, encode_turns, ends
from nanopref.data.dialogues import Dialogue, as_json, as_prompt, first_turn, messages_of, turns
from nanopref.data.formats import read
from nanopref.data.groups import Group, encode
from nanopref.data.template import render
from nanopref.data.tokenizer import Tokenizer
from nanopref.models.inference import response_logprobs
from nanopref.running import parallel
from nanopref.running.flags import UserError

words = ["the film", " a", "é", "🎬", "1234", "\n", "  ", "\n\nHuman: x", "\ue000", "> ", "<", "?", "n", "assistant"]
special = ["<|im_end|>", "<|im_start|>", "<|im_", "end|>", "|>", "<|", "<|endoftext|>", "<|eot_id|>", "[INST]", "</s>"]
special += ["<|im_<|im_end|>end|>", "</", "[/INST", "]", "<s>", "<|end_header_id|>"]
plain_content = st.lists(st.sampled_from(words) | st.text("ab <>|.\n", max_size=4), max_size=6).map("".join)
content = st.lists(st.sampled_from(words + special), max_size=6).map("".join)


def conversations(content, system: bool = True):
    """One that asks for an answer."""
    opening = st.lists(content.map(lambda x: ("system", x)), max_size=int(system))
    pairs = st.lists(st.tuples(content, content), max_size=3)
    return st.builds(
        lambda first, pairs, last: Dialogue(
            [*first, *(m for a, b in pairs for m in (("user", a), ("assistant", b))), ("user", last)]
        ),
        opening, pairs, content,
    )  # fmt: skip


@pytest.fixture(scope="module", params=TEMPLATES)
def style(request, tmp_path_factory) -> SimpleNamespace:
    """A tokenizer with a chat template, as we have it and as `transformers` has it."""
    import transformers

    folder = tmp_path_factory.mktemp(request.param)
    ours = chat_tokenizer(folder, request.param)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    end = ENDS.get(request.param, "<|im_end|>")
    return SimpleNamespace(name=request.param, ours=ours, theirs=theirs, end=end, system=request.param != "mistral")


def listed(messages) -> list[dict]:
    return [{"role": role, "content": content} for role, content in messages]


def their_ids(style, messages, prompt: bool) -> list[int]:
    return style.theirs.apply_chat_template(listed(messages), add_generation_prompt=prompt)["input_ids"]


def their_text(style, messages, prompt: bool) -> str:
    return style.theirs.apply_chat_template(listed(messages), add_generation_prompt=prompt, tokenize=False)


def specials(style, tokens: list[int]) -> list[int]:
    known = {style.ours.added[token] for token in style.ours.special}
    return [token for token in tokens if token in known]


def alike(style, tokens: list[int], text: str) -> bool:
    """Whether these are the tokens of a text, which some tokenizers bring to a normal form and leave bytes out of."""
    missing = {"\x04", "\0"} if style.name == "smollm2" else set()
    text = "".join(c for c in text if c not in missing)
    return style.ours.decode(tokens) == (unicodedata.normalize("NFC", text) if style.ours._layout.compose else text)


# ---- tokens ----------------------------------------------------------------------------------------------------------


@given(st.data())
def test_transformers_has_the_same_tokens(style, data):
    dialogue, answer = data.draw(conversations(plain_content, style.system)), data.draw(plain_content)
    prompt = encode_prompt(style.ours, dialogue)
    assert prompt == their_ids(style, dialogue.messages, True)
    if style.name == "plain" and not answer.strip():
        return  # the template's own newline would merge with the one behind it
    tokens = prompt + encode_answer(style.ours, dialogue, answer)
    whole = their_ids(style, [*dialogue.messages, ("assistant", answer.strip())], False)
    if style.name == "plain":
        assert tokens[-1] == style.ours.end_of_text
        assert style.ours.decode(whole).startswith(style.ours.decode(tokens[:-1]))
    else:
        assert tokens == whole[: len(tokens)]
        assert style.ours.decode(whole[len(tokens) :]) in ("", "\n")


@given(st.data())
def test_what_is_said_is_never_special(style, data):
    dialogue, answer = data.draw(conversations(content, style.system)), data.draw(content)
    messages = [*dialogue.messages, ("assistant", answer.strip())]
    prompt, response = encode_prompt(style.ours, dialogue), encode_answer(style.ours, dialogue, answer)
    assert alike(style, prompt, their_text(style, dialogue.messages, True))
    whole = their_text(style, messages, False)
    text = style.ours.decode(prompt + response)
    text = text.removesuffix(style.end) if style.name == "plain" else text
    whole = unicodedata.normalize("NFC", whole) if style.ours._layout.compose else whole
    assert whole.startswith(text) and whole[len(text) :] in ("", "\n", "\n\n")
    innocent = Dialogue((role, "x") for role, _ in dialogue.messages)
    assert specials(style, prompt) == specials(style, encode_prompt(style.ours, innocent))
    assert specials(style, response) == [style.ours.added[style.end]] == response[-1:]
    assert response[-1] in ends(style.ours)


@given(st.data())
def test_of_a_conversation_what_the_assistant_says_counts(style, data):
    dialogue, answer = data.draw(conversations(content, style.system)), data.draw(content)
    messages = [*dialogue.messages, ("assistant", answer.strip())]
    tokens, counted, shortened = encode_turns(style.ours, messages, 10**6)
    assert len(tokens) == len(counted) and counted[-1] and not shortened
    end = style.ours.added[style.end]
    spans, said = [], []
    for token, counts in zip(tokens, counted, strict=True):
        said += [token] if counts else []
        if said and (token == end or not counts):
            spans.append(said)
            said = []
    answers = [content for role, content in messages if role == "assistant"]
    marks = [style.end if style.name != "plain" else ""] * (len(answers) - 1) + [style.end]
    if style.name == "qwen3":
        answers[-1] = f"<think></think>{answers[-1]}"
    expected = "".join(map("".join, zip(answers, marks, strict=True)))
    assert "".join("".join(map(style.ours.decode, spans)).split()) == "".join(expected.split())
    if style.name != "plain":
        assert len(spans) == len(answers)
    if style.name != "plain" and all(x == x.strip() for role, x in messages if role == "assistant"):
        assert tokens == encode_prompt(style.ours, dialogue) + encode_answer(style.ours, dialogue, answer)


@given(st.data(), st.integers(1, 200))
def test_a_prompt_fits_the_room_that_it_is_given(style, data, room):
    dialogue, notes = data.draw(conversations(content, style.system)), Counter()
    tokens, whole = encode_prompt(style.ours, dialogue, room, notes), encode_prompt(style.ours, dialogue)
    assert len(tokens) <= room and (tokens == whole) == (len(whole) <= room) == (not notes) and notes.total() <= 1
    messages = list(dialogue.messages)
    system = messages[:1] if messages[0][0] == "system" else []
    options = [Dialogue([*system, *messages[i:]]) for i in range(len(system), len(messages), 2)]
    fitting = [x for x in options if len(encode_prompt(style.ours, x)) <= room]
    if fitting:
        assert tokens == encode_prompt(style.ours, fitting[0])
    frame = encode_prompt(style.ours, Dialogue([*system, ("user", "")]))
    if not fitting and len(frame) <= room:
        assert specials(style, tokens) == specials(style, frame)
        assert notes == {chat.CUT: 1}


@pytest.mark.parametrize("room", [1, 2, 5])
def test_a_text_keeps_what_it_begins_with(tmp_path, room):
    tokenizer = chat_tokenizer(tmp_path, "llama3")
    tokens = encode_prompt(tokenizer, "the film of the year", room)
    assert len(tokens) == room and tokenizer.begin and (room == 1 or tokens[:1] == tokenizer.begin)
    assert encode_prompt(tokenizer, "") == tokenizer.begin
    assert encode_answer(tokenizer, "a", " b ") == [*tokenizer.encode(" b "), tokenizer.end_of_text]


def test_without_a_template_a_conversation_is_its_transcript():
    tokenizer = Tokenizer.train(["the film the film"], 262)
    messages = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    text = "\n\nSystem: s\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert Dialogue(messages[:4]) == text and encode_prompt(tokenizer, Dialogue(messages[:4])) == tokenizer.encode(text)
    tokens, counted, _ = encode_turns(tokenizer, messages, 1000)
    end = [tokenizer.end_of_text]
    asked = ["\n\nSystem: s\n\nHuman: a\n\nAssistant:", "\n\nHuman: c\n\nAssistant:"]
    said = [[*tokenizer.encode(x), *end] for x in (" b", " d")]
    expected = [token for x, y in zip(map(tokenizer.encode, asked), said, strict=True) for token in x + y]
    assert tokens == expected and [t for t, c in zip(tokens, counted, strict=True) if c] == said[0] + said[1]
    short, counted, shortened = encode_turns(tokenizer, messages, len(tokens) - 1)
    assert shortened and tokenizer.decode(short) == "\n\nSystem: s\n\nHuman: c\n\nAssistant: d<|endoftext|>"
    assert encode_turns(tokenizer, messages, 5)[0] == []


def test_thoughts_are_tokens_and_only_the_last_are_kept(tmp_path):
    tokenizer = chat_tokenizer(tmp_path, "qwen3", QWEN3)
    thought = "<think>\nhm\n</think>\n\n"
    messages = [("user", "a"), ("assistant", thought + "b"), ("user", "c"), ("assistant", thought + "d")]
    tokens, counted, _ = encode_turns(tokenizer, messages, 1000)
    said = tokenizer.decode([t for t, c in zip(tokens, counted, strict=True) if c])
    assert said == f"b<|im_end|>{thought}d<|im_end|>"
    assert tokens.count(tokenizer.added["<think>"]) == 1
    answer = encode_answer(tokenizer, Dialogue(messages[:3]), "d")
    assert tokenizer.decode(answer) == "<think>\n\n</think>\n\nd<|im_end|>"


def test_rows_of_conversations(tmp_path):
    tokenizer = chat_tokenizer(tmp_path, "chatml")
    messages = [("user", "a"), ("assistant", "b"), ("user", "c")]
    group = Group(Dialogue(messages), (" d",), turns=True)
    data, notes = encode([group, Group("x", (" y",))], tokenizer, 64)
    batch = data.collate([0, 1])
    said = [[int(t) for t, m in zip(*row, strict=True) if m] for row in zip(batch.targets, batch.mask, strict=True)]
    assert [tokenizer.decode(x) for x in said] == ["b<|im_end|>d<|im_end|>", " y<|im_end|>"]
    assert data.response_lengths.tolist() == list(map(len, said)) == batch.mask.sum(1).tolist() and not notes
    hh = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    again, _ = encode([Group(as_prompt(hh), (" d",), whole=True)], tokenizer, 64)
    assert again.tokens.tolist() == data.tokens[: data.starts[1]].tolist()
    length = int(data.row_lengths[0])
    data, notes = encode([group], tokenizer, length - 1)
    assert notes == {chat.SHORTENED: 1} and tokenizer.decode(data.tokens.tolist()).count("<|im_start|>user") == 1
    long = group._replace(responses=(" the film" * 99,))
    data, notes = encode([long], tokenizer, 32)
    assert len(data.tokens) == 32 and notes["answers cut on the right to fit the context"] == 1


# ---- conversations as text -------------------------------------------------------------------------------------------


@given(conversations(content))
def test_a_dialogue_is_text_and_is_read_back_from_a_file(dialogue):
    found = as_json(dialogue)
    again = Dialogue(messages_of("", "", found)) if isinstance(found, list) else as_prompt(found)
    assert again == dialogue and again.messages == dialogue.messages and isinstance(found, list)
    for copied in (copy.deepcopy(dialogue), pickle.loads(pickle.dumps(dialogue))):
        assert copied == dialogue and copied.messages == dialogue.messages and type(copied) is Dialogue
    assert type(str(dialogue)) is str and hash(dialogue) == hash(str(dialogue))


@pytest.mark.parametrize(
    "text, messages",
    [
        ("\n\nHuman: a b \n\nAssistant:", [("user", "a b")]),
        ("\n\nHuman:  a\n\nAssistant: \n\nHuman: c\n\nAssistant:", [("user", "a"), ("assistant", ""), ("user", "c")]),
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant:", [("user", "a\n\nb")]),
        ("\n\nSystem: s\n\nHuman: a\n\nAssistant:", [("system", "s"), ("user", "a")]),
    ],
)  # fmt: skip
def test_texts_in_the_format_of_hh_are_dialogues(text, messages):
    dialogue = as_prompt(text)
    assert dialogue == text and list(dialogue.messages) == messages
    written = as_json(dialogue)
    again = Dialogue(messages_of("", "", written)) if isinstance(written, list) else as_prompt(written)
    assert again == text and again.messages == dialogue.messages


@pytest.mark.parametrize(
    "text", ["", "a", "\n\nHuman: a", "x\n\nHuman: a\n\nAssistant:", "\n\nAssistant:", "a\n\nAssistant:"]
)
def test_other_texts_are_none(text):
    assert type(as_prompt(text)) is str and (turns(text) == [] or text == "\n\nHuman: a")


def test_the_first_turn_of_an_answer():
    assert first_turn(" a\n\nHuman: b\n\nAssistant: c") == " a" and first_turn(" a\n\nHumans: b") == " a\n\nHumans: b"


# ---- templates that do not work --------------------------------------------------------------------------------------

DOUBLED = "{{% set n = namespace(x='aa') %}}{{% for i in range(99) %}}{}{{% endfor %}}"
ENDLESS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "one that does so twice": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "a recursive loop": "{% for a in [[1]] recursive %}{{ loop([[1]]) }}{{ loop([[1]]) }}{% endfor %}",
    "a range": "{% for a in range(10**9) %}{% endfor %}",
    "text that doubles": DOUBLED.format("{% set n.x = n.x ~ n.x %}"),
    "a block that doubles": DOUBLED.format("{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}"),
    "a product": "{{ messages[0].content * 10**12 }}",
    "a power": "{{ (messages|length + 9) ** 999999999 }}",
    "much text": "{% for a in range(9999) %}{% for a in range(90) %}{{ 'aaaaaaaaaaaaaaaa' }}{% endfor %}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("case", ENDLESS)
def test_a_template_that_does_not_end_is_refused(case):
    start = time.monotonic()
    with pytest.raises(UserError, match="does not come to an end, or writes too much"):
        render(ENDLESS[case], {}, [("user", "abc")], True)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{% for %}", "chat template is none: line 1: "),
        ("\n{{ a b }}", "line 2: "),
        ("{{ raise_exception('no ' + messages[0].role) }}", "refuses messages of the roles user: no user"),
        ("{{ messages[7].content.x }}", "refuses messages of the roles user: "),
        ("{{ messages.append(1) }}", "refuses messages"),
        ("{{ ''.__class__.__mro__ }}", "refuses messages"),
        ("{% include 'x' %}", "refuses messages"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "leaves out what the assistant says"),
    ],
)
def test_a_template_that_fails_is_a_sentence(tmp_path, template, reason):
    tokenizer = chat_tokenizer(tmp_path, "chatml", template)
    with pytest.raises(UserError) as error:
        chat.check(tokenizer)
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_a_role_that_a_template_does_not_know_is_named(tmp_path):
    tokenizer = chat_tokenizer(tmp_path, "llama3")
    with pytest.raises(UserError, match="of the roles user, poet: Unknown role: poet"):
        encode_prompt(tokenizer, Dialogue([("user", "a"), ("poet", "b")]))


def test_what_transformers_offers_to_templates():
    template = """{% generation %}{{ {'b': '<é>', 'a': 1} | tojson }}{% endgeneration %}
    {% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}{{ loop.length }}{{ loop.revindex }}
    {% endfor %}
    {{ strftime_now('%d %b %Y') }}{{ tools is none }}{{ bos_token }}{{ eos_token is defined }}"""
    text = render(template, {"bos_token": "<s>"}, [("user", "a"), ("user", "b")], False)
    assert text.split() == ['{"b":', '"<é>",', '"a":', "1}user22", "26", "Jul", "2024True<s>False"]


# ---- a real model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> Path:
    folder = Path(os.environ.get("NANOPREF_MODEL", "absent"))
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("NANOPREF_MODEL names no folder with a real chat model")
    return folder


def test_hh_in_a_real_models_tokens(real, real_data):
    tokenizer = Tokenizer.load(real)
    groups = read(real_data / "hh_harmless.jsonl.gz", tokenizer=tokenizer)[1]
    assert len(groups) == 1496 and all(isinstance(group.prompt, Dialogue) for group in groups)
    start = time.process_time()
    encode(groups, tokenizer, 1024)
    seconds = time.process_time() - start
    print(f"{len(groups)} pairs in {seconds:.2f} s")
    assert seconds < 10


def trl_rows(real, groups: list[Group]) -> list[dict]:
    """Pairs in the tokens that TRL's DPOTrainer makes of them: prompt_ids, chosen_ids, rejected_ids."""
    import transformers
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows, theirs = [], transformers.AutoTokenizer.from_pretrained(real)
    for group in groups:
        said = ([{"role": "assistant", "content": text.strip()}] for text in group.responses)
        rows.append({"prompt": listed(group.prompt.messages), **dict(zip(("chosen", "rejected"), said, strict=True))})
    args = DPOConfig(output_dir="unused", max_length=None, bf16=False, use_cpu=True, report_to=[])
    trainer = SimpleNamespace(_tokenizer=theirs, _is_vision_dataset=False)
    return list(DPOTrainer._prepare_dataset(trainer, Dataset.from_list(rows), theirs, args, "train"))


def test_trl_collates_hh_alike(real, real_data):
    """Prompt and answers of 50 pairs token for token; only what the template puts behind the end of a turn is more."""
    pytest.importorskip("trl")
    ours = Tokenizer.load(real)
    groups = read(real_data / "hh_harmless.jsonl.gz", tokenizer=ours)[1][:50]
    newline = ours.encode("\n")
    for group, row in zip(groups, trl_rows(real, groups), strict=True):
        assert row["prompt_ids"] == encode_prompt(ours, group.prompt)
        for name, text in zip(("chosen_ids", "rejected_ids"), group.responses, strict=True):
            assert row[name] == encode_answer(ours, group.prompt, text) + newline


def test_log_probs_of_hh_are_those_of_trl_and_transformers(real, real_data, pairs=4):
    """log π(y|x) of TRL's tokens by transformers' logits, each answer alone, and of whole groups here: 1e-3 nats."""
    pytest.importorskip("trl")
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(real, dtype=torch.float32).eval()
    model, tokenizer = models.load(real)
    groups = read(real_data / "hh_harmless.jsonl.gz", tokenizer=tokenizer)[1][:pairs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "_dtype", "float32")
        found = response_logprobs(model.eval(), encode(groups, tokenizer, 2048)[0], batch_size=4)
    expected = []
    for row in trl_rows(real, groups):
        for name in ("chosen_ids", "rejected_ids"):
            tokens = torch.tensor([row["prompt_ids"] + row[name][:-1]])  # without what stands behind the end of turn
            n = len(row[name]) - 1
            with torch.no_grad():
                logprobs = theirs(tokens).logits[0, -n - 1 : -1].log_softmax(-1)
            expected.append(logprobs.gather(-1, tokens[0, -n:, None]).sum())
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-3, rtol=0)
