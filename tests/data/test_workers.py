"""A worker outlives the signals that a scheduler sends to the whole job."""

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection

from siglip_train.data.workers import outlive_signals


def _work(pipe: Connection) -> None:
    outlive_signals(0)
    pipe.send("ready")
    while pipe.recv() == "still there?":
        pipe.send("yes")


def _signal_from_another_process(process: int, number: int) -> None:
    os.kill(process, number)


def test_only_its_parents_sigterm_ends_a_worker():
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    worker = context.Process(target=_work, args=(theirs,), daemon=True)
    worker.start()
    try:
        assert ours.poll(20)
        assert ours.recv() == "ready"
        assert worker.pid is not None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            sender = context.Process(target=_signal_from_another_process, args=(worker.pid, number))
            sender.start()
            sender.join()
        time.sleep(0.2)
        ours.send("still there?")
        assert ours.poll(20)
        assert ours.recv() == "yes"
        worker.terminate()
        worker.join(20)
        assert worker.exitcode == 0
    finally:
        worker.kill()
