"""The tables of objectives: what each name sets, which flags it has no use for, what it learns from."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
from small_models import message_of

import train_dpo
import train_rm
from nanopref.data.groups import Group, as_labels
from nanopref.learning import objectives
from nanopref.learning.objectives import LOSSES, OBJECTIVES, SCORES, Knobs

PLAIN = {"logprobs": "sum", "reference": "model", "beta": 0.1, "margin": 0.0, "likelihood": 0.0, "label_smoothing": 0.0}
PLAIN |= {"rating_temperature": 1.0}
ALONE_IN_IT = {"reference": "none", "likelihood": 1.0}
PUBLISHED = {  # what is not as in DPO
    "dpo": {},
    "cdpo": {"label_smoothing": 0.1},
    "robust": {"label_smoothing": 0.1},
    "ipo": {},
    "ipo-mean": {"logprobs": "mean"},
    "slic": {"beta": 1.0, **ALONE_IN_IT},
    "simpo": {"logprobs": "mean", "reference": "none", "beta": 2.0, "margin": 1.0},
    "cpo": ALONE_IN_IT,
    "orpo": {"logprobs": "log-odds", "reference": "none", "beta": 1.0, "likelihood": 10.0},
    "rpo": {"likelihood": 1.0},
    "preferred": ALONE_IN_IT,
    "unlikelihood": ALONE_IN_IT,
    "sigmoid": {},
    "hinge": {},
    "squared-hinge": {},
    "exponential": {},
    "discopop": {},
    "plackett-luce": {"feedback": "rankings", "answers": 4},
    "infonca": {"feedback": "ratings", "answers": 4},
    "nca": {"feedback": "ratings", "answers": 4},
    "kto": {"feedback": "labels"},
    "binary": {"feedback": "labels"},
    "regression": {"feedback": "ratings", "answers": 4},
}
ON_THE_TASK = {"ipo": 0.1, "ipo-mean": 1.0, "slic": 1.0, "simpo": 2.0, "orpo": 1.0}  # β, if it is not 0.5
LEARNS_FROM = {
    "plackett-luce": ("rankings", "pairs"),
    "infonca": ("ratings", "pairs"),
    "nca": ("ratings", "pairs"),
    "kto": ("labels", "pairs"),
    "binary": ("labels", "pairs"),
    "regression": ("ratings",),
    "preferred": ("pairs", "rankings", "ratings", "responses"),
    "bradley-terry": ("pairs",),
}
SCORED = ["bradley-terry", "plackett-luce", "regression", "binary", "infonca", "nca"]
LOGISTIC = {"dpo", "cdpo", "robust", "simpo", "cpo", "orpo", "rpo", "sigmoid", "bradley-terry"}
OF_PAIRS = {"ipo", "ipo-mean", "slic", "unlikelihood", "hinge", "squared-hinge", "exponential", "discopop"} | LOGISTIC
OF_LABELS, EVERY = {"kto", "binary"}, PUBLISHED.keys() | SCORED
OBEY = {  # a value of each flag that is not its default, and who obeys the flag
    "beta": (0.3, EVERY - {"preferred"}),  # which has no reward
    "logprobs": ("log-odds", EVERY - {"preferred"}),
    "reference": ("none", EVERY - {"preferred"}),
    "margin": (0.5, OF_PAIRS),
    "likelihood": (0.5, EVERY - OF_LABELS),
    "label_smoothing": (0.2, LOGISTIC),
    "rating_temperature": (0.5, {"infonca", "nca"}),
    "good_weight": (1.0, OF_LABELS),
    "bad_weight": (1.0, OF_LABELS),
}
OF_POLICIES = {"beta", "logprobs", "reference", "likelihood"}
SCRIPTS = {"train_dpo": (train_dpo.Config, OBJECTIVES), "train_rm": (train_rm.Config, SCORES)}


def test_every_objective_is_looked_at_here():
    assert OBJECTIVES.keys() == PUBLISHED.keys() and list(SCORES) == SCORED
    assert {name for name, loss in LOSSES.items() if loss.reference_point} == {"kto"}


def test_kinds_are_what_each_loss_learns_from():
    assert objectives.kinds(OBJECTIVES) == {name: LEARNS_FROM.get(name, ("pairs",)) for name in PUBLISHED}
    assert objectives.kinds(SCORES) == {name: LEARNS_FROM[name] for name in SCORED}


@pytest.mark.parametrize("name", PUBLISHED)
def test_flags_not_given_are_as_its_authors_have_them(name):
    """With a file; on the built-in task, whose answers are short, with another β."""
    expected = PLAIN | {"feedback": "pairs", "answers": 2} | PUBLISHED[name]
    for data, beta in (("some", expected["beta"]), ("", ON_THE_TASK.get(name, 0.5))):
        before = train_dpo.Config(loss=name, data=data, lr=0.5)
        found = vars(objectives.resolve(before, OBJECTIVES[name]))
        assert found == vars(before) | expected | {"beta": beta}


@pytest.mark.parametrize("name", PUBLISHED)
def test_flags_that_are_given_stay(name):
    """Those that its loss obeys; and what turns a term off, whether it has that term or not."""
    off = {"margin": 0.0, "likelihood": 0.0, "label_smoothing": 0.0}
    for given in ({flag: value for flag, (value, users) in OBEY.items() if name in users}, off):
        kinds = [kind for kind in LEARNS_FROM.get(name, ("pairs",)) if kind != "responses"]  # which come of --select
        given |= {"feedback": kinds[-1], "answers": 2}
        found = vars(objectives.resolve(train_dpo.Config(loss=name, **given), OBJECTIVES[name]))
        assert {flag: found[flag] for flag in given} == given


@pytest.mark.parametrize("name", SCORED)
def test_reward_models_have_no_flags_of_policies(name):
    expected = {"margin": 0.0, "label_smoothing": 0.0, "rating_temperature": 1.0, "feedback": LEARNS_FROM[name][0]}
    expected |= {"answers": 4 if expected["feedback"] in ("rankings", "ratings") else 2}
    before = train_rm.Config(loss=name)
    assert vars(objectives.resolve(before, SCORES[name])) == vars(before) | expected


@pytest.mark.parametrize("script, flag", list(itertools.product(SCRIPTS, OBEY)))
def test_a_flag_that_a_loss_does_not_obey_is_refused(script, flag):
    (Config, table), (value, users) = SCRIPTS[script], OBEY[flag]
    if script == "train_rm" and flag in OF_POLICIES:
        assert not hasattr(Config(), flag)
        return
    for name in table:
        config = Config(loss=name, **{flag: value})
        if name in users:
            objectives.resolve(config, table[name])
        else:
            message = f"--loss {name} has no use for --{flag.replace('_', '-')}"
            assert message_of(objectives.resolve, config, table[name]) == message


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_people_said_is_read_or_asked_for_but_not_both(script):
    """--feedback and --answers say how answers are sampled, which they are of a file of prompts with --reward too."""
    Config, table = SCRIPTS[script]
    loss, a_file = (
        next(iter(table)),
        "--feedback, --answers, --select, --voters are for answers that are sampled, and here",
    )
    cases = [
        ({"judged": "x", "data": "y"}, "--judged belongs to the built-in task: give it or --data"),
        *(
            ({read: "x", **asked}, a_file)
            for read in ("data", "judged")
            for asked in ({"feedback": "pairs"}, {"answers": 2}, {"select": "rso"})
        ),
        ({"feedback": "pairs", "answers": 2}, ""),
        ({"data": "x"}, ""),
        ({"data": "x", "voters": (1.0,)}, a_file),
        ({"judged": "x", "votes": "count"}, "--judged holds what was made of votes: leave --votes out"),
        ({"judged": "x"}, ""),
        ({"judged": "x", "reward": ("y",)}, "people have --judged already: leave --reward out"),
        ({"data": "x", "reward": ("y",), "feedback": "pairs", "answers": 2}, ""),
        ({"data": "x", "reward": ("y",), "select": "best-worst", "answers": 2}, ""),
    ]
    for settings, message in cases:
        config = Config(loss=loss, **settings)
        if message:
            assert message_of(objectives.resolve, config, table[loss]).startswith(message), settings
        else:
            found = objectives.resolve(config, table[loss])
            assert (found.feedback, found.answers) == ("pairs", 2)


@pytest.mark.parametrize("feedback", ["pairs", "labels", "rankings", "ratings"])
def test_feedback_that_a_loss_cannot_learn_from_is_refused(feedback):
    for name in OBJECTIVES:
        config, kinds = train_dpo.Config(loss=name, feedback=feedback), LEARNS_FROM.get(name, ("pairs",))
        if feedback in kinds:
            found = objectives.resolve(config, OBJECTIVES[name])
            assert (found.feedback, found.answers) == (feedback, 4 if feedback in ("rankings", "ratings") else 2)
        else:
            message = f"--feedback {feedback}: --loss {name} learns from {' or '.join(kinds)}"
            assert message_of(objectives.resolve, config, OBJECTIVES[name]) == message


@pytest.mark.parametrize(
    "name, feedback, fit, misfit",
    [
        ("dpo", None, [2, 3, 9], [1]),
        ("plackett-luce", None, [2, 3, 9], [1]),
        ("plackett-luce", "pairs", [2, 3], [1]),
        ("infonca", None, [2, 5], [1]),
        ("regression", None, [2, 5], [1]),
        ("kto", None, [1, 2, 3], []),
        ("kto", "pairs", [2, 3], [1]),
    ],
)
def test_so_many_answers_must_make_feedback(name, feedback, fit, misfit):
    for answers in fit + misfit:
        config = train_dpo.Config(loss=name, feedback=feedback, answers=answers)
        if answers in fit:
            assert objectives.resolve(config, OBJECTIVES[name]).answers == answers
        else:
            kind = feedback or LEARNS_FROM.get(name, ("pairs",))[0]
            assert message_of(objectives.resolve, config, OBJECTIVES[name]) == f"--answers {answers} make no {kind}"


@pytest.mark.parametrize("select", ["best-worst", "doubt", "rso", "best"])
def test_what_is_selected_is_what_is_learnt_from_or_is_refused(select):
    """Pairs, or the best alone, of which only likelihood knows what to do; with as many answers as its authors had."""
    kind, answers = {"best": ("responses", 16), "rso": ("pairs", 8)}.get(select, ("pairs", 4))
    for name in OBJECTIVES:
        config, kinds = train_dpo.Config(loss=name, select=select), LEARNS_FROM.get(name, ("pairs",))
        if kind in kinds:
            found = objectives.resolve(config, OBJECTIVES[name])
            assert (found.feedback, found.answers) == (kind, answers)
            assert objectives.resolve(replace(config, answers=3), OBJECTIVES[name]).answers == 3
            few = message_of(objectives.resolve, replace(config, answers=1), OBJECTIVES[name])
            assert few == f"--answers 1 make no {kind}"
            other = replace(config, feedback="ratings")
        else:
            other = config
        message = f"--select {select} makes {kind}: --loss {name} learns from {' or '.join(kinds)}"
        assert message_of(objectives.resolve, other, OBJECTIVES[name]) == message


def test_who_chooses_without_a_selection_is_refused():
    config = train_dpo.Config(chooser=("true",))
    assert message_of(objectives.resolve, config, OBJECTIVES["dpo"]).startswith("--chooser: it is --select that")
    assert objectives.resolve(replace(config, select="rso"), OBJECTIVES["dpo"]).chooser == ("true",)


@pytest.mark.parametrize(
    "good, bad, given, weights",
    [
        (3, 12, {}, (4.0, 1.0)),
        (12, 3, {}, (1.0, 4.0)),
        (5, 5, {}, (1.0, 1.0)),
        (5, 0, {}, (1.0, 1.0)),
        (0, 5, {}, (1.0, 1.0)),
        (0, 0, {}, (1.0, 1.0)),
        (3, 12, {"good_weight": 0.5}, (0.5, 1.0)),
        (12, 3, {"good_weight": 0.5, "bad_weight": 2.0}, (0.5, 2.0)),
    ],
)
def test_the_rarer_label_weighs_as_much_in_all_unless_weights_are_given(good, bad, given, weights):
    labels = [Group("x", ("y",), scores=(float(i < good),)) for i in range(good + bad)]
    found = objectives.knobs(SimpleNamespace(beta=0.3, label_smoothing=0.2, rating_temperature=2.0, **given), labels)
    assert found == Knobs(0.3, 0.2, 2.0, *weights)


def test_knobs_are_the_flags_and_a_reward_model_has_no_beta():
    """Pairs and ratings are no labels; the two answers of a pair become one of each."""
    pairs = [Group("x", ("a", "b"))] * 3 + [Group("x", ("a", "b"), scores=(1.0, 0.0))]
    config = objectives.resolve(train_dpo.Config(loss="cdpo", beta=0.3), OBJECTIVES["cdpo"])
    assert objectives.knobs(config, pairs) == Knobs(0.3, 0.1, 1.0, 1.0, 1.0)
    config = objectives.resolve(train_rm.Config(loss="infonca", rating_temperature=3.0), SCORES["infonca"])
    assert objectives.knobs(config, pairs) == Knobs(1.0, 0.0, 3.0, 1.0, 1.0)
    config = objectives.resolve(train_dpo.Config(loss="kto", bad_weight=0.7), OBJECTIVES["kto"])
    assert objectives.knobs(config, as_labels(pairs)) == Knobs(0.5, 0.0, 1.0, 1.0, 0.7)
