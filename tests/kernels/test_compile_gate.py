"""What the Triton kernels compile to on GPUs that need not be there: no spills, matrix instructions, few others.

The kernel takes the width E as an argument: one compilation serves all multiples of the depth of its tile.
"""

import os
import sys

import pytest
import triton

if sys.platform != "linux" or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton's compiler", allow_module_level=True)

from kernels.linear_cross_entropy.kernel import softmax_kernel
from kernels.linear_cross_entropy.triton_softmax import BLOCK, WARPS
from kernels.sigmoid_loss.autotune import candidates
from kernels.sigmoid_loss.kernel import finish_kernel, sigmoid_tile_kernel
from kernels.sigmoid_loss.score_kernel import score_tile_kernel
from kernels.sigmoid_loss.tiles import (
    AMPERE,
    AMPERE_FP32,
    HOPPER,
    HOPPER_FP32,
    Tile,
    choose_tile,
    choose_warps,
)
from tests.kernels.compiled import MATRIX_INSTRUCTION, SHARED_LIMIT, compile_kernel

ELEMENT = {"bf16": 2, "fp16": 2, "fp32": 4}
SHIPPED = [(80, "bf16"), (90, "bf16"), (100, "bf16"), (80, "fp32"), (90, "fp32"), (100, "fp32"), (90, "fp16")]
WIDTHS = (768, 1024, 1152, 1536)
TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
# instructions per logit in bf16, inner and with the branch for edges and matching pairs
# measured with Triton 3.9: sm_80 16.9 and 19.9, sm_90 16.2 and 19.3, sm_100 16.1 and 19.9
BOUNDS = {80: (18, 20), 90: (17, 20), 100: (17, 20)}
# with 3.6: sm_80 17.1 and 20.2, sm_90 16.4 and 19.4, sm_100 15.4 and 22.8
BOUNDS_BEFORE_3_9 = {80: (18, 21), 90: (17.5, 20), 100: (17, 24)}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def tile_kernel(
    capability, dtype, tile: Tile, *, checked, gradients=True, even=True, precision="tf32x3", ids=False, weighted=False
):  # fmt: skip
    def embeddings(rows, columns):
        return f"tensordesc<{dtype}[{rows}, {columns}]>" if tile.descriptors else f"*{dtype}:16"

    types = {
        "X": embeddings(tile.images, tile.depth),
        "Y": embeddings(tile.texts, tile.depth),
        "G": embeddings(tile.images, tile.texts // tile.parts) if gradients else "*fp32:16",
        "SCALE": "*fp32:16", "BIAS": "*fp32:16", "SUMS": "*fp32:16", "weight": "fp32",
        "X_IDS": "*i32:16", "SORTED": "*i32:16", "Y_IDS": "*i32:16",
        "n": "i32", "m": "i32", "positives": "i32",
        "width": "i32:16" if even else "i32", "stride_g": "i32:16",
    }  # fmt: skip
    constants = {
        "BN": tile.images, "BM": tile.texts, "BD": tile.depth, "BAND": 8, "PARTS": tile.parts, "EVEN": even,
        "CHECKED": checked, "GROUP": tile.group, "DESCRIPTORS": tile.descriptors, "GRADIENTS": gradients,
        "UNIT": 1024 if dtype == "fp16" else 1, "PRECISION": precision, "INTERPRETED": False,
        "HAS_IDS": ids, "WEIGHTED": weighted,
    }  # fmt: skip
    warps = choose_warps(tile, weighted=weighted)
    options = {"num_warps": warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    return compile_kernel(sigmoid_tile_kernel, capability, types, constants, **options)


def check_resources(code, capability):
    assert code.stack == 0, "a stack means spilled registers"
    assert code.local == 0
    assert code.shared <= SHARED_LIMIT[capability] * 1024
    assert code.tensor_columns <= 512
    # a kernel of nothing but a trap has no stack and spills nothing
    assert code.instructions[MATRIX_INSTRUCTION[capability]] > 0
    assert code.total > 500


def per_logit(code, tile):
    return code.total * code.threads / (tile.images * tile.texts)


@pytest.mark.parametrize("width", WIDTHS)
def test_one_compilation_serves_the_widths_of_the_models(width):
    assert all(width % tile.depth == 0 for tile in (HOPPER, AMPERE, HOPPER_FP32, AMPERE_FP32))
    assert width % 16 == 0


@pytest.mark.parametrize(("capability", "dtype"), SHIPPED)
def test_tiles_do_not_spill_and_use_the_matrix_units(capability, dtype):
    tile = choose_tile(divmod(capability, 10), ELEMENT[dtype], aligned=True)
    inner = tile_kernel(capability, dtype, tile, checked=False)
    check_resources(inner, capability)
    edge = tile_kernel(capability, dtype, tile, checked=True)
    check_resources(edge, capability)
    if dtype == "bf16":
        bounds = BOUNDS if TRITON >= (3, 9) else BOUNDS_BEFORE_3_9
        # all but the tiles at an edge or with matching pairs run the inner one
        assert per_logit(inner, tile) <= bounds[capability][0]
        assert per_logit(edge, tile) <= bounds[capability][1]
    if tile.descriptors:
        assert 2 * (inner.shared + 1024) <= 228 * 1024, "two programs share a multiprocessor"
        assert inner.registers * inner.threads * 2 <= 65536


CANDIDATES = [
    (capability, dtype, tile)
    for capability, dtype in [
        (80, "bf16"),
        (80, "fp32"),
        (90, "bf16"),
        (90, "fp32"),
        (100, "bf16"),
        (100, "fp32"),
    ]
    for tile in candidates(
        choose_tile(divmod(capability, 10), ELEMENT[dtype], aligned=True), divmod(capability, 10)
    )[1:]
]


@pytest.mark.parametrize(("capability", "dtype", "tile"), CANDIDATES)
def test_what_tuning_may_choose_does_not_spill(capability, dtype, tile):
    # with the branch for edges and matching pairs, which needs more
    check_resources(tile_kernel(capability, dtype, tile, checked=True), capability)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_evaluation_and_odd_widths_do_not_spill(capability):
    tile = choose_tile((capability // 10, 0), 2, aligned=True)
    value = tile_kernel(capability, "bf16", tile, checked=True, gradients=False)
    check_resources(value, capability)
    # with the branch for edges; measured 14.2 to 15.5, with Triton 3.6 up to 16.4
    assert per_logit(value, tile) <= 18
    odd = choose_tile((capability // 10, 0), 2, aligned=False)
    check_resources(tile_kernel(capability, "bf16", odd, checked=True, even=False), capability)


def score_kernel(capability, dtype, tile: Tile, *, checked, ids):
    def embeddings(rows):
        return f"tensordesc<{dtype}[{rows}, {tile.depth}]>" if tile.descriptors else f"*{dtype}:16"

    types = dict.fromkeys(("SCALE", "BIAS", "ROW_SUMS", "COLUMN_SUMS"), "*fp32:16")
    types |= dict.fromkeys(("X_IDS", "SORTED", "Y_IDS"), "*i32:16") | dict.fromkeys(
        ("n", "m", "positives"), "i32"
    )
    types |= {"X": embeddings(tile.images), "Y": embeddings(tile.texts), "width": "i32:16", "weight": "fp32"}
    constants = {
        "BN": tile.images, "BM": tile.texts, "BD": tile.depth, "BAND": 8, "PARTS": tile.parts, "EVEN": True,
        "CHECKED": checked, "DESCRIPTORS": tile.descriptors, "PRECISION": "tf32x3", "INTERPRETED": False,
        "HAS_IDS": ids,
    }  # fmt: skip
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    return compile_kernel(score_tile_kernel, capability, types, constants, **options)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_scores_do_not_spill(capability, dtype):
    tile = choose_tile(divmod(capability, 10), ELEMENT[dtype], aligned=True)
    inner = score_kernel(capability, dtype, tile, checked=False, ids=False)
    for code in (inner, score_kernel(capability, dtype, tile, checked=True, ids=True)):
        check_resources(code, capability)
    if dtype == "bf16":
        # measured 19.4, 20.3, 32.4: on sm_100 a thread has a row, so columns are summed by shuffles
        assert per_logit(inner, tile) <= (35 if capability == 100 else 23)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_pair_ids_do_not_spill(capability, dtype):
    def compiled(weighted, **options):
        tile = choose_tile(divmod(capability, 10), ELEMENT[dtype], aligned=True)
        code = tile_kernel(capability, dtype, tile, checked=True, ids=True, weighted=weighted, **options)
        check_resources(code, capability)
        return per_logit(code, tile)

    left_out, weighted = compiled(weighted=False), compiled(weighted=True)
    if dtype == "bf16":
        # with both branches, of which a tile without alike pairs takes neither: 23.1, 22.9, 23.1; with Triton 3.6
        # 23.3, 23.0, 25.2
        assert left_out <= (25 if TRITON >= (3, 9) or capability != 100 else 27)
        # and with the second round: 32.8 (eight warps), 26.2, 27.6; with Triton 3.6 33.4, 26.6, 29.1
        assert weighted <= (36 if capability == 80 else 30)
        # 17.7, 17.4, 18.4; with Triton 3.6 17.9, 17.6, 19.4
        assert compiled(weighted=False, gradients=False) <= 21
        compiled(weighted=True, gradients=False)


@pytest.mark.parametrize(
    ("capability", "dtype", "aligned", "precision"),
    [
        (86, "bf16", True, "tf32"),
        (89, "fp32", True, "tf32x3"),
        (80, "fp32", False, "tf32x3"),
        (90, "fp32", False, "tf32x3"),
        (100, "fp32", False, "tf32x3"),
        (90, "fp32", True, "tf32"),
    ],
)
def test_other_gpus_and_precisions_do_not_spill(capability, dtype, aligned, precision):
    tile = choose_tile(divmod(capability, 10), ELEMENT[dtype], aligned=aligned)
    code = tile_kernel(capability, dtype, tile, checked=True, even=aligned, precision=precision)
    check_resources(code, capability)


@pytest.mark.parametrize("capability", [80, 90])
def test_the_finish_does_not_spill(capability):
    pointers = dict.fromkeys(("X", "Y"), "*bf16:16") | dict.fromkeys(
        ("SCALE", "BIAS", "DX", "DY", "SUMS"), "*fp32:16"
    )
    types = pointers | {"n": "i32", "m": "i32", "positives": "i32", "width": "i32:16"}
    constants = {"BN": 8, "BD": 256, "GRADIENTS": True, "UNIT": 1, "INTERPRETED": False}
    code = compile_kernel(finish_kernel, capability, types, constants, enable_fp_fusion=True)
    assert code.stack == 0
    assert code.local == 0
    assert code.total > 100


@pytest.mark.parametrize(("capability", "dtype"), [(80, "bf16"), (90, "fp32"), (100, "fp16")])
def test_the_softmax_does_not_spill(capability, dtype):
    types = dict.fromkeys(("LOGITS", "BIAS", "FACTORS", "LOSSES"), "*fp32:16")
    types |= {"TARGETS": "*i64:16", "G": f"*{dtype}:16", "width": "i32"}
    types |= {"stride_logits": "i32:16", "stride_g": "i32:16"}
    constants = {"BLOCK": BLOCK, "HAS_BIAS": True, "GRADIENTS": True, "INTERPRETED": False}
    code = compile_kernel(
        softmax_kernel, capability, types, constants, num_warps=WARPS, enable_fp_fusion=True
    )
    assert code.stack == 0
    assert code.local == 0
    # so that eight programs of 256 threads share a multiprocessor and hide each other's loads; older Triton
    # releases need up to 106, which leaves room for two
    assert code.registers <= (64 if TRITON >= (3, 9) else 128)
    assert code.total > 100
