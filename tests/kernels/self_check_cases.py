"""The self-check with the real kernels, in the process that `test_self_check.py` starts."""

import logging

import pytest
import torch
import torch.distributed as dist

from kernels import dispatch, linear_cross_entropy, self_check, sigmoid_loss, sigmoid_loss_scores
from kernels.dispatch import force
from kernels.linear_cross_entropy import chunks, triton_softmax
from kernels.self_check import is_right
from kernels.sigmoid_loss import Exchange
from kernels.sigmoid_loss.triton import block as triton_block
from kernels.sigmoid_loss.triton import sample
from kernels.sigmoid_loss.triton.sample import BlockSample
from kernels.testing import rms_ratio
from tests.kernels.test_sigmoid_loss import INIT, make
from tests.ranks import run_ranks
from tests.tiers import one_in

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
OPS = ["sigmoid_loss_block", "sigmoid_loss_block_value", "sigmoid_loss_block_scores"]
# several of the interpreter's tiles of 32 x 32; a GPU takes the blocks that users' GPUs take
SMALL = ((40, 45, 24, 7, 10.0), (32, 32, 32, None, 60.0))

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    be_like_a_gpu(monkeypatch.setattr)


def be_like_a_gpu(setattr):
    setattr(self_check, "_answers", {})
    if DEVICE.type == "cpu":
        setattr(dispatch, "runs_triton", lambda device: True)
        setattr(sample, "_BLOCKS", SMALL)


def all_samples():
    return {
        str(block): block for op in OPS for weight in (None, 0.0, 0.5) for block in [BlockSample(op, weight)]
    } | {"linear_cross_entropy": chunks._sample}


@pytest.mark.parametrize("name", one_in(3, all_samples()))
def test_every_sample_passes(name):
    for dtype in (
        (torch.bfloat16, torch.float16, torch.float32) if DEVICE.type == "cuda" else (torch.bfloat16,)
    ):
        assert is_right(name, DEVICE, dtype, all_samples()[name])


@pytest.mark.slow
def test_the_whole_sample_passes(monkeypatch):
    monkeypatch.undo()
    # measured in the interpreter: sums 6e-8, gradients 1.5e-3, in fp32 3e-7, in fp16 2e-4
    assert is_right("sigmoid_loss", DEVICE, torch.bfloat16, BlockSample(OPS[0], None))


def losses(dtype=torch.bfloat16):
    """Of all ops, with gradients: a name and what it gave."""
    images, texts, scale, bias = (tensor.to(DEVICE) for tensor in make(40, 40, 24, *INIT, dtype))
    leaf = images.clone().requires_grad_()
    sigmoid_loss(leaf, texts, scale, bias).backward()
    with torch.inference_mode():
        value = sigmoid_loss(images, texts, scale, bias)
        scores = sigmoid_loss_scores(images, texts, scale, bias)
    targets = torch.arange(40, device=DEVICE)
    return [leaf.grad, value, *scores, linear_cross_entropy(images, texts, targets)]


def test_ops_ask_once_and_leave_the_random_state_and_the_grad_mode(monkeypatch, caplog):
    asked = []
    monkeypatch.setattr(self_check, "is_right", lambda *args: (asked.append(args[:3]), is_right(*args))[1])
    torch.manual_seed(3)
    before = torch.get_rng_state(), torch.cuda.get_rng_state() if DEVICE.type == "cuda" else torch.zeros(1)
    with caplog.at_level(logging.WARNING):
        losses()
        first = len(asked)
        losses()
    assert (before[0] == torch.get_rng_state()).all()
    assert DEVICE.type == "cpu" or (before[1] == torch.cuda.get_rng_state()).all()
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    # loss and gradients, value, scores, linear cross-entropy
    assert len(asked) == first == len(set(asked)) == 4
    assert set(self_check._answers.values()) == {True}
    assert not caplog.records


def test_sabotaged_kernels_are_not_used(monkeypatch, caplog):
    with force("chunked"):
        expected = losses()
    sabotage(monkeypatch.setattr)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            for found, truth in zip(losses(), expected, strict=True):
                assert (found == truth).all()
    assert set(self_check._answers.values()) == {False}
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 4
    for op in (*OPS, "linear_cross_entropy"):
        assert any(f"{op} for bfloat16 on" in message and "is off by" in message for message in messages)


def sabotage(setattr):
    """One wrong row or column in all that is made of tiles, one wrong slope in all that is made of rows."""
    store = triton_block._Block.tiles, triton_block._Block.scores, triton_softmax.losses_and_slopes

    def tiles(block, chunk, start, G):
        sums = store[0](block, chunk, start, G)
        if G is not None:
            G[:, len(block.texts) - 1] = 0
        return sums * 1.01

    def scores(block, chunk, start):
        rows, columns = store[1](block, chunk, start)
        return rows, columns * (1 + 0.1 * (torch.arange(len(columns), device=columns.device) == 1))

    def losses_and_slopes(logits, targets, *args, **options):
        return store[2](logits, targets, *args, **options) * 1.01

    setattr(triton_block._Block, "tiles", tiles)
    setattr(triton_block._Block, "scores", scores)
    setattr(triton_softmax, "losses_and_slopes", losses_and_slopes)


def differing_ranks():
    """Rank 0 trusts its kernel, rank 1 does not."""
    rank, size = dist.get_rank(), dist.get_world_size()
    be_like_a_gpu(setattr)
    if rank == 1:
        sabotage(setattr)
    whole = make(40, 40, 24, *INIT, torch.float32)
    leaves = [part.chunk(size)[rank].clone().requires_grad_() for part in whole[:2]] + whole[2:]
    sigmoid_loss(*leaves, group=dist.group.WORLD, exchange=Exchange("ring")).backward()
    return list(set(self_check._answers.values())), [leaf.grad for leaf in leaves[:2]]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="ranks of the test are processes on one CPU")
def test_ranks_that_disagree_exchange_the_same():
    whole = make(40, 40, 24, *INIT, torch.float32)
    leaves = [part.requires_grad_() for part in whole[:2]]
    with force("chunked"):
        sigmoid_loss(*leaves, *whole[2:]).backward()
    results = run_ranks(2, differing_ranks)
    assert [used for used, _ in results] == [[True], [False]]
    for part in range(2):
        gradient = torch.cat([torch.from_numpy(gradients[part]) for _, gradients in results]) / 2
        assert rms_ratio(gradient, leaves[part].grad) < 2e-6  # measured 2e-7
