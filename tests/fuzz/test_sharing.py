"""Batches, micro-batches and data of any size, by any number of processes: they learn what one process learns."""

import processes
from fuzzing import examples, tried
from hypothesis import given
from hypothesis import strategies as st

from nanopref.running.flags import UserError

SHAPES = {"batch_size": st.integers(1, 9), "micro_batch": st.integers(1, 4), "seed": st.integers(0, 3)}
SHAPES |= {"init": st.sampled_from(["llama", "untied"])}
ASKED = {"eval_prompts": st.integers(2, 5), "max_new_tokens": st.integers(3, 9), "sample_batch": st.integers(1, 9)}
# not whitened: an answer that is as good as the mean would have an advantage of rounding, of which Adam makes a step
ROUNDS = {"minibatch": st.integers(1, 9), "epochs": st.integers(1, 3), "whiten_advantages": st.just(False)}
COMMANDS = [
    st.tuples(st.just(name), st.fixed_dictionaries(SHAPES | own))
    for name, own in {
        "sft": {"steps": st.integers(1, 3), "dropout": st.sampled_from([0.0, 0.3])},
        "dpo": ASKED | {"loss": st.sampled_from(["dpo", "kto", "orpo", "simpo"])},
        "rm": ASKED | {"heads": st.integers(1, 3)},
        "ppo": ASKED | ROUNDS | {"replay": st.integers(1, 3), "critic": st.sampled_from(["network", "head"])},
    }.items()
]
DATA = st.tuples(st.integers(2, 14), st.integers(1, 4), st.integers(0, 99), st.sampled_from([1, 3]))
WAYS = st.tuples(st.integers(2, 4), st.sampled_from(["ddp", "fsdp"]))


@examples(10)
@given(command=st.one_of(COMMANDS), data=DATA, way=WAYS)
def test_any_number_of_processes_learns_what_one_does(command, data, way, shared_folder, pools):
    (name, settings), (n, engine) = command, way
    *size, kinds = data
    kinds = 1 if settings.get("loss") or name == "rm" else kinds
    processes.write(shared_folder / "drawn.jsonl", *size, kinds=kinds)
    settings = processes.settings_of(shared_folder, name, **settings, data="drawn.jsonl")
    with tried("numbers of processes"):
        try:
            alone = processes.outcome(shared_folder, name, settings)
        except UserError:  # as where all answers to so few prompts are empty
            return
        processes.same(processes.outcome(shared_folder, name, settings, pools[n], engine), alone)
