"""The errors of rewards beside their bound, in small."""

import json

import numpy as np
import pytest

from nanopref.experiments import comparisons
from nanopref.feedback.bradley_terry import maximum_likelihood
from nanopref.running.flags import UserError


def test_errors_fall_and_the_table_says_so(tmp_path, no_picture):
    out = tmp_path / "new" / "comparisons"
    comparisons.main(comparisons.Config(out=str(out), seeds=10, alternatives=6, doublings=2, timed=(20,)))
    found = json.loads((out / "results.json").read_text())
    assert found["comparisons"] == [150, 300, 600] and all(0.8 < share <= 1 for share in found["held"])
    best = found["Cramér-Rao bound"]
    assert best == pytest.approx([2 * best[2], np.sqrt(2) * best[2], best[2]])
    for name in ("maximum likelihood", "rank centrality"):
        assert found[name] == sorted(found[name], reverse=True)
        assert np.divide(found[name], best) == pytest.approx([1.2] * 3, abs=0.4)
    lines = (out / "table.md").read_text().splitlines()
    assert lines[2].startswith(f"| 150 | {found['maximum likelihood'][0]:.4f} | {found['rank centrality'][0]:.4f} |")
    assert lines[5].startswith("| slope, log-log | -0.") and "| -0.500 |" in lines[5] and lines[9].startswith("| 20 |")


def test_the_bound_is_reached_where_comparisons_are_many():
    truth, rng = np.linspace(-2, 2, 5), np.random.default_rng(0)
    fits = [maximum_likelihood(*comparisons.compared(truth, 4000, rng), 5)[0] for _ in range(300)]
    squares = ((np.array(fits) - truth) ** 2).mean(0)
    assert squares == pytest.approx(comparisons.bound(truth, 4000), rel=5 * np.sqrt(2 / 300))


def test_too_few_comparisons_are_said_to_be_so(tmp_path):
    config = comparisons.Config(out=str(tmp_path), seeds=1, alternatives=40, fewest=2, timed=())
    with pytest.raises(UserError, match="--fewest 2: with seed 0 no finite rewards are the best"):
        comparisons.main(config)
