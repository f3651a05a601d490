"""Templates: text is text, a missing value is an error, and a page of another package begins with the same base."""

import pytest
from jinja2 import UndefinedError

from siglip_train.report.charts import Bin, Series, bar_chart, histogram, line_chart
from siglip_train.report.numbers import log_ticks, short
from siglip_train.report.render import embedded, render

HOSTILE = """</title></style><script>alert('x')</script>" onload="x"""


def test_a_value_that_a_template_lacks_is_an_error():
    with pytest.raises(UndefinedError, match="'cards' is undefined"):
        render("preview.html", package="data_tools.preview", title="t")


@pytest.mark.parametrize(
    "drawn",
    [
        line_chart(HOSTILE, [Series(HOSTILE, [(0, 1.0), (1, 2.0)])], x_name=HOSTILE),
        bar_chart(HOSTILE, [(HOSTILE, 3)], 4, HOSTILE),
        histogram(HOSTILE, [Bin(0, 1, 2), Bin(1, 2, 3)], HOSTILE, HOSTILE),
        render("preview.html", package="data_tools.preview", title=HOSTILE, cards=[]),
    ],
)
def test_text_never_becomes_markup(drawn):
    assert "<script" not in drawn
    assert '" onload' not in drawn
    assert "&lt;script&gt;" in drawn


def test_only_an_image_inside_the_page_has_an_address():
    assert embedded("data:image/png;base64,AAAA") == "data:image/png;base64,AAAA"
    assert [embedded(url) for url in ("https://a.org/b.jpg", "javascript:x", "data:text/html,x", "")] == [
        ""
    ] * 4


def test_one_way_to_shorten_numbers_and_to_divide_an_axis():
    assert [short(value, 3) for value in (12.345, 1174, 2130.4, 0.0041)] == ["12.3", "1174", "2130", "0.0041"]
    assert log_ticks(0.7, 1.6) == [0.7, 1, 1.5]
    assert all(1e-20 <= value <= 1e20 for value in log_ticks(1e-20, 1e20))
