"""Embeddings as the tile kernels multiply them: 16 bits a number, rows that begin and end at whole blocks.

The matrix units multiply 16-bit numbers exactly and sum in fp32. An fp32 number is the sum of three bf16 ones, exactly,
and its product with another the sum of six of their nine products, up to 2^-24 (arXiv 1904.06376). As terms that stand
side by side, those six are one product of six times the width: as fast as three in tf32, and nothing to be cut in the
kernel. They are summed from the smallest on.
"""

import torch
from torch import Tensor


def image_factors(images: Tensor, depth: int) -> Tensor:
    """`[n, E]` -> `[n, K]`, bf16 or fp16, K a multiple of depth; the images themselves where they are that already.

    fp32: K is six times E, or three where `torch.set_float32_matmul_precision` lets products be rounded.
    """
    return _side_by_side(images, depth, [image for image, _ in _products()])


def text_factors(texts: Tensor, depth: int) -> Tensor:
    """`[m, E]` -> `[m, K]`: their products with `image_factors` are those of the embeddings."""
    return _side_by_side(texts, depth, [text for _, text in _products()])


def _products() -> list[tuple[int, int]]:
    """Which term of an image and which of a text are multiplied; 0 is the largest term."""
    terms = 3 if torch.get_float32_matmul_precision() == "highest" else 2
    return [(image, size - image) for size in reversed(range(terms)) for image in range(size + 1)]


def _side_by_side(embeddings: Tensor, depth: int, places: list[int]) -> Tensor:
    missing = -embeddings.shape[1] % depth
    if embeddings.dtype != torch.float32:
        is_fit = missing == 0 and embeddings.data_ptr() % 16 == 0
        return embeddings if is_fit else torch.nn.functional.pad(embeddings, (0, missing))
    rest = torch.nn.functional.pad(embeddings, (0, missing))
    terms: list[Tensor] = []
    while len(terms) <= max(places):
        terms.append(rest.bfloat16())
        rest = rest - terms[-1]
    return torch.cat([terms[place] for place in places], dim=1)
