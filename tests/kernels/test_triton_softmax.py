"""Starts `triton_softmax_cases.py` in a process of its own."""

from pathlib import Path

from tests.kernels.interpreted import run_cases


def test_the_triton_kernel_equals_the_reference():
    run_cases(Path(__file__).with_name("triton_softmax_cases.py"))
