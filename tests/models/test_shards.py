"""Models in several files of weights: what is in them, who holds and writes them, and what they replace."""

import json
import shutil
import socket
import weakref
from itertools import pairwise
from pathlib import Path

import pytest
import small_runs
import torch
import torch.distributed as dist
from helpers import forks
from safetensors.torch import load_file
from small_models import SMALL, random_tokens, randomise
from torch.distributed.fsdp import fully_shard

from nanopref import models
from nanopref.data.tokenizer import Tokenizer
from nanopref.models import checkpoint, llama, lora
from nanopref.models.gpt2 import GPT
from nanopref.models.scalar import ScalarModel
from nanopref.running.flags import UserError

TOKENIZER = Tokenizer.train(["aaa bb, aaa bb"], SMALL.vocab_size)
UNTIED = llama.LlamaConfig(260, 12, 2, 4, 2, 16, 32, 4, tied=False)
ONE, FEW, MANY = 10**9, 10_000, 3_000  # bytes that a file may hold: one file, three, and more
WAYS = [(ONE, ONE), (ONE, FEW), (FEW, ONE), (FEW, FEW), (FEW, MANY), (MANY, FEW)]  # of one model over another


def new(kind: str, shift: float = 0.0) -> torch.nn.Module:
    """A model of random weights, with adapters that say something, or a scalar head that has a bias."""
    torch.manual_seed(0)
    model = randomise(llama.Llama(UNTIED) if "llama" in kind else GPT(SMALL))
    if "adapters" in kind:
        lora.adapt(model, 2, 0)
        for _, layer in lora.adapters(model):
            layer.lora_B.data.normal_()
    if "scalar" in kind:
        model = ScalarModel(model, 2)
        model.bias += 0.5
    for p in model.parameters():
        p.data += shift
    return model


