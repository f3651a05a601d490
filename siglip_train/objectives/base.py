"""What an objective is: a small module that turns the forward pass of a batch into one scalar."""

import math
from typing import NamedTuple

from torch import Tensor, nn

from siglip_train.objectives.forward_pass import ForwardPass


class Losses(NamedTuple):
    """What a training step gives back. A NamedTuple, as ZeRO-3 does not see into a dataclass.

    total: weighted sum, to differentiate. terms: every objective's own value, unweighted and detached, by name.
    """

    total: Tensor
    terms: dict[str, Tensor]


class Objective(nn.Module):
    """A term of the loss. Its heads, where it has any, are its submodules.

    weight: factor of this term in the total. Raises ValueError unless it is finite and above 0.
    pairs_samples: whether samples are compared with one another, so that the loss of a batch is not the mean of the
        losses of its parts. Such an objective asks the forward pass for embeddings alone.
    """

    pairs_samples = False

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__()
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(
                f"weight is {weight}: give a finite number above 0, or leave the objective out of the config"
            )
        self.weight = weight

    def forward(self, forward_pass: ForwardPass) -> Tensor:
        """Return this term, unweighted: a scalar, the mean over this rank's samples."""
        raise NotImplementedError
