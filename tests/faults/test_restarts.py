"""Runs that a launcher or a scheduler starts again after a failure."""

import pytest

from siglip_train.errors import UserError
from siglip_train.run_dir import open_run_dir

RESTARTING = {
    "torchrun --max-restarts": {"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "3"},
    "a job that Slurm requeued": {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"},
}


@pytest.mark.fault_by_default
@pytest.mark.parametrize("launcher", RESTARTING)
def test_a_folder_named_by_the_time_is_refused_where_each_attempt_would_get_its_own(
    launcher: str, monkeypatch: pytest.MonkeyPatch, record_fault
) -> None:
    for name, value in RESTARTING[launcher].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"run_dir: .* give run_dir=PATH") as refused:
        open_run_dir(None, None, None)  # type: ignore[arg-type]  # refused before anything is asked for
    assert "\n" not in str(refused.value)
    record_fault(f"run_dir=null under {launcher}", ranks=1, happened="refused")
