"""train_ppo.py as its users meet it: its optimum on a bandit, its log-probs, killed and resumed, fed nonsense."""

import copy
import gzip
import itertools
import json
import random
import signal
import time
from pathlib import Path

import helpers
import pytest
import torch
import torch.nn.functional as F
import tyro
from helpers import Fork, finish, flags, results, start, two_processes
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

import kernels
import train_ppo
from nanopref import data, evaluate, losses, reviews, run
from nanopref.generate import generate
from nanopref.model import GPT, GPTConfig, ScalarGPT, load_pretrained, save_pretrained
from nanopref.tokenizer import Tokenizer

SMALL = {"iterations": 6, "batch_size": 16, "minibatch": 8, "micro_batch": 4, "eval_prompts": 16, "save_every": 2}
SMALL |= {"device": "cpu", "value_warmup": 1}


@pytest.fixture(scope="module")
def reward_folder(sft_folder, tmp_path_factory) -> str:
    """A reward model that knows nothing, which is all that most tests need."""
    model, tokenizer = load_pretrained(sft_folder)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("rm") / "rm"
    save_pretrained(ScalarGPT(model), tokenizer, folder / "model")
    return str(folder)


@pytest.fixture(scope="module")
def left_alone(sft_folder, reward_folder, tmp_path_factory) -> Path:
    """A small run that nobody disturbed."""
    out = tmp_path_factory.mktemp("ppo") / "left alone"
    finish(start("train_ppo.py", *flags(out=out, init=sft_folder, reward=reward_folder, kl_target=1.0, **SMALL)))
    return out


# ---- the optimum -----------------------------------------------------------------------------------------------------

LETTERS = "abc"
PROMPT = "a"  # a letter itself: the rows of all others shrink to one vector, which LayerNorm would blow up
REWARDS = {"": -0.5, "a": 0.0, "b": 1.0, "c": 0.3, "aa": 0.6, "ab": -1.0, "bc": 1.2, "cb": -0.4, "cc": 0.9}


def bandit_reward(text: str) -> float:
    return REWARDS.get(text, 0.2)


