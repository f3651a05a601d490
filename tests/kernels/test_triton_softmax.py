"""Starts `triton_softmax_cases.py` in a process of its own."""

from pathlib import Path

import pytest

from tests.kernels.interpreted import compiled_on_a_gpu, run_cases


@compiled_on_a_gpu
def test_the_triton_kernel_equals_the_reference():
    run_cases(Path(__file__).with_name("triton_softmax_cases.py"))


@pytest.mark.slow
@compiled_on_a_gpu
def test_the_triton_kernel_equals_the_reference_in_all_shapes_and_dtypes():
    run_cases(Path(__file__).with_name("triton_softmax_cases.py"), tier="slow")
