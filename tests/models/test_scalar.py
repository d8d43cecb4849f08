"""Models that say a number: in float32 under autocast too, on the scale that was asked for, and as others read them."""

import pytest
import torch
from small_models import SMALL, message_of, random_tokens, randomise

from nanopref import models
from nanopref.data.groups import Encoded
from nanopref.data.tokenizer import Tokenizer
from nanopref.models import inference
from nanopref.models.actor_critic import Learner, new_critic
from nanopref.models.gpt2 import GPT, GPTConfig
from nanopref.models.scalar import ScalarModel
from nanopref.running import parallel
from nanopref.running.flags import ModelFlags

TOKENIZER = Tokenizer.train(["aaa bb, aaa bb"], SMALL.vocab_size)
WIDE = GPTConfig(300, 16, n_layer=2, n_head=4, n_embd=64)


def scalar_model(heads: int = 1, config: GPTConfig = WIDE) -> ScalarModel:
    torch.manual_seed(0)
    model = ScalarModel(GPT(config), heads)
    return model.eval()


@pytest.fixture
def autocast_on_a_cpu(monkeypatch):
    """As on a GPU: bfloat16 where the code asks for autocast."""
    for module in (parallel, inference):
        monkeypatch.setattr(module, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))


# ---- precision -------------------------------------------------------------------------------------------------------