@pytest.fixture(scope="module")
def bandit(tmp_path_factory) -> Path:
    """A GPT that answers with at most two of three letters, each with a probability of its own."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train([""], 257)
    model = GPT(GPTConfig(257, 8, 1, 2, 16))
    tokens = torch.tensor([tokenizer.encode(letter)[0] for letter in LETTERS] + [tokenizer.end_of_text])
    likely = torch.tensor([0.3, 0.2, 0.3, 0.2])
    contexts = [[ord(PROMPT)]] + [[ord(PROMPT), int(token)] for token in tokens[:3]]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(400):
        loss = sum(F.cross_entropy(model(torch.tensor([c]))[0, -1][None], wanted(tokens, likely)) for c in contexts)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("bandit") / "init"
    save_pretrained(model, tokenizer, folder)
    return folder


def wanted(tokens: torch.Tensor, likely: torch.Tensor) -> torch.Tensor:
    return torch.zeros(1, 257).index_copy(1, tokens, likely[None])


def all_responses(model: GPT, tokenizer: Tokenizer) -> tuple[list[str], torch.Tensor]:
    """Each response of at most two tokens to the prompt and its log-prob, in float64."""
    model = model.double()
    end = tokenizer.end_of_text
    with torch.no_grad():
        first = model(torch.tensor([[ord(PROMPT)]]))[0, -1].log_softmax(-1)
        contexts = torch.tensor([[ord(PROMPT), token] for token in range(end)])
        second = model(contexts)[:, -1].log_softmax(-1)
    texts = [""] + [
        tokenizer.decode([a]) + (tokenizer.decode([b]) if b != end else "") for a in range(end) for b in range(end + 1)
    ]
    return texts, torch.cat([first[end:], (first[:end, None] + second).flatten()])


@pytest.mark.parametrize("settings", [{}, {"critic": "head"}, {"advantage": "rloo"}], ids=["gae", "head", "rloo"])
def test_ppo_finds_the_closed_form_optimum_of_a_bandit(bandit, settings, tmp_path, monkeypatch, no_picture):
    """π* ∝ π_ref exp(r/β), over every response there is."""
    monkeypatch.setattr(reviews, "true_reward", bandit_reward)
    monkeypatch.setattr(reviews, "sample_prompt", lambda rng: PROMPT)
    beta = 0.5
    config = train_ppo.Config(
        out=str(tmp_path / "ppo"), init=str(bandit), reward=("true",), beta=beta, missing_end=0.0, max_new_tokens=2,
        iterations=120, batch_size=256, minibatch=128, micro_batch=256, epochs=2, lr=3e-3, eval_prompts=4,
        device="cpu", value_clip=10.0, **settings,
    )  # fmt: skip
    train_ppo.train(config)
    texts, reference = all_responses(*load_pretrained(bandit))
    _, found = all_responses(*load_pretrained(tmp_path / "ppo"))
    best = (reference + torch.tensor([bandit_reward(text) for text in texts]) / beta).log_softmax(0)
    distance = (found.exp() * (found - best)).sum().item()
    assert (reference.exp() * (reference - best)).sum() > 0.5  # there was a way to go
    assert 0 <= distance < 0.02


# ---- the run ---------------------------------------------------------------------------------------------------------


def test_the_run_folder_holds_what_the_design_promises(left_alone):
    names = {path.name for path in left_alone.iterdir()}
    assert {"config.json", "metrics.jsonl", "report.json", "report.png", "model", "critic", "state.pt"} <= names
    metrics, report = results(left_alone)
    assert [row["step"] for row in metrics] == list(range(1, SMALL["iterations"] + 1))
    expected = {"score", "true_reward", "kl", "kl_k3", "entropy", "clip_fraction", "value_clip_fraction", "value_loss"}
    expected |= {"explained_variance", "response_length", "unended", "beta", "approx_kl", "grad_norm"}
    assert expected <= metrics[0].keys()
    rows = [json.loads(line) for line in (left_alone / "metrics.jsonl").read_text().splitlines()]
    assert all(row["rollout_tokens_per_second"] > 0 and row["learning_tokens_per_second"] > 0 for row in rows)
    assert {"reference", "policy", "reference_std"} <= report["true_reward"].keys()
    assert {"win_rate", "kl", "response_length", "score"} <= report.keys()
    critic, _ = load_pretrained(left_alone / "critic", kind=ScalarGPT)
    assert len(critic.score.weight) == 1


def test_the_first_round_starts_at_the_reference(left_alone):
    """Before any step π_θ is π_ref: both KL estimates are 0, nothing is clipped, and during the warm-up it stays so."""
    metrics, _ = results(left_alone)
    for row in metrics[:2]:
        assert row["kl"] == pytest.approx(0, abs=1e-4) and row["kl_k3"] == pytest.approx(0, abs=1e-4)
    assert metrics[0]["clip_fraction"] == 0 and metrics[0]["approx_kl"] == pytest.approx(0, abs=1e-7)
    assert metrics[2]["kl_k3"] > 1e-3 and metrics[1]["approx_kl"] > 0


def test_the_kl_coefficient_follows_the_controller(left_alone):
    metrics, _ = results(left_alone)
    for before, after in itertools.pairwise(metrics):
        expected = losses.adapt_kl_coefficient(before["beta"], before["kl"], 1.0, SMALL["batch_size"], 1000)
        assert after["beta"] == pytest.approx(expected, rel=1e-12)
    assert metrics[0]["beta"] == train_ppo.Config().beta and metrics[1]["beta"] < metrics[0]["beta"]


@given(st.sampled_from([0.5, 0.8, 1.0, 1.5]), st.integers(0, 1000))
@settings(max_examples=8)
def test_the_samplers_logprobs_are_the_learners(sft_folder, temperature, seed):
    """What guards everything: sampled one at a time from a cache, or all at once, a token has one probability."""
    policy, tokenizer = load_pretrained(sft_folder)
    rng = random.Random(seed)
    prompts = [tokenizer.encode(reviews.sample_prompt(rng)) for _ in range(12)]
    samples = generate(
        policy,
        prompts,
        48,
        end_of_text=tokenizer.end_of_text,
        temperature=temperature,
        generator=torch.Generator().manual_seed(seed),
    )
    batch = data.collate([(x, sample.tokens) for x, sample in zip(prompts, samples, strict=True)])
    with torch.no_grad():
        found, entropies, values = train_ppo.Learner(policy, None, 0.1)(*batch, temperature)
    expected = torch.tensor([p for sample in samples for p in sample.logprobs])
    assert (found[batch.mask.bool()] - expected).abs().max() < 1e-4
    assert (found[batch.mask == 0] == 0).all() and (entropies[batch.mask == 0] == 0).all() and (values == 0).all()


def test_a_round_is_the_arithmetic_by_hand(sft_folder, reward_folder, tmp_path, monkeypatch, no_picture):
    """What reaches the losses in the second round, when the policy has left the reference, token by token."""
    seen = {"rounds": [], "policy": [], "value": []}
    ordinary = {name: getattr(train_ppo, name) for name in ("generate", "look")}

    def generate_and_note(policy, queries, *args, **more):
        samples = ordinary["generate"](policy, queries, *args, **more)
        seen["rounds"].append((queries, samples, more["generator"].initial_seed(), more["temperature"]))
        return samples

    def look_and_note(learner, reference, *args):
        seen["models"] = copy.deepcopy((learner, reference))
        return ordinary["look"](learner, reference, *args)

    monkeypatch.setattr(train_ppo, "generate", generate_and_note)
    monkeypatch.setattr(train_ppo, "look", look_and_note)
    for name, key in (("ppo_clip_loss", "policy"), ("clipped_value_loss", "value")):
        original = getattr(kernels, name)

        def loss_and_note(*args, original=original, key=key, **more):
            seen[key].append((args, more))
            return original(*args, **more)

        monkeypatch.setattr(kernels, name, loss_and_note)
    tau, gamma, lam, beta, missing_end = 0.8, 0.9, 0.6, 0.3, 0.7
    config = train_ppo.Config(
        out=str(tmp_path / "ppo"), init=sft_folder, reward=(reward_folder,), iterations=2, batch_size=1, minibatch=1,
        epochs=1, value_warmup=0, lr=1e-3, temperature=tau, gamma=gamma, lam=lam, beta=beta, missing_end=missing_end,
        clip=0.3, value_clip=0.15, max_new_tokens=12, whiten_advantages=False, eval_prompts=2, device="cpu",
    )  # fmt: skip
    train_ppo.train(config)
    (_, _, first_seed, _), (queries, samples, second_seed, temperature) = seen["rounds"]
    assert first_seed != second_seed and temperature == tau
    learner, reference = seen["models"]
    reward_model, tokenizer = load_pretrained(reward_folder, kind=ScalarGPT)
    x, y = queries[0], samples[0].tokens
    assert y[-1] != tokenizer.end_of_text  # 12 tokens end no review, so the penalty is there
    tokens = torch.tensor([x + y])
    with torch.no_grad():
        policy, ref = (model(tokens)[0].div(tau).log_softmax(-1) for model in (learner.policy, reference))
        values = learner.critic(tokens)[0, :, 0]
        score = reward_model(tokens)[0, -1, 0].item() - missing_end
    steps = range(len(y))
    old = [policy[len(x) - 1 + t, y[t]].item() for t in steps]
    kl = [old[t] - ref[len(x) - 1 + t, y[t]].item() for t in steps]
    value = [values[len(x) - 1 + t].item() for t in steps] + [0.0]
    assert sum(map(abs, kl)) > 1e-3
    reward = [-beta * kl[t] + (score if t == len(y) - 1 else 0.0) for t in steps]
    delta = [reward[t] + gamma * value[t + 1] - value[t] for t in steps]
    advantage = [sum((gamma * lam) ** (s - t) * delta[s] for s in steps if s >= t) for t in steps]

    (logprobs, old_logprobs, advantages, mask), options = seen["policy"][-1]
    inside = mask[0].bool()
    assert options == {"clip": 0.3} and int(inside.sum()) == len(y)
    for found, expected in [(old_logprobs, old), (logprobs, old), (advantages, advantage)]:
        assert found[0][inside].tolist() == pytest.approx(expected, abs=1e-4)
    (new_values, old_values, returns, _), options = seen["value"][-1]
    assert options == {"clip": 0.15}
    targets = [a + v for a, v in zip(advantage, value, strict=False)]
    for found, expected in [(old_values, value[:-1]), (new_values, value[:-1]), (returns, targets)]:
        assert found[0][inside].tolist() == pytest.approx(expected, abs=1e-4)


def test_gradients_do_not_pile_up(sft_folder, reward_folder, tmp_path, no_picture):
    """Where nothing moves, a second pass has the gradient of the first."""
    norms = []
    for epochs in (1, 3):
        words = SMALL | {"epochs": epochs, "minibatch": 16, "iterations": 1, "value_warmup": 0, "lr": 1e-12}
        out = tmp_path / str(epochs)
        train_ppo.train(train_ppo.Config(out=str(out), init=sft_folder, reward=(reward_folder,), **words))
        norms.append(results(out)[0][0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_an_entropy_bonus_raises_the_entropy(sft_folder, tmp_path, no_picture):
    words = SMALL | {"iterations": 5, "value_warmup": 0, "lr": 1e-3, "entropy": 0.3, "max_kl": 1e4}
    train_ppo.train(train_ppo.Config(out=str(tmp_path / "ppo"), init=sft_folder, reward=("true",), **words))
    metrics, _ = results(tmp_path / "ppo")
    assert metrics[-1]["entropy"] > metrics[0]["entropy"] + 0.1


def test_the_warm_up_leaves_the_policy_alone(sft_folder, reward_folder, tmp_path, monkeypatch):
    """With the critic on the policy's own trunk too: only the head learns. And the picture counts rounds."""
    axis = Figure().subplots()
    monkeypatch.setattr(evaluate, "plot", lambda panels, path: panels[0](axis))
    words = SMALL | {"iterations": 3, "value_warmup": 2, "lr": 1e-2, "critic": "head", "max_kl": 1e4}
    train_ppo.train(train_ppo.Config(out=str(tmp_path / "ppo"), init=sft_folder, reward=(reward_folder,), **words))
    metrics, _ = results(tmp_path / "ppo")
    assert metrics[2]["kl_k3"] == pytest.approx(0, abs=1e-4) and metrics[1]["value_loss"] != metrics[0]["value_loss"]
    assert axis.get_xlabel() == "round"


