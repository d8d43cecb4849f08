"""What a loss learns from a file: labels that meet, what is converted, and what is said of the rest."""

from collections import Counter

import pytest
from files import feedback, jsonl, judged, labelled, refusal
from hypothesis import given
from hypothesis import strategies as st

from nanopref.data.formats import passages, read, read_prompts, read_to_imitate
from nanopref.data.groups import Group, split

# ---- texts with labels -----------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(["good", "film", "end.", "why?", ".", "\n"]), max_size=200).map(" ".join))
def test_passages_are_the_text_in_order(text):
    found = [(prompt + response).split() for prompt, response in passages(text)]
    words = text.split()
    assert [word for passage in found for word in passage] == words[: sum(map(len, found))]
    for prompt, response in passages(text):
        assert len(prompt.split()) == 12 and response.startswith(" ") and 20 <= len(response.split()) <= 52
    for passage in found:
        *inside, last = passage[31:]
        assert not any(word[-1] in ".!?" for word in inside)  # it ends where it first may
        assert last[-1] in ".!?" or len(passage) == 64
    left = words[sum(map(len, found)) :]
    assert len(left) < 64 and not any(word[-1] in ".!?" for word in left[31:])


def test_every_stage_holds_out_the_same_texts(write):
    path = write(jsonl(*labelled(40)))
    found, notes = read_to_imitate(path)
    labelled_groups = read(path)[1]
    assert len(found) == 80 and not notes and {group.scores for group in labelled_groups} == {(1.0,), (0.0,)}
    assert found == [group._replace(scores=()) for group in labelled_groups]
    held_out = {group.source for group in split(found)[1]}
    assert len(held_out) == 4 and len(split(found)[1]) == 8
    _, tested, _ = judged(path)
    _, prompts = read_prompts(path)
    words = {word for text in held_out for word in text.split()}
    assert all(word in words for group in tested for x in group.prompts for word in x.split())
    assert {x for group in tested for x in group.prompts} <= set(prompts) and len(prompts) == 8
    streamed = write(jsonl(*({"text": row["text"]} for row in labelled(40))))
    assert {group.responses[0] for group in split(read_to_imitate(streamed)[0])[1]} == held_out  # with no labels, too


def test_other_fields_do_not_change_what_a_file_holds(write):
    """Pairs with a text or a label beside them are pairs, and responses with a label are responses."""
    rows = [{"prompt": f"p{i}", "chosen": "c", "rejected": "r", "text": "t", "label": 1} for i in range(20)]
    path = write(jsonl(*rows))
    training, held_out = split(read(path)[1])
    assert len(training) == 18 and feedback(path)[:2] == (training, held_out)
    assert read_prompts(path)[1] == [group.prompt for group in held_out]
    assert read_to_imitate(path)[0] == [Group(f"p{i}", ("c",)) for i in range(20)]
    path = write(jsonl({"prompt": "p", "response": "r", "label": 1}))
    assert read_to_imitate(path)[0] == [Group("p", ("r",))]


def test_held_out_prompts_are_no_training_prompts(write):
    """Passages of two texts may begin alike."""
    rows = [{"text": f"{'same ' * 12}{'w ' * 20}{i}.", "label": i % 2} for i in range(30)]
    assert "none to hold out" in refusal(read_prompts, write(jsonl(*rows)))
    training, held_out = read_prompts(write(jsonl(*rows, *labelled(40))))
    assert held_out and not set(training) & set(held_out)


def test_a_good_passage_meets_a_bad_one(write):
    training, tested, notes = judged(write(jsonl(*labelled(41))))
    for group in training + tested:
        good, bad = (int(x.split()[0][1:]) for x in group.prompts)
        assert good % 2 == 0 and bad % 2 == 1
        assert all(f"{x[0]}{x.split()[0][1:]} " in y for x, y in zip(group.asked(), group.responses, strict=True))
    met = {tuple(x.split()[0][1:] for x in group.prompts) for group in training}
    assert len(met) > len(training) // 2 + 5  # not text by text
    assert len(training) + len(tested) == 41 - notes["answers dropped: more of one label than of the other"] / 2


