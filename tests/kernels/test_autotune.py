"""Tuning without a GPU: classes, search, files and their damage, several writers. Only the clock is a stand-in."""

import json
import logging
import multiprocessing

import pytest
import torch

from kernels.sigmoid_loss.pairs import BlockGradients
from kernels.sigmoid_loss.triton import autotune, block
from kernels.sigmoid_loss.triton.autotune import (
    BESIDE,
    BESIDE_ON_BLACKWELL,
    Case,
    Choice,
    Tuning,
    cache_file,
    candidates,
    rows_class,
)
from kernels.sigmoid_loss.triton.tiles import AMPERE, HOPPER, choose_chunk_rows

CASE = Case("NVIDIA H200", "3.9.0", "bfloat16", 768, 32768, 32768)
SLOW_TILE, WIDE = HOPPER, BESIDE[HOPPER][0]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(autotune.REQUEST, raising=False)
    monkeypatch.setattr(autotune, "_known", {})


def forget(monkeypatch):
    """As a new process would."""
    monkeypatch.setattr(autotune, "_known", {})


RESULT = BlockGradients(*(torch.ones(3) for _ in BlockGradients._fields))


def make(run=lambda choice: RESULT, *, case=CASE, tile=HOPPER, capability=(9, 0)):
    return Tuning(case, Choice(tile, choose_chunk_rows(case.images, case.width, 132)), 132, capability, run)


class Clock:
    """A tuning whose runs take what `cost` says of a choice; measures by it and records what was measured."""

    def __init__(self, cost, result=lambda choice: RESULT, **options):
        self.cost, self.result, self.ran, self.last = cost, result, [], None
        self.tuning = make(self.run, **options)

    def run(self, choice):
        self.last = choice
        return self.result(choice)

    def measure(self, run):
        run()
        self.ran.append(self.last)
        return self.cost(self.last)

    def search(self):
        return self.tuning.search(self.measure)


def cost(choice):
    """The wide tile wins, and half of the usual chunk."""
    return (1.0 if choice.tile == WIDE else 2.0) + choice.chunk_rows / 10_000


def test_rows_fall_into_powers_of_two():
    assert [rows_class(rows) for rows in (0, 1, 1024, 1025, 4096, 5000, 32768, 32769, 10**6)] == [
        1024, 1024, 1024, 2048, 4096, 8192, 32768, 32768, 32768,
    ]  # fmt: skip


def test_each_case_has_a_file_of_its_own(tmp_path):
    cases = [CASE] + [
        CASE._replace(**{name: value})
        for name, value in [
            ("gpu", "NVIDIA A100-SXM4-40GB"), ("triton", "3.6.0"), ("dtype", "float16"), ("width", 1152),
            ("images", 1024), ("texts", 1024),
        ]
    ]  # fmt: skip
    files = {cache_file(case) for case in cases}
    assert len(files) == len(cases)
    assert cache_file(CASE) == (
        tmp_path / "siglip-kernels/sigmoid_loss/NVIDIA-H200_3.9.0_bfloat16_768_32768_32768.json"
    )


def test_without_a_request_and_a_file_the_default_stands():
    clock = Clock(cost)
    assert clock.tuning.choice() == clock.tuning.default
    assert clock.ran == []
    assert not autotune.cache_folder().exists()


def test_the_fastest_tile_and_then_the_fastest_chunk_are_kept():
    clock = Clock(cost)
    assert clock.tuning.chunks() == [4224, 4608, 2112 // 128 * 128]
    assert clock.search() == Choice(WIDE, 2048)
    assert clock.ran == [Choice(tile, 4224) for tile in candidates(HOPPER, (9, 0))] + [
        Choice(WIDE, 4608), Choice(WIDE, 2048),
    ]  # fmt: skip


def test_chunks_that_hold_all_images_are_one():
    assert make(case=CASE._replace(images=1024)).chunks() == [1024]
    assert make(case=CASE._replace(images=4096)).chunks() == [4096, 2048]


def test_a_result_is_used_by_later_calls_and_processes_without_a_run(monkeypatch):
    Clock(cost).search()
    for _ in range(2):
        later = Clock(cost)
        assert later.tuning.choice() == Choice(WIDE, 2048)
        assert later.ran == []
        forget(monkeypatch)
    assert [file.suffix for file in autotune.cache_folder().iterdir()] == [".json"]
    other = Clock(cost, case=CASE._replace(width=1152)).tuning
    assert other.choice() == other.default


def test_on_request_the_first_call_tries_and_the_second_does_not(monkeypatch):
    monkeypatch.setenv(autotune.REQUEST, "1")
    ran = []
    # by the real clock, so which wins is open
    tuning = make(lambda choice: (ran.append(choice), RESULT)[1])
    first = tuning.choice()
    tried = len(ran)
    # and each once for its results
    assert tried == 5 * (autotune._WARMUP + autotune._RUNS + 1)
    forget(monkeypatch)
    assert tuning.choice() == first
    assert len(ran) == tried


def test_a_tile_that_does_not_run_is_passed_over():
    def fail_for_the_wide(choice):
        if choice.tile == WIDE:
            raise RuntimeError("out of shared memory")
        return cost(choice)

    assert Clock(fail_for_the_wide).search() == Choice(SLOW_TILE, 2048)


@pytest.mark.parametrize("field", BlockGradients._fields)
@pytest.mark.parametrize("value", [1.02, float("nan")])
def test_a_tile_whose_results_differ_is_passed_over_with_one_line(field, value, caplog):
    def result(choice):
        return RESULT._replace(**{field: RESULT.loss * value}) if choice.tile == WIDE else RESULT

    with caplog.at_level(logging.WARNING):
        assert Clock(cost, result).search() == Choice(SLOW_TILE, 2048)
    (record,) = caplog.records
    assert f"{field} is off by" in record.getMessage()
    # other rounding is no difference
    forgiving = Clock(cost, lambda choice: RESULT._replace(loss=RESULT.loss * (1 + 1e-5 * choice.tile.warps)))
    assert forgiving.search() == Choice(WIDE, 2048)


def test_if_the_default_fails_it_says_so_and_keeps_nothing():
    def fail(choice):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="the default tile fails on NVIDIA H200"):
        Clock(fail).search()
    assert not autotune.cache_folder().exists()


