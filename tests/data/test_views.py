"""Augmented views: drawn from the sample's generator alone, of the sizes asked for, and of what they claim to show."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from siglip_train.data.choices import Choices
from siglip_train.data.config import DataConfig, SourceConfig, ViewsConfig
from siglip_train.data.image_transform import ImageTransform
from siglip_train.data.inputs.base import InputSetup, RunInputs
from siglip_train.data.inputs.views import Views, ViewsInput, _turned
from siglip_train.data.shards.reader import RawSample
from siglip_train.errors import SampleError

PLAIN = {"jittered": 0.0, "grey": 0.0, "blurred": 0.0, "mirrored": 0.0}


def photo(width: int = 96, height: int = 64) -> bytes:
    """Red grows to the right and green downwards, so that a view tells what it shows."""
    levels = np.zeros((height, width, 3), np.uint8)
    levels[..., 0] = np.linspace(0, 255, width)
    levels[..., 1] = np.linspace(0, 255, height)[:, None]
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    return file.getvalue()


def made(seeds: range, data: bytes | None = None, **views) -> Views:
    config = ViewsConfig(**{"local": 3, "local_patches": 2, **views})
    run = RunInputs((ViewsInput,), ImageTransform(32, 8), None)
    source = SourceConfig(shards="x")
    views_input = ViewsInput(InputSetup("mine", source, None, run, DataConfig(views=config)))
    sample = RawSample(shard="0.tar", key="0", members={"image": data or photo()})
    rows = [views_input.make(sample, Choices(np.random.default_rng(seed))) for seed in seeds]
    return views_input.collate(rows, lambda shape, dtype: torch.empty(shape, dtype=dtype))


def test_shapes_grids_and_masks() -> None:
    views = made(range(4))
    assert views.whole.patches.shape == (4, 16, 192)
    assert views.local.patches.shape == (4, 3, 4, 192)
    assert views.local.grid[0, 0].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert views.masked.shape == (4, 8)
    for places in views.masked.tolist():
        assert places == sorted(set(places))
        assert max(places) < 16
    # another sample, other patches
    assert len({tuple(places) for places in views.masked.tolist()}) == 4
    assert made(range(2), masked=0.75).masked.shape == (2, 12)


def test_equal_generators_draw_equal_views_and_others_do_not() -> None:
    first, again, other = made(range(3)), made(range(3)), made(range(3, 6))
    for mine, theirs in zip(
        (*first.whole[:1], *first.local[:1]), (*again.whole[:1], *again.local[:1]), strict=True
    ):
        assert torch.equal(mine, theirs)
    assert not torch.equal(first.whole.patches, other.whole.patches)


def test_a_view_shows_the_share_of_the_area_that_is_asked_for() -> None:
    views = made(range(40), **PLAIN, global_scale=(0.5, 1.0), local_scale=(0.05, 0.2))

    def shares(patches: torch.Tensor) -> torch.Tensor:
        levels = patches.flatten(-2).unflatten(-1, (-1, 3)).float()
        span = (levels.amax(-2) - levels.amin(-2)) / 255
        return span[..., 0] * span[..., 1]

    whole, local = shares(views.whole.patches), shares(views.local.patches).flatten()
    # resizing takes a little off the outermost levels
    assert 0.4 < whole.min() < whole.max() <= 1
    assert 0.02 < local.min() < local.max() < 0.22
    assert 0.6 < whole.mean() < 0.85


def test_mirror_grey_and_turned_colours() -> None:
    whole = {"global_scale": (1.0, 1.0), "local": 0}
    plain, mirrored = (
        made(range(1), **{**PLAIN, **whole}),
        made(range(1), **{**PLAIN, **whole, "mirrored": 1.0}),
    )
    red, turned = (each.whole.patches.view(4, 4, 8, 8, 3)[..., 0].float() for each in (plain, mirrored))
    assert red[0, 0].mean() < red[0, 3].mean()
    assert turned[0, 0].mean() > turned[0, 3].mean()
    grey = made(range(1), **{**PLAIN, **whole, "grey": 1.0}).whole.patches.unflatten(-1, (-1, 3))
    assert (grey == grey[..., :1]).all()
    red_square = Image.new("RGB", (4, 4), (255, 0, 0))
    assert _turned(red_square, 1 / 3).getpixel((0, 0)) == pytest.approx((0, 255, 0), abs=6)
    assert _turned(red_square, -1 / 3).getpixel((0, 0)) == pytest.approx((0, 0, 255), abs=6)
    assert _turned(red_square, 0).getpixel((0, 0)) == (255, 0, 0)


def test_a_broken_image_is_a_bad_sample() -> None:
    with pytest.raises(SampleError):
        made(range(1), photo()[:200])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"local_scale": (0.0, 0.4)}, "local_scale is 0.0, 0.4: give shares"),
        ({"masked": 1.5}, r"masked is 1.5: give a share in 0\.\.1"),
        ({"local_patches": 0}, "local_patches at least 1"),
        ({"jitter": (0.4, 0.4, 0.2, 0.6)}, "of the hue at most 0.5"),
    ],
)
def test_values_out_of_range_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViewsConfig(**values)