def test_texts_that_cannot_be_learnt_from_are_refused(write):
    assert "'label' must be 1 or true (good), 0 or false (bad), found 'good'" in refusal(
        judged, write(jsonl({"text": "a", "label": "good"}))
    )
    one_sided = write(jsonl(*({**row, "label": 1} for row in labelled(20))))
    assert "needs good and bad answers (label 1 and 0), to train on and to hold out" in refusal(judged, one_sided)
    _, _, notes = read(write(jsonl(*labelled(20), {"text": "too short.", "label": 0})))
    assert notes == Counter({"texts dropped: no sentence ends after its first 32 words": 1})


# ---- what each loss learns from --------------------------------------------------------------------------------------


def rows_of(kind: str, n: int = 20) -> list[dict]:
    """A file of one kind, whose ratings have mean 5 and deviation 2 in each group."""
    return [
        {
            "pairs": {"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}", "margin": i},
            "rankings of two": {"prompt": f"p{i}", "responses": [f"c{i}", f"r{i}"]},
            "rankings": {"prompt": f"p{i}", "responses": ["a", "b", "c"][: 2 + i % 2]},
            "ratings": {"prompt": f"p{i}", "responses": ["b", "a"], "scores": [3, 7]},
            "ratings of many": {"prompt": f"p{i}", "responses": ["b", "a", "c", "d"], "scores": [3, 7, 7, 3]},
            "labels": {"prompt": f"p{i}", "completion": f"a{i}", "label": i % 2},
            "texts with labels": labelled(n)[i],
            "text": {"text": f"t{i}"},
            "responses": {"prompt": f"p{i}", "completion": "a"},
            "prompts": {"prompt": f"p{i}"},
        }[kind]
        for i in range(n)
    ]


PAIRS, RANKINGS = [Group(f"p{i}", (f"c{i}", f"r{i}"), margin=float(i)) for i in range(20)], ("a", "b", "c")
GROUPS = {  # what a loss that takes a kind gets of `rows_of` it
    "pairs": PAIRS,
    "rankings of two": [group._replace(margin=1.0) for group in PAIRS],
    "rankings": [Group(f"p{i}", RANKINGS[: 2 + i % 2]) for i in range(20)],
    "ratings": [Group(f"p{i}", ("a", "b"), scores=(1.0, -1.0)) for i in range(20)],
    "ratings of many": [Group(f"p{i}", ("a", "c", "b", "d"), scores=(1.0, 1.0, -1.0, -1.0)) for i in range(20)],
    "labels": [Group(f"p{i}", (f"a{i}",), scores=(float(i % 2),)) for i in range(20)],
}
GROUPS["pairs as labels"] = [
    Group(f"p{i}", (text,), margin=float(i), scores=(score,))
    for i in range(20)
    for text, score in ((f"c{i}", 1.0), (f"r{i}", 0.0))
]
GROUPS["rankings of two as labels"] = [group._replace(margin=1.0) for group in GROUPS["pairs as labels"]]


@pytest.mark.parametrize(
    "losses, kind, found",
    [
        ("dpo cdpo robust ipo simpo orpo infonca nca plackett-luce preferred", "pairs", "pairs"),
        ("dpo slic infonca plackett-luce preferred", "rankings of two", "rankings of two"),
        ("plackett-luce preferred", "rankings", "rankings"),
        ("infonca nca regression preferred", "ratings", "ratings"),
        ("infonca nca regression preferred", "ratings of many", "ratings of many"),
        ("kto binary", "labels", "labels"),
        ("kto binary", "pairs", "pairs as labels"),
        ("kto binary", "rankings of two", "rankings of two as labels"),
    ],
)
def test_what_a_policy_learns_from_each_kind(write, losses, kind, found):
    path = write(jsonl(*rows_of(kind)))
    for loss in losses.split():
        assert feedback(path, loss) == (*split(GROUPS[found]), Counter()), loss


@pytest.mark.parametrize(
    "losses, kind, found",
    [
        ("bradley-terry plackett-luce infonca nca", "pairs", "pairs"),
        ("bradley-terry plackett-luce", "rankings of two", "rankings of two"),
        ("plackett-luce", "rankings", "rankings"),
        ("regression infonca nca", "ratings of many", "ratings of many"),
        ("binary", "labels", "labels"),
        ("binary", "pairs", "pairs as labels"),
    ],
)
def test_what_a_reward_model_learns_from_each_kind(write, losses, kind, found):
    path = write(jsonl(*rows_of(kind)))
    for loss in losses.split():
        assert judged(path, loss) == (*split(GROUPS[found]), Counter()), loss


