"""The random decisions about one training sample, shared by the inputs that are made from it."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

_T = TypeVar("_T")


class Choices:
    """Draws from the sample's generator; a decision with a name is drawn once, by the input that asks first.

    So boxes can follow the crop and the mirror of their image.
    """

    def __init__(self, generator: np.random.Generator) -> None:
        self.generator = generator
        self._drawn: dict[str, Any] = {}

    def once(self, name: str, draw: Callable[[np.random.Generator], _T]) -> _T:
        """The decision `name`, by `draw` if no one has asked for it yet."""
        if name not in self._drawn:
            self._drawn[name] = draw(self.generator)
        return self._drawn[name]
