"""What a loader's worker process does about signals."""

import os
import signal
import threading


def outlive_signals(_: int) -> None:
    """Let a worker go on when a terminal or a scheduler signals the whole job: the main process decides.

    That one saves a checkpoint first, and would fail if its workers died meanwhile. Only its own SIGTERM ends them.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # only a wait for the signal tells who sent it
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_when_told, args=(os.getppid(),), daemon=True).start()


def _exit_when_told(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
