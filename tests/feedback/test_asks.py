"""A chat model that is asked: what it says against a few lines by hand, what cancels, and what cannot be asked."""

import copy
from pathlib import Path
from types import SimpleNamespace

import by_hand
import pytest
import torch
from small_models import message_of

from nanopref import models
from nanopref.data.dialogues import Dialogue
from nanopref.data.groups import Group
from nanopref.evaluation.compare import compare
from nanopref.feedback import asking, rewards, rules
from nanopref.feedback.collect import collect
from nanopref.feedback.rewards import as_answers, load
from nanopref.models.sampling import Answer
from nanopref.running.flags import RewardError

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
WHICH = (
    "[user] Below are a prompt and two answers to it.\n\nThe prompt:\n{}\n\nAnswer A:\n{}\n\nAnswer B:\n{}\n\n"
    "Which answer {} Reply with A or B alone.<|endoftext|>[assistant] "
)
WHETHER = (
    "[user] Below are a prompt and an answer to it.\n\nThe prompt:\n{}\n\nThe answer:\n{}\n\n"
    "Is this a good answer?\nA: {}\nB: {}\nReply with A or B alone.<|endoftext|>[assistant] "
)
PRINCIPLES = """[[rule]]
name = "kind"
principle = "Be kind."
weight = 3.0
[[rule]]
name = "short"
at_most_words = 2
[[rule]]
name = "honest"
principle = "Be {honest}."
"""


def chat_model(folder: Path, template: str = TEMPLATE, block_size: int = 512, seed: int = 3) -> str:
    by_hand.tiny_model(folder, block_size, seed)
    (folder / "chat_template.jinja").write_text(template)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """judge: a chat model that knows nothing, so that what it says depends on every token; init: a policy."""
    folder = tmp_path_factory.mktemp("asked")
    chat_model(folder / "judge")
    by_hand.tiny_model(folder / "init", block_size=96)
    (folder / "principles.toml").write_text(PRINCIPLES)
    return folder


@pytest.fixture(scope="module")
def policy(folder):
    model, tokenizer = models.load(folder / "init")
    model.ln_f.bias.data[0] = 3.0  # most answers end soon
    return model, tokenizer


def of(policy, *words, **config):
    return load([str(word) for word in words], *policy, SimpleNamespace(**{"data": "", "doubt": 0.0} | config))


def answers_of(policy, *groups: tuple[str, ...]) -> list[Answer]:
    """A prompt and answers to it, each."""
    return as_answers([Group(x, tuple(texts)) for x, *texts in groups], policy[1], 96)


@pytest.fixture(scope="module")
def said(folder):
    """log p(A) - log p(B) behind a text, in float64."""
    model, tokenizer = by_hand.in_float64(folder / "judge")

    def log_odds(text: str) -> float:
        (a,), (b,) = tokenizer.encode("A"), tokenizer.encode("B")
        with torch.no_grad():
            last = model.hidden(torch.tensor([tokenizer.encode(text, special=True)]))[0, -1] @ model.wte.weight.T
        return (last[a] - last[b]).item()

    return log_odds


@pytest.fixture(scope="module")
def lead(said):
    """By how much one of two answers leads, asked both ways."""

    def lead(prompt: str, one: str, other: str, question: str = "is better?") -> float:
        return (said(WHICH.format(prompt, one, other, question)) - said(WHICH.format(prompt, other, one, question))) / 2

    return lead


# ---- what is said ----------------------------------------------------------------------------------------------------


