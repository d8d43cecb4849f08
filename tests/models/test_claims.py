"""What a model's folder claims to be costs nothing before it is known to be that: refused in the time of reading it."""

import json
import shutil
import struct
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import SMALL, message_of, random_tokens, randomise

from nanopref import models
from nanopref.data.tokenizer import Tokenizer
from nanopref.models.gpt2 import GPT
from nanopref.models.llama import Llama, LlamaConfig

TOKENIZER = Tokenizer.train(["aaa bb, aaa bb"], SMALL.vocab_size)
LLAMA = LlamaConfig(260, 12, 2, 4, 2, 8, 16, 4, rope_scaling=(8.0, 1.0, 4.0, 6))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    models.save(randomise(GPT(SMALL)), TOKENIZER, folder / "gpt2")
    models.save(randomise(Llama(LLAMA)), TOKENIZER, folder / "llama")
    models.save(randomise(Llama(replace(LLAMA, rope_scaling=None, rope_factor=2.0))), TOKENIZER, folder / "linear")
    return folder


def changed(saved, tmp_path, name, **changes):
    folder = shutil.copytree(saved / name, tmp_path / name)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))
    return folder


@pytest.mark.parametrize("name, key", [("gpt2", "n_layer"), ("llama", "num_hidden_layers")])
def test_a_million_layers_are_not_made_to_find_that_they_are_missing(saved, tmp_path, name, key):
    start = time.process_time()
    message = message_of(models.load, changed(saved, tmp_path, name, **{key: 1_000_000}))
    assert "is missing" in message and time.process_time() - start < 10


@pytest.mark.parametrize(
    "name, key",
    [("gpt2", "n_embd"), ("gpt2", "vocab_size"), ("gpt2", "n_positions"), ("gpt2", "n_layer")]
    + [("llama", "hidden_size"), ("llama", "intermediate_size"), ("llama", "head_dim"), ("llama", "vocab_size")],
)
@pytest.mark.parametrize("value", [2**16, 2**24, 2**31, 2**63, 10**400])
def test_sizes_beyond_the_weights_are_refused(saved, tmp_path, name, key, value):
    folder = changed(saved, tmp_path, name, **{key: value})
    assert str(folder) in message_of(models.load, folder)


HUGE = [float("inf"), float("nan"), 0, -1.0, 10**400, 1e300, "8", True, [], None]
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE |= {"original_max_position_embeddings": 6}
NUMBERS = [{"rms_norm_eps": value} for value in [*HUGE, 1e-320]] + [{"rope_theta": value} for value in HUGE]
NUMBERS += [{"rope_parameters": ROPE | {key: value}, "rope_scaling": None} for key in [*ROPE][1:] for value in HUGE]
NUMBERS += [{"rope_parameters": ROPE | {"high_freq_factor": 1.0}, "rope_scaling": None}]  # divides by their distance
NUMBERS += [{"rope_scaling": value} for value in ("yarn", [1], 3)]
NUMBERS += [{key: value} for key in ("attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window")
            for value in ("false", 0.5, [False])]  # fmt: skip


@pytest.mark.parametrize("changes", NUMBERS, ids=str)
def test_a_setting_that_is_no_such_number_or_switch_is_refused(saved, tmp_path, changes):
    folder = changed(saved, tmp_path, "llama", **changes)
    message = message_of(models.load, folder)
    assert message.startswith(str(folder / "config.json")) and len(message) < 1000


@pytest.mark.parametrize("name", ["llama", "linear"])
def test_as_it_was_saved_it_runs(saved, name):
    assert models.load(saved / name)[0].logits(random_tokens(260, 2, 12)).isfinite().all()


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b'{"weight_map": {"\xff": 1}}', b"9" * 5000])
def test_json_of_any_depth_or_encoding_is_refused(saved, tmp_path, file, content):
    folder = changed(saved, tmp_path, "gpt2")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere")
    (folder / file).write_bytes(content)
    assert message_of(models.load, folder).startswith(f"{folder}/")


@pytest.mark.parametrize(
    "shard", ["", ".", "..", "a\nb", "x" * 5000, "\0", "config.json", "model.safetensors.index.json"]
)
def test_an_index_of_what_is_no_shard_is_refused(saved, tmp_path, shard):
    folder = changed(saved, tmp_path, "gpt2")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"wte.weight": shard}}))
    message = message_of(models.load, folder)
    assert str(folder) in message and message.isprintable() and len(message) < 1000


def test_a_setting_of_a_megabyte_is_quoted_in_part(saved, tmp_path):
    message = message_of(models.load, changed(saved, tmp_path, "gpt2", model_type="x\x1b\n" * 300_000))
    assert len(message) < 1000 and message.isprintable()


def test_weights_are_not_read_before_they_fit(saved, tmp_path):
    """A file of 4 GB (of holes), nearly all of it one tensor, of the wrong shape."""
    folder = changed(saved, tmp_path, "gpt2")
    weights = load_file(folder / "model.safetensors")
    header, end = {}, 0
    for name, x in weights.items():
        size = 4 << 30 if name.endswith("wpe.weight") else 4 * x.numel()
        shape = [size // 32, 8] if name.endswith("wpe.weight") else list(x.shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
    start = time.process_time()
    assert "wpe.weight is [134217728, 8]" in message_of(models.load, folder)
    assert time.process_time() - start < 10


def test_weights_of_another_kind_are_refused(saved, tmp_path):
    folder = changed(saved, tmp_path, "gpt2")
    weights = load_file(folder / "model.safetensors")
    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"].to(torch.float8_e4m3fn)
    save_file(weights, folder / "model.safetensors")
    assert "holds torch.float8_e4m3fn" in message_of(models.load, folder)


def test_a_tied_copy_of_another_precision_is_another(saved, tmp_path):
    folder = changed(saved, tmp_path, "gpt2")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["transformer.wte.weight"].bfloat16()
    save_file(weights, folder / "model.safetensors")
    assert "lm_head.weight is not tied" in message_of(models.load, folder)
