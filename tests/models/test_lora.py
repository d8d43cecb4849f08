"""Adapters: nothing changes at first, they alone learn, one trunk serves all, and PEFT reads what is saved."""

import json

import pytest
import torch
from small_models import SMALL, random_tokens, randomise

from nanopref import models
from nanopref.data.tokenizer import Tokenizer
from nanopref.models import llama, lora
from nanopref.models.actor_critic import Learner, new_critic
from nanopref.models.gpt2 import GPT
from nanopref.models.scalar import ScalarModel
from nanopref.running import optim, parallel
from nanopref.running.flags import StartFlags
from nanopref.running.parallel import autocast

TOKENIZER = Tokenizer.train(["aaa bb, aaa bb"], SMALL.vocab_size)
SIZES = {"gpt2": SMALL, "llama": llama.LlamaConfig(260, 12, 2, 4, 2, 16, 32, 4, tied=True)}
FLAGS = StartFlags(lora=3)
FLAGS.seed = 0


def new(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return randomise(GPT(SIZES[family]) if family == "gpt2" else llama.Llama(SIZES[family]))


def stirred(model: torch.nn.Module) -> torch.nn.Module:
    """With adapters that say something."""
    random = torch.Generator().manual_seed(1)
    for _, layer in lora.adapters(model):
        layer.lora_B.data.normal_(std=0.05, generator=random)
    return model


def logits(model, tokens) -> torch.Tensor:
    with torch.no_grad(), autocast(model):
        return model.logits(tokens)


def loss(model, tokens) -> torch.Tensor:
    with autocast(model):
        return -model(tokens, tokens.roll(-1, 1), torch.ones(tokens.shape)).mean()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", SIZES)
def test_adapters_change_nothing_at_first_and_alone_learn(family, dtype, monkeypatch):
    monkeypatch.setattr(parallel, "_dtype", dtype)
    model, tokens = new(family), random_tokens(260, 4, 12)
    before, names = logits(model, tokens), set(dict(model.named_parameters()))
    lora.adapt(model, 3, 0)
    reference, frozen = models.reference(model), {n: p.clone() for n, p in model.named_parameters() if n in names}
    assert torch.equal(logits(model, tokens), before) and torch.equal(logits(reference, tokens), before)
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    per_block = 4 if family == "gpt2" else 7
    assert len(learns) == 2 * per_block * 2 and all(".lora_" in name for name in learns)
    optimizer = optim.adamw(model, 1e-2)
    first = loss(model, tokens)
    for _ in range(10):
        loss(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss(model, tokens) < first - 0.01
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in names)
    for held in (reference, models.reference(model)):  # which share the trunk, and have no adapters
        assert torch.equal(logits(held, tokens), before) and not any(lora.adapters(held))
    assert not torch.equal(logits(model, tokens), before)


def test_the_formula():
    """h = Wx + b + 32/r · BAx (Hu et al. 2021, eq. 3)."""
    model = new("gpt2")
    weight, bias = model.h[0].attn.c_attn.weight.double(), model.h[0].attn.c_attn.bias.double()
    lora.adapt(model, 3, 0)
    layer, x = stirred(model).h[0].attn.c_attn, torch.randn(7, 8)
    A, B = layer.lora_A.double(), layer.lora_B.double()
    expected = x.double() @ weight.T + bias + 32 / 3 * (x.double() @ A.T) @ B.T
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-5, rtol=1e-5)
    assert A.abs().max() <= 8**-0.5 and A.std() > 0.1


def trunk(model: torch.nn.Module) -> set[int]:
    return {p.data_ptr() for name, p in model.named_parameters() if ".lora_" not in name}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("judged", [True, False])
def test_all_of_ppo_holds_one_trunk_and_a_reward_model_another(judged, dtype, monkeypatch):
    monkeypatch.setattr(parallel, "_dtype", dtype)
    policy = new("gpt2")
    judge = models.frozen(randomise(ScalarModel(new("gpt2"), 2))) if judged else None
    lora.adapt(policy, 3, 0)
    models.placed(policy, "cpu")
    reference = models.reference(policy)
    critic = new_critic("network", policy, [judge] if judged else [], FLAGS)
    learner = Learner(policy, critic, 0.1)
    assert trunk(reference) == trunk(policy)
    assert trunk(critic.transformer) == trunk(judge.transformer if judged else policy)
    theirs = {id(p) for p in optim.learning(critic)}
    assert len(theirs) == 2 * 4 * 2 + 1 and not theirs & {id(p) for p in optim.learning(policy)}
    tokens = random_tokens(260, 3, 12)
    with torch.no_grad(), autocast(critic):
        expected = judge(tokens).mean(-1) if judged else torch.zeros(3, 12)
        torch.testing.assert_close(critic(tokens)[..., 0], expected, atol=1e-5, rtol=1e-5)
        critic(tokens)
    assert {id(p) for p in learner.parameters() if p.requires_grad} == theirs | {id(p) for p in optim.learning(policy)}
    assert not any(p.requires_grad for p in [*reference.parameters(), *(judge.parameters() if judged else ())])


def test_a_critic_without_adapters_learns_in_float32_whatever_the_judge_is_held_in(monkeypatch):
    monkeypatch.setattr(parallel, "_dtype", "bfloat16")
    judge, config = models.frozen(randomise(ScalarModel(new("gpt2")))), StartFlags()
    critic = new_critic("network", new("gpt2"), [judge], config)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in critic.parameters())
    assert not trunk(critic) & trunk(judge)
    with torch.no_grad(), autocast(critic):
        tokens = random_tokens(260, 3, 12)
        assert torch.equal(critic(tokens), judge(tokens))


# ---- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SIZES)
def test_what_is_saved_is_the_merged_model_and_the_adapter_as_peft_reads_it(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft", reason="only PEFT can say whether it reads our adapters")
    models.save(new(family), TOKENIZER, tmp_path / "base")
    model, tokenizer, _ = models.load_init(FLAGS, name=tmp_path / "base")
    tokens = random_tokens(260, 4, 12)
    models.save(stirred(model), tokenizer, tmp_path / "tuned")
    expected = logits(model, tokens)
    merged = models.load(tmp_path / "tuned")[0]
    assert not any(lora.adapters(merged))
    torch.testing.assert_close(logits(merged, tokens), expected, atol=1e-5, rtol=1e-4)
    assert (expected - logits(new(family), tokens)).abs().max() > 0.1
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
        torch.testing.assert_close(theirs(tokens).logits, expected, atol=1e-5, rtol=1e-4)
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "tuned" / "adapter")
        torch.testing.assert_close(adapted(tokens).logits, expected, atol=1e-5, rtol=1e-4)
    settings = json.loads((tmp_path / "tuned" / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "base") and settings["r"] == 3


@pytest.mark.parametrize("family", SIZES)
def test_peft_reads_a_reward_models_adapter_and_its_head(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft", reason="only PEFT can say whether it reads our adapters")
    models.save(ScalarModel(new(family), 3), TOKENIZER, tmp_path / "base")
    transformer = new(family)
    lora.adapt(transformer, 3, 0)
    model = ScalarModel(stirred(transformer), 3)
    models.save(model, TOKENIZER, tmp_path / "tuned")
    tokens = random_tokens(260, 4, 12)
    with torch.no_grad():
        base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "tuned" / "adapter")(tokens).logits
        torch.testing.assert_close(theirs, model(tokens)[:, -1], atol=1e-5, rtol=1e-4)
