"""When bad samples are too many, and what is logged."""

import logging

import pytest

from siglip_train.data.shards.faults import BadSample, BadSampleLog, causes, too_many
from siglip_train.errors import SampleError


@pytest.mark.parametrize(
    ("bad", "seen", "share", "expected"),
    [
        (1, 10, 0.01, False),  # a small run
        (199, 199, 0.01, False),
        (4, 200, 0.01, False),  # 2 are due, and chance
        (5, 200, 0.01, True),
        (1000, 100_000, 0.01, False),
        (1100, 100_000, 0.01, True),
        (1, 10, 0.0, True),
        (0, 10, 0.0, False),
        (500, 1000, 1.0, False),
    ],
)
def test_too_many(bad: int, seen: int, share: float, expected: bool):
    assert too_many(bad, seen, share) is expected


def test_the_first_are_logged_with_shard_key_and_cause_then_every_hundredth(caplog: pytest.LogCaptureFixture):
    log = BadSampleLog()
    with caplog.at_level(logging.WARNING):
        for number in range(301):
            log(BadSample("7.tar", f"key{number}", "broken image", "torn"))
        log(BadSample("7.tar", "other", "no text"))
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "bad sample 7.tar/key0: broken image (torn)"
    assert [line.split(":")[0].rsplit("key")[-1] for line in lines[21:24]] == ["99", "199", "299"]
    assert lines[24:] == ["bad sample 7.tar/other: no text"]


def test_the_unforeseen_is_a_read_error_that_names_its_type():
    assert BadSample.of("a", "b", OSError("gone")) == ("a", "b", "read error", "OSError: gone")
    assert BadSample.of("a", "b", SampleError("no text", "x")) == ("a", "b", "no text", "x")
    assert causes([BadSample("", "", cause) for cause in ("x", "y", "x")]) == "2 x, 1 y"
