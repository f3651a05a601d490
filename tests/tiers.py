"""Which cases of a long list `make test` runs; `make test-all` runs them all."""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def one_in(every: int, *values: Iterable[Any]) -> list[Any]:
    """For `parametrize`: all combinations of `values`; one in `every` is run by default, the others are slow.

    Where `every` has no divisor in common with the lengths, each value is among those that are run.
    """
    cases = list(itertools.product(*values))
    return [
        pytest.param(*case, marks=[] if number % every == 0 else [pytest.mark.slow])
        for number, case in enumerate(cases)
    ]
