import io
import math
import random
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from statistics import median, mode

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import nanopref.generate
from nanopref import run
from nanopref.generate import (
    Config,
    check_sampling,
    draw,
    generate,
    generate_all,
    main,
    response_text,
    token_distribution,
)
from nanopref.model import GPT, GPTConfig, preset, save_pretrained
from nanopref.run import UserError
from nanopref.tokenizer import Tokenizer

V, BLOCK = 23, 24
NEVER = -1  # no token ends a response
prompt_lists = st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=8), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def model():
    model = GPT(GPTConfig(V, BLOCK, n_layer=2, n_head=2, n_embd=16))
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.normal_(std=0.4, generator=generator)
    return model.eval()


def scripted(script: list[int], block_size: int, vocab_size: int = 260) -> GPT:
    """A model whose most likely token at position i is script[i], whatever came before."""
    model = GPT(GPTConfig(vocab_size, block_size, n_layer=1, n_head=1, n_embd=64)).eval()
    for p in model.h.parameters():
        p.data.zero_()
    directions = torch.randn(vocab_size, 64, generator=torch.Generator().manual_seed(0))
    model.wte.weight.data = F.normalize(directions - directions.mean(-1, keepdim=True))
    for i, token in enumerate(script):
        model.wpe.weight.data[i] = 100 * model.wte.weight[token]
    return model


def some_prompts(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (n,), generator=generator).tolist()
    return [torch.randint(V, (length,), generator=generator).tolist() for length in lengths]


def slow_distribution(logits: list[float], temperature: float, top_k: int, top_p: float) -> tuple[list[float], bool]:
    """The definition, one row, one token at a time: the probability of each token, ties to the first.

    And whether a set of tokens holds so nearly top_p that float32 may round to either side.
    """
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    kept = sorted(range(len(logits)), key=lambda i: -logits[i])
    if top_k:
        kept = kept[:top_k]
    total = sum(weights[i] for i in kept)
    nucleus, mass, near = [], 0.0, False
    for i in kept:
        if top_p < 1 and mass >= top_p:
            break
        nucleus.append(i)
        mass += weights[i] / total
        near |= top_p < 1 and abs(mass - top_p) < 1e-5
    total = sum(weights[i] for i in nucleus)
    return [weights[i] / total if i in nucleus else 0.0 for i in range(len(logits))], near


# ---- the distribution ------------------------------------------------------------------------------------------------

settings_of_sampling = st.tuples(st.floats(0.2, 3), st.integers(0, 12), st.floats(0.05, 1) | st.just(1.0))


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.floats(-8, 8, width=16) | st.integers(-2, 2).map(float), min_size=1, max_size=10), settings_of_sampling
)
def test_the_distribution_against_its_definition(logits, setting):
    temperature, top_k, top_p = setting
    found = token_distribution(torch.tensor([logits]), temperature=temperature, top_k=top_k, top_p=top_p)[0].exp()
    expected, near = slow_distribution(logits, temperature, top_k, top_p)
    assume(not near)
    assert found.sum().item() == pytest.approx(1, abs=1e-5)
    # of equal tokens either may be kept, so both are compared from the most likely down
    found = [found[i].item() for i in sorted(range(len(logits)), key=lambda i: (-logits[i], -found[i]))]
    expected = [expected[i] for i in sorted(range(len(logits)), key=lambda i: (-logits[i], -expected[i]))]
    assert [p == 0 for p in found] == [p == 0 for p in expected]
    assert found == pytest.approx(expected, abs=1e-5)


def test_rows_do_not_touch_each_other():
    logits = torch.randn(50, V, generator=torch.Generator().manual_seed(0)) * 3
    setting = {"temperature": 0.8, "top_k": 9, "top_p": 0.8}
    together = token_distribution(logits, **setting)
    assert torch.equal(together, torch.cat([token_distribution(row[None], **setting) for row in logits]))


