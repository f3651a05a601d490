"""Whether a Triton kernel computes here what torch does: asked on a small sample before anything rests on it."""

import logging
from collections.abc import Iterable

import torch

from kernels.device import device_of
from kernels.testing import Comparison, Sample, rms_ratio

log = logging.getLogger(__name__)

# RMS ratios, about five times what the kernels' tests measure: a single wrong row or column is off by ten times more.
# What is summed in fp32 from exact logits; gradients, made of weights that are rounded to the dtype
_SUMS = 1e-4
_GRADIENTS = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# both, for fp32 where `torch.set_float32_matmul_precision` lets products be rounded
_TF32 = 5e-3

_answers: dict[tuple[str, torch.device, torch.dtype], bool] = {}


# a compiler that traced the sample would compile the check into every step
@torch.compiler.disable
def passes(op: str, device: torch.device, dtype: torch.dtype, sample: Sample) -> bool:
    """`is_right`, asked once for an op, a device and a dtype; False, without asking, while a graph is captured."""
    key = op, device, dtype
    if key not in _answers:
        with device_of(device):
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                # the check waits for the device, which would break the capture: later, outside of one
                return False
            _answers[key] = is_right(op, device, dtype, sample)
    return _answers[key]


def is_right(op: str, device: torch.device, dtype: torch.dtype, sample: Sample) -> bool:
    """Whether all results of a sample are within their limits. If not, or if it does not run, one warning says why.

    The host waits for the device's current stream. Nothing is sent to other ranks, so each may ask when it likes.
    """
    place = f"{torch.cuda.get_device_name(device)} ({device})" if device.type == "cuda" else str(device)
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            wrong = beyond_limits(sample(device, dtype), dtype)
        reason = f"in its self-check {wrong} (RMS ratio)" if wrong else ""
    except Exception as error:  # whatever a compiler or driver says
        log.debug("the self-check of %s on %s", op, place, exc_info=True)
        reason = f"its self-check does not run: {type(error).__name__}: {error}"
    if reason:
        log.warning(
            "%s for %s on %s: the Triton kernel is not used in this process, but the slower form in torch: %s",
            op, str(dtype).removeprefix("torch."), place, reason,
        )  # fmt: skip
    return not reason


def beyond_limits(comparisons: Iterable[Comparison], dtype: torch.dtype) -> str:
    """Which results are further off than the kernels' rounding explains, and by how much; empty if none is."""
    ratios = [(found, rms_ratio(found.actual, found.expected)) for found in comparisons]
    # NaN is within no limit
    wrong = [pair for pair in ratios if not pair[1] <= _limit(dtype, is_rounded=pair[0].is_rounded)]
    return ", ".join(f"{found.name} is off by {ratio:.1e}" for found, ratio in wrong)


def _limit(dtype: torch.dtype, *, is_rounded: bool) -> float:
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return _TF32
    return _GRADIENTS[dtype] if is_rounded else _SUMS
