"""The stem of patches at another patch size: the pseudo-inverse resize of FlexiViT (Beyer et al. 2023, section 3.4)."""

import math

import torch
from torch import Tensor
from torch.nn import functional


def resize_patch_kernel(weight: Tensor, patch_size: int) -> Tensor:
    """Stem `[D, P]` for another patch size, `[D, patch_size ** 2 * 3]`, computed and returned in float64.

    A patch enlarged bilinearly, without antialiasing, meets the new stem as the patch itself met the old one;
    where patches shrink, this holds as nearly as least squares can make it.
    """
    old = math.isqrt(weight.shape[1] // 3)
    axis = _resize_matrix(old, patch_size)
    matrix = torch.kron(axis, axis)  # [new * new, old * old]
    pixels = weight.double().unflatten(1, (old * old, 3))  # [D, old * old, 3]
    return (torch.linalg.pinv(matrix.T) @ pixels).flatten(1)  # [D, P]


def _resize_matrix(old: int, new: int) -> Tensor:
    """`[new, old]`: what bilinear resizing of one axis multiplies by."""
    unit = torch.eye(old, dtype=torch.float64)[None]
    return functional.interpolate(unit, new, mode="linear", align_corners=False)[0].T