def saved(folder: Path, shard: int, kind: str = "gpt2", shift: float = 0.0) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "SHARD", shard)
        models.save(new(kind, shift), TOKENIZER, folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of a policy that loads."""
    return models.load(folder)[0].state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


KINDS = ["gpt2", "llama", "gpt2 adapters", "llama adapters", "gpt2 scalar", "llama scalar", "llama scalar adapters"]


@pytest.mark.parametrize("kind", KINDS)
def test_in_shards_it_is_the_same_model(kind, tmp_path):
    one, many = saved(tmp_path / "one", ONE, kind), saved(tmp_path / "many", MANY, kind)
    whole, index = load_file(one / "model.safetensors"), json.loads((many / checkpoint.INDEX).read_text())
    files = sorted(path.name for path in many.glob("*.safetensors"))
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)] and files[3:]
    assert not (one / checkpoint.INDEX).exists() and not (many / "model.safetensors").exists()
    parts = {name: load_file(many / name) for name in files}
    assert index["weight_map"] == {key: name for name, part in parts.items() for key in part}
    assert same({key: x for part in parts.values() for key, x in part.items()}, whole)
    assert index["metadata"] == {"total_size": sum(x.nbytes for x in whole.values())}
    sizes = [sum(x.nbytes for x in part.values()) for part in parts.values()]
    assert all(size <= MANY or len(part) == 1 for size, part in zip(sizes, parts.values(), strict=True))
    assert all(a + b > MANY for a, b in pairwise(sizes))  # none is smaller than it must be
    load = models.load_scalar if "scalar" in kind else models.load
    assert same(load(many)[0].state_dict(), load(one)[0].state_dict())


@pytest.mark.parametrize("kind", ["gpt2", "llama", "llama scalar"])
def test_transformers_opens_the_shards(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder, tokens = saved(tmp_path, MANY, kind), random_tokens(259, 2, 12)
    scalar = "scalar" in kind
    name = "AutoModelForSequenceClassification" if scalar else "AutoModelForCausalLM"
    theirs, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    unexpected = ["score.bias"] if scalar else []
    assert not info["missing_keys"] and not info["mismatched_keys"] and list(info["unexpected_keys"]) == unexpected
    with torch.no_grad():
        ours = new(kind)(tokens)[:, -1] - 0.5 if scalar else new(kind).logits(tokens)
        torch.testing.assert_close(theirs.eval()(tokens).logits, ours, atol=1e-5, rtol=1e-4)


def test_one_file_is_held_at_a_time(tmp_path, monkeypatch):
    held, most = {}, []

    def gather(x: torch.Tensor) -> torch.Tensor:
        whole = x.clone()
        key = len(most)
        held[key] = whole.nbytes
        weakref.finalize(whole.untyped_storage(), held.pop, key)
        most.append(sum(held.values()))
        return whole

    monkeypatch.setattr(lora, "full", gather)
    largest = max(p.nbytes for p in new("llama").parameters())
    saved(tmp_path, MANY, "llama")
    assert len(most) > 20 and largest < max(most) <= largest + MANY


@pytest.mark.parametrize("old, now", WAYS)
def test_what_is_written_over_another_model_is_what_loads(old, now, tmp_path):
    folder, fresh = saved(tmp_path / "model", old), saved(tmp_path / "fresh", now, shift=1.0)
    saved(folder, now, shift=1.0)
    assert same(weights(folder), weights(fresh))
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in fresh.iterdir())  # and no file is left


@pytest.mark.parametrize("old, now", [*WAYS, (None, ONE), (None, FEW)])
def test_killed_at_any_moment_it_is_the_old_model_or_the_new_or_none(old, now, tmp_path):
    folder, copies = tmp_path / "model", []
    if old:
        saved(folder, old)
    before = weights(folder) if old else None
    after = weights(saved(tmp_path / "fresh", now, shift=1.0))

    def copy(count: int, *_) -> None:
        if folder.exists():
            copies.append(Path(shutil.copytree(folder, tmp_path / f"copy {count}")))

    small_runs.watched(folder, copy, saved, folder, now, "gpt2", 1.0)
    found = []
    for left in copies:
        try:
            there = weights(left)
            assert same(there, after) or (before and same(there, before))
            found.append("new" if same(there, after) else "old")
        except UserError as error:
            assert "no model folder there" in str(error)
            found.append("none")
        if len(found) % 3 == 0:  # the next one that writes there makes it whole
            assert same(weights(saved(left, now, shift=1.0)), after)
    assert len(found) > 10 and found == sorted(found, key=["old", "none", "new"].index)
    assert old is None or found[0] == "old"
    assert ("none" in found) == ((old, now) != (ONE, ONE))


def test_a_save_in_shards_that_fails_leaves_the_old_model(tmp_path, monkeypatch):
    folder = saved(tmp_path / "model", FEW)
    before, save_file, calls = {p.name: p.read_bytes() for p in folder.iterdir()}, checkpoint.save_file, []

    def fail_at_last(tensors, path, **how):
        calls.append(path)
        save_file(tensors, path, **how)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fail_at_last)
    with pytest.raises(OSError, match=r"model-00003-of-000\d\d.safetensors"):
        saved(folder, MANY, shift=1.0)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


# ---- sharded among processes -----------------------------------------------------------------------------------------


def _save_together(rank: int, port: int, kind: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = new(kind)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    assert all(type(p).__name__ == "DTensor" for p in model.parameters())
    checkpoint.SHARD = MANY
    models.save(model, TOKENIZER, folder / str(rank))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["gpt2", "llama scalar adapters"])
def test_of_two_processes_that_hold_half_the_first_writes_all(kind, tmp_path):
    expected = saved(tmp_path / "expected", MANY, kind)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [forks.Process(target=_save_together, args=(rank, port, kind, tmp_path)) for rank in range(2)]
    for process in both:
        process.start()
    try:
        for process in both:
            process.join(60)
            assert process.exitcode == 0
    finally:
        for process in both:  # one that waits for the other would do so for ever
            process.kill()
    files = {p.relative_to(expected): p.read_bytes() for p in expected.rglob("*") if p.is_file()}
    assert {p.relative_to(tmp_path / "0"): p.read_bytes() for p in (tmp_path / "0").rglob("*") if p.is_file()} == files
    assert not (tmp_path / "1").exists()
