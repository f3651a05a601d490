"""Faults that are injected into runs, and what becomes of the run: `make faults` ends with the table.

A test injects one fault (parametrise over which rank, which moment, which file), lets the run end or go on, asserts
what must have happened, and records it:

    def test_a_truncated_file(stopped_run, straight_run, tmp_path, record_fault):
        run_dir = shutil.copytree(stopped_run, tmp_path / "run")   # of two ranks, stopped after 6 of its 10 steps
        ...                                                        # the fault
        results = train([f"run_dir={run_dir}"], ranks=2)           # runs.py: forked ranks, a result for each
        assert "step-00000006 is damaged" in results[0].stderr
        record_fault("moments.safetensors is cut", ranks=2, happened="went on from the checkpoint before",
                     **gone_on(run_dir, straight_run))             # measures samples lost and steps repeated

A fault inside a process (a disk that is full, a rank that is killed in the middle of a save) is injected by
`train(…, prepare=…)`, a function of the rank that patches what is needed before the program starts. Only what is about
a signal to a real process, or about a command line, starts one.

Every test here is `slow` (`make test-all`) but those marked `fault_by_default`, the worst, which `make test` runs.
"""
