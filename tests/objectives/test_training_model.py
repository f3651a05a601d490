"""The weighted sum of objectives over one shared forward pass."""

import math

import pytest
import torch

from siglip_train.objectives.base import Losses, Objective
from siglip_train.objectives.sigmoid import SigmoidLoss
from siglip_train.objectives.training_model import TrainingModel
from tests.objectives.tiny import tiny_batch, tiny_model


class TextNorm(Objective):
    """A second objective, with a head of its own."""

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__(weight=weight)
        self.head = torch.nn.Linear(16, 1, dtype=torch.float64)

    def forward(self, forward_pass):
        return {"samples": self.head(forward_pass.text.pooled).square().sum()}


def test_total_is_the_weighted_sum_of_the_terms():
    model = TrainingModel(tiny_model(), {"sigmoid": SigmoidLoss(weight=0.5), "norm": TextNorm(weight=3.0)})
    losses = model(tiny_batch(4))
    assert isinstance(losses, Losses)
    assert list(losses.terms) == ["sigmoid", "norm"]
    assert all(term.shape == () and not term.requires_grad for term in losses.terms.values())
    expected = 0.5 * losses.terms["sigmoid"] + 3.0 * losses.terms["norm"]
    assert losses.total.item() == pytest.approx(expected.item(), rel=1e-14)


def test_the_towers_run_once_for_all_objectives():
    model = TrainingModel(tiny_model(), {"sigmoid": SigmoidLoss(), "norm": TextNorm()})
    calls = []
    model.model.text.register_forward_hook(lambda *_: calls.append("text"))
    model(tiny_batch(2))
    assert calls == ["text"]


def test_gradients_reach_towers_scale_bias_and_heads():
    model = TrainingModel(tiny_model(), {"sigmoid": SigmoidLoss(), "norm": TextNorm()})
    model(tiny_batch(4)).total.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == []
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    assert model.objectives["norm"].head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_a_weight_that_is_not_finite_and_positive_is_refused(weight):
    with pytest.raises(ValueError, match="finite number above 0"):
        SigmoidLoss(weight=weight)
