"""The training loader as a whole: exactly once, the same order however it is split, resume, mixtures, bad samples."""

import gzip
import logging
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from siglip_train.data.batch_pieces import RankShare
from siglip_train.data.config import DataConfig, SourceConfig
from siglip_train.data.image_file import decode
from siglip_train.data.image_transform import ImageTransform
from siglip_train.data.loader import Loader
from siglip_train.data.pipeline import build_loader
from siglip_train.data.shards.select import Selection
from siglip_train.data.tokenizer import Tokenizer
from siglip_train.errors import UserError
from tests.data.conftest import encoded, picture
from tests.data.run_inputs import inputs_of
from tests.data.shard_files import Member, sample, without, write_shards, write_tar

SIZES = [7, 5, 11, 3, 9]
TOTAL = sum(SIZES)
SIX = RankShare(6)


class Build:
    """Builds loaders with small defaults."""

    def __init__(self, tokenizer: Tokenizer, transform: ImageTransform, cache: str) -> None:
        self.tokenizer, self.transform, self.cache = tokenizer, transform, cache

    def __call__(
        self, sources: Any, share: RankShare = SIX, state: dict | None = None, **options: Any
    ) -> Loader:
        if not isinstance(sources, dict):
            sources = {"all": SourceConfig(sources)}
        seed = options.pop("seed", 0)
        config = DataConfig(
            sources, **{"workers": 0, "shuffle_window": 12, "cache_dir": self.cache, **options}
        )
        return build_loader(
            config,
            inputs=inputs_of(config, self.transform, self.tokenizer),
            share=share,
            seed=seed,
            state=state,
        )


@pytest.fixture
def build(tokenizer: Tokenizer, transform: ImageTransform, cache: str) -> Build:
    """A maker of loaders."""
    return Build(tokenizer, transform, cache)


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """35 samples in five uneven shards."""
    return write_shards(tmp_path / "in", SIZES)


def _keys(loader: Loader, batches: int) -> list[str]:
    iterator = iter(loader)
    return [key for _ in range(batches) for key in next(iterator).keys]


def _global_keys(build: Build, shards: str, ranks: int, batches: int, **options: Any) -> list[str]:
    parts = [
        np.array(_keys(build(shards, RankShare(6, rank, ranks), **options), batches)).reshape(batches, -1)
        for rank in range(ranks)
    ]
    return np.concatenate(parts, axis=1).reshape(-1).tolist()


def test_the_order_is_the_same_for_any_ranks_and_workers_and_every_sample_comes_once_an_epoch(
    build: Build, shards: str
):
    # 2 epochs of 35 samples are no whole number of batches of 6
    batches = -(-2 * TOTAL // 6)
    expected = _global_keys(build, shards, 1, batches)
    assert len(set(expected[:TOTAL])) == len(set(expected[TOTAL : 2 * TOTAL])) == TOTAL
    assert expected[:TOTAL] != expected[TOTAL : 2 * TOTAL]
    for ranks, workers in [(1, 1), (1, 2), (2, 0), (2, 2), (3, 0), (3, 1)]:
        assert _global_keys(build, shards, ranks, batches, workers=workers) == expected


def test_large_shares_are_made_in_pieces_of_the_same_order(
    build: Build, shards: str, monkeypatch: pytest.MonkeyPatch
):
    whole = iter(build(shards, RankShare(14, 0, 2)))
    monkeypatch.setattr("siglip_train.data.batch_pieces._PIECE", 3)
    pieces = iter(build(shards, RankShare(14, 0, 2), workers=2))
    for _ in range(6):
        one, other = next(whole), next(pieces)
        assert other.keys == one.keys
        assert other.part("texts").equal(one.part("texts"))
        assert other.part("images").patches.equal(one.part("images").patches)
        assert other.part("images").grid.equal(one.part("images").grid)


def test_a_batch_holds_what_its_keys_say(
    build: Build, shards: str, tokenizer: Tokenizer, transform: ImageTransform
):
    batch = next(iter(build(shards)))
    assert batch.part("images").patches.shape == (6, 4, 192)
    assert batch.part("images").patches.dtype == torch.uint8
    assert batch.part("texts").dtype == torch.int64
    for row, key in enumerate(batch.keys):
        shard, _, name = key.partition("/")
        assert shard in {f"{i:05d}.tar" for i in range(5)}
        number = int(name)
        assert batch.part("texts")[row].equal(tokenizer([f"caption {number}"])[0])
        levels = transform(picture(number)).astype(int)
        # training resizes by torch, which rounds a little otherwise than Pillow
        np.testing.assert_allclose(batch.part("images").patches[row].int().numpy(), levels, rtol=0, atol=1)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (3, 0), (2, 2)])
