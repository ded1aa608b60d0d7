"""The figure without a library: well-formed, every point in its place, the best marked."""

import re
from xml.etree import ElementTree

import pytest

from reverie.cli.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, line_chart, ticks

SVG = "{http://www.w3.org/2000/svg}"


def circles(text):
    found = ElementTree.fromstring(text).iter(f"{SVG}circle")
    return [(float(c.get("cx")), float(c.get("cy")), c.get("fill")) for c in found]


def test_points_lie_where_their_numbers_say():
    points = [(0.2, 5.0), (0.1, 7.0), (0.4, 6.0)]
    found = circles(line_chart(points, "length", "distance"))
    assert [x for x, _, _ in found] == sorted(x for x, _, _ in found)
    (x1, y1, _), (x2, y2, _), (x4, y4, _) = found
    assert (x4 - x2) / (x2 - x1) == pytest.approx(2, rel=1e-3)
    assert (y2 - y1) / (y2 - y4) == pytest.approx(2, rel=1e-3)  # down is less
    for x, y, _ in found:
        assert LEFT < x < WIDTH - RIGHT
        assert TOP < y < HEIGHT - BOTTOM
    assert [fill == "#d1495b" for _, _, fill in found] == [False, True, False]


@pytest.mark.parametrize("points", [[(0.1, 2.0)], [(0.1, 0.0), (0.2, 0.0)], [(1e-9, 1e9), (2e-9, 2e9)]])
def test_one_point_and_flat_lines_have_a_place(points):
    text = line_chart(points, "x", "y")
    assert len(circles(text)) == len(points)
    assert "nan" not in text
    assert "inf" not in text


def test_labels_are_text_and_not_markup():
    texts = [t.text for t in ElementTree.fromstring(line_chart([(0, 1)], "<a & b>", "y")).iter(f"{SVG}text")]
    assert "<a & b>" in texts


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.03, 0.25), (-3.0, 1000.0), (0.501, 0.502)])
def test_ticks_are_round_and_within(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 11
    assert all(low <= t <= high for t in found)
    step = found[1] - found[0]
    assert re.fullmatch(r"[125](\.0*)?e[+-]\d+", f"{step:.6e}".replace("000000", "0")), step
