"""Sigmoid loss of SigLIP with its gradients in one pass; the mathematics is in README.md."""

from kernels.sigmoid_loss.op import sigmoid_loss
from kernels.sigmoid_loss.pair_ids import PairIds
from kernels.sigmoid_loss.ring import exchange_seconds
from kernels.sigmoid_loss.scores import sigmoid_loss_scores

__all__ = ["PairIds", "exchange_seconds", "sigmoid_loss", "sigmoid_loss_scores"]
