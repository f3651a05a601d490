import base64
import io

import pytest
from PIL import Image

from siglip_train.report.thumbnail import spread, thumbnail


@pytest.mark.parametrize(
    ("size", "expected"),
    [((400, 200), (96, 48)), ((32, 32), (96, 96)), ((90, 30), (90, 30)), ((1, 1), (96, 96))],
)
def test_thumbnails_fit_the_square_and_keep_the_aspect(size, expected):
    url = thumbnail(Image.new("RGBA", size, (10, 200, 30, 255)))
    prefix, data = url.split(",")
    assert prefix == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert picture.size == expected
        assert max(abs(a - b) for a, b in zip(picture.getpixel((0, 0)), (10, 200, 30), strict=True)) < 8


def test_spread_positions_are_distinct_and_cover_the_whole():
    assert spread(100, 4) == [0, 25, 50, 75]
    assert spread(3, 10) == [0, 1, 2]
    assert spread(0, 5) == []
