"""What the user sees at the end of a run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopref.evaluation import report
from nanopref.evaluation.report import curves, histograms, plot, side_by_side, table


@given(st.text(max_size=300), st.text(max_size=300), st.integers(30, 120))
def test_side_by_side_shows_any_two_answers_within_the_width(left, right, width):
    text = side_by_side({"prompt": "x", "reference": left, "policy": right}, width)
    assert all(len(line) <= width for line in text.split("\n")) and "│" in text.split("\n")[1]
    for word in left.split()[:1]:
        assert word[:10] in text


def test_a_table_lines_up():
    lines = table([("a", "1"), ("long name", "12.5")], ("", "value")).split("\n")
    assert len({len(line) for line in lines}) == 1 and lines[3].endswith("12.5")


def test_a_picture_with_one_point_and_no_spread_is_drawn(tmp_path):
    panels = [
        curves([{"step": 1, "loss": 1.0}], {"loss": "training", "held_out_loss": "held out"}, "loss"),
        histograms({"before": [0.0, 0.0], "after": [0.0]}, "reward", "reward"),
    ]
    plot(panels, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def drawn(monkeypatch, tmp_path, *panels) -> list[str]:
    """The titles in a picture of these panels."""
    figures = []
    monkeypatch.setattr(report.plt, "close", figures.append)
    plot(panels, tmp_path / "report.png")
    return [axis.get_title() for axis in figures[0].axes if axis.axison]


METRICS = [
    {"step": i, "loss": 1 / i, "β": 0.1, "share": 0.0, "noise": 1 + 1e-8 * i} | ({"late": i} if i > 8 else {})
    for i in range(1, 11)
]


def test_panels_in_which_nothing_moves_are_left_out(monkeypatch, tmp_path):
    """Whatever they are called; one of two curves that moves is enough, and a picture always has a panel."""
    titles = {name: curves(METRICS, {name: name, "missing": "missing"}, name) for name in (*METRICS[0], "late", "none")}
    both = curves(METRICS, {"β": "β", "loss": "loss"}, "both")
    spread = histograms({"before": [0.0, 0.0]}, "rewards", "reward")
    found = drawn(monkeypatch, tmp_path, *titles.values(), both, spread)
    assert found == ["step", "loss", "late", "both", "rewards"]
    assert drawn(monkeypatch, tmp_path, titles["none"], titles["β"]) == ["none"]


@pytest.mark.parametrize("n", range(1, 13))
def test_a_picture_of_any_number_of_panels_has_few_places_empty(n, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "write_atomic", lambda path, content: None)
    figures = []
    monkeypatch.setattr(report.plt, "close", figures.append)
    plot([curves(METRICS, {"loss": "loss"}, str(i)) for i in range(n)], tmp_path / "report.png")
    axes = figures[0].axes
    assert [axis.get_title() for axis in axes] == [*map(str, range(n)), *[""] * (len(axes) - n)]
    assert len(axes) - n <= 2 and axes[0].get_gridspec().ncols <= 4
