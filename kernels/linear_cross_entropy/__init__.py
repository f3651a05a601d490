"""Cross-entropy of a linear layer over a large vocabulary without its logits; the mathematics is in README.md."""

from kernels.linear_cross_entropy.op import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
