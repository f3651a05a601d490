"""Sigmoid loss of SigLIP with its gradients in one pass; the mathematics is in README.md."""

from kernels.sigmoid_loss.op import sigmoid_loss
from kernels.sigmoid_loss.ring import exchange_seconds

__all__ = ["exchange_seconds", "sigmoid_loss"]
