"""Answer, critique, revision: what is kept, and what counts as no repair."""

import pytest

from nanopref.data.dialogues import Dialogue
from nanopref.feedback import revise as revising
from nanopref.feedback.rules import Rule
from nanopref.models.sampling import Answer

RULES = [
    Rule(name, "", "mentions", [name], weight) for name, weight in (("acting", 1.0), ("plot", 3.0), ("music", 2.0))
]


@pytest.fixture
def says(monkeypatch):
    """`revise` of prompts to which the policy answers so: drafts first, then a list for each try; "…" has no end."""

    def run(*answers: dict[str, str], tries: int = 8):
        asked, left = [], list(answers)

        def respond(policy, tokenizer, prompts, *, stream, seed):
            asked.append((stream, list(prompts), seed))
            said = left.pop(0)
            return [Answer([1], [2], [], said[x], not said[x].endswith("…")) for x in prompts]

        monkeypatch.setattr(revising, "respond", respond)
        return revising.revise("policy", "tokenizer", list(answers[0]), RULES, tries=tries, seed=3), asked

    return run


def test_what_keeps_all_rules_stays_and_is_not_asked_again(says):
    rows, asked = says({"p": "acting plot music"}, {})
    assert rows == [{"prompt": "p", "completion": "acting plot music"}] and asked == [("drafts", ["p"], 3)]


def test_a_revision_repairs_the_worst_and_breaks_nothing_that_was_kept(says):
    rows, asked = says(
        {"p": "music", "q": "plot music acting"},  # p breaks plot, which weighs most, and acting
        {"p": "music acting"},  # the worst is still broken
        {"p": "plot acting"},  # the music, which was there, is gone
        {"p": "plot music…"},  # no end
        {"p": "plot music"},
        tries=5,
    )
    assert rows == [
        {"prompt": "q", "completion": "plot music acting"},
        {"prompt": "p", "completion": "plot music", "critique": "plot", "draft": "music"},
    ]
    assert [stream for stream, _, _ in asked] == ["drafts", *(f"revisions {i}" for i in range(4))]
    assert all(prompts == ["p"] for _, prompts, _ in asked[1:])


def test_what_is_not_repaired_or_has_no_end_is_left_out(says):
    rows, asked = says({"p": "music", "q": "plot music acting…"}, {"p": "music"}, {"p": "acting"}, tries=2)
    assert rows == [] and len(asked) == 3


# ---- in words --------------------------------------------------------------------------------------------------------

TALK = Dialogue([("user", "who?"), ("assistant", "I."), ("user", "why?")])


def test_a_chat_model_is_asked_for_a_critique_by_a_principle_and_then_for_a_better_answer(monkeypatch):
    asked = {}

    def respond(model, tokenizer, prompts, *, stream, seed, temperature):
        assert (model, tokenizer, seed, temperature) == ("model", "tokenizer", 5, 0.5)
        asked[stream] = [prompt.messages for prompt in prompts]
        ends = {"completion": [True, False, True, True]}.get(stream, [False] * 4)  # others may be cut
        texts = [f" {stream} {i} " if stream != "completion" or i != 2 else " " for i in range(4)]
        return [Answer([1], [2], [], text, ended) for text, ended in zip(texts, ends, strict=True)]

    monkeypatch.setattr(revising, "respond", respond)
    principles = [Rule("kind", "Be kind.", "", None, 1.0), Rule("never drawn", "Be {cruel}.", "", None, 1e-9)]
    prompts = ["hi {there}", "x", "y", TALK]
    rows = revising.revise_in_words("model", "tokenizer", prompts, principles, seed=5, temperature=0.5)
    texts = {"principle": "Be kind.", "draft": "draft {}", "critique": "critique {}", "completion": "completion {}"}
    first, last = ({name: text.format(i) for name, text in texts.items()} for i in (0, 3))
    assert rows == [{"prompt": Dialogue([("user", "hi {there}")]), **first}, {"prompt": TALK, **last}]
    assert asked["draft"][0] == (("user", "hi {there}"),) and asked["draft"][3] == TALK.messages
    assert asked["critique"][3][:-1] == (*TALK.messages, ("assistant", "draft 3"))
    assert asked["critique"][3][-1] == ("user", revising.CRITIQUE.replace("{principle}", "Be kind."))
    assert asked["completion"][3][:-2] == asked["critique"][3]
    assert asked["completion"][3][-2:] == (("assistant", "critique 3"), ("user", revising.REVISION))
    assert list(asked) == ["draft", "critique", "completion"]


def test_principles_are_drawn_by_their_weights_and_a_transcript_is_a_conversation(monkeypatch):
    def respond(model, tokenizer, prompts, *, stream, seed):
        assert all(prompt.messages[: len(TALK.messages)] == TALK.messages for prompt in prompts)
        return [Answer([1], [2], [], stream, True) for _ in prompts]

    monkeypatch.setattr(revising, "respond", respond)
    principles = [Rule(name, name, "", None, weight) for name, weight in (("kind", 3.0), ("short", 1.0))]
    rows = [revising.revise_in_words("m", "t", [str(TALK)] * 400, principles, seed=seed) for seed in (0, 0, 1)]
    drawn = [[row["principle"] for row in run] for run in rows]
    assert drawn[0] == drawn[1] != drawn[2] and abs(drawn[0].count("kind") - 300) < 40
