"""The model and its objectives as one module: what the engine wraps and the loop calls."""

from collections.abc import Mapping

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

    def forward(self, batch: Batch) -> Losses:
        """Run the passes the objectives ask for, in config order, and return the losses of `batch`."""
        forward_pass = ForwardPass(self.model, batch)
        terms = {name: objective(forward_pass) for name, objective in self.objectives.items()}
        weighted = [self.objectives[name].weight * term for name, term in terms.items()]
        return Losses(torch.stack(weighted).sum(), {name: term.detach() for name, term in terms.items()})
