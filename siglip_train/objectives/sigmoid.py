"""The sigmoid loss of SigLIP as an objective, over the texts of all ranks."""

import logging
import math
import re
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from kernels import sigmoid_loss
from kernels.sigmoid_loss import Exchange, check_exchange, choose_exchange
from kernels.sigmoid_loss.cost_model import Form
from siglip_train.distributed.collectives import is_distributed
from siglip_train.objectives.base import Objective
from siglip_train.objectives.forward_pass import ForwardPass

log = logging.getLogger(__name__)

_PLAIN: dict[str, Form | Literal["auto"]] = {
    "auto": "auto",
    "ring": "ring",
    "both_directions": "both_directions",
    "node_ring": "node_ring",
    "all_gather": "all_gather",
}
_DTYPES = {"fp32": None, "bf16": torch.bfloat16}
_HASH_BASE = 0x9E3779B97F4A7C15  # odd, with its bits well mixed


class SigmoidLoss(Objective):
    """Every image against every text of the global batch, matched or not (SigLIP, section 3.2).

    exchange: how texts meet the images of other ranks: `auto` (the fastest by a cost model), `ring`, `both_directions`,
    `node_ring` (`node_ring:8` with 8 ranks a node), `grid:4x2` (rows x columns of ranks) or `all_gather`; README of
    kernels/sigmoid_loss. exchange_dtype: `bf16` halves what is sent and rounds it. same_text_weight: how often an image
    counts against another sample's text that has the same tokens as its own, and so is none of its negatives; 0 leaves
    such pairs out, 1 (as published) treats them as all others. Raises ValueError for other values, and for a form that
    does not fit the number of ranks, where there are several.
    """

    pairs_samples = True

    def __init__(
        self,
        *,
        weight: float = 1.0,
        exchange: str = "auto",
        exchange_dtype: Literal["fp32", "bf16"] = "fp32",
        same_text_weight: float = 1.0,
    ) -> None:
        super().__init__(weight=weight)
        if not 0 <= same_text_weight < math.inf:
            raise ValueError(f"same_text_weight is {same_text_weight}: give a number of at least 0")
        self._same_text_weight = same_text_weight
        self._exchange = parse_exchange(exchange, exchange_dtype)
        self._is_announced = False
        if is_distributed():
            check_exchange(self._exchange, _all_ranks())

    def forward(self, forward_pass: ForwardPass) -> Tensor:
        """Return the sum over all texts, mean over this rank's images.  # all ranks"""
        model = forward_pass.model
        images, texts = forward_pass.image_embedding, forward_pass.text_embedding
        group = _all_ranks() if is_distributed() else None
        ids = None if self._same_text_weight == 1 else text_ids(forward_pass.batch.texts)
        if group is not None and not self._is_announced:
            chosen = choose_exchange(self._exchange, images, group, has_ids=ids is not None)
            log.info("exchange of texts between ranks: %s", chosen)
            self._is_announced = True
        with record_function("objective/sigmoid"):
            return sigmoid_loss(
                images,
                texts,
                model.logit_scale.exp(),
                model.logit_bias,
                image_ids=ids,
                text_ids=ids,
                same_id_weight=self._same_text_weight,
                group=group,
                exchange=self._exchange,
            )


def text_ids(tokens: Tensor) -> Tensor:
    """A number for each text: tokens `[B, context_length]` -> `[B]` int64, not negative; equal for equal tokens.

    A polynomial modulo 2^63, so that ranks compare numbers and not tokens: among a million different texts, two share
    one with a chance of 1e-7.
    """
    powers = [pow(_HASH_BASE, place, 1 << 64) for place in range(tokens.shape[1])]
    signed = [power - (1 << 64) if power >= 1 << 63 else power for power in powers]
    return ((tokens + 1) * torch.tensor(signed, device=tokens.device)).sum(1) & ((1 << 63) - 1)


def parse_exchange(name: str, dtype: str) -> Exchange:
    """The `Exchange` that a config's `exchange` and `exchange_dtype` name; ValueError for others."""
    if dtype not in _DTYPES:
        raise ValueError(f"exchange_dtype is {dtype!r}: choose fp32 or bf16")
    travels = _DTYPES[dtype]
    if name in _PLAIN:
        return Exchange(_PLAIN[name], dtype=travels)
    if found := re.fullmatch(r"node_ring:(\d+)", name):
        return Exchange("node_ring", ranks_per_node=int(found[1]), dtype=travels)
    if found := re.fullmatch(r"grid:(\d+)x(\d+)", name):
        return Exchange("grid", grid=(int(found[1]), int(found[2])), dtype=travels)
    raise ValueError(
        f"exchange is {name!r}: choose {', '.join(_PLAIN)}, node_ring:8 (ranks a node) or grid:4x2 (rows x columns of "
        "ranks)"
    )


def expected_initial_loss(global_batch_size: int, bias: float = -10.0) -> float:
    """Loss that an untrained model should start near, for the user to compare with the first one logged.

    Logits of unrelated unit vectors lie round `bias`, so an image pays softplus(-bias) for its own text and
    softplus(bias) for each other one: 11.5 for a batch of 32768. The spread of the cosines is left out.
    """
    return _softplus(-bias) + (global_batch_size - 1) * _softplus(bias)


def _all_ranks() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def _softplus(value: float) -> float:
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))
