"""What tests of all ops and the self-check share: pairs of results, their error, odd shapes, NaN memory, op counts."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# (rows, columns): single, prime, one off a power of two, wide, tall
ODD_SHAPES = [
    (1, 1), (1, 2), (2, 1), (1, 97), (97, 1), (2, 3), (3, 2), (5, 5), (7, 13), (13, 7), (15, 17), (16, 16),
    (17, 15), (31, 33), (33, 31), (63, 65), (64, 64), (65, 63), (101, 103), (128, 1), (1, 128), (127, 129),
]  # fmt: skip


class Comparison(NamedTuple):
    """One result of a kernel and what it should be. is_rounded: it is made of weights in the inputs' dtype."""

    name: str
    actual: Tensor
    expected: Tensor
    is_rounded: bool


# runs an op both ways on a device in a dtype; must leave the random state alone
Sample = Callable[[torch.device, torch.dtype], Iterable[Comparison]]


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the error over that of `expected`: a measure that does not depend on size or scale."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.numel() == 0:
        return 0.0
    expected = expected.double()
    error = (actual.double() - expected).square().mean().sqrt()
    if error == 0:
        return 0.0
    # NaN and infinity give NaN or infinity, which no limit lets pass
    return (error / expected.square().mean().sqrt()).item()


def assert_close(actual: Tensor, expected: Tensor, limit: float, name: str = "") -> None:
    """Fail unless the RMS ratio is at most `limit`; NaN fails."""
    ratio = rms_ratio(actual, expected)
    assert ratio <= limit, f"{name} is off by {ratio:.2e} (RMS ratio), more than {limit:.0e}"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what `torch.empty` gives with NaN (integers: their maximum), so that reading it before writing shows."""
    filling: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), filling.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)  # noqa: FBT003
    filling.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        filling.fill_uninitialized_memory = before[1]


class OpRecorder(TorchDispatchMode):
    """Within it, counts every op that torch runs, and keeps the size of each tensor an op newly allocates.

    calls: number of calls by name, for example `mm`. allocated: elements of each new storage, largest first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self._sizes: list[int] = []

    @property
    def allocated(self) -> list[int]:
        return sorted(self._sizes, reverse=True)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        self.calls[function.overloadpacket.__name__] += 1
        tensors = (args, tuple((kwargs or {}).values()))
        known = {t.untyped_storage().data_ptr() for t in _tensors(tensors)}
        self._sizes += [t.numel() for t in _tensors(result) if t.untyped_storage().data_ptr() not in known]
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
