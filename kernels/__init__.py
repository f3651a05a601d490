"""The public ops. Needs torch alone, so that the folder can be used without the training system."""

from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.sigmoid_loss import sigmoid_loss

__all__ = ["linear_cross_entropy", "sigmoid_loss"]
