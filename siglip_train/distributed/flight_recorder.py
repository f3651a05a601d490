"""Torch's record of the last collectives of each rank, on disk when ranks hang: what `torchfrtrace` compares."""

import logging
import os
import threading
from pathlib import Path

import torch
import torch.distributed as dist

log = logging.getLogger(__name__)

# collectives that are kept
_ENTRIES = "2000"
# a file for each rank; `torchfrtrace -p exchanges_rank_ FOLDER`
PREFIX = "exchanges_rank_"
# seconds that a dump may take on a rank whose GPU does not answer
_PATIENCE = 5.0


def switch_on() -> None:
    """Record from now on, where the user has not said otherwise. To be called before a process group is made."""
    # the name it had before torch 2.9
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", _ENTRIES)
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def write_into(folder: Path) -> None:
    """Where NCCL's own watchdog shall write it."""
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder / PREFIX))


def write(folder: Path, rank: int) -> Path | None:
    """Write this rank's record; None where torch has none, or does not come back with it."""
    if not dist.is_initialized():
        return None
    name = "_dump_nccl_trace" if dist.get_backend() == "nccl" else "_dump_fr_trace"
    dump = getattr(torch._C._distributed_c10d, name, None)
    if dump is None:
        return None
    path = folder / f"{PREFIX}{rank}"

    def record() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(dump())
        except (OSError, RuntimeError) as error:
            log.warning("no record of exchanges: %s", error)

    thread = threading.Thread(target=record, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return path if path.exists() else None
