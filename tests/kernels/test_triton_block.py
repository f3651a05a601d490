"""Starts `triton_block_cases.py` in a process of its own; the choice of implementation, tile and chunk."""

from pathlib import Path

import pytest
import torch

from kernels.dispatch import force, implementation
from kernels.sigmoid_loss.triton import tiles
from kernels.sigmoid_loss.triton.sample import BlockSample
from kernels.sigmoid_loss.triton.tiles import choose_chunk_rows, choose_tile
from tests.kernels.interpreted import compiled_on_a_gpu, run_cases


@compiled_on_a_gpu
def test_triton_kernels_equal_the_reference():
    run_cases(Path(__file__).with_name("triton_block_cases.py"))


# two processes of some minutes each, on two cores
@pytest.mark.slow
@pytest.mark.parametrize("selected", ["alike or scores or scale", "not (alike or scores or scale)"])
@compiled_on_a_gpu
def test_triton_kernels_equal_the_reference_in_all_shapes_and_dtypes(selected):
    run_cases(Path(__file__).with_name("triton_block_cases.py"), selected, "slow")


def chosen(tensor):
    sample = BlockSample("sigmoid_loss_block", None)
    return implementation(tensor, str(sample), sample)


def test_a_cpu_takes_the_chunks_unless_forced():
    tensor = torch.zeros(2, 2)
    assert chosen(tensor) == "chunked"
    with force("triton"):
        assert chosen(tensor) == "triton"
        with force("chunked"):
            assert chosen(tensor) == "chunked"
    assert chosen(tensor) == "chunked"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_takes_the_kernel_but_for_float64():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert chosen(torch.zeros(2, 2, device="cuda", dtype=dtype)) == "triton"
    assert chosen(torch.zeros(2, 2, device="cuda", dtype=torch.float64)) == "chunked"


def test_chunks_fill_the_waves_of_an_h200():
    # 132 multiprocessors: 33 rows of 4 tiles, or 22 of 6
    assert {width: choose_chunk_rows(32768, width, 132) for width in (768, 1024, 1152, 1536)} == {
        768: 4224, 1024: 4224, 1152: 5632, 1536: 8448,
    }  # fmt: skip


@pytest.mark.parametrize("multiprocessors", [1, 108, 132, 148])
@pytest.mark.parametrize("width", [1, 64, 768, 1000, 4096])
def test_chunks_are_bounded(width, multiprocessors):
    assert choose_chunk_rows(100, width, multiprocessors) == 100
    rows = choose_chunk_rows(1_000_000, width, multiprocessors)
    assert rows % 128 == 0
    assert 128 <= rows <= max(128, 6 * width)


def test_the_interpreter_takes_pairs_in_groups_as_gpus_do():
    for size in (2, 4):
        gpus = {
            choose_tile(capability, size).group for capability in ((8, 0), (8, 6), (9, 0), (10, 0), (12, 0))
        }
        assert gpus == {tiles.interpreted_tile(size).group}


def test_tiles_by_gpu():
    assert choose_tile((9, 0), 2) == choose_tile((10, 0), 2) == tiles.HOPPER
    assert choose_tile((8, 0), 2) == choose_tile((12, 0), 2) == tiles.AMPERE
    assert choose_tile((9, 0), 4) == choose_tile((10, 0), 4) == tiles.HOPPER_FP32
    assert choose_tile((8, 6), 4) == tiles.AMPERE_FP32
