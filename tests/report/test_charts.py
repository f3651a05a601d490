import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from siglip_train.report.charts import Scale, Series, line_chart, thinned
from siglip_train.report.numbers import log_ticks, short, ticks


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-12, -10), (3.1, 3.2), (1, 600), (0, 1e-6), (-1e9, 2e9)])
def test_ticks_are_round_evenly_spaced_and_inside(low, high):
    values = ticks(low, high)
    assert 3 <= len(values) <= 8
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in values)
    step = values[1] - values[0]
    assert [b - a for a, b in pairwise(values)] == pytest.approx([step] * (len(values) - 1))
    assert f"{step:.6e}"[0] in "125"


def test_log_ticks_are_powers_of_ten():
    assert log_ticks(0.05, 2000) == [0.1, 1, 10, 100, 1000]
    assert len(log_ticks(1e-20, 1e20)) <= 9


def test_scale_maps_the_ends_and_the_middle():
    assert [Scale(0, 10, 100, 200)(value) for value in (0, 5, 10)] == [100, 150, 200]
    assert Scale(1, 100, 0, 10, is_log=True)(10) == pytest.approx(5)


def test_thinning_keeps_the_spikes():
    points = [(x, 1.0) for x in range(10_000)]
    points[1234], points[8765] = (1234, 99.0), (8765, -99.0)
    kept = thinned(points, 400)
    assert len(kept) <= 402
    assert {(1234, 99.0), (8765, -99.0)} <= set(kept)
    assert kept == sorted(kept)
    assert kept[-1] == points[-1]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (12_345, "12.3k"), (1_500_000, "1.5M"), (2e9, "2G"), (0.03125, "0.03125"), (1e-5, "1e-05"),
     (9999, "9999"), (-0.5, "-0.5"), (math.nan, "nan"), (math.inf, "inf")],
)  # fmt: skip
def test_short_numbers(value, text):
    assert short(value) == text


def drawing(chart: str) -> ElementTree.Element:
    return ElementTree.fromstring(re.search("<svg.*</svg>", chart, re.DOTALL).group())


def test_a_chart_is_well_formed_and_names_its_values():
    chart = line_chart("loss <b>", [Series("a & b", [(0, 1.0), (10, 2.0)]), Series("c", [(0, 1.5)])])
    svg = drawing(chart)
    paths = [path.get("d") for path in svg.iter("path")]
    assert [path.count("M") for path in paths] == [1, 1]
    assert "<b>" not in re.sub("<b>[0-9.]+</b>", "", chart)
    assert [title.text for title in svg.iter("title")] == [
        "a & b 1 at step 0",
        "a & b 2 at step 10",
        "c 1.5 at step 0",
    ]


def test_values_that_are_not_finite_leave_a_gap():
    chart = line_chart(
        "loss", [Series("loss", [(0, 1.0), (1, 2.0), (2, math.nan), (3, math.inf), (4, 1.0), (5, 1.0)])]
    )
    (path,) = drawing(chart).iter("path")
    assert path.get("d").count("M") == 2
    assert "nan" not in path.get("d")


def test_nothing_to_draw_gives_nothing():
    assert line_chart("x", []) == ""
    assert line_chart("x", [Series("x", []), Series("y", [(1, math.nan)])]) == ""


def test_wide_positive_ranges_are_logarithmic_where_asked():
    wide, with_zero = ([Series("norm", [(0, low), (1, 10.0)])] for low in (1e-3, 0.0))
    assert "log scale" in line_chart("norm", wide, y="log if wide")
    assert "log scale" not in line_chart("norm", with_zero, y="log if wide")
    assert "log scale" not in line_chart("norm", wide)
