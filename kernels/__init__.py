"""The public ops. Needs torch alone, so that the folder can be used without the training system."""

from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.prototype_cross_entropy import prototype_cross_entropy
from kernels.sigmoid_loss import PairIds, sigmoid_loss, sigmoid_loss_scores

__all__ = [
    "PairIds",
    "linear_cross_entropy",
    "prototype_cross_entropy",
    "sigmoid_loss",
    "sigmoid_loss_scores",
]