@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_top_k_keeps_exactly_k_of_equal_tokens(k):
    for logits in (torch.zeros(3, 10), torch.tensor([[1.0] * 4 + [0.0] * 6])):
        kept = token_distribution(logits, top_k=k) > -torch.inf
        assert (kept.sum(-1) == k).all()
    assert kept[0, :4].sum() == min(k, 4)


def test_top_p_keeps_at_least_the_most_likely_token():
    logits = torch.tensor([[0.0, 5.0, 1.0]])
    assert token_distribution(logits, top_p=1e-9).exp().tolist() == [[0, 1, 0]]


def test_temperature_zero_is_greedy():
    logits = torch.tensor([[0.0, 2.0, 1.0], [-5.0, -9.0, -7.0]])
    assert token_distribution(logits, temperature=0).exp().tolist() == [[0, 1, 0], [1, 0, 0]]
    assert token_distribution(torch.zeros(1, 9), temperature=0).exp().sum() == 1


def test_half_precision_logits_give_float32():
    assert token_distribution(torch.randn(2, 9).bfloat16(), top_k=3, top_p=0.9).dtype == torch.float32


# ---- samples ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(prompt_lists, st.integers(1, 12), st.integers(0, V - 1))
def test_greedy_takes_the_uncached_models_best(model, prompts, new, end_of_text):
    for prompt, sample in zip(
        prompts, generate(model, prompts, new, end_of_text=end_of_text, temperature=0), strict=True
    ):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + sample.tokens[:-1]]))[0, len(prompt) - 1 :]
        chosen = logits.gather(1, torch.tensor(sample.tokens)[:, None])[:, 0]
        assert (logits.amax(-1) - chosen).max() < 1e-4  # float32, summed in another order: a tie may go either way
        assert sample.logprobs == [0.0] * len(sample.tokens)
        assert end_of_text not in sample.tokens[:-1]
        assert sample.tokens[-1] == end_of_text or len(sample.tokens) == new


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.5, 0, 0.8), (0.9, 10, 0.7)])
def test_logprobs_are_those_of_the_full_model(model, temperature, top_k, top_p):
    prompts = some_prompts(60)
    setting = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    samples = generate(model, prompts, 14, end_of_text=NEVER, **setting)
    end = mode(token for sample in samples for token in sample.tokens)
    samples = generate(model, prompts, 14, end_of_text=end, generator=torch.Generator().manual_seed(0), **setting)
    assert len({len(sample.tokens) for sample in samples}) > 5  # the batch has shrunk on the way
    for prompt, sample in zip(prompts, samples, strict=True):
        assert len(sample.logprobs) == len(sample.tokens)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + sample.tokens[:-1]]))[0, len(prompt) - 1 :]
        for row, token, logprob in zip(logits.tolist(), sample.tokens, sample.logprobs, strict=True):
            expected, near = slow_distribution(row, **setting)
            assert near or logprob == pytest.approx(math.log(expected[token]), abs=1e-4)


def test_under_autocast_logits_are_not_rounded(model):
    """One token each, so that only the logits can differ: products of bfloat16, sums in float32, as in the kernels."""
    prompts = [[i % V] * 4 for i in range(200)]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        samples = generate(model, prompts, 1, end_of_text=NEVER)
        hidden = model.hidden(torch.tensor(prompts))[:, -1]
    logits = hidden.bfloat16().double() @ model.unembedding.detach().bfloat16().double().T
    for sample, logprobs in zip(samples, logits.log_softmax(-1), strict=True):
        assert sample.logprobs[0] == pytest.approx(logprobs[sample.tokens[0]].item(), abs=1e-5)


