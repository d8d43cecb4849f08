"""The bench of whole steps: what it counts, what it measures on, and that a small run of it leaves table and file."""

import itertools
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nanopref import bench
from nanopref.data.formats import read
from nanopref.data.groups import Encoded, encode, split, write_groups
from nanopref.data.tokenizer import Tokenizer
from nanopref.models.gpt2 import GPT, GPTConfig


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch):
    monkeypatch.setattr(bench, "CUDA", False)


def test_flops_are_those_of_tokens_fed_one_by_one():
    """With a cache each token meets exactly the tokens before it, so all that is counted then had to be done."""
    config = GPTConfig(vocab_size=300, block_size=16, n_layer=3, n_head=2, n_embd=8)
    gpt, pairs = GPT(config), [(([1, 2, 3], [4, 5, 6, 7]), ([1, 2, 3], [8, 9])), (([1], [2, 3]), ([1], [4]))]
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for prompt, answer in itertools.chain(*pairs):
            cache = gpt.new_cache(1, 16)
            hidden = [gpt.hidden(torch.tensor([[token]]), cache) for token in (prompt + answer)[:-1]]
            F.linear(torch.cat(hidden[-len(answer) :], 1), gpt.unembedding)
    assert bench.dpo_flops(config, Encoded.pack(pairs)) == 3 * counter.get_total_flops()


def test_counts_by_hand():
    # GPT-2: 84,934,656 weights in the blocks, 38,597,376 in the unembedding; each answer's T is 1023
    forward = 2 * 1023 * 84_934_656 + 2 * 512 * 38_597_376 + 2 * 12 * 768 * 1023 * 1024
    assert forward == 232_608_497_664
    assert bench.dpo_flops(GPTConfig(), Encoded.pack([[([0] * 512, [0] * 512)] * 2])) == 6 * forward
    # 48 + 20 weights read by each of 3 passes; then 3 rows of 5 and of 6 tokens, keys and values of width 2
    small = GPTConfig(vocab_size=10, block_size=16, n_layer=1, n_head=1, n_embd=2)
    assert bench.rollout_bytes(small, rows=3, prompt=5, new=3, itemsize=2) == 2 * (3 * 68 + 3 * (5 + 6) * 4)


@pytest.mark.parametrize("ragged", [False, True])
def test_pairs_have_the_lengths_wanted(ragged, tmp_path):
    tokenizer = bench.synthetic_tokenizer(700)
    path = tmp_path / "pairs.jsonl"
    path.write_text(write_groups(bench.random_pairs(tokenizer, 40, 64, ragged)), encoding="utf-8")
    train, held_out = split(read(path)[1])
    assert len(train) == 40 and len(held_out) == 4
    encoded, cut = encode(train + held_out, tokenizer, block_size=64)
    lengths = {*encoded.prompt_lengths.tolist(), *encoded.response_lengths.tolist()}
    assert not cut
    assert (min(lengths), max(lengths)) == (4, 32) if ragged else lengths == {32}


def test_transformers_reads_the_tokenizer_alike(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = bench.synthetic_tokenizer(50257)
    assert tokenizer.vocab_size == 50257
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path) == tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    prompt, (chosen, _), *_ = bench.random_pairs(tokenizer, 1, 512, ragged=False)[0]
    text = prompt + chosen  # TRL tokenizes the two together
    assert theirs(text)["input_ids"] == tokenizer.encode(prompt) + tokenizer.encode(chosen)
    assert theirs(text + theirs.eos_token)["input_ids"][-1] == tokenizer.end_of_text
    assert len(tokenizer.encode(text)) == 511 and tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_shared_prompt_gives_what_two_rows_give():
    P, A = 5, 3
    q, k, v = torch.randn(3, 2, 2, P + 2 * A, 16)
    got = bench.shared_prompt(P, A)(q, k, v, is_causal=True)
    for columns in ([*range(P + A)], [*range(P), *range(P + A, P + 2 * A)]):
        own = F.scaled_dot_product_attention(*(x[:, :, columns] for x in (q, k, v)), is_causal=True)
        torch.testing.assert_close(got[:, :, columns], own)


def test_a_small_run_leaves_tables_and_files(tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setattr(bench, "LENGTHS", ("ragged",))
    monkeypatch.setattr(bench, "REPEATS", 1)
    monkeypatch.setattr(bench, "limits", lambda: {"matmul_TFLOP_per_second": 0.5, "copy_GB_per_second": 8.0})
    sizes = {"vocab_size": 300, "tokens": 32, "batch_size": 2, "micro_batch": 1, "steps": 5, "prompts": 2}
    bench.main(bench.Config(**sizes, preset="tiny", new_tokens=4, out=str(tmp_path)))
    printed = capsys.readouterr().out
    found = {name: json.loads((tmp_path / f"cpu-{name}.json").read_text()) for name in ("step", "parts", "rollouts")}
    assert all(f["card"] == "cpu" and f["versions"]["torch"] and f["flags"]["steps"] == 5 for f in found.values())
    own, *trl = found["step"]["rows"]
    assert own["tokens_per_second"] > 0 and own["share_of_matmul"] == own["TFLOP_per_second"] / 0.5
    assert [row["not_measured"] for row in trl] == ["UserError: trl is not installed"] * 2
    assert printed.count("trl is not installed") == 4 and "meant for a GPU" in printed and "tokens/second" in printed
    assert all(row["milliseconds"] > 0 for row in found["parts"]["rows"])
    bound, *rates = found["rollouts"]["rows"]
    assert len(rates) == 3 and all(row["tokens_per_second"] > 0 for row in rates)
    assert rates[0]["share_of_bound"] == bound["seconds"] / rates[0]["seconds"]