def edited(**changes):
    return json.dumps(json.loads(cache_file(CASE).read_text()) | changes).encode()


DAMAGE = {
    "empty": lambda: b"",
    "cut": lambda: cache_file(CASE).read_bytes()[:100],
    "binary": lambda: b"\xff\xfe\x00",
    "a list": lambda: b"[1, 2]",
    "no chunk": lambda: b'{"tile": {}}',
    "other fields": lambda: edited(tile={"rows": 3}),
    "no candidate": lambda: edited(tile=AMPERE._asdict()),
    "huge chunk": lambda: edited(chunk_rows=10**9),
    "other case": lambda: edited(case=CASE._replace(gpu="NVIDIA-H200")._asdict()),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_ignored_with_one_line(kind, monkeypatch, caplog):
    clock = Clock(cost)
    clock.search()
    cache_file(CASE).write_bytes(DAMAGE[kind]())
    forget(monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert [clock.tuning.choice() for _ in range(3)] == [clock.tuning.default] * 3
    (record,) = caplog.records
    assert str(cache_file(CASE)) in record.getMessage()
    assert "\n" not in record.getMessage()
    # and a new search replaces it
    clock.search()
    forget(monkeypatch)
    assert clock.tuning.choice() == Choice(WIDE, 2048)


def test_a_cache_that_cannot_be_written_costs_a_line_and_not_the_result(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    clock = Clock(cost)
    with caplog.at_level(logging.WARNING):
        assert clock.search() == clock.tuning.choice() == Choice(WIDE, 2048)
    assert len(caplog.records) == 1


def write_often(times):
    for _ in range(times):
        Clock(cost).search()


def test_processes_that_tune_at_once_leave_one_whole_file(monkeypatch, caplog):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_often, args=(100,)) for _ in range(3)]
    for writer in writers:
        writer.start()
    tuning, seen = make(), set()
    with caplog.at_level(logging.WARNING):
        while any(writer.is_alive() for writer in writers):
            forget(monkeypatch)
            seen.add(tuning.choice())
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert seen <= {tuning.default, Choice(WIDE, 2048)}
    assert not caplog.records
    forget(monkeypatch)
    assert tuning.choice() == Choice(WIDE, 2048)
    assert list(autotune.cache_folder().iterdir()) == [cache_file(CASE)]


def test_every_default_has_candidates_and_is_the_first():
    offered = [candidates(tile, (0, 0)) for tile in BESIDE] + [
        candidates(tile, (10, 0)) for tile in BESIDE_ON_BLACKWELL
    ]
    assert all(
        tiles[0] == default for default, tiles in zip([*BESIDE, *BESIDE_ON_BLACKWELL], offered, strict=True)
    )
    assert all(1 < len(set(tiles)) == len(tiles) for tiles in offered)


def test_blackwell_is_not_offered_the_tiles_that_spill_there():
    assert make().tiles() == candidates(HOPPER, (9, 0)) == (HOPPER, *BESIDE[HOPPER])
    blackwell = make(capability=(10, 0))
    assert blackwell.tiles() == candidates(HOPPER, (10, 3)) == (HOPPER, *BESIDE_ON_BLACKWELL[HOPPER])
    assert WIDE not in blackwell.tiles()
    # nor is it taken from a file
    Clock(cost).search()
    assert json.loads(cache_file(CASE).read_text())["tile"] == WIDE._asdict()
    autotune._known.clear()
    assert blackwell.choice() == blackwell.default


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_tune_needs_a_gpu():
    with pytest.raises(ValueError, match="no CUDA device"):
        block.tune(4096, 4096, 768)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tune_on_a_gpu_keeps_a_candidate():
    pytest.importorskip("triton")

    found = block.tune(5000, 3000, 512)
    images, texts = (torch.zeros(rows, 512, device="cuda", dtype=torch.bfloat16) for rows in (5000, 3000))
    tuning = block.tuning_of(images, texts)
    assert (tuning.case.images, tuning.case.texts) == (8192, 4096)
    assert tuning.choice() == found
    assert found.tile in tuning.tiles()
    assert json.loads(cache_file(tuning.case).read_text())["milliseconds"]
