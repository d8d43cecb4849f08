"""Whoever is named with --reward, each against a computation by hand; and what is said where a judge fails."""

import json
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import by_hand
import pytest
import torch

from nanopref import models
from nanopref.data import reviews
from nanopref.data.groups import Group
from nanopref.data.tokenizer import Tokenizer
from nanopref.feedback import rewards
from nanopref.feedback.rewards import Rewards, load, parse
from nanopref.models.gpt2 import GPT, GPTConfig
from nanopref.models.sampling import Answer, respond, room_for_prompt
from nanopref.models.scalar import ScalarModel
from nanopref.running.flags import RewardError, UserError

RULES = """[[rule]]
name = "short"
at_most_words = 3
weight = 2.0
[[rule]]
name = "names the film"
mentions = ["film"]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """init, reference: tiny policies; dpo: a run with β 0.3 that moved `init` away from `reference`; rm: a reward model
    with three heads; rules.toml."""
    folder = tmp_path_factory.mktemp("judges")
    by_hand.tiny_model(folder / "init")
    by_hand.tiny_model(folder / "reference", seed=5)
    by_hand.tiny_model(folder / "dpo" / "model", seed=7)
    a_run(folder / "dpo", init=str(folder / "reference"), beta=0.3)
    by_hand.tiny_judge(folder / "rm", str(folder / "init"), heads=3)
    (folder / "rules.toml").write_text(RULES)
    return folder


def a_run(folder: Path, **flags) -> str:
    (folder / "config.json").write_text(json.dumps({"flags": flags, "versions": {}}))
    return str(folder)


@pytest.fixture(scope="module")
def policy(folder) -> tuple[GPT, Tokenizer]:
    return models.load(folder / "init")


@pytest.fixture(scope="module")
def answers(policy) -> list[Answer]:
    rng = random.Random(0)
    groups = [Group(by_hand.text(rng, 1, 6), tuple(by_hand.text(rng, 1, 7) for _ in range(3))) for _ in range(7)]
    return rewards.as_answers(groups, policy[1], 48)


def of(policy, *words, **flags) -> Rewards | None:
    return load(words, *policy, SimpleNamespace(**{"data": "", "init": "", "doubt": 0.0} | flags))


def refusal(call, *args, kind=UserError, **more) -> str:
    """One sentence."""
    with pytest.raises(kind) as error:
        call(*args, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


def function(path: Path, body: str) -> str:
    """The word for a function of this body in a file of its own."""
    path.write_text(body)
    return f"{path}:f"


# ---- the notation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "word, name, weight",
    [
        ("true", "true", 1.0),
        ("true*0.7", "true", 0.7),
        ("out/rm*-2", "out/rm", -2.0),
        ("out/a*b*1e-3", "out/a*b", 1e-3),
        ("rules:mine.toml*0", "rules:mine.toml", 0.0),
        ("mine.py:score*3", "mine.py:score", 3.0),
        ("implicit:out/dpo*.5", "implicit:out/dpo", 0.5),
    ],
)
def test_a_word_is_a_name_and_a_weight(word, name, weight):
    assert parse(word) == (name, weight)


@pytest.mark.parametrize("word", ["true*", "true*two", "*", "out/*", "true*nan", "true*inf", "true*1e999", "a*0.5x"])
def test_a_weight_that_is_none_is_refused(word):
    assert refusal(parse, word) == f"--reward {word}: what stands behind * must be a finite number"


@pytest.mark.parametrize("word", ["", "*0.5"])
def test_a_weight_of_nobody_is_refused(word):
    assert refusal(parse, word) == f"--reward {word!r}: names nobody"


def test_nobody_named_at_all_is_refused(policy):
    assert refusal(of, policy) == "--reward: name at least one, or leave the flag out"


@pytest.mark.parametrize(
    "words, twice",
    [
        (["true", "true*0.5"], "true"),
        (["{}/rm", "specificity", "{}/rm*2"], "{}/rm"),
        (["rules:{}/rules.toml", "rules:{}/rules.toml*0.5"], "short"),
    ],
)
def test_one_who_is_named_twice_is_refused(words, twice, policy, folder):
    words, twice = [word.format(folder) for word in words], twice.format(folder)
    assert refusal(of, policy, *words) == f"--reward: {twice} is named twice; give it one weight"


def test_weights_add_what_each_says_and_the_log_has_the_mean_of_each(policy, folder, answers):
    score = function(folder / "length.py", "def f(prompt, response):\n    return len(response)\n")
    judge = of(policy, f"{folder}/rm*0.7", "true", f"rules:{folder}/rules.toml*-3", f"{score}*0.01", "specificity*0")
    names = [f"{folder}/rm", "true", "short", "names the film", score, "specificity"]
    assert list(judge.parts) == names and len(judge.models) == 1
    assert judge.weights.tolist() == pytest.approx([0.7, 1.0, -6.0, -3.0, 0.01, 0.0])
    each = torch.stack([part(answers).float() for part in judge.parts.values()])
    torch.testing.assert_close(judge.each(answers), each)
    expected = sum(w * row for w, row in zip([0.7, 1.0, -6.0, -3.0, 0.01, 0.0], each, strict=True))
    torch.testing.assert_close(judge(answers), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(judge.total(each), expected, rtol=1e-5, atol=1e-5)
    assert judge(answers).dtype == torch.float32 and len({round(x, 4) for x in judge(answers).tolist()}) > 10
    means = judge.means(each)
    parts = {f"score {name}": row.mean().item() for name, row in zip(names, each, strict=True)}
    assert means == pytest.approx({"score": expected.mean().item()} | parts, rel=1e-5)
    one = of(policy, "true*2")  # which has no parts
    assert one.means(each[1:2]) == pytest.approx({"score": 2 * each[1].mean().item()})


# ---- each kind of judge ----------------------------------------------------------------------------------------------


def test_the_task_judges_texts(policy, monkeypatch):
    texts = [" The plot is superb.", " The acting in the last scene is dull.", " It."]
    said = [Answer([1], [2], [], text, True) for text in texts]
    judge = of(policy, "true", "specificity")
    expected = torch.tensor([[f(text) for text in texts] for f in (reviews.true_reward, reviews.specificity)])
    torch.testing.assert_close(judge.each(said), expected)
    assert len(set(judge.each(said)[0].tolist())) == 3


@pytest.mark.parametrize("doubt", [0.0, 0.8])
def test_a_reward_model_says_the_mean_of_its_heads_less_their_spread(doubt, policy, folder, answers):
    judge = of(policy, str(folder / "rm"), doubt=doubt)
    model = models.load_scalar(folder / "rm")[0].double()
    with torch.no_grad():
        heads = torch.stack(
            [model.score.weight @ model.transformer.hidden(torch.tensor([a.prompt + a.tokens]))[0, -1] for a in answers]
        )
    spread = ((heads - heads.mean(1, keepdim=True)) ** 2).mean(1).sqrt()
    torch.testing.assert_close(judge(answers).double(), heads.mean(1) - doubt * spread, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(judge.heads(answers).double(), heads, rtol=1e-4, atol=1e-4)
    assert spread.min() > 0.05


def log_ratio(policy: Path, reference: Path, answer: Answer) -> float:
    with torch.no_grad():
        p, q = (by_hand.logprob(by_hand.in_float64(x)[0], answer.prompt, answer.tokens) for x in (policy, reference))
    return (p - q).item()


def test_a_policy_says_beta_times_its_log_ratio(policy, folder, answers):
    """β and the reference are those of its run; whoever is being trained has nothing to do with it."""
    ratios = [log_ratio(folder / "dpo", folder / "reference", answer) for answer in answers]
    found = of(policy, f"implicit:{folder}/dpo", init=str(folder / "init"))(answers).tolist()
    assert found == pytest.approx([0.3 * x for x in ratios], abs=1e-4) and max(ratios) - min(ratios) > 1
    order = sorted(range(len(answers)), key=lambda i: ratios[i])
    assert sorted(range(len(answers)), key=lambda i: found[i]) == order


def test_a_run_from_a_model_on_the_hub_is_held_against_that(policy, folder, answers, tmp_path, monkeypatch):
    asked = []

    def snapshot(name, **_) -> str:
        asked.append(name)
        return str(folder / "reference")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot))
    shutil.copytree(folder / "dpo", tmp_path / "run")
    a_run(tmp_path / "run", init="someone/small", beta=0.3)
    found = of(policy, f"implicit:{tmp_path}/run")(answers[:2]).tolist()
    expected = [0.3 * log_ratio(folder / "dpo", folder / "reference", answer) for answer in answers[:2]]
    assert found == pytest.approx(expected, abs=1e-4) and asked == ["someone/small"]
    assert rewards.made_from(["true", f"{tmp_path}/run"]) == "someone/small"
    gone = a_run(tmp_path / "run", init=f"{tmp_path}/gone", beta=0.3)
    assert refusal(of, policy, f"implicit:{gone}").startswith(f"{tmp_path}/gone: no model folder there")


def test_the_policy_in_hand_is_judged_as_it_is_when_it_is_asked(folder, answers):
    hand, tokenizer = models.load(folder / "dpo")
    judge = of((hand, tokenizer), "implicit", init=str(folder / "dpo"))
    before = [0.3 * log_ratio(folder / "dpo", folder / "reference", answer) for answer in answers]
    assert judge(answers).tolist() == pytest.approx(before, abs=1e-4)
    hand.load_state_dict(models.load(folder / "init")[0].state_dict())
    after = [0.3 * log_ratio(folder / "init", folder / "reference", answer) for answer in answers]
    assert judge(answers).tolist() == pytest.approx(after, abs=1e-4) and after != pytest.approx(before, abs=0.1)


def test_rules_say_minus_one_where_they_are_broken(policy, folder):
    texts = [" a film", " one two three four", " a film that is long", " no"]
    judge = of(policy, f"rules:{folder}/rules.toml*0.5")
    said = [Answer([1], [2], [], text, True) for text in texts]
    assert judge.each(said).tolist() == [[0, -1, -1, 0], [0, -1, 0, -1]]
    assert judge(said).tolist() == [0, -1.5, -1, -0.5]
    assert list(of(policy, "rules").parts)[:2] == ["does not contradict itself", "is short"]  # those shipped


@pytest.mark.parametrize("together", [False, True])
def test_a_function_is_given_the_prompt_that_the_policy_saw_and_the_response(together, policy, tmp_path, answers):
    """A prompt that was too long for the context without its beginning; one by one, or 4 × --micro-batch at once."""
    log = tmp_path / "log"
    body = f"def f(prompts, responses):\n    open({str(log)!r}, 'a').write(repr((prompts, responses)) + '\\n')\n"
    body += "    return [len(p) + 0.25 * len(r) for p, r in zip(prompts, responses)]\n"
    if not together:
        body = body.replace("prompts", "prompt").replace("responses", "response")
        body = body[: body.index("    return")] + "    return len(prompt) + 0.25 * len(response)\n"
    model, tokenizer = policy
    long = respond(model, tokenizer, [" film" * 60], max_new_tokens=6, seed=0, stream="x")
    seen = tokenizer.decode(tokenizer.encode(" film" * 60)[-room_for_prompt(model, 6) :])
    assert 0 < len(seen) < 300
    texts = [(tokenizer.decode(answer.prompt), answer.text) for answer in answers] + [(seen, long[0].text)]
    judge = of(policy, function(tmp_path / "mine.py", body), micro_batch=2)
    assert judge(answers + long).tolist() == pytest.approx([len(p) + 0.25 * len(r) for p, r in texts])
    calls = [eval(line) for line in log.read_text().splitlines()]
    if together:
        assert [len(prompts) for prompts, _ in calls] == [8, 8, 6]
        assert [pair for prompts, said in calls for pair in zip(prompts, said, strict=True)] == texts
    else:
        assert calls == texts


# ---- what can be wrong with one who is named -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "word, flags, message",
    [
        ("{}/none", {}, "{}/none: no model folder there"),
        ("{}/init", {}, "{}/init: has no scalar head, so it is no reward model"),
        ("implicit:{}/init", {}, "--reward implicit:{}/init: {}/init: no run of train_dpo.py or train_ppo.py"),
        ("implicit:{}/none", {}, "--reward implicit:{}/none: {}/none: no run of"),
        ("implicit:", {}, "--reward implicit:: no folder is named"),
        ("implicit", {}, "--reward implicit: no folder is named"),
        ("implicit", {"init": "{}/init"}, "--reward implicit: {}/init: no run of"),
        ("true", {"data": "x.jsonl"}, "--reward true: only the built-in task knows that"),
        ("specificity*2", {"data": "x.jsonl"}, "--reward specificity: only the built-in task knows that"),
        ("rules:{}/none.toml", {}, "{}/none.toml: no such file"),
        ("rules:{}", {}, "{}: a folder, not a file"),
        ("true", {"doubt": 1.0}, "--doubt needs a --reward with several heads"),
        ("{}/none.py:f", {}, "--reward {}/none.py:f: {}/none.py: no such file"),
    ],
)
def test_who_cannot_judge_is_refused_in_one_sentence(word, flags, message, policy, folder):
    flags = {name: value.format(folder) if isinstance(value, str) else value for name, value in flags.items()}
    assert refusal(of, policy, word.format(folder), **flags).startswith(message.replace("{}", str(folder)))


def test_a_run_of_sft_has_no_beta(policy, folder, tmp_path):
    models.save(*models.load(folder / "init"), tmp_path / "model")
    word = f"implicit:{a_run(tmp_path, init=str(folder / 'reference'), steps=3)}"
    assert refusal(of, policy, word).startswith(f"--reward {word}: {tmp_path}: no run of train_dpo.py")


def test_an_unknown_test_of_a_rule_is_refused(policy, tmp_path):
    (tmp_path / "mine.toml").write_text('[[rule]]\nname = "a"\nis_nice = true\n')
    said = refusal(of, policy, f"rules:{tmp_path}/mine.toml")
    assert said.startswith(f"{tmp_path}/mine.toml, rule 1 ('a'): unknown test is_nice")


def test_models_that_would_misread_the_policy_are_refused(policy, folder, tmp_path):
    _, tokenizer = policy
    other = Tokenizer.train(["other words"], 300)
    models.save(ScalarModel(GPT(GPTConfig(other.vocab_size, 96, 1, 1, 8))), other, tmp_path / "other")
    models.save(ScalarModel(GPT(GPTConfig(tokenizer.vocab_size, 20, 1, 1, 8))), tokenizer, tmp_path / "short")
    misread = "its tokenizer is not the policy's, so it would misread it"
    assert refusal(of, policy, f"{tmp_path}/other*0.5") == f"--reward {tmp_path}/other: {misread}"
    short = f"--reward {tmp_path}/short: its context of 20 is less than the policy's 48"
    assert refusal(of, policy, f"{tmp_path}/short") == short
    models.save(GPT(GPTConfig(other.vocab_size, 48, 1, 1, 8)), other, tmp_path / "far" / "model")
    by_hand.tiny_model(tmp_path / "near" / "model", block_size=32)
    for name, message in (("far", misread), ("near", "its context of 32 is less than the policy's 48")):
        word = f"implicit:{a_run(tmp_path / name, init=str(folder / 'reference'), beta=0.1)}"
        assert refusal(of, policy, word) == f"--reward {word}: {message}"


@pytest.mark.parametrize(
    "body, message",
    [
        ("def g(prompt, response): return 1", "has no function 'f'"),
        ("f = 3", "has no function 'f'"),
        ("import no_such_module", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def f(", "cannot be imported: SyntaxError"),
        ("1 / 0", "cannot be imported: ZeroDivisionError: division by zero"),
    ],
)
def test_a_file_without_the_function_is_refused_before_a_policy_is_there(body, message, policy, tmp_path):
    word = function(tmp_path / "mine.py", body)
    for who in ((None, None), policy):
        said = refusal(of, who, word)
        assert said.startswith(f"--reward {word}: {tmp_path}/mine.py") and message in said


def test_without_a_policy_all_is_checked_that_can_be(folder, tmp_path):
    nobody = (None, None)
    assert of(nobody, "true", f"rules:{folder}/rules.toml", f"implicit:{folder}/dpo") is None
    assert "name the policy that it was trained for with --init" in refusal(of, nobody, f"{folder}/rm")
    assert "no model folder there" in refusal(of, nobody, f"{folder}/none")
    assert "no run of" in refusal(of, nobody, f"implicit:{folder}/init")
    assert "no such file" in refusal(of, nobody, f"rules:{folder}/none.toml")


# ---- a judge that fails ----------------------------------------------------------------------------------------------

ONE = "def f(prompt, response):\n    if 'BAD' in response:\n        {}\n    return 1.0\n"
ALL = "def f(prompts, responses):\n    if any('BAD' in x for x in responses):\n        {}\n"
ALL += "    return [1.0] * len(prompts)\n"
FAULTS = {
    "raise ValueError('too long')": "ValueError: too long; it was asked",
    "return None": "TypeError: ",
    "return 'good'": "ValueError: could not convert string to float: 'good'",
}


@pytest.mark.parametrize("form", [ONE, ALL], ids=["one", "all"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_function_that_fails_is_named_with_what_it_was_asked(form, fault, policy, tmp_path, answers):
    """Also where it was asked many at once, of which one made it fail."""
    word = function(tmp_path / "mine.py", form.format(fault))
    judge = of(policy, "true", f"{word}*0.5")
    culprit = answers[13]._replace(text=" BAD")
    assert judge(answers).shape == (21,)
    said = refusal(judge, [*answers[:13], culprit, *answers[14:]], kind=RewardError)
    expected = "TypeError: gives text" if form == ALL and "good" in fault else FAULTS[fault]
    assert said.startswith(f"--reward {word}: ") and expected in said
    prompt = policy[1].decode(culprit.prompt)
    assert said.endswith(f"it was asked for the prompt {prompt!r} and the response ' BAD'")


def test_what_a_function_was_asked_is_said_in_short(policy, tmp_path, answers):
    word = function(tmp_path / "mine.py", ONE.format("1 / 0"))
    text = " BAD" + "x" * 500 + "end"
    said = refusal(of(policy, word), [answers[0]._replace(text=text)], kind=RewardError)
    assert "'" + text[:97] + " … " + text[-100:] + "'" in said and len(said) < 700


def test_as_many_numbers_as_responses_are_asked_for(policy, tmp_path, answers):
    for count in ("[1.0]", "[1.0] * (len(prompts) + 1)", "[]"):
        word = function(tmp_path / "mine.py", f"def f(prompts, responses):\n    return {count}\n")
        said = refusal(of(policy, word, micro_batch=4), answers, kind=RewardError)
        numbers = len(eval(count, {"prompts": answers[:16]}))
        assert said == f"--reward {word}: gives {numbers} numbers for 16 answers"


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("form", [ONE, ALL], ids=["one", "all"])
def test_a_number_that_is_not_finite_is_refused_with_the_answer(form, value, policy, tmp_path, answers):
    fault = f"return float('{value}')" if form == ONE else f"return [float('{value}') * ('B' in x) for x in responses]"
    fault = fault.replace(" * ('B' in x)", " if 'B' in x else 0.0")
    word = function(tmp_path / "mine.py", form.format(fault))
    said = refusal(of(policy, "true", word), [*answers[:5], answers[5]._replace(text=" BAD")], kind=RewardError)
    n = len(answers[5].tokens)
    assert said == f"--reward {word}: gives {value}, which is no finite number, to an answer of {n} tokens, ' BAD'"


def test_a_weighted_sum_that_is_not_finite_is_refused(policy, tmp_path, answers):
    word = function(tmp_path / "mine.py", "def f(prompt, response):\n    return 1e30\n")
    assert of(policy, f"{word}*1e8")(answers).max() == pytest.approx(1e38)
    assert refusal(of(policy, f"{word}*1e9"), answers, kind=RewardError).startswith("the weighted scores of --reward")
