"""The one kind of error a user causes: printed as a line or two, exit status 2, no traceback."""

import functools
import sys
from collections.abc import Callable
from typing import Any


class UserError(Exception):
    """A mistake in a command, a config, a path, a shard or a checkpoint.

    The message says what is wrong, where, and what to do about it.
    """


def exit_on_user_error(main: Callable[..., Any]) -> Callable[..., Any]:
    """Turn a `UserError` that leaves an entry point into one line on stderr and exit status 2; Ctrl-C into 130."""

    @functools.wraps(main)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)  # noqa: T201
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("interrupted; every file that was written is complete", file=sys.stderr)  # noqa: T201
            raise SystemExit(130) from None

    return guarded
