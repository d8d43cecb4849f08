"""The credit of tokens, against the formulas worked out in float64, and how it is shown."""

import json
import re
import shutil

import by_hand
import pytest
import torch
from small_models import message_of

from nanopref import models
from nanopref.data.tokenizer import Tokenizer
from nanopref.evaluation import credit
from nanopref.feedback import rewards
from nanopref.models.sampling import Answer, respond

BETA, GAMMA, LAM, MISSING = 0.3, 0.9, 0.8, 0.7


def a_run(folder, **flags):
    (folder / "config.json").write_text(json.dumps({"flags": flags}))
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A DPO run and a PPO run from the same reference."""
    root = tmp_path_factory.mktemp("credit")
    by_hand.tiny_model(root / "sft", seed=1)
    for name in ("dpo", "ppo"):
        by_hand.tiny_model(root / name / "model", seed=2)
    by_hand.tiny_judge(root / "ppo" / "critic", str(root / "sft"), 1, seed=3)
    by_hand.tiny_judge(root / "rm", str(root / "sft"), 2, seed=4)
    a_run(root / "dpo", init=str(root / "sft"), beta=BETA, logprobs="sum", reference="model")
    ppo = {"init": str(root / "sft"), "beta": BETA, "gamma": GAMMA, "lam": LAM, "temperature": 1.5}
    a_run(root / "ppo", **ppo, missing_end=MISSING, reward=[f"{root}/rm"], doubt=0.5)
    return root


@pytest.fixture(scope="module")
def answers(folder) -> list[Answer]:
    """Of several lengths, some of which do not end."""
    policy, tokenizer = models.load(folder / "dpo")
    prompts = [" the film", " its plot is", " long", " new new", " good", " the end"] * 2
    found = respond(policy, tokenizer, prompts, max_new_tokens=6, seed=0, stream="x")
    assert len({len(a.tokens) for a in found}) > 2 and len({a.ended for a in found}) == 2
    return found


def log_ratios(folder, answer: Answer, temperature: float) -> list[float]:
    with torch.no_grad():
        p, q = (
            by_hand.token_logprobs(
                by_hand.in_float64(folder / name)[0], answer.prompt, answer.tokens, temperature
            ).gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
            for name in ("dpo", "sft")
        )
    return (BETA * (p - q)).tolist()


def test_a_policy_credits_each_token_with_beta_times_its_log_ratio(folder, answers):
    policy, tokenizer = models.load(folder / "dpo")
    found = credit.load(str(folder / "dpo"), policy, tokenizer)(answers)
    assert list(found) == ["log-ratio"]
    for answer, numbers in zip(answers, found["log-ratio"], strict=True):
        assert numbers == pytest.approx(log_ratios(folder, answer, 1.0), abs=1e-4)
    implicit = rewards.implicit_reward(policy, models.load(folder / "sft")[0], BETA)(answers)
    assert [sum(numbers) for numbers in found["log-ratio"]] == pytest.approx(implicit.tolist(), abs=1e-4)


def test_a_critic_credits_what_it_expects_and_the_last_token_what_came_of_it(folder, answers):
    """δ_t without and with the price of the KL, as in Schulman et al. 2016, eq. 10 to 16, token by token."""
    policy, tokenizer = models.load(folder / "ppo")
    judge = rewards.Rewards({"x": lambda said: torch.tensor([len(a.text) / 7 for a in said])}, torch.ones(1), [])
    found = credit.load(str(folder / "ppo"), policy, tokenizer, judge)(answers)
    critic = models.load_scalar(folder / "ppo" / "critic")[0].double()
    for i, answer in enumerate(answers):
        with torch.no_grad():
            values = critic(torch.tensor([answer.prompt + answer.tokens]))[0, len(answer.prompt) - 1 : -1, 0].tolist()
        score = len(answer.text) / 7 - (0 if answer.ended else MISSING)
        ratios, n = log_ratios(folder, answer, 1.5), len(answer.tokens)
        change = [after - before for before, after in zip(values, [*values[1:], score], strict=True)]
        rewarded = [-x + (score if t == n - 1 else 0) for t, x in enumerate(ratios)]
        deltas = [rewarded[t] + GAMMA * (values[t + 1] if t + 1 < n else 0) - values[t] for t in range(n)]
        advantages = [sum((GAMMA * LAM) ** (s - t) * deltas[s] for s in range(t, n)) for t in range(n)]
        assert found["log-ratio"][i] == pytest.approx(ratios, abs=1e-4)
        assert found["value"][i] == pytest.approx(change, abs=1e-4)
        assert sum(found["value"][i]) == pytest.approx(score - values[0], abs=1e-4)
        assert found["advantage"][i] == pytest.approx(advantages, abs=1e-4)


def test_whom_a_run_asked_and_with_which_doubt(folder, answers, tmp_path):
    policy = models.load(folder / "ppo")
    rm = models.load_scalar(folder / "rm")[0].double()
    with torch.no_grad():
        heads = torch.stack([rm(torch.tensor([a.prompt + a.tokens]))[0, -1] for a in answers])
    mean, spread = heads.mean(1), heads.std(1, correction=0)
    judge = credit.judge_of(str(folder / "ppo"), *policy)
    assert judge(answers).tolist() == pytest.approx((mean - 0.5 * spread).tolist(), abs=1e-4) and spread.max() > 0.01
    shutil.copytree(folder / "rm", tmp_path / "rm")  # where it makes its own
    own = a_run(tmp_path, init=str(folder / "sft"), beta=0.1, reward=None, doubt=0.0)
    assert credit.judge_of(own, *policy)(answers).tolist() == pytest.approx(mean.tolist(), abs=1e-4)


def test_a_critic_of_whitened_rewards_has_nothing_to_say(folder, tmp_path):
    assert credit.critic_of(str(folder / "dpo")) == "" and credit.critic_of(str(folder / "ppo"))
    shutil.copytree(folder / "ppo" / "critic", tmp_path / "critic")
    for whiten, says in ((False, True), (True, False)):
        run = a_run(tmp_path, init=str(folder / "sft"), beta=0.1, whiten_rewards=whiten)
        assert bool(credit.critic_of(run)) is says


def test_beta_is_the_last_where_a_kl_is_aimed_at(folder, answers, tmp_path):
    policy, tokenizer = models.load(folder / "dpo")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "beta": 0.1}\n{"step": 1, "beta": 0.7}\n')
    for target, beta in ((None, BETA), (6.0, 0.7)):
        run = a_run(tmp_path, init=str(folder / "sft"), beta=BETA, kl_target=target)
        (found,) = credit.load(run, policy, tokenizer)(answers[:1])["log-ratio"]
        assert found == pytest.approx([beta / BETA * x for x in log_ratios(folder, answers[0], 1.0)], abs=1e-4)


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"steps": 3}, "no run of train_dpo.py or train_ppo.py, which would say its β"),
        ({"beta": 0.1, "logprobs": "mean", "loss": "simpo"}, "trained by --loss simpo, whose reward is not β log"),
    ],
)
def test_a_run_that_does_not_say_its_beta_and_reference_is_refused(flags, said, folder, tmp_path):
    policy = models.load(folder / "dpo")
    run = a_run(tmp_path, init=str(folder / "sft"), **flags)
    message = message_of(credit.load, run, *policy)
    assert message.startswith("--credit: ") and said in message
    assert "no run of" in message_of(credit.load, str(folder / "sft"), *policy)


def test_a_reference_that_would_misread_the_policy_is_refused(folder, tmp_path):
    by_hand.tiny_model(tmp_path / "short", block_size=20)
    run = a_run(tmp_path, init=str(tmp_path / "short"), beta=0.1)
    said = message_of(credit.load, run, *models.load(folder / "dpo"))
    assert said == "--credit: its context of 20 is less than the policy's 48"


# ---- to be read ------------------------------------------------------------------------------------------------------

NUMBERS = {"log-ratio": [0.5, -1.0, 0.01], "value": [0.0, 0.0, 0.0]}
NASTY = [" a\x1b[2J", "\n\u202e", "é"]


def test_token_texts_put_together_are_the_text():
    tokenizer = Tokenizer.train(["aaa bb, aaa bb"], 260)
    tokens = tokenizer.encode("é🎬 aaa")
    texts = credit.token_texts(tokens, tokenizer)
    assert "".join(texts) == "é🎬 aaa" and texts[:2] == ["", "é"]
    assert credit.token_texts(tokens[:3], tokenizer) == ["", "é", "\ufffd"]


def test_without_colours_it_is_a_table():
    lines = credit.shown(NASTY, NUMBERS, colour=False).splitlines()
    assert lines[0].split("  ")[0] == "token" and lines[0].endswith("change of the critic's value")
    assert [re.split(r"\s{2,}", line) for line in lines[2:]] == [
        ['" a\\x1b[2J"', "+0.50", "+0.00"],
        ['"\\n\\u202e"', "-1.00", "+0.00"],
        ['"é"', "+0.01", "+0.00"],
        ["together", "-0.49", "+0.00"],
    ]


def test_colours_say_how_much_and_what_a_terminal_would_obey_is_escaped():
    shown = credit.shown(NASTY, NUMBERS, colour=True)
    text = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert "\x1b" not in text and "\u202e" not in text
    legend, first, _, other, second = text.splitlines()
    assert first == second == " a\\x1b[2J\\n\\u202eé"
    assert legend.startswith("β log π_θ/π_ref: -1.00 (underlined) ") and legend.endswith(" +1.00, together -0.49")
    assert other.startswith("change of the critic's value: -1.00")  # nothing to divide by
    blue, red = f"48;5;{credit.BLUE[1]}m", f"48;5;{credit.RED[3]};4m"
    assert f"{blue} a\\x1b[2J\x1b[0m\x1b[38;5;16;{red}\\n\\u202e\x1b[0mé" in shown