def test_resume_goes_on_where_it_stopped_on_other_ranks_and_workers(
    build: Build, shards: str, ranks: int, workers: int
):
    expected = _global_keys(build, shards, 1, 15)
    for stop in (1, 4, 11):
        loader = build(shards, workers=1)
        iterator = iter(loader)
        for _ in range(stop):
            next(iterator)
        state = loader.state()
        assert state["samples_seen"] == 6 * stop
        got = _global_keys(build, shards, ranks, 15 - stop, workers=workers, state=state)
        assert got == expected[6 * stop :]


def test_augmentation_is_the_same_after_resume(build: Build, shards: str):
    build.transform = ImageTransform(16, 8, flip=True, min_crop_area=0.3)
    loader = build(shards)
    iterator = iter(loader)
    first = next(iterator)
    state = loader.state()
    expected = next(iterator)
    plain = build(shards, state=state)
    assert next(iter(plain)).part("images").patches.equal(expected.part("images").patches)
    build.transform = ImageTransform(16, 8)
    assert not next(iter(build(shards))).part("images").patches.equal(first.part("images").patches)


def test_resume_with_a_batch_size_that_does_not_fit_is_refused(build: Build, shards: str):
    loader = build(shards, RankShare(6))
    next(iter(loader))
    with pytest.raises(UserError, match="global_batch_size 4"):
        build(shards, RankShare(4), state=loader.state())


def test_resume_on_other_data_warns(build: Build, shards: str, caplog: pytest.LogCaptureFixture):
    state = build(shards).state()
    build(shards, state=state)
    assert not caplog.records
    build(shards, state=state, seed=1)
    assert "differ from those of the checkpoint" in caplog.text


def test_counts_survive_a_resume_and_what_is_excluded_is_not_counted_twice(build: Build, tmp_path: Path):
    members = [m for i in range(8) for m in sample(f"{i}", i)] + without(sample("x"), "txt")
    path = str(write_tar(tmp_path / "a.tar", members))
    loader = build(path)
    next(iter(loader))
    expected = {"seen": 6, "source/all": 6, "excluded/no text": 1, "passes/all": 0.75}
    assert loader.total_counts() == expected
    assert build(path, state=loader.state()).total_counts() == expected


def test_sources_are_mixed_by_weight_and_counted(build: Build, tmp_path: Path):
    sources = {
        "en": SourceConfig(write_shards(tmp_path / "en", [30]), weight=2, language="en"),
        "many": SourceConfig(write_shards(tmp_path / "many", [10, 10]), weight=1, language="json:number"),
    }
    loader = build(sources, RankShare(12))
    iterator = iter(loader)
    for batches in range(1, 6):
        next(iterator)
        assert (loader.counts["source/en"], loader.counts["source/many"]) == (8 * batches, 4 * batches)
    assert loader.counts["seen"] == 60
    assert loader.counts["language/en"] == 40
    assert sum(count for name, count in loader.counts.items() if name.startswith("language/")) == 60
    assert loader.counts["language/3"] >= 1


def test_a_mapping_of_texts_draws_purely_by_position(build: Build, tmp_path: Path, tokenizer: Tokenizer):
    path = write_shards(tmp_path, [40])
    spec = {"txt": 0.5, "json:number": 0.5}
    # a number is no caption, so all fall to txt
    batch = next(iter(build({"all": SourceConfig(path, text=spec)}, RankShare(8))))
    expected = tokenizer([f"caption {int(key.split('/')[1])}" for key in batch.keys])
    assert batch.part("texts").equal(expected)


@pytest.fixture
def bad_shards(tmp_path: Path) -> str:
    """60 good samples in two shards; among them seven that fail only when decoded."""
    jpeg = encoded(picture(size=(64, 64)), "jpg")
    bad: list[list[Member]] = [
        sample("torn-jpeg", png=jpeg[:800]),
        sample("zero-bytes", png=b""),
        sample("rubbish", png=b"no image"),
        sample("bomb", png=encoded(Image.new("1", (500, 500)))),
        sample("empty-caption", txt=b" \n"),
        sample("latin1", txt="ä".encode("latin-1")),
        sample("modes-ok", png=encoded(Image.new("LA", (5, 5)))),
    ]
    good = [sample(f"{i:05d}", i) for i in range(60)]
    for shard in range(2):
        rows = good[shard::2] + (bad if shard else [])
        write_tar(tmp_path / f"{shard}.tar", [member for row in rows for member in row])
    return str(tmp_path / "*.tar")


