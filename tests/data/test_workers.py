"""A worker, and the server it is forked from, outlive the signals that a scheduler sends to the whole job."""

import os
import subprocess
import sys
import time
from multiprocessing.connection import Connection

import psutil

from siglip_train.data.workers import JOB_SIGNALS, outlive_signals, worker_options
from tests.conftest import ROOT


def _work(pipe: Connection) -> None:
    outlive_signals(0)
    pipe.send(os.getppid())
    while pipe.recv() == "still there?":
        pipe.send("yes")


def _signal_from_another_process(*processes: int) -> None:
    for number in JOB_SIGNALS:
        for process in processes:
            os.kill(process, number)


def signal_worker_and_server():
    context = worker_options(1)["multiprocessing_context"]
    ours, theirs = context.Pipe()
    worker = context.Process(target=_work, args=(theirs,), daemon=True)
    worker.start()
    try:
        assert ours.poll(20)
        server = ours.recv()
        assert server != os.getpid()
        sender = context.Process(target=_signal_from_another_process, args=(worker.pid, server))
        sender.start()
        sender.join()
        assert sender.exitcode == 0
        time.sleep(0.2)
        ours.send("still there?")
        assert ours.poll(20)
        assert ours.recv() == "yes"
        worker.terminate()
        worker.join(20)
        assert worker.exitcode == 0
        another = context.Process(target=os.getpid)  # of the server, which is still there
        another.start()
        another.join(20)
        assert another.exitcode == 0
    finally:
        worker.kill()


def test_only_its_parents_sigterm_ends_a_worker():
    # in a process of its own: in this one, the server may be that of the tests, which ignores no signals
    program = "from tests.data.test_workers import signal_worker_and_server as main; main()"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=100)


def test_workers_and_their_server_end_with_a_killed_main_process():
    program = """
import time
from siglip_train.data.workers import worker_options
from tests.data.test_workers import _work
if __name__ == "__main__":
    context = worker_options(1)["multiprocessing_context"]
    ours, theirs = context.Pipe()
    worker = context.Process(target=_work, args=(theirs,), daemon=True)
    worker.start()
    print(worker.pid, ours.recv(), flush=True)
    time.sleep(60)
"""
    main = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert main.stdout is not None
    pids = [int(pid) for pid in main.stdout.readline().split()]
    main.kill()
    main.communicate()
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=20)
    assert len(pids) == 2
    assert not alive


def test_processes_of_the_data_tools_end_with_a_killed_tool():
    program = """
import time
from siglip_train.data.processes import run_all
if __name__ == "__main__":
    list(run_all(time.sleep, [60, 60], 2))
"""
    tool = psutil.Popen([sys.executable, "-c", program], cwd=ROOT)
    # imports take long where others work
    deadline = time.monotonic() + 90
    # two workers, and the tracker of what they share
    while len(children := tool.children()) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    tool.kill()
    tool.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert len(children) == 3
    for process in alive:
        process.kill()
    assert not alive
