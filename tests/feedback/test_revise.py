"""Answer, critique, revision: what is kept, and what counts as no repair."""

import pytest

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