def test_a_look_at_the_reference_computes_no_entropy(sft_folder, monkeypatch):
    policy, tokenizer = load_pretrained(sft_folder)
    batch = data.collate([(tokenizer.encode("A film"), tokenizer.encode(" that works."))])
    asked, ordinary = [], kernels.token_logprobs
    monkeypatch.setattr(
        kernels, "token_logprobs", lambda *a, **more: asked.append(more.get("entropy", False)) or ordinary(*a, **more)
    )
    learner = train_ppo.Learner(policy, None, 0.1)
    _, looked = train_ppo.look(learner, policy, batch, [batch.inputs.shape[1]], train_ppo.Config())
    found, _, _ = learner(*batch, 1.0)
    assert asked == [False, True] and torch.equal(looked, found)


@pytest.mark.parametrize("kind", ["network", "head"])
def test_a_prompts_padding_changes_nothing(sft_folder, kind):
    """A row says the same beside a much longer one, and in a batch with columns that it does not need."""
    policy, tokenizer = load_pretrained(sft_folder)
    torch.manual_seed(0)
    transformer = policy if kind == "head" else load_pretrained(sft_folder)[0]
    learner = train_ppo.Learner(policy, ScalarGPT(transformer), 0.1)
    short = (tokenizer.encode("A film"), tokenizer.encode(" that works."))
    long = (tokenizer.encode("On Friday we went to see The Silver Window, the modern musical."), short[1] * 8)
    with torch.no_grad():
        alone = learner(*data.collate([short]), 1.0)
        together = learner(*data.collate([short, long]), 1.0)
    n = alone[0].shape[1]
    mask = data.collate([short]).mask[0].bool()
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a[0][mask], b[0, :n][mask], atol=1e-5, rtol=1e-5)


