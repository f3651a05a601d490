"""What a worker hands over, on its way to the main process."""

from multiprocessing.reduction import ForkingPickler

import torch

from siglip_train.batch import Batch, Images
from siglip_train.data.pieces import Piece, Report


def test_a_piece_arrives_as_it_was_sent_with_patches_alone_in_shared_memory():
    patches = torch.randint(256, (16, 100, 768), dtype=torch.uint8)
    grid = torch.arange(200).view(100, 2).expand(16, -1, -1)
    texts, labels, pooled = torch.randint(100, (16, 64)), torch.arange(16), torch.randn(16, 5).half()
    sent = Piece(Batch(Images(patches, grid), texts, ("a/b",) * 16, labels, pooled), Report(failure="none"))
    arrived = ForkingPickler.loads(bytes(ForkingPickler.dumps(sent)))
    assert arrived.report == sent.report
    assert arrived.batch is not None
    assert arrived.batch.keys == ("a/b",) * 16
    found: list[torch.Tensor] = []
    arrived.batch.each(lambda tensor: (found.append(tensor), tensor)[1])
    assert [tensor.is_shared() for tensor in found] == [True, False, False, False, False]
    for tensor, expected in zip(found, (patches, grid, texts, labels, pooled), strict=True):
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected)


def test_a_piece_that_was_given_up_keeps_its_reason():
    arrived = ForkingPickler.loads(bytes(ForkingPickler.dumps(Piece(None, Report(failure="no shard")))))
    assert arrived.batch is None
    assert arrived.report.failure == "no shard"