CAUSES = {
    "bad/broken image": 2, "bad/empty image": 1, "bad/image too large": 1, "bad/empty caption": 1, "bad/not utf-8": 1,
}  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_counted_named_and_replaced(
    build: Build, bad_shards: str, caplog: pytest.LogCaptureFixture, workers: int
):
    loader = build(bad_shards, RankShare(67), workers=workers, max_image_pixels=100_000)
    (keys,) = [_keys(loader, 1)]
    assert len(keys) == 67
    assert sum(CAUSES.values()) == 6
    # a substitute may be bad as well, hence "at least"
    assert {name: 1 for name in loader.counts if name.startswith("bad/")} == dict.fromkeys(CAUSES, 1)
    assert all(loader.counts[name] >= count for name, count in CAUSES.items())
    assert loader.counts["substituted"] == 6
    assert loader.counts["seen"] == 67
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    for key, cause in [
        ("torn-jpeg", "broken image"), ("zero-bytes", "empty image"), ("rubbish", "broken image"),
        ("bomb", "image too large"), ("empty-caption", "empty caption"), ("latin1", "not utf-8"),
    ]:  # fmt: skip
        assert any(message.startswith(f"bad sample 1.tar/{key}: {cause}") for message in messages)
    assert not any(" at 0x" in message for message in messages), "it differs from run to run"
    assert "1.tar/modes-ok" in keys
    assert _keys(build(bad_shards, RankShare(67), max_image_pixels=100_000), 1) == keys


def test_broken_json_is_a_bad_sample(build: Build, tmp_path: Path):
    rows = [sample(f"{i}", i, json=b'{"text": "x"}') for i in range(20)] + [sample("b", json=b"{")]
    path = str(write_tar(tmp_path / "a.tar", [member for row in rows for member in row]))
    loader = build({"all": SourceConfig(path, text="json:text")}, RankShare(21))
    next(iter(loader))
    assert loader.counts["bad/broken json"] >= 1


def test_a_file_that_vanishes_is_a_bad_sample_not_the_end(build: Build, shards: str, caplog: Any):
    loader = build(shards, max_bad_share=1.0)
    Path(shards).parent.joinpath("00003.tar").unlink()
    _keys(loader, 6)
    assert loader.counts["bad/read error"] >= 3
    assert "00003.tar" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_samples_end_the_run(build: Build, tmp_path: Path, workers: int):
    rows = [sample(f"{i}", i, **({"txt": b""} if i % 4 == 0 else {})) for i in range(80)]
    path = str(write_tar(tmp_path / "a.tar", [member for row in rows for member in row]))
    with pytest.raises(UserError, match=r"bad samples among \d+, more than data\.max_bad_share 0\.1"):
        _keys(build(path, RankShare(40), workers=workers, max_bad_share=0.1), 20)
    assert len(_keys(build(path, RankShare(40), workers=workers, max_bad_share=0.5), 20)) == 800


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_without_any_usable_sample_says_so_in_one_line(build: Build, shards: str, workers: int):
    source = {"mine": SourceConfig(shards, text="json:nowhere")}
    with pytest.raises(UserError, match="source mine: 9 samples in a row are unusable") as caught:
        _keys(build(source, workers=workers), 1)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_too_many_incomplete_samples_are_an_error_before_training(build: Build, tmp_path: Path):
    rows = [sample(f"{i}", i) if i % 2 else without(sample(f"{i}", i), "txt") for i in range(220)]
    path = str(write_tar(tmp_path / "a.tar", [member for row in rows for member in row]))
    with pytest.raises(UserError, match=r"110 of 220 samples are incomplete \(110 no text\)"):
        build(path)
    assert build(path, max_bad_share=0.6).unusable["excluded/no text"] == 110