@given(st.integers(1, 70), st.integers(0, 2**32), st.floats(0, 1))
def test_a_draw_inverts_the_cumulative_distribution(V, seed, sparse):
    """In fractions, which do not round: the token is the first whose cumulative probability is above the number."""
    rng = random.Random(seed)
    weights = [0 if rng.random() < sparse else rng.randint(1, 9) for _ in range(V)]
    weights[rng.randrange(V)] += 1
    numbers = [0.0, 1 - 2**-53, *(rng.random() for _ in range(20))]
    numbers += [sum(weights[:i]) / sum(weights) for i in range(0, V, 5)]
    logprobs = torch.tensor([weights]).double().log().log_softmax(-1).float().expand(len(numbers), V)
    tokens = draw(logprobs, torch.tensor(numbers, dtype=torch.float64))[:, 0].tolist()
    cumulative = [Fraction(sum(weights[: i + 1]), sum(weights)) for i in range(V)]
    for number, token in zip(numbers, tokens, strict=True):
        assert weights[token] > 0
        exact = next((i for i, c in enumerate(cumulative) if c > number), V - 1)
        edge = min(abs(float(c) - number) for c in [Fraction(0), *cumulative])
        assert token == exact or edge < 1e-5


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.5, 0, 1.0), (1.0, 4, 1.0), (1.0, 0, 0.6)])
def test_tokens_come_as_often_as_the_distribution_says(model, temperature, top_k, top_p):
    n, prompt = 8192, [3, 1, 4]
    setting = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    seeded = torch.Generator().manual_seed(1)
    samples = generate(model, [prompt] * n, 1, end_of_text=NEVER, generator=seeded, **setting)
    counts = torch.bincount(torch.tensor([sample.tokens[0] for sample in samples]), minlength=V)
    with torch.no_grad():
        logits = model(torch.tensor([prompt]))[0, -1]
    expected, near = slow_distribution(logits.tolist(), **setting)
    assert not near
    expected = n * torch.tensor(expected)
    assert (counts[expected == 0] == 0).all()
    counts, expected = counts[expected > 0], expected[expected > 0]
    degrees = len(counts) - 1
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees)  # its mean and five standard deviations


def test_rows_that_end_at_different_times_keep_their_own_tokens():
    end, new = 259, 6
    script = [end if i in (5, 11) else i for i in range(24)]
    prompts = [[7] * n for n in (1, 6, 3, 6, 9, 1, 2, 14, 12)]
    seen = []
    samples = generate(
        scripted(script, 24),
        prompts,
        new,
        end_of_text=end,
        temperature=0,
        on_token=lambda row, token: seen.append((row, token)),
    )
    for row, (prompt, sample) in enumerate(zip(prompts, samples, strict=True)):
        expected = script[len(prompt) - 1 :][:new]
        if end in expected:
            expected = expected[: expected.index(end) + 1]
        assert sample.tokens == [token for r, token in seen if r == row] == expected


@pytest.mark.parametrize("lengths", [[1], [1, 5, 12], [12, 1, 12, 1, 1, 1]])
def test_without_end_of_text_all_new_tokens_come(model, lengths):
    samples = generate(model, [[5] * n for n in lengths], 9, end_of_text=NEVER)
    assert [len(sample.tokens) for sample in samples] == [9] * len(lengths)


def test_prompt_and_response_fit_the_context(model):
    prompts = [[5] * n for n in (1, BLOCK - 1, 20, BLOCK - 1, 10)]
    samples = generate(model, prompts, 100, end_of_text=NEVER)
    assert [len(prompt) + len(sample.tokens) for prompt, sample in zip(prompts, samples, strict=True)] == [BLOCK] * 5


def test_the_same_seed_gives_the_same_samples(model):
    def sample(seed):
        return generate(
            model, some_prompts(20), 10, end_of_text=3, generator=torch.Generator().manual_seed(seed), top_p=0.9
        )

    assert sample(0) == sample(0) != sample(1)


