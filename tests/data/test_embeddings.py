"""Rows in place of images: made shard by shard, read as the images would be, and nothing lost or made twice."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from siglip_train.data.batch_pieces import RankShare
from siglip_train.data.config import DataConfig, SourceConfig
from siglip_train.data.inputs.embeddings import embedding, stands_in
from siglip_train.data.loader import Loader
from siglip_train.data.pipeline import build_loader
from siglip_train.data.tokenizer import Tokenizer
from siglip_train.distributed.setup import World
from siglip_train.embedding_cache import embed_images
from siglip_train.errors import UserError
from siglip_train.evals.base import Encoder
from siglip_train.models.siglip import Siglip
from tests.data.conftest import encoded, picture
from tests.data.run_inputs import inputs_of
from tests.data.shard_files import sample, write_shards, write_tar
from tests.test_embedding_cache import TRANSFORM, frozen_model


class StopError(Exception):
    pass


def encoder_of(model: Siglip, stop_at: int = -1) -> Encoder:
    """One that raises when it is about to embed its batch number `stop_at`, counted from 0."""
    begun = []

    def on_batch() -> None:
        if len(begun) == stop_at:
            raise StopError
        begun.append(1)

    world = World(0, 1, 0, torch.device("cpu"))
    return Encoder(
        model=model,
        tokenizer=lambda _: torch.empty(0),
        transform=TRANSFORM,
        world=world,
        batch_size=4,
        on_batch=on_batch,
    )


def loader_of(
    tokenizer: Tokenizer, cache: str, *shards: str, folder: Path | None = None, **options
) -> Loader:
    sources = {f"source{number}": SourceConfig(spec) for number, spec in enumerate(shards)}
    config = DataConfig(sources=sources, workers=0, cache_dir=cache, shuffle_window=8, **options)
    inputs = inputs_of(config, TRANSFORM, tokenizer)
    if folder is not None:
        inputs = inputs._replace(kinds=stands_in(inputs.kinds), embedding_dir=folder)
    return build_loader(config, inputs=inputs, share=RankShare(4), seed=3)


def batches_of(loader: Loader, count: int) -> list:
    stream = iter(loader)
    return [next(stream) for _ in range(count)]


def test_an_interrupted_computation_goes_on_with_the_shard_it_was_at(
    tmp_path: Path, tokenizer: Tokenizer, cache: str
) -> None:
    shards = write_shards(tmp_path / "shards", [5, 4, 6])
    model = frozen_model()
    embed_images(
        loader_of(tokenizer, cache, shards, folder=tmp_path / "whole"), encoder_of(model), tmp_path / "whole"
    )
    with pytest.raises(StopError):
        embed_images(
            loader_of(tokenizer, cache, shards, folder=tmp_path / "rows"),
            encoder_of(model, stop_at=2),
            tmp_path / "rows",
        )
    assert len(list((tmp_path / "rows").iterdir())) == 1, "of eight images five are a whole shard"
    # ten images are left, of which three batches are made
    embed_images(
        loader_of(tokenizer, cache, shards, folder=tmp_path / "rows"),
        encoder_of(model, stop_at=3),
        tmp_path / "rows",
    )
    files = sorted((tmp_path / "whole").iterdir())
    assert sorted(os.listdir(tmp_path / "rows")) == [file.name for file in files]
    for file in files:
        np.testing.assert_allclose(np.load(tmp_path / "rows" / file.name), np.load(file), rtol=1e-3)
    embed_images(
        loader_of(tokenizer, cache, shards, folder=tmp_path / "rows"),
        encoder_of(model, stop_at=0),
        tmp_path / "rows",
    )


def test_a_damaged_file_is_made_again_and_said(
    tmp_path: Path, tokenizer: Tokenizer, cache: str, caplog: pytest.LogCaptureFixture
) -> None:
    shards, model = write_shards(tmp_path / "shards", [5, 4, 6, 3]), frozen_model()
    embed_images(
        loader_of(tokenizer, cache, shards, folder=tmp_path / "rows"), encoder_of(model), tmp_path / "rows"
    )
    assert "damaged" not in caplog.text
    expected = {file: np.load(file) for file in (tmp_path / "rows").iterdir()}
    whole, cut, empty, other = expected
    cut.write_bytes(cut.read_bytes()[:-1])
    empty.write_bytes(b"")
    np.save(other, expected[other][1:])
    kept = whole.stat().st_mtime_ns
    loader = loader_of(tokenizer, cache, shards, folder=tmp_path / "rows")
    embed_images(loader, encoder_of(model), tmp_path / "rows")
    (said,) = (record.message for record in caplog.records if record.levelname == "WARNING")
    assert "3 files in" in said
    assert whole.stat().st_mtime_ns == kept
    for file, rows in expected.items():
        np.testing.assert_allclose(np.load(file), rows, rtol=1e-3)
    batches_of(loader, 6)
    assert not any(name.startswith("bad/") for name in loader.counts)


@pytest.mark.parametrize("order", ["shuffled", "resampled"])
def test_batches_are_those_of_pictures_with_their_rows_and_bad_samples(
    tmp_path: Path, tokenizer: Tokenizer, cache: str, order: str
) -> None:
    shards = write_shards(tmp_path / "shards", [5, 6])
    jpeg = encoded(picture(1, (96, 64)), "jpg")
    bad = {2: {"png": b"no image"}, 4: {"jpg": jpeg[: len(jpeg) // 2] + jpeg[-2:]}}
    rows = [sample(f"x{number}", 50 + number, **bad.get(number, {})) for number in range(6)]
    tar = write_tar(tmp_path / "other.tar", [member for row in rows for member in row])
    # two sources share shards, one is a remote shard with two bad images
    sources = (shards, shards, f"pipe:cat {tar}")
    model, options = frozen_model(), {"order": order, "max_bad_share": 1.0}
    plain = loader_of(tokenizer, cache, *sources, **options)
    cached = loader_of(tokenizer, cache, *sources, folder=tmp_path / "rows", **options)
    embed_images(cached, encoder_of(model), tmp_path / "rows")
    assert len(list((tmp_path / "rows").iterdir())) == 3
    for with_pictures, with_rows in zip(batches_of(plain, 12), batches_of(cached, 12), strict=True):
        assert with_rows.keys == with_pictures.keys
        assert torch.equal(with_rows.part("texts"), with_pictures.part("texts"))
        assert "images" not in with_rows.parts
        with torch.inference_mode():
            expected = model.vision(*with_pictures.part("images")).pooled
        # measured 0.021: training resizes within a level or two of 255
        torch.testing.assert_close(with_rows.part("pooled").float(), expected, rtol=0, atol=0.05)
    assert plain.counts["bad/broken image"] > 0
    assert plain.counts["bad/damaged picture data"] > 0
    assert cached.counts == plain.counts


def test_pictures_that_cannot_be_read_now_do_not_become_bad_for_ever(
    tmp_path: Path, tokenizer: Tokenizer, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = loader_of(tokenizer, cache, write_shards(tmp_path / "shards", [4, 5]), folder=tmp_path / "rows")
    reader = loader.sources[0].reader
    read = reader.read

    def failing(shard: int, number: int):
        if shard == 1:
            raise OSError("stale file handle")
        return read(shard, number)

    monkeypatch.setattr(reader, "read", failing)
    with pytest.raises(UserError, match="images could not be read"):
        embed_images(loader, encoder_of(frozen_model()), tmp_path / "rows")
    (file,) = (tmp_path / "rows").iterdir()
    assert embedding(file, 3) is not None


def test_values_beyond_float16_are_an_error_in_a_line(
    tmp_path: Path, tokenizer: Tokenizer, cache: str
) -> None:
    model = frozen_model()
    model.vision.pool.mlp.fc2.bias.fill_(1e5)
    loader = loader_of(tokenizer, cache, write_shards(tmp_path / "shards", [4]), folder=tmp_path / "rows")
    with pytest.raises(UserError, match="beyond 65504"):
        embed_images(loader, encoder_of(model), tmp_path / "rows")


def test_a_folder_that_cannot_be_made_is_an_error_in_a_line(
    tmp_path: Path, tokenizer: Tokenizer, cache: str
) -> None:
    (tmp_path / "file").write_text("")
    loader = loader_of(tokenizer, cache, write_shards(tmp_path / "shards", [4]), folder=tmp_path / "rows")
    with pytest.raises(UserError, match="cannot make"):
        embed_images(loader, encoder_of(frozen_model()), tmp_path / "file" / "rows")