def test_what_micro_batches_accumulate_is_the_minibatchs_gradient(sft_folder, reward_folder, tmp_path, no_picture):
    """The first round's losses do not depend on how many responses are in memory at once."""
    rows = {}
    for micro in (2, 16):
        words = SMALL | {"micro_batch": micro, "iterations": 2, "minibatch": 16, "value_warmup": 0, "epochs": 2}
        config = train_ppo.Config(out=str(tmp_path / str(micro)), init=sft_folder, reward=(reward_folder,), **words)
        train_ppo.train(config)
        rows[micro] = results(tmp_path / str(micro))[0][0]
    assert rows[2] == pytest.approx(rows[16], rel=1e-3, abs=1e-5)


def test_killed_and_resumed_it_ends_the_same(sft_folder, reward_folder, left_alone, tmp_path):
    words = flags(out=tmp_path / "run", init=sft_folder, reward=reward_folder, kl_target=1.0, resume=True, **SMALL)
    metrics, moments = tmp_path / "run" / "metrics.jsonl", random.Random(0)
    for kill in range(3):
        script = Fork(tmp_path / "log", "train_ppo.py", *words)
        while script.is_alive() and (not metrics.exists() or metrics.read_text().count("\n") < 2 * kill):
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.3))
        assert script.kill() == -signal.SIGKILL
    Fork(tmp_path / "log", "train_ppo.py", *words).succeed()
    assert results(tmp_path / "run") == results(left_alone)


