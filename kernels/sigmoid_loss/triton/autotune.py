"""Which tile and chunk are fastest on the GPU at hand: tried on request, once for a class of shapes, kept on disk.

Without a request nothing is tried and the choice of `tiles.py` stands. A result on disk is used from then on.
"""

import json
import logging
import math
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.sigmoid_loss.pairs import BlockGradients, pair_up
from kernels.sigmoid_loss.triton.tiles import (
    AMPERE,
    AMPERE_FP32,
    HOPPER,
    HOPPER_FP32,
    Tile,
    choose_chunk_rows,
    choose_tile,
)

log = logging.getLogger(__name__)

REQUEST = "SIGLIP_KERNELS_AUTOTUNE"
# beside each default, what passes the compile gate (test_compile_gate.py) and might hide its work better
BESIDE = {
    HOPPER: (HOPPER._replace(texts=256, warps=8), HOPPER._replace(images=256, warps=8)),
    AMPERE: (AMPERE._replace(depth=64, stages=2), AMPERE._replace(stages=3)),
    HOPPER_FP32: (HOPPER_FP32._replace(texts=256, warps=8), HOPPER_FP32._replace(images=256, warps=8)),
    AMPERE_FP32: (AMPERE_FP32._replace(stages=4), AMPERE_FP32._replace(stages=2)),
}  # fmt: skip
# there a thread holds a whole row of the accumulator, and larger tiles spill
BESIDE_ON_BLACKWELL = {default: (default._replace(stages=2),) for default in (HOPPER, HOPPER_FP32)}
# from 32,768 rows on, more of them change no tile; below 1,024, the launches are all of the time
LEAST_ROWS, MOST_ROWS = 1024, 32768
_WARMUP, _RUNS = 2, 5


class Choice(NamedTuple):
    """What one call of the kernels runs with."""

    tile: Tile
    chunk_rows: int


class Case(NamedTuple):
    """What a result holds for. images, texts: `rows_class` of the numbers of rows."""

    gpu: str
    triton: str
    dtype: str
    width: int
    images: int
    texts: int


