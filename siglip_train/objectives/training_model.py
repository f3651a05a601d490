"""The model and its objectives as one module: what the engine wraps and the loop calls."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from siglip_train.batch import Batch
from siglip_train.models.siglip import Siglip
from siglip_train.objectives.base import Losses, Objective
from siglip_train.objectives.forward_pass import ForwardPass


class TrainingModel(nn.Module):
    """`model` and the objectives it is trained on, by the names they have in the config and in the logs."""

    def __init__(self, model: Siglip, objectives: Mapping[str, Objective]) -> None:
        super().__init__()
        self.model = model
        self.objectives = nn.ModuleDict(dict(objectives))

    def forward(self, batch: Batch, part: Callable[["TrainingModel", ForwardPass], Any] | None = None) -> Any:
        """Run the passes the objectives ask for and return the `Losses` of `batch`, or what `part` makes of them.

        All work goes through here, in parts where need be: ZeRO-3 gathers weights for the forward of a module.
        """
        forward_pass = ForwardPass(self.model, batch)
        return self.losses(forward_pass, self.objectives) if part is None else part(self, forward_pass)

    def losses(self, forward_pass: ForwardPass, names: Iterable[str]) -> Losses:
        """Return the losses of the named objectives in the order given; their total is 0 where none is named."""
        terms = {name: self.objectives[name](forward_pass) for name in names}
        weighted = [self.objectives[name].weight * term for name, term in terms.items()]
        total = torch.stack(weighted).sum() if weighted else self.model.logit_bias.new_zeros(())
        return Losses(total, {name: term.detach() for name, term in terms.items()})
