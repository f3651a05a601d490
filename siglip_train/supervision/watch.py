"""What watches over a program from outside its main thread: signals, the other ranks, and the log of how it ended."""

import contextlib
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from siglip_train.distributed import flight_recorder
from siglip_train.distributed.peers import Failure, Peers
from siglip_train.distributed.setup import DistributedConfig, launched_rank
from siglip_train.distributed.standing import Standing
from siglip_train.errors import PeerError, UserError, said
from siglip_train.supervision.rank_log import RankLog
from siglip_train.supervision.stop_signal import StopSignal

log = logging.getLogger(__name__)

# for the others to learn why a rank leaves at once
_LAST_WORD_SECONDS = 5.0


@dataclass
class Supervision:
    """standing: the main thread keeps it up to date. ended: what the log's last line shall say of a good end."""

    config: DistributedConfig
    log: RankLog
    rank: int
    standing: Standing = field(default_factory=Standing)
    stop: StopSignal = field(init=False)
    peers: Peers | None = None
    ended: str = "ended"

    def __post_init__(self) -> None:
        self.stop = StopSignal(
            self.standing,
            grace_seconds=self.config.grace_seconds,
            leave=self._leave_on_signal,
            write_stacks=self.log.write_stacks,
        )

    def met(self, store: dist.Store, rank: int, world_size: int) -> None:
        """The ranks have a store and begin to wait for one another: for `init_world`."""
        timeouts = self.config.timeout_seconds, self.config.startup_timeout_seconds
        self.peers = Peers(
            store, rank, world_size, standing=self.standing, timeouts=timeouts, leave=self._leave
        )

    def _leave(self, failure: Failure) -> None:
        if failure.hangs and self.log.folder is not None:
            path = flight_recorder.write(self.log.folder / "logs", self.rank)
            log.debug("the last exchanges of this rank: %s", path)
        self.log.leave(failure.reason, failure.status, stacks=failure.hangs)

    def _leave_on_signal(self, reason: str, status: int) -> None:
        if self.peers is not None:
            # all write down where they stand: it may be another that does not move
            failure = Failure(reason, status, hangs=True)
            word = threading.Thread(target=self.peers.tell, args=(failure,), daemon=True)
            word.start()
            word.join(_LAST_WORD_SECONDS)
        self.log.leave(reason, status, stacks=True)

    def failed(self, error: BaseException) -> PeerError | None:
        """Write down why this rank ends, and tell the others; where it ends as another has failed, that one's error."""
        status = 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1
        is_expected = isinstance(error, UserError | KeyboardInterrupt)
        reason = " ".join(str(error).split()) if isinstance(error, UserError) else said(error)
        cause = self.peers.fail(error, reason, status) if self.peers is not None else None
        if cause is None:
            self.log.end(f"error: {reason}", None if is_expected else error)
            return None
        self.log.end(f"error: {cause.reason}")
        return PeerError(cause.reason, cause.status)


@contextlib.contextmanager
def supervised(config: DistributedConfig, run_dir: str | None) -> Iterator[Supervision]:
    """Watch over the block: signals from its beginning, other ranks from `init_world(…, met=)`.

    run_dir: where the log of this rank goes if it ends before `open_run_dir`; None = on the screen alone. What ends one
    rank ends all: those that only met it raise `PeerError`, with its reason.
    """
    rank = launched_rank()
    watch = Supervision(config, RankLog(rank, Path(run_dir) if run_dir else None), rank)
    watch.stop.install()
    try:
        yield watch
    except BaseException as error:
        if (cause := watch.failed(error)) is not None:
            raise cause from None
        raise
    else:
        watch.log.end(watch.ended)
    finally:
        if watch.peers is not None:
            watch.peers.close()
        watch.stop.uninstall()
        watch.log.close()