@pytest.mark.parametrize(
    "options",
    [
        {"advantage": "grpo", "group": 2},
        {"critic": "head", "entropy": 0.01, "whiten_rewards": True},
        {"early_stop_kl": 1e-9, "epochs": 4, "temperature": 0.8},
    ],
    ids=lambda options: next(iter(options)),
)
def test_the_other_ways_to_run_it_run(options, sft_folder, reward_folder, tmp_path, monkeypatch):
    asked, ordinary = [], train_ppo.generate
    monkeypatch.setattr(train_ppo, "generate", lambda *a, **k: asked.append(a[1]) or ordinary(*a, **k))
    config = train_ppo.Config(
        out=str(tmp_path / "ppo"),
        init=sft_folder,
        reward=(reward_folder, "true"),
        reward_weights=(0.5, 2.0),
        **SMALL | {"iterations": 3} | options,
    )
    train_ppo.train(config)
    metrics, _ = results(tmp_path / "ppo")
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-4)  # at any temperature π_θ begins as π_ref
    group = options.get("group", 1)
    for queries in asked:  # the responses to a prompt stand side by side
        assert all(queries[i : i + group] == [queries[i]] * group for i in range(0, len(queries), group))
    if "early_stop_kl" in options:  # the first steps move nothing but the critic; after that every step is too far
        assert metrics[0]["minibatches"] == 8 and metrics[-1]["minibatches"] == 2
    assert (tmp_path / "ppo" / "critic").exists() == (options.get("advantage") is None)


def test_scores_are_the_weighted_sum_less_the_doubt(sft_folder, reward_folder):
    policy, tokenizer = load_pretrained(sft_folder)
    torch.manual_seed(1)
    ensemble = ScalarGPT(policy, 4)
    single, _ = load_pretrained(reward_folder, kind=ScalarGPT)
    x, y = tokenizer.encode("A film."), [*tokenizer.encode(" The plot is superb."), tokenizer.end_of_text]
    config = train_ppo.Config(reward=("a", "b", "true"), reward_weights=(2.0, -1.0, 3.0), doubt=0.5)
    found = train_ppo.score(config, [ensemble, single, None], [(x, y)], tokenizer).item()
    with torch.no_grad():
        heads, one = (model(torch.tensor([x + y]))[0, -1] for model in (ensemble, single))
    expected = (
        2 * (heads.mean() - 0.5 * heads.std(correction=0)) - one[0] + 3 * reviews.true_reward(" The plot is superb.")
    )
    assert found == pytest.approx(expected.item(), abs=1e-4)


