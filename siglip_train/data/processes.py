"""Run one function on many tasks in several processes, results in the order of the tasks."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from siglip_train.data.workers import end_with_parent, forget_safe_path, safe_path_for_children
from siglip_train.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_all(work: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Iterator[Result]:
    """`work(task)` of every task; `work` is a function of a module, tasks and results are pickled.

    One worker means this process. After an exception, or Ctrl-C, tasks that have begun are finished, others are not
    begun. Raises `UserError` when the system ends a process.
    """
    processes = min(workers, len(tasks))
    if processes <= 1:
        yield from map(work, tasks)
        return
    # spawn: a fork of a process with threads may hang
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_begin) as pool:
        try:
            with safe_path_for_children():
                results = pool.map(work, tasks)
            yield from results
        except BrokenProcessPool as error:
            raise UserError(
                f"one of {processes} processes was killed, most often for want of memory: use fewer --workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin() -> None:
    forget_safe_path()
    # Ctrl-C reaches every process of the terminal; this one's task is to end as its parent decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # a parent that is killed cannot tell, and siblings hold the pipe open from which tasks come
    end_with_parent()