def test_greedy_does_not_depend_on_the_batch(model):
    prompts = some_prompts(20)
    setting = {"end_of_text": 3, "temperature": 0}
    together = generate(model, prompts, 10, **setting)
    assert together == [generate(model, [prompt], 10, **setting)[0] for prompt in prompts]
    assert together[::-1] == generate(model, prompts[::-1], 10, **setting)
    assert together == generate_all(model, prompts, 10, batch_size=7, **setting)
    assert generate_all(model, [], 10, **setting) == []


def test_the_cache_is_at_least_five_times_faster():
    """64 prompts of 16 tokens, 48 new ones: against running the model on the whole sequence for each token."""
    model = GPT(preset("tiny", vocab_size=1024, block_size=96)).eval()
    prompts = torch.randint(1024, (64, 16), generator=torch.Generator().manual_seed(0))

    def recompute():
        tokens = prompts
        with torch.inference_mode():
            for _ in range(48):
                logits = F.linear(model.hidden(tokens)[:, -1], model.unembedding)
                tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
        return tokens[:, 16:].tolist()

    def cached():
        return [sample.tokens for sample in generate(model, prompts.tolist(), 48, end_of_text=NEVER, temperature=0)]

    def timed(function):  # the time of this thread: what else the machine does is not counted
        begun = time.thread_time()
        result = function()
        return time.thread_time() - begun, result

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        slow, expected = timed(recompute)  # so long that once is enough
        fast = [timed(cached) for _ in range(5)]
    finally:
        torch.set_num_threads(threads)
    assert all(found == expected for _, found in fast)
    ratio = slow / median(seconds for seconds, _ in fast)
    print(f"{ratio:.1f} times faster")
    assert ratio >= 5


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [BLOCK, BLOCK + 1, 100])
def test_a_prompt_without_room_to_respond_is_refused(model, length):
    with pytest.raises(UserError, match=f"a prompt of {length} tokens leaves no room .* context of {BLOCK}"):
        generate(model, [[1], [1] * length], 5, end_of_text=NEVER)


