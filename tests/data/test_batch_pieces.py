"""What a worker hands over, on its way to the main process."""

from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch

from siglip_train.batch import Batch, Images
from siglip_train.data.batch_pieces import BatchPieces, Piece, RankShare, Report
from siglip_train.data.config import DataConfig, SourceConfig
from siglip_train.data.image_transform import ImageTransform
from siglip_train.data.pipeline import build_loader
from siglip_train.data.tokenizer import Tokenizer
from siglip_train.errors import UserError
from tests.data.run_inputs import inputs_of
from tests.data.shard_files import write_shards


def test_a_piece_arrives_as_it_was_sent_with_patches_alone_in_shared_memory():
    patches = torch.randint(256, (16, 100, 768), dtype=torch.uint8)
    grid = torch.arange(200).view(100, 2).expand(16, -1, -1)
    texts, labels, pooled = torch.randint(100, (16, 64)), torch.arange(16), torch.randn(16, 5).half()
    sent = Piece(
        Batch(
            {"images": Images(patches, grid), "texts": texts, "labels": labels, "pooled": pooled},
            ("a/b",) * 16,
        ),
        Report(failure="none"),
    )
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


@pytest.fixture
def pieces(tmp_path: Path, tokenizer: Tokenizer, cache: str) -> BatchPieces:
    """Of one sample each, 1.3 million levels, which do not go in a message."""
    config = DataConfig({"all": SourceConfig(write_shards(tmp_path / "in", [8]))}, cache_dir=cache)
    transform = ImageTransform(672, 8)
    return build_loader(
        config, inputs=inputs_of(config, transform, tokenizer), share=RankShare(1), seed=0
    )._pieces


def test_pieces_of_workers_take_turns_in_the_same_memory(pieces: BatchPieces):
    def patches(pieces: BatchPieces, number: int) -> torch.Tensor:
        batch = pieces[number].batch
        assert batch is not None
        return batch.part("images").patches

    own = [patches(pieces, number) for number in range(7)]
    assert not own[0].is_shared()
    shared = pieces.shared(3)
    places = []
    for number, expected in enumerate(own):
        found = patches(shared, number)
        assert found.is_shared()
        assert found.equal(expected)
        places.append(found.data_ptr())
    assert places[:3] == places[3:6]
    assert places[6] == places[0]
    assert len(set(places)) == 3


def test_too_little_shared_memory_is_said_in_a_line(pieces: BatchPieces, monkeypatch: pytest.MonkeyPatch):
    def full(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(
            "unable to allocate shared memory(shm): No space left on device (28)\nat somewhere"
        )

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    message = r"^no 1\.3 GiB of shared memory .* lower data\.workers .* No space left on device \(28\)$"
    with pytest.raises(UserError, match=message):
        pieces.shared(1000)
