"""Where the main thread of a rank stands, for its other threads and for other ranks."""

import sys
import threading
import time
from pathlib import PurePath
from types import FrameType
from typing import Any, Literal

# in the order in which a step goes through them; "first step" compiles
Phase = Literal["start-up", "data", "first step", "step", "metrics", "checkpoint", "evaluation", "end"]


PHASES: tuple[Phase, ...] = (
    "start-up", "data", "first step", "step", "metrics", "checkpoint", "evaluation", "end"
)  # fmt: skip


class Standing:
    """Where the main thread of this rank stands: written by it, read by threads that watch."""

    def __init__(self) -> None:
        self._now: tuple[Phase, int, float] = ("start-up", 0, time.monotonic())
        self._thread = threading.get_ident()

    def at(self, phase: Phase, step: int | None = None) -> None:
        """It has come to this phase, of this step; without one, of the same."""
        self._now = (phase, self._now[1] if step is None else step, time.monotonic())

    def move(self) -> None:
        """It is alive, in the same phase."""
        self.at(self._now[0])

    @property
    def phase(self) -> Phase:
        """Where it is."""
        return self._now[0]

    @property
    def since(self) -> float:
        """When it came there or last moved, on the monotonic clock."""
        return self._now[2]

    def __str__(self) -> str:
        return described(self._now[0], self._now[1])

    def report(self) -> dict[str, Any]:
        """All of it for others: phase, step, seconds since, and the innermost lines of code."""
        phase, step, since = self._now
        frame = sys._current_frames().get(self._thread)
        return {
            "phase": phase,
            "step": step,
            "seconds": round(time.monotonic() - since),
            "line": _line(frame),
        }


def described(phase: str, step: int) -> str:
    match phase:
        case "start-up" | "end":
            return phase
        case "data":
            return f"step {step}, waiting for data"
        case "first step" | "step":
            return f"step {step}"
        case _:
            return f"step {step}, {phase}"


def _line(frame: FrameType | None) -> str:
    """`loop.py:204 divisors > distributed_c10d.py:3100 all_reduce`: the innermost line of this project, and of all."""
    innermost, ours = frame, frame
    while ours is not None and not {"siglip_train", "kernels"} & set(PurePath(ours.f_code.co_filename).parts):
        ours = ours.f_back
    lines = [ours, innermost] if ours is not innermost else [innermost]
    return " > ".join(
        f"{PurePath(each.f_code.co_filename).name}:{each.f_lineno} {each.f_code.co_name}"
        for each in lines
        if each
    )
