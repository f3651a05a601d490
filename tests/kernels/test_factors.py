"""Factors of 16 bits: what their product is worth beside that of the embeddings, and what is left as it is."""

import pytest
import torch

from kernels.sigmoid_loss.triton.factors import image_factors, text_factors


def product(images, texts):
    return image_factors(images, 16).double() @ text_factors(texts, 16).double().T


@pytest.mark.parametrize("width", [1, 37, 48])
def test_of_fp32_they_multiply_as_well_as_fp32(width):
    generator = torch.Generator().manual_seed(width)
    # digits of every size
    images, texts = (torch.randn(9, width, generator=generator) * 10.0 ** (turn * 8 - 4) for turn in range(2))
    factors = image_factors(images, 16)
    assert factors.dtype == torch.bfloat16
    assert factors.shape == (9, 6 * -(-width // 16) * 16)
    sizes = images.double().abs() @ texts.double().abs().T
    error = (product(images, texts) - images.double() @ texts.double().T).abs() / sizes
    # measured 3e-8; one digit of fp32 is 1.2e-7
    assert error.max() < 1e-7


def test_of_fp32_three_terms_are_the_number_itself():
    numbers = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    # of images the terms 0, 1, 2, 0, 1, 0
    terms = image_factors(numbers, 16).double().view(50, 6, 16)
    assert (terms[:, :3].sum(1) == numbers.double()).all()
    assert (terms[:, 5].float() == numbers.bfloat16().float()).all()


def test_where_products_may_be_rounded_there_are_three():
    numbers = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    torch.set_float32_matmul_precision("high")
    try:
        assert image_factors(numbers, 16).shape == text_factors(numbers, 16).shape == (8, 48)
        error = (product(numbers, numbers) - numbers.double() @ numbers.double().T).abs()
    finally:
        torch.set_float32_matmul_precision("highest")
    sizes = numbers.double().abs() @ numbers.double().abs().T
    # measured 1.6e-6; tf32 rounds to 5e-4
    assert 1e-7 < (error / sizes).max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_of_16_bits_stay_where_they_are_unless_rows_do_not_fit(dtype):
    numbers = torch.randn(6, 32).to(dtype)
    assert image_factors(numbers, 16) is text_factors(numbers, 32) is numbers
    padded = image_factors(numbers[:, :20].contiguous(), 16)
    assert padded.shape == (6, 32)
    assert (padded[:, :20] == numbers[:, :20]).all()
    assert not padded[:, 20:].any()
    # rows that begin between multiples of 16 bytes
    flat = torch.randn(6 * 32 + 3).to(dtype)
    shifted = flat[3:].view(6, 32)
    copy = text_factors(shifted, 16)
    assert copy.data_ptr() % 16 == 0
    assert (copy == shifted).all()
