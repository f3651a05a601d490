# ruff: noqa: E501
"""The README's Slurm script, run with a `srun` and a `scontrol` that tell what they were asked."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

# each attempt: what siglip-train leaves behind, and its exit status; whether the job is put back into the queue, and
# the script's own status
ATTEMPTS = {
    "all samples are seen": [("DONE", 0, False, 0)],
    "the time limit, then the end": [("step-1", 0, True, 0), ("step-2", 0, True, 0), ("DONE", 0, False, 0)],
    "a mistake": [("", 2, False, 2)],
    "it crashes and saves between": [("step-1", 1, True, 0), ("step-2", 1, True, 0), ("step-3", 1, True, 0), ("step-4", 137, True, 0)],
    "it crashes at the same step": [("step-1", 1, True, 0), ("step-1", 1, True, 0), ("step-1", 137, True, 0), ("step-1", 1, False, 1)],
    "it never comes to a checkpoint": [("", 1, True, 0), ("", 1, True, 0), ("", 1, False, 1)],
    "progress counts from the last": [("", 1, True, 0), ("", 1, True, 0), ("step-1", 1, True, 0), ("step-1", 1, True, 0)],
}  # fmt: skip


def _script() -> str:
    (script,) = (
        block
        for block in re.findall(
            r"```bash\n(.*?)```", (ROOT / "siglip_train" / "distributed" / "README.md").read_text(), re.DOTALL
        )
        if "#SBATCH" in block
    )
    return script


@pytest.mark.parametrize("story", ATTEMPTS)
def test_a_job_is_tried_again_as_long_as_it_gets_on(story: str, tmp_path: Path, record_fault) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("srun", "scontrol"):
        (tools / name).write_text(
            f'#!/bin/bash\necho "{name} $*" >> "$ASKED"\n[ {name} = srun ] && . "$STORY"\nexit 0\n'
        )
        (tools / name).chmod(0o755)
    script, asked, what = tmp_path / "job.sh", tmp_path / "asked", tmp_path / "story"
    script.write_text(_script())
    variables = {"PATH": f"{tools}:{os.environ['PATH']}", "ASKED": asked, "STORY": what, "SLURM_JOB_ID": "7"}
    for left, status, requeued, own in ATTEMPTS[story]:
        last = f"mkdir -p runs/b16/checkpoints; echo {left} > runs/b16/checkpoints/LAST; " if left else ""
        done = "touch runs/b16/DONE; " if left == "DONE" else ""
        what.write_text(f"{last}{done}exit {status}\n")
        asked.unlink(missing_ok=True)
        result = subprocess.run(
            ["bash", script], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
        )
        assert (result.returncode, result.stderr) == (own, "")
        command, *after = asked.read_text().splitlines()
        assert command.startswith("srun --kill-on-bad-exit=1 siglip-train experiment=")
        assert "run_dir=runs/b16" in command
        assert after == (["scontrol requeue 7"] if requeued else [])
    record_fault(
        f"Slurm: {story}", ranks=1, happened="tried again" if requeued else "ended", lost=None, repeated=None
    )
