"""Any number of processes, whether each holds the whole model or a share of it, learn the same: figures, answers and
weights are those of one process to 1e-5, whatever is learnt. (tests/fuzz has batches and data of any size.)

A batch of 7 in pieces of 2 is nothing that 2, 3 or 4 processes could share evenly, nor are matrices with 16, 24 or 330
rows, heads with one or two, and 2 held-out prompts. Models are Llama's without biases unless it is about GPT-2: there
the bias of keys has a gradient of 0 but for rounding, of which Adam makes a step as long as any, so that the learning
rate has to be so low that such steps are below the tolerance.
"""

from typing import Any

import processes
import pytest

from nanopref import models
from nanopref.data.formats import read_feedback
from nanopref.data.groups import encode
from nanopref.learning import objectives

WAYS = [("2 ddp", "3 fsdp"), ("4 fsdp", "3 ddp"), ("4 ddp", "2 fsdp")]
LONGER = {"iterations": 3, "value_warmup": 1}
DEEP = {"init": "untied", "checkpoint_activations": True, "optimizer": "muon"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {}),
    "sft with muon": ("sft", {"optimizer": "muon"}),
    "sft of gpt2": ("sft", {"init": "gpt2", "lr": 1e-6}),
    "sft untied": ("sft", DEEP),
    "dpo": ("dpo", {}),
    "dpo of gpt2": ("dpo", {"init": "gpt2", "lr": 1e-6}),
    "dpo untied": ("dpo", DEEP),
    "dpo with adapters": ("dpo", {"lora": 4, "lr": 1e-3}),
    "dpo in bfloat16": ("dpo", {"dtype": "bfloat16"}),
    "kto": ("dpo", {"loss": "kto"}),
    "rankings": ("dpo", {"data": "rankings.jsonl", "loss": "plackett-luce"}),
    "online": ("dpo", {"reward": ("mine.py:f",), "rounds": 2, "data": "data.jsonl", "prompts": 120, "loss": "kto"}),
    "rm": ("rm", {"heads": 2}),
    "rm untied": ("rm", DEEP | {"loss": "binary"}),
    "ppo": ("ppo", {"kl_target": 0.1, "whiten_rewards": True, "replay": 2, **LONGER}),
    "ppo with a head": ("ppo", {"critic": "head", "entropy": 0.01, "early_stop_kl": 1e-4}),
    "ppo with a judge": ("ppo", {"reward": ("judge",), "doubt": 0.5, "checkpoint_activations": True}),
    "ppo with adapters": ("ppo", {"lora": 4, "reward": ("judge",), "lr": 1e-3}),
    "ppo of gpt2": ("ppo", {"init": "gpt2", "lr": 1e-6}),
    "rloo": ("ppo", {"advantage": "rloo", "batch_size": 6, "group": 2, "replay": 2}),
    "reinforce": ("ppo", {"advantage": "reinforce", "init": "untied"}),
    "trpo": ("ppo", {"update": "trpo", "lr": None, "critic_lr": 1e-4, "cg_steps": 2}),
    "few": ("ppo", {"batch_size": 2, "minibatch": 1, "eval_prompts": 1, "replay": 2}),
}
# products of 8 bits differ by the other rows of a batch, so that a token may be another
LOOSER = {"dpo in bfloat16": {"tolerance": 2e-3, "said": False}}


@pytest.mark.parametrize("number, case", list(enumerate(CASES)), ids=CASES)
def test_figures_and_weights_are_those_of_one_process(number, case, shared_folder, pools, small_and_plain):
    name, more = CASES[case]
    settings = processes.settings_of(shared_folder, name, **more)
    alone = processes.outcome(shared_folder, name, settings)
    for way in ("2 ddp", "3 ddp", "4 ddp") if case == "trpo" else WAYS[number % 3]:
        n, engine = way.split()
        found = processes.outcome(shared_folder, name, settings, pools[int(n)], engine)
        processes.same(found, alone, **LOOSER.get(case, {}))


def test_of_as_many_processes_both_ways_are_equal_where_products_have_8_bits(shared_folder, pools, small_and_plain):
    """In rounds of sampling too, where one process soon has other answers."""
    settings = processes.settings_of(shared_folder, "ppo", dtype="bfloat16", lr=1e-3)
    ddp, fsdp = (processes.outcome(shared_folder, "ppo", settings, pools[3], engine) for engine in ("ddp", "fsdp"))
    processes.same(ddp, fsdp)


def test_rows_that_share_a_prompt_are_among_them(shared_folder):
    _, tokenizer = models.load(shared_folder / "llama")
    for name, loss in (("data", "dpo"), ("rankings", "plackett-luce")):
        file, kinds = f"{shared_folder}/{name}.jsonl", objectives.kinds(objectives.OBJECTIVES)
        groups, _, _ = read_feedback(file, kinds, loss, "majority", tokenizer)
        data, _ = encode(groups, tokenizer, 48)
        packed = [data.collate([i, i + 1]).packed is not None for i in range(len(data) - 1)]
        assert len(packed) > 15 and all(packed)