class Tuning(NamedTuple):
    """A case, what is chosen for it without trial, and how to run it with another choice."""

    case: Case
    default: Choice
    multiprocessors: int
    capability: tuple[int, int]
    run: Callable[[Choice], BlockGradients]

    @classmethod
    def of(
        cls,
        images: Tensor,
        texts: Tensor,
        triton: str,
        multiprocessors: int,
        run: Callable[[Choice], BlockGradients],
    ) -> "Tuning":
        """The case of contiguous `[n, E]` images and `[m, E]` texts on a GPU. triton: its version."""
        rows, width = images.shape
        case = Case(
            gpu=torch.cuda.get_device_name(images.device),
            triton=triton,
            dtype=str(images.dtype).removeprefix("torch."),
            width=width,
            images=rows_class(rows),
            texts=rows_class(len(texts)),
        )
        capability = torch.cuda.get_device_capability(images.device)
        tile = choose_tile(capability, images.element_size())
        default = Choice(tile, max(1, choose_chunk_rows(rows, width, multiprocessors)))
        return cls(case, default, multiprocessors, capability, run)

    def choice(self) -> Choice:
        """The result on disk; if there is none, that of a search where one is requested, else the default."""
        if self.case not in _known:
            found = _load(self)
            if found is None and os.environ.get(REQUEST) == "1":
                found = self.search()
            _known[self.case] = found
        return _known[self.case] or self.default

    def search(self, measure: Callable[[Callable[[], object]], float] | None = None) -> Choice:
        """Try every tile at the first chunk, then every chunk with the best tile; keep the fastest.

        A tile whose results are not the default's, which the self-check compares with torch's, counts as slow.
        """
        measure = measure or _seconds
        first = self.default._replace(chunk_rows=self.chunks()[0])
        seconds = {first: self._try(first, measure)}
        if math.isinf(seconds[first]):
            raise RuntimeError(f"the default tile fails on {self.case.gpu} with Triton {self.case.triton}")
        truth = self.run(first)
        for choice in (first._replace(tile=tile) for tile in self.tiles()[1:]):
            seconds[choice] = self._try(choice, measure, truth)
        best = min(seconds, key=seconds.__getitem__)
        for choice in (best._replace(chunk_rows=rows) for rows in self.chunks()[1:]):
            seconds[choice] = self._try(choice, measure, truth)
        best = min(seconds, key=seconds.__getitem__)
        _store(self.case, best, seconds)
        _known[self.case] = best
        return best

    def tiles(self) -> tuple[Tile, ...]:
        """What may be tried and what a file may name, the default first."""
        return candidates(self.default.tile, self.capability)

    def chunks(self) -> list[int]:
        """Chunks that differ for this number of images: that of the default, the largest, and half of the default."""
        largest = max(128, 6 * self.case.width // 128 * 128)
        usual = choose_chunk_rows(10**9, self.case.width, self.multiprocessors)
        half = max(128, usual // 2 // 128 * 128)
        return list(dict.fromkeys(min(rows, self.case.images) for rows in (usual, largest, half)))

    def _try(
        self,
        choice: Choice,
        measure: Callable[[Callable[[], object]], float],
        truth: BlockGradients | None = None,
    ) -> float:
        # here, because it imports torch's compiler
        from kernels.self_check import beyond_limits

        try:
            seconds = measure(lambda: self.run(choice))
            wrong = truth and beyond_limits(pair_up(self.run(choice), truth), getattr(torch, self.case.dtype))
        except Exception as error:  # whatever a compiler or driver says of a tile that does not fit this GPU
            log.info("%s does not run here: %s", choice, error)
            return math.inf
        if wrong:
            log.warning("%s on %s is not used: %s (RMS ratio)", choice, self.case.gpu, wrong)
            return math.inf
        return seconds


_known: dict[Case, Choice | None] = {}


def candidates(default: Tile, capability: tuple[int, int]) -> tuple[Tile, ...]:
    """Tiles to try on a GPU that `choose_tile` gives this default, the default first."""
    return default, *(BESIDE_ON_BLACKWELL if capability[0] == 10 else BESIDE)[default]


def rows_class(rows: int) -> int:
    """The power of two from `LEAST_ROWS` to `MOST_ROWS` that has room for them, or the last."""
    return min(MOST_ROWS, max(LEAST_ROWS, 1 << (rows - 1).bit_length()))


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/siglip-kernels/sigmoid_loss`, by default under `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "siglip-kernels" / "sigmoid_loss"


def cache_file(case: Case) -> Path:
    """A file for each case: processes that tune at once replace whole files and lose nothing of one another's."""
    name = "_".join(str(part) for part in case)
    return cache_folder() / (re.sub(r"[^\w.]+", "-", name) + ".json")


def _load(tuning: Tuning) -> Choice | None:
    path = cache_file(tuning.case)
    try:
        content = json.loads(path.read_text())
        found = Choice(Tile(**content["tile"]), content["chunk_rows"])
        if content["case"] != tuning.case._asdict():
            raise ValueError("it is of another case")
        if found.tile not in tuning.tiles() or found.chunk_rows not in tuning.chunks():
            raise ValueError("it names what is no candidate")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("ignored the tuning in %s: %s: %s", path, type(error).__name__, error)
        return None
    return found


def _store(case: Case, best: Choice, seconds: dict[Choice, float]) -> None:
    content: dict[str, Any] = {
        "case": case._asdict(),
        "tile": best.tile._asdict(),
        "chunk_rows": best.chunk_rows,
        # for people: what was tried
        "milliseconds": {str(choice): round(value * 1e3, 4) for choice, value in seconds.items()},
    }
    path = cache_file(case)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(content, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        log.warning("could not keep the tuning in %s: %s", path, error)


def _seconds(run: Callable[[], object]) -> float:
    """Median of some runs after those that compile."""
    times = []
    for turn in range(_WARMUP + _RUNS):
        _synchronize()
        start = time.perf_counter()
        run()
        _synchronize()
        if turn >= _WARMUP:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
