"""Agreement with open_clip's SigLipLoss: stored outputs, single and distributed, and in place of it."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from kernels import sigmoid_loss
from kernels.testing import assert_close
from tests.kernels.test_sigmoid_loss import INIT, TRAINED, make

FOLDER = Path(__file__).resolve().parents[2].parent / "shared" / "goldens" / "open_clip_siglip_loss"
NAMES = ("loss", "g_img", "g_txt", "g_log_scale", "g_bias")
# for each dtype: relative to the loss, and to the largest entry of a gradient (README of the goldens)
LIMITS = {"f64": (1e-11, 1e-11), "f32": (2e-6, 5e-6)}
DTYPES = {"f64": torch.float64, "f32": torch.float32}


def load():
    return np.load(FOLDER / "inputs.npz"), np.load(FOLDER / "expected.npz")


def outputs(images, texts, log_scale, bias, group=None):
    """Loss, gradients of both embeddings, of the LOGARITHM of the scale, and of the bias."""
    leaves = [images, texts, torch.as_tensor(log_scale), torch.as_tensor(bias)]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    loss = sigmoid_loss(leaves[0], leaves[1], leaves[2].exp(), leaves[3], group=group)
    return dict(zip(NAMES, [loss.detach(), *torch.autograd.grad(loss, leaves)], strict=True))


def error(actual, expected):
    """Largest difference, relative to the largest entry."""
    expected = torch.as_tensor(expected).double()
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.skipif(not FOLDER.exists(), reason="the goldens are not beside the checkout")
@pytest.mark.parametrize("kind", ["f64", "f32"])
@pytest.mark.parametrize("state", ["init", "trained"])
@pytest.mark.parametrize("size", ["64x32", "257x96"])
def test_stored_single_process_outputs(size, state, kind):
    inputs, expected = load()
    embeddings = (torch.from_numpy(inputs[f"{size}/{part}"]).to(DTYPES[kind]) for part in ("img", "txt"))
    actual = outputs(*embeddings, *inputs[f"tb/{state}"])
    for name, value in actual.items():
        key = f"single/{size}/{state}/{kind}/{name}"
        if key in expected:
            assert error(value, expected[key]) < LIMITS[kind][name != "loss"], name


def distributed_golden_errors(group):
    """Error and limit of every stored output of this rank; none without the goldens or for other world sizes."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if not FOLDER.exists() or world not in (2, 4):
        return {}
    inputs, expected = load()
    found = {}
    for size, kind in [("64x32", "f64"), ("64x32", "f32"), ("256x96", "f64")]:
        images, texts = _distributed_inputs(inputs, size, rank, world, DTYPES[kind])
        actual = outputs(images, texts, *inputs["tb/trained"], group=group)
        for name, value in actual.items():
            key = f"dist/{size}/W{world}/bidir/{kind}/{name}"
            if key in expected:
                stored = torch.from_numpy(expected[key]).chunk(world)[rank]
                found[key] = error(value.reshape(stored.shape), stored), LIMITS[kind][name != "loss"]
    return found


def _distributed_inputs(inputs, size, rank, world, dtype):
    # the stored 256 x 96 case is the first 256 rows of the 257 x 96 one
    source, rows = ("257x96", 256) if size == "256x96" else (size, 64)
    parts = (torch.from_numpy(inputs[f"{source}/{part}"])[:rows].to(dtype) for part in ("img", "txt"))
    return [part.chunk(world)[rank] for part in parts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("scale", "bias"), [INIT, TRAINED])
def test_stands_in_for_open_clip_s_loss(scale, bias, dtype):
    loss_class = pytest.importorskip("open_clip.loss").SigLipLoss
    images, texts, scale, bias = (tensor.to(dtype) for tensor in make(61, 61, 48, scale, bias))
    limit = 1e-12 if dtype == torch.float64 else 1e-6
    found = []
    for function in (loss_class(rank=0, world_size=1), sigmoid_loss):
        leaves = [tensor.clone().requires_grad_() for tensor in (images, texts, scale, bias)]
        loss = function(*leaves)
        found.append([loss.detach(), *torch.autograd.grad(loss * 1.7, leaves)])
    for theirs, ours in zip(*found, strict=True):
        assert_close(ours, theirs, limit)
