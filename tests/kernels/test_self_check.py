"""When a kernel is checked, what follows from the answer, and that a check leaves no trace; the kernels themselves are
checked by `self_check_cases.py`, in a process of its own.
"""

import logging
from pathlib import Path

import pytest
import torch

from kernels import dispatch, self_check
from kernels.dispatch import force, implementation
from kernels.testing import Comparison
from tests.kernels.interpreted import compiled_on_a_gpu, run_cases

OP = "some_op"


@compiled_on_a_gpu
def test_triton_kernels_pass_their_self_check():
    run_cases(Path(__file__).with_name("self_check_cases.py"))


@pytest.mark.slow
@compiled_on_a_gpu
def test_triton_kernels_pass_their_self_check_with_all_samples():
    run_cases(Path(__file__).with_name("self_check_cases.py"), tier="slow")


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(dispatch, "runs_triton", lambda device: True)
    monkeypatch.setattr(self_check, "_answers", {})


class CountedSample:
    """Off by a share of each result; or what it raises."""

    def __init__(self, error=0.0, failure=None):
        self.error, self.failure, self.calls = error, failure, []

    def __call__(self, device, dtype):
        self.calls.append((device, dtype))
        if self.failure:
            raise self.failure
        truth = torch.ones(3, device=device, dtype=torch.float64)
        yield Comparison("sum", truth, truth, is_rounded=False)
        yield Comparison("slope", truth * (1 + self.error), truth, is_rounded=True)


def choices(sample, dtype=torch.bfloat16, calls=3, op=OP):
    return {implementation(torch.zeros(2, dtype=dtype), op, sample) for _ in range(calls)}


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-4), ("float16", 2e-3), ("bfloat16", 1e-2)])
def test_a_kernel_within_its_limit_is_used_and_one_beyond_it_is_not(dtype, limit):
    assert choices(CountedSample(0.9 * limit), getattr(torch, dtype)) == {"triton"}
    assert choices(CountedSample(1.1 * limit), getattr(torch, dtype), op="another") == {"chunked"}


def test_it_is_checked_once_for_an_op_a_device_and_a_dtype():
    samples = [CountedSample() for _ in range(3)]
    for sample, dtype, op in zip(
        samples, [torch.bfloat16, torch.float16, torch.float16], [OP, OP, "another"], strict=True
    ):
        assert choices(sample, dtype, op=op) == {"triton"}
        assert sample.calls == [(torch.device("cpu"), dtype)]


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (CountedSample(0.25), "slope is off by 2.5e-01"),
        (CountedSample(float("nan")), "slope is off by nan"),
        (CountedSample(failure=RuntimeError("out of resource: shared memory")), "out of resource: shared memory"),
    ],
)  # fmt: skip
def test_a_kernel_that_is_wrong_or_fails_is_not_used_and_one_warning_says_so(sample, reason, caplog):
    with caplog.at_level(logging.WARNING):
        assert choices(sample) == {"chunked"}
    assert len(sample.calls) == 1
    (record,) = caplog.records
    for part in (OP, "bfloat16", "cpu", reason):
        assert part in record.getMessage()


def test_what_torch_alone_computes_and_what_is_forced_is_not_checked(monkeypatch):
    sample = CountedSample()
    assert choices(sample, torch.float64) == {"chunked"}
    for name in ("triton", "chunked"):
        with force(name):
            assert choices(sample) == {name}
    monkeypatch.undo()
    assert choices(sample) == {"chunked"}
    assert sample.calls == []


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_modes_of_the_caller_stay(mode):
    seen = []

    def sample(device, dtype):
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        yield from CountedSample()(device, dtype)

    with mode(), torch.autocast("cpu"):
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        assert choices(sample) == {"triton"}
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
        assert torch.is_autocast_enabled("cpu")
    assert seen == [(False, False)]


def test_compiled_code_asks_once_and_follows_the_answer():
    sample = CountedSample()

    def step(x):
        return x + 1 if implementation(x, OP, sample) == "triton" else x - 1

    compiled = torch.compile(step, backend="eager")
    for size in (2, 2, 3):
        assert (compiled(torch.zeros(size, dtype=torch.bfloat16)) == 1).all()
    assert len(sample.calls) == 1
