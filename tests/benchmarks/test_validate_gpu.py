"""The command that validates a GPU: what it keeps of a stage that fails or is stopped, and all at reduced sizes."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import validate_gpu


def write_stage(folder, monkeypatch, code):
    """A stage of this code, in place of those that measure."""
    (folder / "gpu_stages.py").write_text("import json, sys, time\n" + code)
    monkeypatch.setattr(validate_gpu, "__file__", str(folder / "validate_gpu.py"))


def test_rows_of_a_stage_that_is_stopped_are_kept(tmp_path, monkeypatch):
    lines = [
        "print('a library speaks')",
        "print(json.dumps({'ms': 1.5}))",
        "print('{', flush=True)",
        "time.sleep(60)",
    ]
    code = "\n".join(lines)
    write_stage(tmp_path, monkeypatch, code)
    result = validate_gpu.run_stage("loss", 3, tmp_path, quick=True)
    assert result["end"] == "stopped after 3 s"
    assert result["rows"] == [{"ms": 1.5}]


def test_a_stage_that_fails_is_named_with_its_log(tmp_path, monkeypatch):
    write_stage(tmp_path, monkeypatch, "print(json.dumps({'n': 2}))\nsys.exit('no such kernel')")
    result = validate_gpu.run_stage("loss", 60, tmp_path, quick=False)
    assert result["end"] == "failed with status 1, see loss.log"
    assert result["rows"] == [{"n": 2}]
    assert "no such kernel" in (tmp_path / "loss.log").read_text()


def test_the_summary_has_a_table_for_rows_of_the_same_columns():
    rows = [{"n": 2, "errors": [0.12345, 1e-7]}, {"n": 3, "errors": []}, {"skipped": "a|b"}]
    page = validate_gpu.summary({"loss": {"end": "done", "seconds": 1.0, "rows": rows}})
    assert "## loss: done, 1.0 s" in page
    assert page.count("|---") == 3
    assert "| 2 | 0.1235, 1e-07 |" in page
    assert "| a\\|b |" in page


@pytest.mark.slow
def test_all_stages_run_at_reduced_sizes(tmp_path):
    command = [sys.executable, "benchmarks/validate_gpu.py", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    results = json.loads((tmp_path / "validation.json").read_text())
    assert all(result["end"] == "done" for result in results.values()), run.stdout
    assert all(result["rows"] for result in results.values())
    ours = [row for row in results["loss"]["rows"] if row["contestant"].startswith("ours")]
    assert len(ours) == 5  # in three dtypes, and from fp32 in two
    for row in ours:
        is_fp32 = row["dtype"] == "torch.float32"
        assert max(row["errors"]) < (1e-5 if is_fp32 else 5e-3), row
    steps = {row["step"] for row in results["training"]["rows"]}
    assert {"default", "ZeRO 3", "gradient cache", "compiled"} <= steps
    for row in results["ring"]["rows"]:
        assert max(row["errors"]) < 1e-5, row
    assert (tmp_path / "summary.md").read_text().startswith("# Validation")
