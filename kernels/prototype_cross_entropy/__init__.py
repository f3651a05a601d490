"""Cross-entropy between a teacher's and a student's choice of prototypes, without their logits; see README.md."""

from kernels.prototype_cross_entropy.op import PrototypeSums, Temperatures, prototype_cross_entropy

__all__ = ["PrototypeSums", "Temperatures", "prototype_cross_entropy"]