def test_two_answers_differ_by_their_log_odds_whatever_else_is_in_the_call(folder, policy, lead):
    groups = ("the film", " is good", " is bad"), ("and its plot", " is slow and long", " is new")
    mixed = answers_of(policy, *groups)
    mixed = [mixed[i] for i in (0, 2, 3, 1)]  # prompts that alternate
    found = of(policy, f"asks:{folder}/judge")(mixed)
    expected = [lead("the film", "is good", "is bad"), lead("and its plot", "is slow and long", "is new")]
    assert min(map(abs, expected)) > 0.001 and (found[0] - found[3]).item() == pytest.approx(expected[0], abs=1e-5)
    assert (found[1] - found[2]).item() == pytest.approx(expected[1], abs=1e-5)
    assert found[0] + found[3] == found[1] + found[2] == 0
    turned = of(policy, f"asks:{folder}/judge")([mixed[i] for i in (3, 1, 2, 0)])
    assert turned[[3, 1, 2, 0]].tolist() == pytest.approx(found.tolist(), abs=1e-6)


def test_of_more_answers_each_meets_all_others_and_one_that_is_given_twice_does_not_meet_itself(folder, policy, lead):
    texts = ["is good", "is bad", "is slow and new", "is bad"]
    found = of(policy, f"asks:{folder}/judge")(answers_of(policy, ("the film", *texts)))
    expected = [sum(lead("the film", a, b) for b in texts if b != a) / 4 for a in texts]
    assert found.tolist() == pytest.approx(expected, abs=1e-5) and found[1] == found[3] and abs(found.sum()) < 1e-6
    alike = of(policy, f"asks:{folder}/judge")(answers_of(policy, ("the film", " is good ", "is good")))
    assert alike.tolist() == [0, 0]


def test_a_single_answer_is_rated_by_whether_it_is_good(folder, policy, said):
    found = of(policy, f"rates:{folder}/judge")(answers_of(policy, ("the film", " is good"), ("the end", " is bad")))
    for number, case in zip(found.tolist(), [("the film", "is good"), ("the end", "is bad")], strict=True):
        yes, no = (said(WHETHER.format(*case, *order)) for order in (("Yes", "No"), ("No", "Yes")))
        assert number == pytest.approx((yes - no) / 2, abs=1e-5) and abs(number) > 0.001
    assert of(policy, f"rates:{folder}/judge")([]).tolist() == []


def test_each_principle_is_asked_about_and_a_rule_with_a_test_is_tested(folder, policy, lead):
    word = f"asks:{folder}/judge:{folder}/principles.toml"
    judge = of(policy, f"{word}*2", f"asks:{folder}/judge*-1")
    assert list(judge.parts) == ["kind", "short", "honest", f"asks:{folder}/judge"]
    assert judge.weights.tolist() == [6, 2, 2, -1]
    answers = answers_of(policy, ("the film", " is good", " is long and slow"))
    each = judge.each(answers)
    for row, words in (
        (0, "follows this principle better? Be kind."),
        (2, "follows this principle better? Be {honest}."),
    ):
        assert (each[row, 0] - each[row, 1]).item() == pytest.approx(
            lead("the film", "is good", "is long and slow", words), abs=1e-5
        )
    assert each[1].tolist() == [0, -1] and each[3, 0] != each[0, 0]
    assert judge(answers).tolist() == pytest.approx((judge.weights @ each).tolist())


@pytest.mark.parametrize("way", ["asks", "rates"])
def test_a_model_that_always_says_a_says_nothing(way, folder, policy, tmp_path):
    model, tokenizer = models.load(folder / "judge")
    a, b = (tokenizer.encode(letter)[0] for letter in "AB")
    model.ln_f.weight.data.zero_()
    model.ln_f.bias.data = 5 * (model.wte.weight[a] - model.wte.weight[b]).detach()
    models.save(model, tokenizer, tmp_path)
    judge = asking.load_judge(str(tmp_path))
    case = {"prompt": "the film", "a": "is good", "b": "is bad", "question": asking.BETTER}
    assert judge.log_odds(asking.WHICH, [case]).min() > 3
    answers = answers_of(policy, ("the film", " is good", " is bad", " is new"))
    assert of(policy, f"{way}:{tmp_path}")(answers).tolist() == [0, 0, 0]


