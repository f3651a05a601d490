"""Counts where the host waits for the device: on CUDA torch says so, on a CPU whatever would be a wait is counted.

A CPU has no device to wait for, so every read of a tensor's value counts, also of one that would lie on the host. What
moves by `Tensor.to` from one device to another is not seen there.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# what makes its shape, or a value for Python, from what tensors hold
_READS = {
    *(
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "equal",
        "is_nonzero",
        "unique_consecutive",
        "_unique2",
    ),
    *("repeat_interleave.Tensor", "bincount", "unique_dim"),
}
_METHODS = ("tolist", "cpu", "numpy")


@contextmanager
def waits(device: torch.device) -> Iterator[list[str]]:
    """The places of this project or of DeepSpeed at which the host waits, `file.py function`, in order."""
    found: list[str] = []
    if device.type == "cuda":
        with _said_by_torch(found):
            yield found
        return
    patches = [mock.patch.object(torch.Tensor, name, _noted(name, found)) for name in _METHODS]
    for patch in patches:
        patch.start()
    try:
        with _Reads(found):
            yield found
    finally:
        for patch in patches:
            patch.stop()


@contextmanager
def _said_by_torch(found: list[str]) -> Iterator[None]:
    def note(message: Warning | str, *_: object, **__: object) -> None:
        if "synchronizing CUDA operation" in str(message):
            found.append(_place())

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class _Reads(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::")
        by_mask = name.startswith("index.") and any(
            isinstance(each, torch.Tensor) and each.dtype in (torch.bool, torch.uint8) for each in args[1]
        )
        if by_mask or name in _READS or name.partition(".")[0] in _READS:
            self._found.append(_place())
        return func(*args, **(kwargs or {}))


def _noted(name: str, found: list[str]):
    method = getattr(torch.Tensor, name)

    def noted(tensor: torch.Tensor, *args, **options):
        found.append(_place())
        return method(tensor, *args, **options)

    return noted


def _place() -> str:
    """The innermost function outside torch and this file."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if (
            path.name != Path(__file__).name
            and not {"torch", "unittest"} & set(path.parts)
            and "<" not in str(path)
        ):
            return f"{path.name} {frame.f_code.co_name}"
        frame = frame.f_back
    return "?"
