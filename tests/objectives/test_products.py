"""What a training step multiplies, and in which dtype, counted op by op under bf16 autocast."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.testing import assert_close
from siglip_train.objectives.sigmoid import SigmoidLoss
from siglip_train.objectives.training_model import TrainingModel
from tests.kernels.test_sigmoid_loss import blocks_by_dtype
from tests.objectives.tiny import tiny_batch, tiny_model

BF16, FP32 = torch.bfloat16, torch.float32
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")


class Recorder(TorchDispatchMode):
    """products: by the dtypes of their factors. casts: from fp32 to bf16, by shape."""

    def __init__(self):
        super().__init__()
        self.products, self.casts = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in PRODUCTS:
            self.products[args[-2].dtype, args[-1].dtype] += 1
        elif name == "_to_copy" and (args[0].dtype, result.dtype) == (FP32, BF16):
            self.casts[tuple(result.shape)] += 1
        return result


def test_a_step_multiplies_in_bf16_and_casts_each_activation_once():
    model, batch = tiny_model(FP32), tiny_batch(6, FP32)
    whole = TrainingModel(model, {"sigmoid": SigmoidLoss()})
    with Recorder() as forward, torch.autocast("cpu", BF16), blocks_by_dtype() as dtypes:
        losses = whole(batch)
    with Recorder() as backward:
        losses.total.backward()
    # patches, a block, the pool; a block, the head. In fp32 the table of positions, and the loss by torch's chunks, for
    # which a GPU has the 16-bit kernel
    assert forward.products == {(BF16, BF16): (1 + 6 + 6) + (6 + 1), (FP32, FP32): 1 + 3}
    assert dtypes == [torch.float16]
    # two for each, but for patches, which need no gradient; those of the loss are made in forward
    assert backward.products == {(BF16, BF16): 2 * 20 - 1, (FP32, FP32): 1}
    images, texts = (6, 4, 16), (6, 5, 16)
    # both norms of a block, and the tokens that the pool reads as keys and as values
    assert (forward.casts[images], forward.casts[texts]) == (3, 2)
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == FP32, name


def test_gradients_under_autocast_are_near_those_of_fp32():
    """Queries, keys and values share one cast, so their gradients for its input are summed in bf16."""
    found = []
    for is_on in (False, True):
        model, batch = tiny_model(FP32), tiny_batch(6, FP32)
        with torch.autocast("cpu", BF16, enabled=is_on):
            losses = TrainingModel(model, {"sigmoid": SigmoidLoss()})(batch)
        losses.total.backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert_close(found[1], found[0], 3e-2)  # measured 1.7e-2
