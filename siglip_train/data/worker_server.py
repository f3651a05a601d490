"""Imported by the process that workers are forked from: it goes on when the whole job is signalled, as they do."""

import signal

from siglip_train.data.workers import JOB_SIGNALS, forget_safe_path

forget_safe_path()
for number in JOB_SIGNALS:
    signal.signal(number, signal.SIG_IGN)
