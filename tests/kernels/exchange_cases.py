"""What the ranks of test_exchange.py run: every form of exchange against one process, and what it sends and holds."""

import itertools
import time
import weakref
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import sigmoid_loss
from kernels.sigmoid_loss import Exchange, Links, choose_exchange, chunked, exchange_seconds
from kernels.sigmoid_loss.exchange import messages
from kernels.sigmoid_loss.exchange.choose import ranks_on_a_node
from kernels.sigmoid_loss.pairs import PairIds
from kernels.sigmoid_loss.reference import pairwise_loss_reference, sigmoid_loss_reference
from kernels.testing import rms_ratio
from tests.kernels.test_goldens import distributed_golden_errors
from tests.kernels.test_sigmoid_loss import INIT, TRAINED, differentiate, make

WIDTH = 24
BF16 = torch.bfloat16
# links between nodes so slow that a flat ring would wait, launches for nothing
GPU = Links(call=0, between=25e9)


def every_exchange(size):
    """All forms, all numbers of ranks a node, all shapes of grid, that `size` ranks have."""
    divisors = [number for number in range(1, size + 1) if size % number == 0]
    exchanges = [Exchange(), Exchange("ring"), Exchange("all_gather")]
    exchanges += [Exchange("node_ring", ranks_per_node=number) for number in divisors]
    exchanges += [Exchange("grid", grid=(number, size // number)) for number in divisors]
    # rows of several nodes: a ring of rings
    exchanges += [
        Exchange("grid", grid=(rows, size // rows), ranks_per_node=number)
        for rows, number in itertools.product(divisors, divisors)
        if 1 < number < size // rows and size // rows % number == 0
    ]
    return exchanges


def as_sent(whole, exchange, compute_dtype=None):
    """The global batch as the ranks see it: what travels, and its copy at home, is rounded."""
    if compute_dtype is not None:
        return [part.to(compute_dtype).to(part.dtype) for part in whole[:2]] + whole[2:]
    if exchange.dtype is None:
        return whole
    images, texts, *rest = whole
    travels = exchange.form == "grid"
    return [images.to(BF16).to(images.dtype) if travels else images, texts.to(BF16).to(texts.dtype), *rest]


def draw_ids(rows):
    """Ids with many duplicates and some that are like nothing."""
    generator = torch.Generator().manual_seed(rows)
    return [torch.randint(-1, max(2, rows // 2), (rows,), generator=generator) for _ in range(2)]


def errors(group, exchange, rows, scale, bias, *, dtype=torch.float64, weight=None, compute_dtype=None):
    """Errors of this rank's loss and gradients against one process that has all rows."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    whole = make(rows * size, rows * size, WIDTH, scale, bias, dtype)
    image_ids, text_ids = draw_ids(rows * size)
    ids = None if weight is None else PairIds(image_ids, text_ids, weight)
    # "auto" may choose a grid, where images travel too
    chosen = choose_exchange(exchange, whole[0].chunk(size)[rank], group, has_ids=ids is not None)
    seen = as_sent(whole, chosen, compute_dtype)
    loss, images, texts, scale_gradient, bias_gradient = differentiate(sigmoid_loss_reference, seen, ids=ids)
    options = {"group": group, "exchange": exchange, "compute_dtype": compute_dtype}
    if ids is not None:
        options |= {
            "image_ids": image_ids.chunk(size)[rank],
            "text_ids": text_ids.chunk(size)[rank],
            "same_id_weight": weight,
        }
    mine = [part.chunk(size)[rank].clone() for part in whole[:2]] + [part.reshape(1) for part in whole[2:]]
    leaves = [tensor.clone().requires_grad_() for tensor in mine]
    value = sigmoid_loss(*leaves, **options)
    value.backward()
    with torch.no_grad():
        evaluated = sigmoid_loss(*mine, **options)
    means = torch.stack([value.detach(), leaves[2].grad[0], leaves[3].grad[0]]).double()
    dist.all_reduce(means, group=group)
    means /= size
    # each rank's loss is a mean over its own rows: features get `size` times the gradient of the global mean
    return {
        "loss": rms_ratio(means[0], loss),
        "evaluated": rms_ratio(evaluated, value.detach()),
        "own loss": rms_ratio(value.detach(), own_loss(seen, ids, rank, size)),
        "images": rms_ratio(leaves[0].grad, size * images.chunk(size)[rank]),
        "texts": rms_ratio(leaves[1].grad, size * texts.chunk(size)[rank]),
        "scale": rms_ratio(means[1], scale_gradient),
        "bias": rms_ratio(means[2], bias_gradient),
    }


def own_loss(whole, ids, rank, size):
    """This rank's images against all texts, divided by the number of its images."""
    losses = pairwise_loss_reference(*(part.double() for part in whole), ids=ids)
    return losses.chunk(size)[rank].sum() / (len(losses) // size)


@contextmanager
def recorded_traffic(size):
    """Yields a list that gets the bytes this rank sends; of a collective, those of one round of a ring."""
    sent = []
    post, gather, scatter = dist.batch_isend_irecv, dist.all_gather_into_tensor, dist.reduce_scatter_tensor

    def recording_post(operations):
        sent.extend(op.tensor.nbytes for op in operations if op.op is dist.isend)
        return post(operations)

    def recording_gather(output, mine, **options):
        sent.append((size - 1) * mine.nbytes)
        return gather(output, mine, **options)

    def recording_scatter(output, shares, **options):
        sent.append((size - 1) * output.nbytes)
        return scatter(output, shares, **options)

    with (
        mock.patch.object(dist, "batch_isend_irecv", recording_post),
        mock.patch.object(dist, "all_gather_into_tensor", recording_gather),
        mock.patch.object(dist, "reduce_scatter_tensor", recording_scatter),
    ):
        yield sent


def traffic(group, exchange, dtype, *, has_ids, compute_dtype=None):
    """Bytes this rank sends for one loss with gradients."""
    leaves = [tensor.requires_grad_() for tensor in make(5, 5, WIDTH, *INIT, dtype)]
    ids = dict(zip(("image_ids", "text_ids"), draw_ids(5), strict=True)) if has_ids else {}
    with recorded_traffic(dist.get_world_size(group)) as sent:
        sigmoid_loss(*leaves, group=group, exchange=exchange, compute_dtype=compute_dtype, **ids)
    return sum(sent)


def order_of_events(group, exchange):
    """Messages and blocks of one loss with gradients, in the order in which they are posted and computed."""
    events = []
    post, block = dist.batch_isend_irecv, chunked.sigmoid_loss_block
    names = {messages.BLOCKS: "texts", messages.GRADIENTS: "gradients"}

    def recording_post(operations):
        events.append(" + ".join(names[op.tag] for op in operations if op.op is dist.isend))
        return post(operations)

    def recording_block(images, *args, **options):
        events.append(f"block of {len(images)}")
        return block(images, *args, **options)

    leaves = [tensor.requires_grad_() for tensor in make(5, 5, WIDTH, *INIT)]
    with (
        mock.patch.object(dist, "batch_isend_irecv", recording_post),
        mock.patch.object(chunked, "sigmoid_loss_block", recording_block),
    ):
        sigmoid_loss(*leaves, group=group, exchange=exchange)
    return events


class PeakMemory(TorchDispatchMode):
    """Within it, `peak` is the most bytes that tensors made by torch's ops held at one time."""

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._alive = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._alive.append((weakref.ref(tensor), storage.data_ptr(), storage.nbytes()))
        self._alive = [entry for entry in self._alive if entry[0]() is not None]
        self.peak = max(self.peak, sum({place: size for _, place, size in self._alive}.values()))
        return result


def peak_blocks(group, exchange):
    """Peak memory beside the inputs, in blocks of n x E: rows so wide that nothing else counts."""
    rows, width = 4, 4096
    leaves = [tensor.requires_grad_() for tensor in make(rows, rows, width, *INIT)]
    with PeakMemory() as memory:
        sigmoid_loss(*leaves, group=group, exchange=exchange)
    return round(memory.peak / (rows * width * 8), 1)


def seconds_waited(rank, group, exchange):
    """Seconds that each rank waits within the exchange where rank 1 takes 0.15 s longer for every block."""
    block = chunked.sigmoid_loss_block

    def slow_block(*args, **options):
        time.sleep(0.15 if rank == 1 else 0)
        return block(*args, **options)

    leaves = [tensor.requires_grad_() for tensor in make(4, 4, 8, *INIT)]
    dist.barrier(group)
    exchange_seconds()
    with mock.patch.object(chunked, "sigmoid_loss_block", slow_block):
        sigmoid_loss(*leaves, group=group, exchange=exchange)
    return exchange_seconds(), exchange_seconds()


def refusals(rank, group):
    """Messages of calls in which rank 0 differs from the others: by rows, dtype, use of gradients, ids, form."""
    odd = rank == 0
    ids = dict(zip(("image_ids", "text_ids"), draw_ids(4), strict=True))
    plain = make(4, 4, 8, *INIT)
    calls = [
        (make(5 if odd else 4, 5 if odd else 4, 8, *INIT), {}),
        (make(4, 4, 8, *INIT, torch.float32 if odd else torch.float64), {}),
        (plain, {"compute_dtype": torch.float16 if odd else torch.bfloat16}),
        ([tensor.requires_grad_(not odd) for tensor in make(4, 4, 8, *INIT)], {}),
        (plain, ids if odd else {}),
        (plain, {"exchange": Exchange("ring" if odd else "all_gather")}),
        (plain, {"exchange": Exchange("ring", dtype=BF16 if odd else None)}),
        (plain, {"exchange": Exchange("grid", grid=(5, 1))}),
        (plain, {"exchange": Exchange("node_ring", ranks_per_node=5)}),
    ]
    return _messages(calls, group)


def refusals_by_one(rank, group):
    """Messages of calls in which the arguments of rank 0 are wrong in themselves."""
    odd = rank == 0
    images, texts, scale, bias = make(4, 4, 8, *INIT)
    ids = {"image_ids": torch.arange(4), "text_ids": torch.arange(4)}
    calls = [
        ((images[:0], texts[:0], scale, bias), {}),
        ((images, texts[:3], scale, bias), {}),
        ((images, texts.float(), scale, bias), {}),
        ((images.long(), texts.long(), scale, bias), {}),
        ((images, texts, scale.expand(2), bias), {}),
        ((images, texts, 10.0, bias), {}),
        ((images.tolist(), texts, scale, bias), {}),
        ((images, texts, scale, bias), {"image_ids": ids["image_ids"]}),
        ((images, texts, scale, bias), ids | {"text_ids": ids["text_ids"].to(torch.uint64)}),
        ((images, texts, scale, bias), ids | {"same_id_weight": -1.0}),
        ((images, texts, scale, bias), {"exchange": "ring"}),
    ]
    return _messages([call if odd else ((images, texts, scale, bias), {}) for call in calls], group)


def _messages(calls, group):
    messages = []
    for inputs, options in calls:
        try:
            sigmoid_loss(*inputs, group=group, **options)
            messages.append("accepted")
        except ValueError as error:
            messages.append(str(error))
    return messages


def one_rank_late(rank, group):
    """Seconds the ranks wait for the last one, which is 0.4 s late; then the reading after it."""
    inputs = make(4, 4, 8, *INIT)
    dist.barrier(group)
    exchange_seconds()
    if rank == 1:
        time.sleep(0.4)
    sigmoid_loss(*inputs, group=group)
    return exchange_seconds(), exchange_seconds()


def name_of(exchange):
    """Unlike `str`, it tells apart what differs in ranks_per_node only."""
    return exchange.form, exchange.grid, exchange.ranks_per_node


def form_cases(group, exchange):
    """Errors by case, bytes sent by case, and peak memory of a form."""
    narrow = replace(exchange, dtype=BF16)
    return {
        "errors": {
            "float64": errors(group, exchange, 7, *TRAINED),
            "one row": errors(group, exchange, 1, *INIT),
            "ids": errors(group, exchange, 5, *INIT, weight=0.5),
        },
        "fp32": errors(group, exchange, 16, *TRAINED, dtype=torch.float32),
        "fp16": errors(group, exchange, 7, *TRAINED, dtype=torch.float32, compute_dtype=torch.float16),
        "bf16": errors(group, narrow, 7, *TRAINED),
        "sent": [
            traffic(group, exchange, torch.float64, has_ids=False),
            traffic(group, exchange, torch.bfloat16, has_ids=True),
            traffic(group, narrow, torch.float32, has_ids=False),
            traffic(group, exchange, torch.float32, has_ids=False, compute_dtype=torch.float16),
        ],
        "peak": peak_blocks(group, exchange),
    }


def group_cases(group):
    """Everything that is run on each group."""
    return {
        "forms": {
            name_of(exchange): form_cases(group, exchange)
            for exchange in every_exchange(dist.get_world_size(group))
        },
        "goldens": distributed_golden_errors(group),
        "refusals": refusals(dist.get_rank(group), group),
        "refusals_by_one": refusals_by_one(dist.get_rank(group), group),
    }


def world_of_two():
    """Cases of two ranks, and what has to do with time."""
    group, rank = dist.group.WORLD, dist.get_rank()
    forms = [exchange for exchange in every_exchange(2) if exchange.form != "auto"]
    return group_cases(group) | {
        "late": one_rank_late(rank, group),
        "waited": {name_of(exchange): seconds_waited(rank, group, exchange) for exchange in forms},
    }


def orders(group):
    """The order of events of each form, on four ranks."""
    return {
        "ring": order_of_events(group, Exchange("ring")),
        "node_ring": order_of_events(group, Exchange("node_ring", ranks_per_node=2)),
        "grid": order_of_events(group, Exchange("grid", grid=(2, 2))),
    }


def world_of_four():
    """Cases of four ranks."""
    group = dist.group.WORLD
    return group_cases(group) | {"order": orders(group)}


def world_of_eight():
    """Cases of eight ranks, and of groups of fewer: by number of ranks. None where this rank is not a member."""
    members = {
        3: [1, 3, 6],
        4: [4, 5, 6, 7],
        6: [1, 2, 3, 5, 6, 7],
        7: [0, 1, 2, 3, 4, 5, 7],
        8: list(range(8)),
    }
    found, rank = {}, dist.get_rank()
    for size, ranks in members.items():
        group = dist.new_group(ranks)  # by all ranks
        found[size] = group_cases(group) if rank in ranks else None
        if size == 3 and rank == 0:
            found["stranger"] = refusals(rank, group)
        if size == 4 and rank in ranks:
            found["order"] = orders(group)
        dist.barrier()
    found["nodes"] = nodes_found(group)
    return found


def nodes_found(group):
    """Ranks on a node as LOCAL_WORLD_SIZE tells, and what is chosen by it; of groups with (un)equal shares of nodes."""
    embeddings = torch.empty(16384, 768, dtype=BF16)
    with mock.patch.dict("os.environ", LOCAL_WORLD_SIZE="2"):
        found = [ranks_on_a_node(group), str(choose_exchange(Exchange(links=GPU), embeddings, group))]
    for ranks in ([0, 1, 4, 5], [0, 1, 2], [1, 2]):
        other = dist.new_group(ranks)
        with mock.patch.dict("os.environ", LOCAL_WORLD_SIZE="2"):
            found.append(ranks_on_a_node(other))
    with mock.patch.dict("os.environ", LOCAL_WORLD_SIZE="3"):
        try:
            sigmoid_loss(*make(4, 4, 8, *INIT), group=group)
        except ValueError as error:
            found.append(str(error))
    return found