def test_repeated_keys_are_told(build: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    members = [m for i in range(8) for m in sample(f"{i}", i)]
    split = [*sample("s"), *sample("t"), ("s.cls", b"1")]
    loader = build(str(write_tar(tmp_path / "a.tar", members + split)))
    assert (loader.unusable["repeated_keys"], loader.unusable["excluded/no image"]) == (1, 1)
    assert "not adjacent" in caplog.text


def _sources(name: str, tmp_path: Path) -> Any:
    write_tar(tmp_path / "empty.tar", [])
    write_tar(tmp_path / "no-text.tar", without(sample("a"), "txt"))
    (tmp_path / "broken.tar").write_bytes(b"no tar" * 200)
    shard = SourceConfig(write_shards(tmp_path / "few", [3]))
    return {
        "empty": str(tmp_path / "empty.tar"),
        "no text": str(tmp_path / "no-text.tar"),
        "no selected": {"x": SourceConfig(shard.shards, select=Selection(keys="nothing"))},
        "broken": str(tmp_path / "broken.tar"),
        "missing": str(tmp_path / "missing-{0..3}.tar"),
        "few": {"few": shard},
        "none": {},
        "no image": {"x": SourceConfig(shard.shards, image=" ; ")},
        "weight": {"x": SourceConfig(shard.shards, weight=0)},
    }[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", r"none of its 1 shards holds a sample.*empty\.tar"),
        (
            "no text",
            r"none of its 1 shards holds a sample.*\(1 no text\); the first, no-text\.tar/a: it holds png, json;"
            r" asked for are as image \(data\.sources\..*\.image\) jpg.*, and as text \(\.text\) txt$",
        ),
        ("no selected", r"none of its 1 shards holds a sample.*\(select leaves none\)"),
        ("broken", r"cannot read shard .*broken\.tar"),
        ("missing", r"no shard matches .*missing-0\.tar"),
        ("few", "source few has 3 complete samples, fewer than the 6"),
        ("none", r"data\.sources is empty"),
        ("no image", "member extensions"),
        ("weight", "weights"),
    ],
)
def test_what_would_stop_training_is_an_error_before_it(
    build: Build, tmp_path: Path, name: str, message: str
):
    with pytest.raises(UserError, match=message):
        build(_sources(name, tmp_path))


def test_ranks_must_divide_the_global_batch(build: Build, shards: str):
    with pytest.raises(UserError, match="7 is not a multiple of the 2 ranks"):
        build(shards, RankShare(7, 0, 2))


@pytest.mark.parametrize("options", [{"workers": -1}, {"prefetch": 0}, {"max_bad_share": 2.0}], ids=str)
def test_ranges_of_the_config(options: dict):
    with pytest.raises(ValueError, match="must not be"):
        DataConfig(**options)


def test_the_fingerprint_depends_on_samples_and_order_not_on_the_folder(
    build: Build, shards: str, tmp_path: Path
):
    moved = write_shards(tmp_path / "moved", SIZES)
    other = write_shards(tmp_path / "other", [*SIZES[:-1], SIZES[-1] + 1])
    same = {build(shards).fingerprint, build(moved).fingerprint, build(shards, workers=1).fingerprint}
    assert len(same) == 1
    different = [
        build(other),
        build(shards, seed=1),
        build(shards, order="sequential"),
        build(shards, shuffle_window=5),
    ]
    assert len({each.fingerprint for each in different} | same) == 5


