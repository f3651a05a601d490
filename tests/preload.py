"""Imported by the server that the tests' processes are forked from (`forks.py`)."""

import contextlib
import os

# as the programs of the tests run: DeepSpeed asks for the device when it is imported
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed

import siglip_train.evaluate
import siglip_train.train  # noqa: F401

with contextlib.suppress(ImportError):
    import peft  # noqa: F401

with contextlib.suppress(ImportError):
    # imported by `deepspeed.initialize`, and with it all of torch's compiler: half the time of a short run
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
