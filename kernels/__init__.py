"""The public ops. Needs torch alone, so that the folder can be used without the training system."""

from kernels.sigmoid_loss import sigmoid_loss

__all__ = ["sigmoid_loss"]