def test_gzipped_shards_with_damage_give_what_is_left(build: Build, tmp_path: Path):
    plain = write_tar(tmp_path / "a.tar", [m for i in range(30) for m in sample(f"{i:03d}", i)])
    packed = gzip.compress(plain.read_bytes())
    (tmp_path / "a.tar.gz").write_bytes(packed[: len(packed) // 2])
    loader = build(str(tmp_path / "a.tar.gz"))
    assert loader.unusable["excluded/truncated"] == 1
    keys = _keys(loader, 5)
    assert set(keys) <= {f"a.tar.gz/{i:03d}" for i in range(20)}
    assert len(set(keys)) > 6


def test_colour_modes_train(build: Build, tmp_path: Path, transform: ImageTransform):
    grey16 = Image.fromarray(np.full((6, 6), 0x8000, dtype=np.uint16))
    pictures = [encoded(picture(mode=mode)) for mode in ("L", "LA", "P", "RGBA", "1")]
    pictures += [encoded(grey16), encoded(picture(size=(16, 16), mode="CMYK"), "jpg")]
    members = [m for i, data in enumerate(pictures) for m in sample(f"{i}", png=data)]
    loader = build(str(write_tar(tmp_path / "a.tar", members)), RankShare(7), order="sequential")
    batch = next(iter(loader))
    assert loader.counts == {"seen": 7, "source/all": 7}
    for row, data in enumerate(pictures):
        levels = transform(decode(data)).astype(int)
        np.testing.assert_allclose(batch.part("images").patches[row].int().numpy(), levels, rtol=0, atol=1)


def test_keys_of_an_epoch_mix_the_shards_of_a_window(build: Build, tmp_path: Path):
    loader = build(write_shards(tmp_path, [20] * 4), RankShare(10), shuffle_window=80)
    shards = Counter(key.split("/")[0] for key in _keys(loader, 1))
    assert len(shards) >= 3


@pytest.mark.parametrize("batch_size", [6, 300], ids=["one piece", "two pieces"])
def test_a_batch_is_pinned_whole_and_keeps_its_keys(
    build: Build, tmp_path: Path, batch_size: int, monkeypatch: pytest.MonkeyPatch
):
    pinned: list[tuple[int, ...]] = []
    empty = torch.empty

    def pin(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory:
            pinned.append(tuple(size[0]))
        return empty(*size, **options)

    shards = write_shards(tmp_path / "in", [300])
    expected = next(iter(build(shards, RankShare(batch_size))))
    loader = build(shards, RankShare(batch_size))
    loader._pin_memory = True
    monkeypatch.setattr(torch, "empty", pin)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    batch = next(iter(loader))
    assert chosen == [3]
    assert sorted(pinned) == [(batch_size, 4, 2), (batch_size, 4, 192), (batch_size, 8)]
    assert batch.keys == expected.keys
    assert batch.part("texts").equal(expected.part("texts"))
    assert batch.part("images").patches.equal(expected.part("images").patches)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_arrive_in_pinned_memory(build: Build, shards: str):
    loader = build(shards, workers=2)
    loader._pin_memory = True
    batch = next(iter(loader))
    assert all(tensor.is_pinned() for tensor in (*batch.part("images")[:2], batch.part("texts")))


@pytest.mark.parametrize(("batch_size", "image_size"), [(4, 448), (257, 64)], ids=["one piece", "two pieces"])
def test_batches_in_hand_keep_their_pictures_while_workers_go_on(
    tokenizer: Tokenizer, cache: str, tmp_path: Path, batch_size: int, image_size: int
):
    # too large for a message, so that workers leave the patches in memory which they use again
    build = Build(tokenizer, ImageTransform(image_size, 8), cache)
    shards, share = write_shards(tmp_path / "in", [200, 100]), RankShare(batch_size)
    expected = list(islice(build(shards, share), 9))
    got = list(islice(build(shards, share, workers=2, prefetch=2), 9))
    for batch, same in zip(got, expected, strict=True):
        assert batch.keys == same.keys
        assert batch.part("images").patches.equal(same.part("images").patches)


def _labelled(folder: Path, labels: list[bytes]) -> str:
    rows = [without(sample(f"{i:03d}", i, cls=label), "txt") for i, label in enumerate(labels)]
    write_tar(folder / "0.tar", [member for row in rows for member in row])
    return str(folder / "0.tar")


def test_labels_come_with_their_samples_and_captions_are_not_needed(build: Build, tmp_path: Path):
    shards = _labelled(tmp_path, [str(i % 3).encode() for i in range(300)])
    # 300 a batch, so that it is joined of two pieces
    source = {"all": SourceConfig(shards, text=None, label="cls")}
    batch = next(iter(build(source, RankShare(300))))
    assert "texts" not in batch.parts
    assert batch.size == 300
    assert batch.part("labels").dtype == torch.int64
    assert batch.part("labels").tolist() == [int(key.rsplit("/")[-1]) % 3 for key in batch.keys]
    numbers = {"all": SourceConfig(shards, text=None, label="json:number")}
    batch = next(iter(build(numbers, RankShare(6))))
    assert batch.part("labels").tolist() == [int(key.rsplit("/")[-1]) for key in batch.keys]


def test_a_sample_without_a_whole_number_as_label_is_replaced_and_counted(build: Build, tmp_path: Path):
    shards = _labelled(tmp_path, [b"1", b"shirt", b"1", b"1.5", b"1", b"1"])
    loader = build({"all": SourceConfig(shards, text=None, label="cls")})
    batch = next(iter(loader))
    assert batch.part("labels").tolist() == [1] * 6
    assert loader.counts["bad/bad label"] >= 2, "each, and again where one is drawn as a substitute"


@pytest.mark.parametrize("key", ["text", "label"])
def test_sources_with_and_without_captions_or_labels_do_not_mix(build: Build, shards: str, key: str):
    sources = {
        "a": SourceConfig(shards, **{"text": "txt", "label": "json:number", key: None}),
        "b": SourceConfig(shards, text="txt", label="json:number"),
    }
    with pytest.raises(UserError, match=rf"data\.sources\.a\.{key} is null"):
        build(sources)


def test_a_file_as_cache_dir_is_named_at_the_start(build: Build, shards: str, tmp_path: Path):
    (tmp_path / "taken").write_text("")
    for taken in (tmp_path / "taken", tmp_path / "taken" / "cache"):
        with pytest.raises(UserError, match=f"{taken} cannot be the cache's folder"):
            build(shards, cache_dir=str(taken))
