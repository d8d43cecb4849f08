"""--overwrite that is killed at any moment: one of the two runs is there, whole, and goes on."""

import shutil

import small_runs
from fuzzing import examples, how_it_ends, tried
from hypothesis import given
from hypothesis import strategies as st

from nanopref.running.replace import OLD


@examples(4)
@given(name=st.sampled_from(["dpo", "rm", "sft"]), moment=st.floats(0, 1, exclude_max=True), early=st.booleans())
def test_of_two_runs_one_is_there(name, moment, early, root, whole):
    out, killed = root / f"{name} twice", root / "overwritten"
    new = root / f"{name} new"
    if not new.exists():
        small_runs.run(small_runs.config_of(name, root, new, seed=1))
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(root / name, out)
    shutil.rmtree(killed, ignore_errors=True)
    number = int((0.3 * moment if early else moment) * 2 * small_runs.moments(name, root))

    def copy(count: int, *_) -> None:
        if count == number:
            shutil.copytree(out, killed)

    with tried("overwritten runs"):
        config = small_runs.config_of(name, root, out, seed=1, overwrite=True)
        small_runs.watched(out, copy, how_it_ends, small_runs.run, config)
        assert small_runs.alike(small_runs.outcome(out), small_runs.outcome(new)) and not (out / OLD).exists()
        if killed.exists():
            ends = {
                seed: how_it_ends(small_runs.run, small_runs.config_of(name, root, killed, seed=seed, resume=True))
                for seed in (0, 1)
            }
            (seed,) = [seed for seed, (code, _, _) in ends.items() if code == 0]
            assert f"was started with --seed {seed}" in ends[1 - seed][2], ends
            expected = whole[name] if seed == 0 else small_runs.outcome(new)
            assert small_runs.alike(small_runs.outcome(killed), expected)
