"""Patch kernels of another size: the stored results of FlexiViT's own code, and what they are for."""

import pytest
import torch
from torch.nn import functional

from siglip_train.models.patches import resize_patch_kernel
from tests.goldens import arrays


@pytest.mark.parametrize(
    "case", ["16x16_to_14x14", "16x16_to_32x32", "8x8_to_14x14", "16x16_to_8x8", "32x32_to_16x16"]
)
def test_equal_to_flexivit(case: str) -> None:
    kernel = arrays("flexivit_pi_resize", "inputs.npz")[case]  # [p, p, 3, D]
    expected = torch.from_numpy(arrays("flexivit_pi_resize", "expected.npz")[case])
    ours = resize_patch_kernel(torch.from_numpy(kernel).flatten(0, 2).T, len(expected))
    torch.testing.assert_close(ours.T.reshape(expected.shape).float(), expected, rtol=0, atol=2e-6)


def test_an_enlarged_patch_is_seen_as_before() -> None:
    """What the resize is for: the same tokens of the same image at twice the size."""
    torch.manual_seed(0)
    pixels, weight = torch.rand(5, 3, 8, 8, dtype=torch.float64), torch.randn(6, 192, dtype=torch.float64)
    enlarged = functional.interpolate(pixels, (16, 16), mode="bilinear")
    before = pixels.permute(0, 2, 3, 1).flatten(1) @ weight.T
    after = enlarged.permute(0, 2, 3, 1).flatten(1) @ resize_patch_kernel(weight, 16).T
    torch.testing.assert_close(after, before, rtol=0, atol=1e-10)
