"""Pairs that are alike: blocks and op against the float64 reference, on one process and several; refusals; memory."""

import pytest
import torch
import torch.distributed as dist

from kernels import sigmoid_loss
from kernels.sigmoid_loss import chunked
from kernels.sigmoid_loss.pairs import PairIds, number
from kernels.sigmoid_loss.reference import pairwise_loss_reference, sigmoid_loss_reference
from kernels.testing import OpRecorder, assert_close, poisoned_memory, rms_ratio
from tests.kernels.test_sigmoid_loss import INIT, NAMES, TRAINED, check_block, differentiate, make
from tests.ranks import run_ranks

WEIGHTS = [0.0, 0.5, 1.0, 3.0]


@pytest.fixture(autouse=True)
def _poison():
    with poisoned_memory():
        yield


def make_ids(n, m, weight, kinds=5, seed=1):
    """Few ids for many rows; about a fifth is negative, some of them equal. Beyond 32 bits, and not in order."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.cat(
        [torch.tensor([-7, -(2**40)]), torch.randperm(10**6, generator=generator)[:kinds] + 2**33]
    )
    images, texts = (values[torch.randint(len(values), (rows,), generator=generator)] for rows in (n, m))
    return PairIds(images, texts, weight)


def test_the_rule_pair_by_pair():
    """The reference, against a loop in plain words."""
    images, texts, scale, bias = make(6, 7, 4, *INIT)
    ids = PairIds(torch.tensor([3, 3, -1, 8, 0, 0]), torch.tensor([3, 9, -1, 3, 0, 8, 0]), 0.25)
    actual = pairwise_loss_reference(images, texts, scale, bias, positives=1, ids=ids)
    plain = pairwise_loss_reference(images, texts, scale, bias, positives=1)
    alike = [(0, 0), (0, 3), (1, 0), (1, 3), (3, 5), (4, 4), (4, 6), (5, 4)]  # (5, 6) matches
    for i in range(6):
        for j in range(7):
            assert actual[i, j] == plain[i, j] * (0.25 if (i, j) in alike else 1)


def test_numbers_are_equal_where_ids_are():
    ids = make_ids(60, 71, 0.0)
    numbers = number(ids)
    assert numbers.images.dtype == numbers.texts.dtype == torch.int32
    expected = (ids.images[:, None] == ids.texts) & (ids.texts >= 0)
    assert 0 < expected.sum() < expected.numel()
    assert torch.equal(numbers.images[:, None] == numbers.texts, expected)
    extremes = torch.tensor([2**63 - 1, 0, -(2**63), -1])
    expected = torch.eye(4, dtype=torch.bool) & torch.tensor([True, True, False, False])
    numbers = number(PairIds(extremes, extremes, 0.0))
    assert torch.equal(numbers.images[:, None] == numbers.texts, expected)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("positives", [None, 0, 2, -3])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 1), (1, 97), (7, 13), (17, 15), (64, 64), (101, 103)])
def test_block_equals_the_reference(n, m, positives, weight):
    # measured: at most 6e-16
    inputs = make(n, m, 1 + (n * m) % 19, 10.0, -3.0)
    check_block(inputs, [1e-14] * 5, positives=positives, ids=make_ids(n, m, weight), chunk_rows=16)


@pytest.mark.parametrize("weight", [0.0, 3.0])
@pytest.mark.parametrize("chunk_rows", [1, 7, 100, 101, 102, 1024])
def test_block_does_not_depend_on_the_chunk(chunk_rows, weight):
    ids = make_ids(101, 67, weight)
    check_block(make(101, 67, 24, 30.0, -8.0), [1e-14] * 5, positives=0, ids=ids, chunk_rows=chunk_rows)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_embeddings(dtype, weight):
    # measured, worst of all: loss 4e-8, images 4e-7, texts 4e-7, scale 2e-8, bias 2e-8; in bf16 with AMX 1.2e-3, 1.4e-4
    inputs = make(131, 127, 72, *TRAINED, dtype)
    limits = [3e-7, 2e-3, 2e-3, 4e-4, 3e-7] if dtype == torch.bfloat16 else [3e-7, 1e-6, 1e-6, 3e-7, 3e-7]
    check_block(inputs, limits, positives=0, ids=make_ids(131, 127, weight), chunk_rows=50)


def test_all_alike_at_weight_0_leaves_the_matching_pairs_alone():
    images, texts, scale, bias = make(9, 9, 8, *TRAINED)
    same = torch.zeros(9, dtype=torch.int64)
    block = chunked.sigmoid_loss_block(images, texts, scale, bias, positives=0, ids=PairIds(same, same, 0.0))
    matching = pairwise_loss_reference(images, texts, scale, bias).diagonal()
    # measured up to 1.1e-14, which depends on the CPU
    assert_close(block.loss, matching.sum(), 1e-13)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_op_takes_ids_of_any_integer_type(dtype, weight):
    inputs = make(37, 37, 24, *TRAINED)
    image_ids, text_ids = ((torch.arange(37) * step % 6).to(dtype) for step in (5, 1))
    ids = PairIds(image_ids.long(), text_ids.long(), weight)
    value, *gradients = differentiate(sigmoid_loss_reference, inputs, ids=ids)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    options = {"image_ids": image_ids, "text_ids": text_ids, "same_id_weight": weight}
    loss = sigmoid_loss(*leaves, **options)
    loss.backward()
    assert_close(loss.detach(), value, 1e-14, "loss")
    for name, leaf, truth in zip(NAMES[1:], leaves, gradients, strict=True):
        assert_close(leaf.grad, truth, 1e-14, name)
    with torch.no_grad():
        assert_close(sigmoid_loss(*leaves, **options), value, 1e-14, "value")


def test_alike_pairs_are_left_out_unless_a_weight_is_given():
    inputs, same = make(12, 12, 8, *INIT), torch.arange(12) // 3
    left_out = sigmoid_loss(*inputs, image_ids=same, text_ids=same)
    assert left_out == sigmoid_loss(*inputs, image_ids=same, text_ids=same, same_id_weight=0)
    assert left_out < sigmoid_loss(*inputs)


def test_no_tensor_of_n_times_m_elements_is_made_for_ids():
    n, width = 5 * chunked.CHUNK_ROWS // 2, 32
    inputs = [tensor.float().requires_grad_() for tensor in make(n, n, width, *INIT)]
    ids = make_ids(n, n, 0.5)
    with OpRecorder() as recorder:
        sigmoid_loss(*inputs, image_ids=ids.images, text_ids=ids.texts, same_id_weight=0.5).backward()
    chunk, rest = chunked.CHUNK_ROWS * n, (n - 2 * chunked.CHUNK_ROWS) * n
    # logits, their sigmoids, counts; and for each of three chunks, who is alike
    assert recorder.allocated[:6] == [chunk] * 5 + [rest]
    assert recorder.allocated[6] <= n * width


def test_without_ids_nothing_more_is_computed():
    inputs = [tensor.requires_grad_() for tensor in make(40, 40, 16, *INIT)]
    with OpRecorder() as recorder:
        sigmoid_loss(*inputs)
    assert not recorder.calls.keys() & {"sort", "searchsorted", "eq", "masked_fill", "masked_fill_", "fill_"}


def refused():
    ids = torch.arange(4)
    yield "both or neither", {"image_ids": ids}
    yield "both or neither", {"text_ids": ids}
    yield "text_ids must be 4 integers", {"image_ids": ids, "text_ids": ids[:3]}
    yield "image_ids must be 4 integers", {"image_ids": ids[:, None], "text_ids": ids}
    yield "image_ids must be 4 integers", {"image_ids": ids.double(), "text_ids": ids}
    yield "text_ids must be 4 integers", {"image_ids": ids, "text_ids": ids > 1}
    yield "on cpu; got .* on meta", {"image_ids": ids, "text_ids": ids.to("meta")}
    for weight in (-0.5, float("nan"), float("inf")):
        yield "same_id_weight must be a finite", {"image_ids": ids, "text_ids": ids, "same_id_weight": weight}


@pytest.mark.parametrize(("message", "options"), refused())
def test_bad_ids_are_refused_with_the_reason(message, options):
    with pytest.raises(ValueError, match=message):
        sigmoid_loss(*make(4, 4, 3, *INIT), **options)


def sharded(weight):
    """Errors of this rank's loss and gradients against one process that has all rows and ids."""
    rank, size, rows = dist.get_rank(), dist.get_world_size(), 9
    whole, ids = make(rows * size, rows * size, 24, *TRAINED), make_ids(rows * size, rows * size, weight)
    loss, images, texts, scale, bias = differentiate(sigmoid_loss_reference, whole, ids=ids)
    mine = [part.chunk(size)[rank].contiguous() for part in (*whole[:2], *ids[:2])]
    leaves = [tensor.clone().requires_grad_() for tensor in (*mine[:2], *whole[2:])]
    options = {"image_ids": mine[2], "text_ids": mine[3], "same_id_weight": weight, "group": dist.group.WORLD}
    value = sigmoid_loss(*leaves, **options)
    value.backward()
    with torch.no_grad():
        evaluated = sigmoid_loss(*leaves, **options)
    means = torch.stack([value.detach(), evaluated, leaves[2].grad, leaves[3].grad])
    dist.all_reduce(means)
    truths = [
        *torch.stack([loss, loss, scale, bias]),
        *(part.chunk(size)[rank] * size for part in (images, texts)),
    ]
    return [
        rms_ratio(*pair)
        for pair in zip([*(means / size), leaves[0].grad, leaves[1].grad], truths, strict=True)
    ]


def refusals():
    """Messages where rank 0 has no ids, or another weight, and the other ranks have."""
    same, rank, messages = torch.zeros(4, dtype=torch.int64), dist.get_rank(), []
    given = {"image_ids": same, "text_ids": same}
    for options in ({} if rank == 0 else given, given | {"same_id_weight": 0.5 if rank else 0.25}):
        with pytest.raises(ValueError, match="the ranks of a group") as caught:
            sigmoid_loss(*make(4, 4, 8, *INIT), group=dist.group.WORLD, **options)
        messages.append(str(caught.value))
    return messages


def rank_cases():
    return {"errors": [sharded(weight) for weight in (0.0, 0.5)], "refusals": refusals()}


@pytest.mark.dist
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_agree_with_one_process(size):
    for result in run_ranks(size, rank_cases):
        for errors in result["errors"]:
            assert max(errors) < 1e-12  # measured 6e-16
        for message in result["refusals"]:
            assert "pair ids or same_id_weight" in message
