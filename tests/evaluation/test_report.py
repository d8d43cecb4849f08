"""What the user sees at the end of a run."""

from hypothesis import given
from hypothesis import strategies as st

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
