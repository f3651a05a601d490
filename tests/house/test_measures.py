"""What the house promises about its own size, where it is kept."""

from pathlib import Path

import pytest

from tests.forks import server
from tests.house.measures import table, traced_step


def _measure(folder: Path, queue: object) -> None:
    step = traced_step(folder)
    queue.put((step.frames, [what for what, *_ in table(step)]))  # type: ignore[attr-defined]


@pytest.mark.slow  # trains three steps under a profiler
def test_few_frames_lie_between_the_loop_and_the_loss(tmp_path: Path) -> None:
    context = server()
    queue = context.Queue()
    process = context.Process(target=_measure, args=(tmp_path, queue))
    process.start()
    frames, measured = queue.get(timeout=200)
    process.join()
    assert frames["objective"] <= 5
    assert frames["block"] <= 8
    assert "files / lines of a training step" in measured