def test_a_critic_starts_from_the_reward_model(sft_folder):
    policy, _ = load_pretrained(sft_folder)
    torch.manual_seed(0)
    reward_model = ScalarGPT(load_pretrained(sft_folder)[0], 3)
    tokens = torch.randint(200, (2, 9))
    critic = train_ppo.new_critic(train_ppo.Config(), policy, [reward_model])
    torch.testing.assert_close(critic(tokens)[..., 0], reward_model(tokens).mean(-1), atol=1e-5, rtol=1e-5)
    assert critic.transformer is not reward_model.transformer
    from_policy = train_ppo.new_critic(train_ppo.Config(), policy, [None])
    assert (from_policy(tokens) == 0).all() and from_policy.transformer is not policy
    assert train_ppo.new_critic(train_ppo.Config(critic="head"), policy, [reward_model]).transformer is policy
    assert train_ppo.new_critic(train_ppo.Config(advantage="rloo"), policy, [reward_model]) is None


def test_the_triton_path_gives_the_same_curve(tmp_path, monkeypatch, no_picture):
    """Without a GPU through Triton's interpreter, which is slow: few steps of a very small model."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["a film and its plot"], 270)
    save_pretrained(GPT(GPTConfig(tokenizer.vocab_size, 160, 1, 2, 16)), tokenizer, tmp_path / "init")
    monkeypatch.setattr(reviews, "sample_prompt", lambda rng: f"a film {rng.random():.2f}")
    for backend in ("torch", "triton"):
        words = SMALL | {"iterations": 2, "batch_size": 4, "minibatch": 4, "micro_batch": 4, "epochs": 1}
        words |= {"eval_prompts": 2, "value_warmup": 0, "max_new_tokens": 4, "kernels": backend}
        config = train_ppo.Config(out=str(tmp_path / backend), init=str(tmp_path / "init"), reward=("true",), **words)
        train_ppo.train(config)
    for a, b in zip(results(tmp_path / "torch")[0], results(tmp_path / "triton")[0], strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


def test_from_nothing_it_trains_everything_it_needs(tmp_path, capsys):
    words = SMALL | {"rm_pairs": 64, "sft_steps": 20, "iterations": 2}
    config = train_ppo.Config(out=str(tmp_path / "ppo"), **words)
    train_ppo.train(config)
    output = capsys.readouterr().out
    assert "supervised fine-tuning first" in output and "a reward model first" in output and "true reward" in output
    seconds = json.loads((tmp_path / "ppo" / "report.json").read_text())["seconds"]
    assert {"sft", "reward model", "ppo", "evaluation"} <= seconds.keys()
    # and the reward model's folder is enough to begin another run from the same policy
    train_ppo.train(train_ppo.Config(out=str(tmp_path / "again"), reward=(str(tmp_path / "ppo" / "rm"),), **words))
    again, _ = results(tmp_path / "again")
    assert again == results(tmp_path / "ppo")[0]


def test_real_prompts_are_answered_and_cut(real_data, tmp_path, capsys):
    rows = gzip.open(real_data / "hh_harmless.jsonl.gz", "rb").read().splitlines(keepends=True)[:60]
    (tmp_path / "hh.jsonl").write_bytes(b"".join(rows))
    words = SMALL | {"data": str(tmp_path / "hh.jsonl"), "sft_steps": 2, "iterations": 2, "max_new_tokens": 8}
    train_ppo.train(train_ppo.Config(out=str(tmp_path / "ppo"), **words))
    _, report = results(tmp_path / "ppo")
    assert "true_reward" not in report and {"kl", "score", "response_length"} <= report.keys()


# ---- bad input, and runs that go wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"reward_weights": (1.0,)}, "1 weights for 0 reward models"),
        ({"reward": ("true",), "reward_weights": (1.0, 2.0)}, "2 weights for 1 reward models"),
        ({"reward": ("true",), "reward_weights": (float("nan"),)}, "finite numbers"),
        ({"reward": ("true",), "data": "x.jsonl"}, "only the built-in task"),
        ({"max_new_tokens": 96}, "leaves no room for a prompt in a context of 96"),
        ({"max_new_tokens": 256, "data": "x.jsonl"}, "leaves no room for a prompt in a context of 256"),
        ({"advantage": "rloo", "group": 1}, "--group must be at least 2"),
        ({"group": 3}, "no multiple of --group 3"),
        ({"value_warmup": 40}, "--value-warmup 40 leaves none of 40 --iterations"),
        ({"beta": 0.0, "kl_target": 5.0}, "--kl-target multiplies --beta"),
        ({"doubt": 1.0}, "--doubt needs a --reward with several heads"),
        ({"temperature": 0.0}, "--temperature must be above 0"),
        ({"beta": -0.1}, "--beta must be 0 or above"),
        ({"lam": 1.5}, "--lam must be from 0 to 1"),
        ({"gamma": 0.0}, "--gamma must be above 0"),
        ({"clip": 0.0}, "--clip must be above 0"),
        ({"clip": 1.5}, "--clip must be below 1"),
        ({"reward": ()}, "--reward: name at least one reward model"),
        ({"iterations": 0}, "--iterations must be at least 1"),
        ({"rm_pairs": 5}, "--rm-pairs must be at least 20"),
        ({"data": "nowhere.jsonl"}, "no such file"),
        ({"init": "out/nowhere"}, "no model folder there"),
        ({"reward": ("out/nowhere",)}, "no model folder there"),
    ],
)
def test_bad_flags_are_refused(options, message, tmp_path, capsys):
    helpers.refused(train_ppo.train, train_ppo.Config(out=str(tmp_path / "out"), **options), message, capsys)


def test_reward_models_that_do_not_fit_are_refused(sft_folder, reward_folder, tmp_path, capsys):
    def refuse(folder, message, init=sft_folder, **more):
        config = train_ppo.Config(out=str(tmp_path / "out"), init=init, reward=(str(folder),), **more)
        helpers.refused(train_ppo.train, config, message, capsys)

    refuse(sft_folder, "has no scalar head")
    refuse(tmp_path / "nowhere", "no model folder there")
    other = Tokenizer.train(["other words"], 300)
    save_pretrained(ScalarGPT(GPT(GPTConfig(other.vocab_size, 96, 1, 1, 8))), other, tmp_path / "other")
    refuse(tmp_path / "other", "its tokenizer is not the policy's")
    refuse(tmp_path / "other", "name the policy that it was trained for", init="")
    model, tokenizer = load_pretrained(reward_folder, kind=ScalarGPT)
    short = ScalarGPT(GPT(GPTConfig(tokenizer.vocab_size, 20, 1, 1, 8)))
    save_pretrained(short, tokenizer, tmp_path / "short")
    refuse(tmp_path / "short", "its context of 20 is less than the policy's 96")
    model.score.weight.data[:] = float("nan")
    save_pretrained(model, tokenizer, tmp_path / "nan")
    refuse(tmp_path / "nan", "score.weight holds numbers that are not finite")
    model.score.weight.data[:] = model.transformer.ln_f.weight.data[:] = 3e38  # finite, but the score overflows
    save_pretrained(model, tokenizer, tmp_path / "huge")
    refuse(tmp_path / "huge", "gives a score that is no finite number")
    refuse(reward_folder, "which writes no text", init=reward_folder)
    refuse(reward_folder, "--doubt needs a --reward with several heads", doubt=1.0)


def test_a_reward_flag_without_a_value_is_not_an_absent_one():
    assert tyro.cli(train_ppo.Config, args=[]).reward is None
    assert tyro.cli(train_ppo.Config, args=["--reward"]).reward == ()
    assert tyro.cli(train_ppo.Config, args=["--reward", "true"]).reward == ("true",)


@pytest.mark.parametrize("iterations, warmup", [(1, 0), (2, 1), (3, 2), (40, 2)])
def test_the_warm_up_leaves_rounds_for_the_policy_unless_asked(iterations, warmup):
    config = train_ppo.Config(iterations=iterations)
    config.check()
    assert config.resolved().value_warmup == warmup


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_only_gae_is_whitened_over_the_round_unless_asked(advantage):
    """Over the round, each response's own return would come into RLOO's baseline."""
    assert train_ppo.Config().resolved().whiten_advantages
    assert not train_ppo.Config(advantage=advantage).resolved().whiten_advantages
    assert train_ppo.Config(advantage=advantage, whiten_advantages=True).resolved().whiten_advantages


@pytest.mark.parametrize("collapse", ["kl", "empty"])
def test_a_collapse_is_said_and_leaves_the_last_good_policy(
    collapse, sft_folder, reward_folder, tmp_path, capsys, monkeypatch
):
    options = SMALL | {"value_warmup": 0, "save_every": 1, "epochs": 1}
    if collapse == "kl":
        options |= {"max_kl": 1e-4}
    else:
        ordinary = train_ppo.generate
        calls = []

        def falls_silent(*args, **more):
            calls.append(1)
            samples = ordinary(*args, **more)
            silent = [s._replace(tokens=[more["end_of_text"]], logprobs=[-1.0]) for s in samples]
            return samples if len(calls) < 2 else silent

        monkeypatch.setattr(train_ppo, "generate", falls_silent)
    config = train_ppo.Config(out=str(tmp_path / "out"), init=sft_folder, reward=(reward_folder,), **options)
    with pytest.raises(SystemExit) as stop:
        run.main(train_ppo.train, config)
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and "the policy has collapsed" in errors and "Traceback" not in errors
    policy, _ = load_pretrained(tmp_path / "out")
    reference, _ = load_pretrained(sft_folder)
    torch.testing.assert_close(policy.state_dict(), reference.state_dict())  # round 1 was the last good one
    assert not (tmp_path / "out" / "report.json").exists()


def test_a_collapse_in_the_last_round_is_noticed_too(sft_folder, reward_folder, tmp_path, capsys):
    options = SMALL | {"value_warmup": 0, "save_every": 1, "iterations": 1, "max_kl": 1e-3, "lr": 1e-2}
    config = train_ppo.Config(out=str(tmp_path / "out"), init=sft_folder, reward=(reward_folder,), **options)
    with pytest.raises(SystemExit) as stop:
        run.main(train_ppo.train, config)
    assert stop.value.code == 2 and "beyond --max-kl" in capsys.readouterr().err
    policy, reference = (load_pretrained(folder)[0].state_dict() for folder in (tmp_path / "out", sft_folder))
    torch.testing.assert_close(policy, reference)


def test_overwrite_spares_the_reward_model(left_alone, sft_folder, capsys):
    (left_alone / "rm").mkdir(exist_ok=True)
    config = train_ppo.Config(out=str(left_alone), overwrite=True, init=sft_folder, reward=(str(left_alone / "rm"),))
    with pytest.raises(SystemExit) as stop:
        run.main(train_ppo.train, config)
    assert stop.value.code == 2 and "--overwrite would remove" in capsys.readouterr().err
    (left_alone / "rm").rmdir()


def test_labels_of_one_kind_are_refused_before_anything_is_trained(tmp_path, capsys):
    rows = [{"text": f"w{i} " * 40 + "end.", "label": 1} for i in range(30)]
    (tmp_path / "texts.jsonl").write_bytes(helpers.lines(*rows))
    config = train_ppo.Config(out=str(tmp_path / "out"), data=str(tmp_path / "texts.jsonl"), device="cpu")
    helpers.refused(train_ppo.train, config, "needs good and bad texts", capsys)


def test_several_processes_are_refused(tmp_path):
    both = two_processes(tmp_path, "train_ppo.py", *flags(out=tmp_path / "out", device="cpu"))
    (code, output), (other_code, _) = (script.finish() for script in both)
    # the first says why; the other may instead find that the first has gone while the two were still meeting
    assert code == 2 and other_code in (1, 2) and "runs as one process" in output and "Traceback" not in output
    assert not (tmp_path / "out").exists()
