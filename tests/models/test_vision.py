"""The vision tower: patches, masks, pools; one tower for fixed and variable grids."""

import pytest
import torch

from siglip_train.batch import Images
from siglip_train.errors import UserError
from siglip_train.models.vision import VisionConfig, patchify
from tests.models.small import padded, rectangle, small_model, some_pixels

POOLS = ["map", "cls", "average"]


def test_patches_are_row_major_with_channels_last() -> None:
    pixels = torch.arange(3 * 4 * 6, dtype=torch.float32).reshape(1, 3, 4, 6)
    patches, grid, mask = patchify(pixels, 2)
    assert mask is None
    assert patches.shape == (1, 6, 12)
    assert grid[0].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    second = pixels[0, :, 0:2, 2:4].permute(1, 2, 0).flatten()
    assert torch.equal(patches[0, 1], second)


def test_what_exceeds_a_multiple_of_the_patch_is_dropped() -> None:
    pixels = torch.randn(1, 3, 384, 384)
    images = patchify(pixels, 14)
    assert images.patches.shape == (1, 27 * 27, 588)
    assert torch.equal(images.patches, patchify(pixels[:, :, :378, :378], 14).patches)


def test_stem_is_a_convolution() -> None:
    tower = small_model().vision
    pixels = some_pixels()
    kernel = tower.patch_embedding.weight.reshape(24, 4, 4, 3).permute(0, 3, 1, 2)
    expected = torch.nn.functional.conv2d(pixels, kernel, tower.patch_embedding.bias, stride=4)
    stem = tower.patch_embedding(patchify(pixels, 4).patches)
    torch.testing.assert_close(stem, expected.flatten(2).mT)


def test_levels_are_scaled_to_minus_one_to_one() -> None:
    tower = small_model().vision
    levels = torch.randint(256, (2, 16, 48), dtype=torch.uint8)
    grid = patchify(some_pixels(2), 4).grid
    from_levels = tower(levels, grid)
    from_floats = tower(levels.float() / 127.5 - 1, grid)
    assert torch.equal(from_levels.pooled, from_floats.pooled)


@pytest.mark.parametrize("pool", POOLS)
def test_a_full_mask_changes_nothing(pool: str) -> None:
    tower = small_model(pool=pool).double().vision
    images = patchify(some_pixels().double(), 4)
    plain = tower(*images)
    masked = tower(*images._replace(mask=torch.ones(3, 16, dtype=torch.bool)))
    torch.testing.assert_close(masked.tokens, plain.tokens)
    torch.testing.assert_close(masked.pooled, plain.pooled)
    assert plain.mask is None


@pytest.mark.parametrize("pool", POOLS)
def test_padding_changes_nothing(pool: str) -> None:
    tower = small_model(pool=pool).double().vision
    images = rectangle(2, 3, 5)
    images = images._replace(patches=images.patches.double())
    plain = tower(*images)
    clean, garbage = (tower(*padded(images, 20, content=value)) for value in (0.0, 50.0))
    torch.testing.assert_close(clean.pooled, plain.pooled)
    torch.testing.assert_close(clean.tokens[:, :15], plain.tokens)
    torch.testing.assert_close(garbage.pooled, clean.pooled, rtol=0, atol=0)
    assert clean.tokens.shape == (2, 20, 24)


def test_images_of_different_grids_share_a_batch() -> None:
    tower = small_model().double().vision
    shapes = [(4, 4), (2, 6), (7, 1)]
    singles = [rectangle(1, *shape) for shape in shapes]
    singles = [single._replace(patches=single.patches.double()) for single in singles]
    together = Images(*(torch.cat(parts) for parts in zip(*(padded(x, 16) for x in singles), strict=True)))
    pooled = tower(*together).pooled
    for row, single in enumerate(singles):
        torch.testing.assert_close(pooled[row], tower(*single).pooled[0])


@pytest.mark.parametrize("pool", POOLS)
def test_pool_by_hand(pool: str) -> None:
    tower = small_model(pool=pool).vision
    images = patchify(some_pixels(), 4)
    features = tower(*images)
    assert features.tokens.shape == (3, 16, 24)
    if pool == "map":
        torch.testing.assert_close(features.pooled, tower.pool(features.tokens))
    elif pool == "average":
        torch.testing.assert_close(features.pooled, features.tokens.mean(1))
    else:
        with torch.no_grad():
            tower.cls_token.normal_()
        moved = tower(*images)
        assert (moved.pooled - features.pooled).abs().max() > 1e-3


def test_a_table_of_another_side_is_read_at_the_images_grid() -> None:
    tower = small_model(position_grid=2).vision
    assert tower.position_table.shape == (4, 24)
    assert tower(*patchify(some_pixels(), 4)).tokens.shape == (3, 16, 24)


def test_wrong_patch_size_is_told() -> None:
    with pytest.raises(AssertionError, match="27"):
        small_model().vision(torch.zeros(1, 4, 27), torch.zeros(1, 4, 2, dtype=torch.int64))


@pytest.mark.parametrize("sizes", [{"width": 100, "heads": 12}, {"image_size": 8, "patch_size": 16}])
def test_impossible_sizes_are_told(sizes: dict) -> None:
    with pytest.raises(UserError, match=r"model\.vision"):
        VisionConfig(**sizes)