def assert_not_rounded(scores: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> None:
    """Scores [N, heads] are what float64 makes of 2,048 hidden states, and as different as these."""
    assert len(hidden) == len(scores) == 2048 and scores.dtype == torch.float32
    different = len(hidden.unique(dim=0))
    assert different > 2000
    torch.testing.assert_close(scores.double(), hidden.double() @ weight.double().t(), atol=1e-5, rtol=0)
    for head in scores.unbind(1):
        assert len(head.unique()) > 0.99 * different


@pytest.mark.parametrize("heads", [1, 3])
def test_scores_are_not_rounded_under_autocast(heads):
    model, tokens = scalar_model(heads), random_tokens(300, 128, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden, scores = model.transformer.hidden(tokens), model(tokens)
    assert_not_rounded(scores.flatten(0, 1), hidden.flatten(0, 1), model.score.weight)
    # and the transformer was under autocast, which makes other hidden states than float32 does
    assert (hidden - model.transformer.hidden(tokens)).abs().max() > 1e-3
    # a loss of theirs reaches the head and the transformer
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens).square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_the_head_reads_half_precision_states_in_float32():
    model = scalar_model(2)
    hidden = torch.randn(2048, WIDE.n_embd, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert_not_rounded(model.read(hidden).detach(), hidden, model.score.weight.detach())


def test_response_scores_are_not_rounded_under_autocast(autocast_on_a_cpu):
    model, tokens = scalar_model(2), random_tokens(300, 2048, 4)
    encoded = Encoded.pack([[(row[:2], row[2:])] for row in tokens.tolist()])
    found = inference.response_scores(model, encoded, batch_size=2048)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden = model.transformer.hidden(tokens)[:, -1]
    assert_not_rounded(found, hidden, model.score.weight.detach())


@pytest.mark.parametrize("kind", ["network", "head"])
def test_values_are_not_rounded_under_autocast(autocast_on_a_cpu, kind):
    policy = randomise(scalar_model().transformer)
    critic = new_critic(kind, policy, [scalar_model()] if kind == "network" else [], ModelFlags())
    critic.score.weight.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    learner = Learner(policy, critic.eval(), 0.1).eval()
    assert (critic.transformer is policy) == (kind == "head")
    tokens = random_tokens(300, 2048, 4)
    batch = Encoded.pack([[(row[:2], row[2:])] for row in tokens.tolist()]).collate(range(2048))
    with torch.no_grad():
        values = learner.values(batch)
        _, _, again = learner(batch, 1.0)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = critic.transformer.hidden(batch.inputs)
    assert torch.equal(values, again) and values.shape == (2048, 3)
    assert_not_rounded(values[:, -1:], hidden[:, -1], critic.score.weight.detach())


# ---- what it says ----------------------------------------------------------------------------------------------------


def test_what_one_token_says_is_of_the_text_up_to_it():
    model, tokens = randomise(scalar_model(2)), random_tokens(300, 5, 12)
    whole, last = model(tokens), torch.tensor([0, 3, 11, 7, 11])
    assert whole.shape == (5, 12, 2)
    torch.testing.assert_close(model(tokens, last), whole[torch.arange(5), last], atol=1e-5, rtol=0)
    for row, end in enumerate(last.tolist()):
        short = model(tokens[row : row + 1, : end + 1])[0, -1]
        torch.testing.assert_close(short, whole[row, end], atol=1e-5, rtol=0)


def test_a_new_head_says_numbers_of_variance_one():
    scores = scalar_model(8)(random_tokens(300, 64, 16))
    assert 0.5 < scores.std().item() < 2 and scores.mean().abs() < 1


def test_rescaling_is_exact_for_several_heads():
    torch.manual_seed(0)
    model = ScalarModel(GPT(GPTConfig(11, 8, 2, 2, 16)), 3)
    tokens = torch.randint(11, (4, 8))
    before, shift, scale = model(tokens), torch.tensor([1.0, -2.0, 30.0]), torch.tensor([2.0, 0.5, 4.0])
    model.rescale(shift, scale)
    torch.testing.assert_close(model(tokens), (before - shift) / scale, atol=1e-4, rtol=1e-4)


# ---- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 3])
def test_transformers_opens_it_and_gives_the_same_scores(tmp_path, heads):
    transformers = pytest.importorskip("transformers")
    model = randomise(scalar_model(heads, SMALL))
    models.save(model, TOKENIZER, tmp_path, score_shift=[1.5])
    loaded, tokenizer = models.load_scalar(tmp_path)
    assert loaded.heads == heads and tokenizer == TOKENIZER
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))

    theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(theirs).__name__ == "GPT2ForSequenceClassification"
    assert theirs.config.num_labels == heads and theirs.config.score_shift == [1.5]
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = ["aaa", "aaa bb", "a, b", "bbbbbb"]
    rows = [reader(text + reader.eos_token)["input_ids"] for text in texts]
    assert rows == [[*TOKENIZER.encode(text), TOKENIZER.end_of_text] for text in texts]
    encoded = Encoded.pack([[(row[:1], row[1:])] for row in rows])
    padded = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=theirs.config.pad_token_id
    )
    with torch.no_grad():
        ours = inference.response_scores(model, encoded)
        torch.testing.assert_close(theirs.eval()(padded).logits, ours, atol=1e-5, rtol=0)


def test_the_bias_of_a_rescaled_head_is_kept_and_transformers_leaves_it_out(tmp_path):
    transformers = pytest.importorskip("transformers")
    model, tokens = randomise(scalar_model(2, SMALL)), random_tokens(259, 1, 9)
    model.rescale(torch.tensor([3.0, -5.0]), torch.tensor([2.0, 0.5]))
    models.save(model, TOKENIZER, tmp_path)
    loaded, _ = models.load_scalar(tmp_path)
    assert torch.equal(loaded.bias, torch.tensor([-1.5, 10.0])) and torch.equal(loaded(tokens), model(tokens))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits + loaded.bias, model(tokens)[:, -1], atol=1e-5, rtol=1e-5)


def test_a_head_that_does_not_fit_is_refused(tmp_path):
    model = ScalarModel(GPT(SMALL))
    model.score.weight = torch.nn.Parameter(torch.zeros(1, 9))
    models.save(model, TOKENIZER, tmp_path / "model")
    assert "score.weight is [1, 9], not [heads, 8]" in message_of(models.load_scalar, tmp_path)