def test_what_a_template_writes_before_an_answer_is_read_before_the_letter(folder, tmp_path):
    thinks = TEMPLATE.replace("] {{ m.content", "] {% if m.role == 'assistant' %}(so) {% endif %}{{ m.content")
    judge = asking.load_judge(chat_model(tmp_path, thinks))
    case = {"prompt": "the film", "a": "is good", "b": "is bad", "question": asking.BETTER}
    model, tokenizer = by_hand.in_float64(tmp_path)
    assert tokenizer.decode(judge.opening) == "(so) " and tokenizer.decode(judge.letters) == "AB"
    text = WHICH.format("the film", "is good", "is bad", "is better?")
    tokens = tokenizer.encode(text, special=True) + tokenizer.encode("(so) ")
    with torch.no_grad():
        logits = model.hidden(torch.tensor([tokens]))[0, -1] @ model.wte.weight.T
    expected = logits[tokenizer.encode("A")] - logits[tokenizer.encode("B")]
    assert judge.log_odds(asking.WHICH, [case])[0, 0].item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_conversation_is_read_as_its_transcript(folder, policy, lead):
    asked = Dialogue([("user", "the film"), ("assistant", "is new"), ("user", "and?")])
    answers = [Answer([1], [2], [], text, True, asked) for text in ("is good", "is bad")]
    found = of(policy, f"asks:{folder}/judge")(answers)
    transcript = "Human: the film\n\nAssistant: is new\n\nHuman: and?"
    assert (found[0] - found[1]).item() == pytest.approx(lead(transcript, "is good", "is bad"), abs=1e-5)


def test_of_what_does_not_fit_the_oldest_turns_are_cut(folder, tmp_path):
    judge = asking.load_judge(chat_model(tmp_path, block_size=300))
    turns = [f"Human: the film {i}\n\nAssistant: is new {i}" for i in range(20)]
    case = {"prompt": "\n\n".join([*turns, "Human: and?"]), "a": "is good", "b": "is bad", "question": asking.BETTER}
    text = judge.tokenizer.decode(judge.question(asking.WHICH, case))
    rest = text.partition("The prompt:\n")[2].partition("\n\nAnswer A:")[0]
    whole = [i for i in range(20) if rest == "\n\n".join([*turns[i:], "Human: and?"])]
    assert len(whole) == 1 and 0 < whole[0] < 19 and len(judge.question(asking.WHICH, case)) <= 300
    longer = {**case, "prompt": "\n\n".join([*turns[whole[0] - 1 :], "Human: and?"])}  # a turn more would not fit
    assert len(judge.question(asking.WHICH, longer)) <= 300
    assert judge.question(asking.WHICH, longer) == judge.question(asking.WHICH, case)
    plain = judge.question(asking.WHICH, {**case, "prompt": "the film " * 200 + "end"})
    assert len(plain) == 300 and "the film end\n\nAnswer A" in judge.tokenizer.decode(plain)
    case["a"] = "is good " * 200
    assert "without the prompt, and the context" in message_of(judge.question, asking.WHICH, case)


# ---- who asks --------------------------------------------------------------------------------------------------------


def within_prompt(answers):
    """Of each answer the tokens above the mean of its prompt, so that those of one model alone tell nothing."""
    texts = {}
    for answer in answers:
        texts.setdefault(tuple(answer.prompt), []).append(len(answer.tokens))
    return torch.tensor([len(x.tokens) - sum(ns := texts[tuple(x.prompt)]) / len(ns) for x in answers])


def test_policy_and_reference_are_compared_with_each_other(policy):
    longer, tokenizer = copy.deepcopy(policy[0]), policy[1]
    longer.ln_f.bias.data[0] = 2.0  # ends later
    prompts = [f"the film {i}" for i in range(40)]
    judge = rewards.alone(within_prompt, "longer")
    report, _ = compare(longer, policy[0], tokenizer, prompts, max_new_tokens=24, seed=0, score=judge)
    assert report["win_rate"] > 0.7 and report["score"]["policy"] == pytest.approx(-report["score"]["reference"])
    assert report["score"]["policy"] > 0


