"""Sigmoid loss of SigLIP with its gradients in one pass; the mathematics is in README.md."""

from kernels.sigmoid_loss.exchange.choose import Exchange, check_exchange, choose_exchange
from kernels.sigmoid_loss.exchange.cost_model import Links
from kernels.sigmoid_loss.exchange.wait_clock import exchange_seconds
from kernels.sigmoid_loss.op import sigmoid_loss
from kernels.sigmoid_loss.pairs import PairIds
from kernels.sigmoid_loss.scores import sigmoid_loss_scores

__all__ = [
    "Exchange",
    "Links",
    "PairIds",
    "check_exchange",
    "choose_exchange",
    "exchange_seconds",
    "sigmoid_loss",
    "sigmoid_loss_scores",
]
