"""The sigmoid loss of SigLIP as an objective, over the texts of all ranks."""

import math

import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from kernels import sigmoid_loss
from siglip_train.distributed.collectives import is_distributed
from siglip_train.objectives.base import Objective
from siglip_train.objectives.forward_pass import ForwardPass


class SigmoidLoss(Objective):
    """Every image against every text of the global batch, matched or not (SigLIP, section 3.2)."""

    pairs_samples = True

    def forward(self, forward_pass: ForwardPass) -> Tensor:
        """Return the sum over all texts, mean over this rank's images.  # all ranks"""
        model = forward_pass.model
        images, texts = forward_pass.image_embedding, forward_pass.text_embedding
        group = dist.group.WORLD if is_distributed() else None
        with record_function("objective/sigmoid"):
            return sigmoid_loss(images, texts, model.logit_scale.exp(), model.logit_bias, group=group)


def expected_initial_loss(global_batch_size: int, bias: float = -10.0) -> float:
    """Loss that an untrained model should start near, for the user to compare with the first one logged.

    Logits of unrelated unit vectors lie round `bias`, so an image pays softplus(-bias) for its own text and
    softplus(bias) for each other one: 11.5 for a batch of 32768. The spread of the cosines is left out.
    """
    return _softplus(-bias) + (global_batch_size - 1) * _softplus(bias)


def _softplus(value: float) -> float:
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))