@pytest.mark.parametrize(
    "name, value",
    [
        *[("max_new_tokens", value) for value in (0, -1)],
        *[("temperature", value) for value in (-0.1, math.inf, math.nan)],
        ("top_k", -1),
        *[("top_p", value) for value in (0.0, -0.5, 1.01, math.nan)],
    ],
)
def test_settings_that_no_distribution_has_are_refused(model, name, value):
    good = {"max_new_tokens": 5, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    check_sampling(**good)
    bad = good | {name: value}
    flag = "--" + name.replace("_", "-")
    with pytest.raises(UserError, match=flag):
        check_sampling(**bad)
    with pytest.raises(UserError, match=flag):
        generate(model, [[1]], bad.pop("max_new_tokens"), end_of_text=NEVER, **bad)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["aaa bb, aaa bb"], 260)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A model that goes on after a prompt of two tokens with text in which every character is cut between tokens."""
    script = [0, *tokenizer.encode("é🎬 ok".encode()), tokenizer.end_of_text]
    assert len(script) == 11  # a token a byte
    folder = tmp_path_factory.mktemp("scripted")
    save_pretrained(scripted(script, 24), tokenizer, folder)
    return folder


def command(*arguments):
    arguments = [sys.executable, "-m", "nanopref.generate", *map(str, arguments)]
    return subprocess.run(arguments, capture_output=True, cwd=Path(__file__).parents[1], timeout=120)


def test_the_command_answers(folder):
    done = command("--model", folder, "--prompt", "xy", "--temperature", 0, "--device", "cpu")
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, "xyé🎬 ok\n", b"")


def test_the_command_refuses_a_missing_model():
    done = command("--model", "out/no such run", "--prompt", "xy")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode().startswith("error: out/no such run: no model folder") and b"Trace" not in done.stderr


class Terminal(io.StringIO):
    """Remembers what had been written at each flush."""

    def __init__(self):
        super().__init__()
        self.flushed = []

    def flush(self):
        self.flushed.append(self.getvalue())


def answer(monkeypatch, folder, prompt="xy", **kwargs) -> list[str]:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    main(Config(prompt, str(folder), temperature=0, device="cpu", **kwargs))
    monkeypatch.undo()
    return [*terminal.flushed, terminal.getvalue()]


def test_the_answer_streams_character_by_character(monkeypatch, folder):
    shown = answer(monkeypatch, folder)
    assert list(dict.fromkeys(shown)) == ["xy", "xyé", "xyé🎬", "xyé🎬 ", "xyé🎬 o", "xyé🎬 ok", "xyé🎬 ok\n"]
    assert not any("\ufffd" in text for text in shown)


def test_an_answer_cut_within_a_character_says_so(monkeypatch, folder):
    assert answer(monkeypatch, folder, max_new_tokens=4)[-1] == "xyé\ufffd\n"


def test_an_empty_prompt_starts_from_end_of_text(monkeypatch, folder):
    assert answer(monkeypatch, folder, prompt="", max_new_tokens=1)[-1] == "\0\n"


def refusal(capsys, **kwargs) -> str:
    with pytest.raises(SystemExit) as stop:
        run.main(main, Config(**({"device": "cpu"} | kwargs)))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_the_command_refuses_bad_folders_and_prompts(tmp_path, folder, capsys):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save({"wte.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    assert "not a safetensors file" in refusal(capsys, prompt="a", model=str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    Tokenizer.train(["aaa bb"], 258).save(tmp_path)
    assert "258" in refusal(capsys, prompt="a", model=str(tmp_path))
    assert "leaves no room" in refusal(capsys, prompt="x" * 24, model=str(folder))
    assert "--top-p" in refusal(capsys, prompt="a", model=str(folder), top_p=0)
    assert "--device nonsense" in refusal(capsys, prompt="a", model=str(folder), device="nonsense")


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_the_command_refuses_a_seed_out_of_range(folder, capsys, seed):
    assert "--seed" in refusal(capsys, prompt="a", model=str(folder), seed=seed)


def test_response_text_leaves_out_the_end_of_text(tokenizer):
    tokens = tokenizer.encode("aaa bé")
    assert response_text([*tokens, tokenizer.end_of_text], tokenizer) == response_text(tokens, tokenizer) == "aaa bé"


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_the_static_path_draws_the_same(data):
    """What a GPU records, every row kept and the whole cache looked at, gives what dropping finished rows gives."""
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    prompts = [[data.draw(st.integers(0, 40)) for _ in range(n)] for n in lengths]
    torch.manual_seed(0)
    model = GPT(GPTConfig(41, data.draw(st.integers(10, 16)), 2, 2, 8))
    setting = {"end_of_text": data.draw(st.integers(0, 40)), "temperature": data.draw(st.sampled_from([0, 0.7, 1.0]))}
    new, seed = data.draw(st.integers(1, 20)), data.draw(st.integers(0, 99))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nanopref.generate, "CHUNK", data.draw(st.integers(1, 8)))
        static, dynamic = (
            generate(model, prompts, new, static=flag, generator=torch.Generator().manual_seed(seed), **setting)
            for flag in (True, False)
        )
    assert [s.tokens for s in static] == [s.tokens for s in dynamic]
    for a, b in zip(static, dynamic, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
        assert len(a.tokens) == len(a.logprobs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_recorded_step_draws_what_the_ordinary_one_does(bfloat16, monkeypatch):
    model = GPT(GPTConfig(41, 256, 2, 2, 8)).cuda()
    prompts = [[1, 2, 3], [4], [5] * 9]

    def sample():
        with torch.autocast("cuda", torch.bfloat16, enabled=bfloat16):
            return generate(model, prompts, 150, end_of_text=7, generator=torch.Generator("cuda").manual_seed(0))

    recorded = sample()
    monkeypatch.setattr(nanopref.generate, "record", lambda step: step)
    assert recorded == sample()