def test_texts_with_labels_are_passages_each_with_its_label(write):
    path = write(jsonl(*rows_of("texts with labels")))
    for found in (feedback(path, "kto"), judged(path, "binary")):
        assert found == (*split(read(path)[1]), Counter())
        assert all(len(g.responses) == len(g.scores) == 1 and g.source for part in found[:2] for g in part)


def test_labels_of_answers_meet_too_where_a_reward_model_is_asked_for_pairs(write):
    path = write(jsonl(*rows_of("labels", 61)))
    training, held_out, notes = judged(path)
    assert not {x for group in training for x in group.prompts} & {x for group in held_out for x in group.prompts}
    for group in training + held_out:
        good, bad = (int(prompt[1:]) for prompt in group.prompts)
        assert group == Group(f"p{good}", (f"a{good}", f"a{bad}"), prompts=(f"p{good}", f"p{bad}"))
        assert good % 2 == 1 and bad % 2 == 0
    assert len(training) + len(held_out) == (61 - notes.total()) / 2 and notes.total() % 2 == 1
    assert judged(path) == (training, held_out, notes)
    # but a policy learns nothing from answers to different prompts
    assert refusal(feedback, path) == f"{path}: labels: use --loss kto or binary"


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("kind", ["labels", "texts with labels"])
def test_labels_that_are_all_alike_are_refused(write, kind, label):
    path = write(jsonl(*(row | {"label": label} for row in rows_of(kind))))
    for reads, loss in ((feedback, "kto"), (feedback, "binary"), (judged, "binary")):
        assert refusal(reads, path, loss) == f"{path}: needs good and bad answers (label 1 and 0) to train on"


TWO = "dpo or cdpo"  # and not sigmoid, which is dpo by another name
NOTHING = "they do not say which answer is better, which train_dpo.py and train_ppo.py can ask a --reward"
REFUSED = {  # of a policy: (the kind of the file, --loss) -> what is said
    ("labels", "dpo"): "labels: use --loss kto or binary",
    ("labels", "infonca"): "labels: use --loss kto or binary",
    ("texts with labels", "dpo"): "labels: use --loss kto or binary",
    ("texts with labels", "regression"): "labels: use --loss kto or binary",
    ("rankings", "dpo"): "rankings: use --loss plackett-luce",
    ("rankings", "kto"): "rankings: use --loss plackett-luce",
    ("rankings", "nca"): "rankings: use --loss plackett-luce",
    ("rankings", "regression"): "rankings: use --loss plackett-luce",
    ("ratings", "dpo"): "ratings: use --loss infonca or nca",
    ("ratings", "plackett-luce"): "ratings: use --loss infonca or nca",
    ("ratings", "kto"): "ratings: use --loss infonca or nca",
    ("pairs", "regression"): f"pairs: use --loss {TWO}",
    ("rankings of two", "regression"): f"pairs: use --loss {TWO}",
    ("text", "dpo"): f"text: {NOTHING}",
    ("text", "kto"): f"text: {NOTHING}",
    ("responses", "plackett-luce"): f"responses: {NOTHING}",
    ("responses", "regression"): f"responses: {NOTHING}",
    ("prompts", "preferred"): f"prompts: {NOTHING}",
}


@pytest.mark.parametrize("kind, loss", REFUSED)
def test_a_policy_refuses_the_rest_and_says_what_would_do(write, kind, loss):
    path = write(jsonl(*rows_of(kind)))
    assert refusal(feedback, path, loss) == f"{path}: {REFUSED[kind, loss]}"


@pytest.mark.parametrize(
    "kind, loss, message",
    [
        ("labels", "regression", "labels: use --loss binary"),
        ("texts with labels", "regression", "labels: use --loss binary"),
        ("rankings", "bradley-terry", "rankings: use --loss plackett-luce"),
        ("ratings", "bradley-terry", "ratings: use --loss regression or infonca"),
        ("pairs", "regression", "pairs: use --loss bradley-terry"),
        ("text", "bradley-terry", f"text: {NOTHING}"),
        ("responses", "binary", f"responses: {NOTHING}"),
        ("prompts", "bradley-terry", f"prompts: {NOTHING}"),
    ],
)
def test_a_reward_model_refuses_the_rest_and_says_what_would_do(write, kind, loss, message):
    path = write(jsonl(*rows_of(kind)))
    assert refusal(judged, path, loss) == f"{path}: {message}"
