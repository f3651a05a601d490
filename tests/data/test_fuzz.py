"""Damage on shards, thousands of times: a clear error or a counted bad sample, and never another sample's caption."""

import gzip
import resource
import signal
import struct
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from siglip_train.data.batch_pieces import RankShare
from siglip_train.data.config import DataConfig, SourceConfig
from siglip_train.data.image_file import decode
from siglip_train.data.image_transform import ImageTransform
from siglip_train.data.pipeline import build_loader
from siglip_train.data.remote.cache import ShardCache, was_damaged
from siglip_train.data.remote.limits import Limits
from siglip_train.data.shards.scan import scan
from siglip_train.data.tokenizer import Tokenizer, load_tokenizer
from tests.data.conftest import encoded, picture
from tests.data.fuzz import Fuzz, flipped
from tests.data.run_inputs import inputs_of
from tests.data.shard_files import sample, write_tar

GUARD_SECONDS = 300
MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A reader that hangs is interrupted, long after the test should have ended."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"still reading after {GUARD_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(GUARD_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("cases", [500, pytest.param(5000, marks=pytest.mark.slow)])
def test_hundreds_or_thousands_of_damaged_shards(cases: int, tmp_path: Path):
    fuzz, before = Fuzz(tmp_path), _peak_bytes()
    for number in range(cases):
        fuzz.case(number)
    for number in range(cases // 20):
        fuzz.gzip_case(number)
    assert _peak_bytes() - before < 300 * MEGABYTE
    # the damage was worth the name, and cost but a few of the eight samples
    for outcome in ("torn: broken header", "torn: truncated", "torn: repeated member", "torn: data after the end",
                    "BrokenTarError", "broken image", "broken json", "not utf-8", "empty caption"):  # fmt: skip
        assert fuzz.outcomes[outcome] > cases // 500
    assert fuzz.outcomes["samples"] > 6 * cases


def test_a_loader_trains_on_what_damage_has_left(
    tmp_path: Path, sentencepiece_model: Path, transform: ImageTransform
):
    """One flip of a bit in each of many shards, read by the loader: the right caption, or another sample."""
    fuzz, random = Fuzz(tmp_path), np.random.default_rng(0)
    tokenizer = load_tokenizer(sentencepiece_model, context_length=48)
    shards, patches, texts = [], {}, {}
    for number in range(60):
        shard, whole = fuzz.whole(number)
        shards.append(tmp_path / f"{number:02d}.tar")
        shards[-1].write_bytes(flipped(whole, random).tobytes())
        for entry in shard.entries:
            data = shard.content[entry.data : entry.data + entry.size]
            if data.startswith(b"the image"):
                texts[tuple(tokenizer([data.decode()])[0].tolist())] = entry.sample
            elif not data.startswith(b"{"):
                patches[transform(decode(data)).tobytes()] = entry.sample
    source = SourceConfig([str(shard) for shard in shards], text="txt")
    config = DataConfig(
        {"all": source}, workers=0, max_bad_share=1, order="sequential", cache_dir=str(tmp_path / "c")
    )
    share = RankShare(400)
    loader = build_loader(config, inputs=inputs_of(config, transform, tokenizer), share=share, seed=0)
    batch = next(iter(loader))
    seen = [
        (patches.get(image.numpy().tobytes()), texts.get(tuple(text.tolist())))
        for image, text in zip(batch.part("images").patches, batch.part("texts"), strict=True)
    ]
    assert len(set(texts.values())) == len(texts) == 8
    # a flip in the image, or in the text, is seen as neither
    known = [pair for pair in seen if None not in pair]
    assert all(image == text for image, text in known)
    assert len(known) > 350
    assert loader.unusable["excluded/broken header"] > 5


def _png(width: int, height: int) -> bytes:
    """A small file whose header promises so many pixels."""
    content = bytearray(encoded(picture()))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def _png_with_text() -> bytes:
    """64 MiB of comment in 64 KiB."""
    chunk = b"zTXtComment\0\0" + zlib.compress(bytes(64 * MEGABYTE))
    content = encoded(picture())
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return content[:33] + chunk + content[33:]


def _jpeg(width: int, height: int) -> bytes:
    content = bytearray(encoded(picture(), "jpg"))
    start = content.index(b"\xff\xc0") + 5
    content[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(content)


def _webp(side: int) -> bytes:
    """An animation's canvas, which is announced apart from the image."""
    frame = encoded(picture(), "webp")[12:]
    canvas = b"VP8X" + struct.pack("<II", 10, 0) + 2 * struct.pack("<I", side - 1)[:3]
    body = b"WEBP" + canvas + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


IMAGE_ENDINGS = {
    "png of 60,000 x 60,000": _png(60_000, 60_000),
    "png of 2^31 x 1": _png(2**31 - 1, 1),
    "png with a bomb in a comment": _png_with_text(),
    "jpeg of 65,535 x 65,535": _jpeg(65_535, 65_535),
    "jpeg of 9,000 x 9,000": _jpeg(9_000, 9_000),
    "webp of 16,384 x 16,384": _webp(16_384),
    "webp of 65,535 x 65,535": _webp(65_535),
    "nothing": b"",
    "zeros": bytes(5000),
    "json": b"{}",
}
TEXTS = {"bytes of no encoding": b"\xff\xfe", "spaces": b" \n", "nothing": b""}
JSON = {
    "nested 100,000 deep": b"[" * 100_000,
    "nested 900 deep": b'{"caption": ' + b"[" * 900 + b'"x"' + b"]" * 900 + b"}",
    "nested 3,000 deep": b'{"caption": ' + b"[" * 3000 + b'"x"' + b"]" * 3000 + b"}",
    "a number of 100,000 digits": b'{"caption": ' + b"9" * 100_000 + b"}",
    "NaN": b'{"caption": NaN}',
    "half a surrogate pair": rb'{"caption": "\ud83d", "language": "\ud83d"}',
    "a list": b"[1]",
    "null": b"null",
    "no encoding": b"\xff",
    "zeros": bytes(100),
}


def test_contents_that_claim_or_nest_too_much(
    tmp_path: Path, tokenizer: Tokenizer, transform: ImageTransform
):
    samples = [sample(f"png{i}", i, png=data) for i, data in enumerate(IMAGE_ENDINGS.values())]
    samples += [sample(f"txt{i}", i, txt=data) for i, data in enumerate(TEXTS.values())]
    samples += [sample(f"json{i}", i, json=data, txt=b"") for i, data in enumerate(JSON.values())]
    samples += [sample(f"good{i}", i) for i in range(len(samples))]
    shard = write_tar(tmp_path / "a.tar", [member for each in samples for member in each])
    source = SourceConfig(str(shard), text={"txt": 0.5, "json:caption": 0.5}, language="json:language")
    config = DataConfig({"all": source}, workers=0, max_bad_share=1, max_image_pixels=1 << 24,
                        order="sequential", cache_dir=str(tmp_path / "cache"))  # fmt: skip
    share = RankShare(len(samples))
    loader = build_loader(config, inputs=inputs_of(config, transform, tokenizer), share=share, seed=0)
    before = _peak_bytes()
    batch = next(iter(loader))
    assert _peak_bytes() - before < 300 * MEGABYTE
    bad = {cause: count for cause, count in loader.counts.items() if cause.startswith("bad/")}
    # NaN, half a pair and 900 levels are captions, or none, but no damage
    assert sum(bad.values()) >= len(IMAGE_ENDINGS) + len(TEXTS) + len(JSON) - 4
    assert "bad/read error" not in bad
    assert len(batch.keys) == len(samples)


def test_a_gzip_bomb_needs_little_memory(tmp_path: Path):
    packed = tmp_path / "bomb.tar.gz"
    with gzip.open(packed, "wb") as out:
        for _ in range(128):
            out.write(bytes(MEGABYTE))
    assert packed.stat().st_size < MEGABYTE
    tracemalloc.start()
    try:
        # what the usual limits refuse: beyond 64 MiB, a thousand times its size
        path = ShardCache(tmp_path / "cache", limits=Limits(unpack_ratio=2000)).local_tar(str(packed))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size == 128 * MEGABYTE
    assert peak < 64 * MEGABYTE
    assert len(scan(path)) == 0
    assert not was_damaged(path)