def test_answers_to_a_prompt_that_is_cut_are_still_answers_to_one_prompt(policy):
    seen = []

    def judge(answers):
        seen.extend((tuple(x.prompt), policy[1].decode(x.prompt).split()[-1]) for x in answers)
        return within_prompt(answers)

    prompts = ["the film and its plot " * 40 + f"end {i}" for i in range(90)]
    sampling = {"max_new_tokens": 64, "sample_batch": 64, "seed": 0}
    collect(*policy, prompts, rewards.alone(judge), noise=0.0, annotators=1, true=False, **sampling)
    assert len(set(seen)) == len({end for _, end in seen}) < len(seen) and all(len(x) < 96 for x, _ in seen)


# ---- what cannot be asked --------------------------------------------------------------------------------------------


def test_who_cannot_be_asked_is_refused(folder, policy, tmp_path):
    low = chat_model(tmp_path / "low", TEMPLATE.replace("m.content", "m.content|lower"))
    cases = {
        "asks": "names no chat model: asks:FOLDER or asks:FOLDER:FILE.toml",
        "rates:": "names no chat model: rates:FOLDER",
        f"asks:{folder}/principles.toml": "names no chat model",
        "asks:out/nobody": "no model folder there",
        f"asks:{folder}/init": "has no chat template, so it cannot be asked: name a chat model",
        f"asks:{folder}/judge:{folder}/none.toml": "no such file",
        f"asks:{low}": "A and B are no tokens",
        f"asks:{chat_model(tmp_path / 'none', TEMPLATE.replace('m.content', 'm.nothing'))}": "leaves out what the",
    }
    for word, message in cases.items():
        for which in (policy, (None, None)):  # before there is a policy, too
            assert message in message_of(of, which, word), word
    assert of((None, None), f"asks:{folder}/judge") is None


def test_answers_that_stand_alone_are_refused_and_may_be_rated(folder, policy):
    for flag in ("group", "answers"):
        message = message_of(lambda flag=flag: of(policy, f"asks:{folder}/judge", **{flag: 1}))
        assert "compares the answers to a prompt" in message and "rates:" in message
        assert of(policy, f"rates:{folder}/judge", **{flag: 1}) and of(policy, f"asks:{folder}/judge", **{flag: 2})
    alone = answers_of(policy, ("the film", " is good"), ("the end", " is bad"))
    with pytest.raises(RewardError, match="each prompt has but one"):
        of(policy, f"asks:{folder}/judge")(alone)
    pair = answers_of(policy, ("the film", " is good", " is bad"))
    assert of(policy, f"asks:{folder}/judge")([*alone[1:], *pair])[0] == 0  # nobody to compare it with


def test_what_is_no_finite_number_is_refused(folder, policy, tmp_path):
    model, tokenizer = models.load(folder / "judge")
    model.ln_f.weight.data.fill_(3e38)
    models.save(model, tokenizer, tmp_path)
    with pytest.raises(RewardError, match="which is no finite number"):
        of(policy, f"asks:{tmp_path}")(answers_of(policy, ("the film", " is good", " is bad")))


def test_sentences_are_for_a_model_that_is_asked(folder):
    path = str(rules.SHIPPED.parent / "harmless.toml")
    found = rules.load(path, sentences=True)
    assert len(found) >= 3 and all(rule.principle.endswith(".") and not rule.test for rule in found)
    assert "--reward asks:FOLDER:FILE.toml" in message_of(rules.load, path)
    (folder / "empty.toml").write_text('[[rule]]\nname = "x"\nprinciple = " "\n')
    assert "needs one test, not none" in message_of(lambda: rules.load(str(folder / "empty.toml"), sentences=True))
