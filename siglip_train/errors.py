"""The errors that callers distinguish: a user's mistake (one line, exit status 2), a bad sample, a rank that failed."""

import functools
import os
import select
import sys
from collections.abc import Callable
from typing import Any

from siglip_train.redact import redact_the_unexpected, redacted


class SampleError(ValueError):
    """One sample is unusable; `cause` is the short name under which it is counted."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(f"{cause}: {detail}")
        self.cause = cause
        self.detail = detail


class UserError(Exception):
    """A mistake in a command, a config, a path, a shard or a checkpoint.

    The message says what is wrong, where, and what to do about it.
    """


class PeerError(Exception):
    """The failure of another rank, which ends this one: the message names it; status: the exit status of all."""

    def __init__(self, reason: str, status: int) -> None:
        super().__init__(reason)
        self.status = status


def said(error: BaseException) -> str:
    """An error in a line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def exit_on_user_error(main: Callable[..., Any]) -> Callable[..., Any]:
    """Turn a `UserError` that leaves an entry point into one line on stderr and exit status 2; Ctrl-C into 130.

    The same for the failure of another rank, with its exit status.

    141, without a word, where who reads the output has gone, as of a program that the signal of it ends.
    """

    @functools.wraps(main)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        redact_the_unexpected()
        try:
            result = main(*args, **kwargs)
            sys.stdout.flush()
            return result
        except UserError as error:
            print(f"error: {redacted(str(error))}", file=sys.stderr)  # noqa: T201
            raise SystemExit(2) from None
        except PeerError as error:
            print(f"error: {redacted(str(error))}", file=sys.stderr)  # noqa: T201
            raise SystemExit(error.status) from None
        except KeyboardInterrupt:
            print("interrupted; every file that was written is complete", file=sys.stderr)  # noqa: T201
            raise SystemExit(130) from None
        except BrokenPipeError:
            if not _output_is_gone():
                raise
            # at exit Python writes what is left, and would complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None

    return guarded


def _output_is_gone() -> bool:
    poll = select.poll()
    # what is asked for is nothing: that the other end has gone is told anyway
    poll.register(sys.stdout.fileno(), 0)
    return bool(poll.poll(0))
