"""How programs end: with a line where the user is to blame, and without a word where nobody reads on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiers import one_in

PROGRAM = """
import sys
from siglip_train.errors import UserError, exit_on_user_error

@exit_on_user_error
def main(what):
    print("a word")
    if what == "mistake":
        raise UserError("wrong, as you see")
    if what == "interrupt":
        raise KeyboardInterrupt
    if what == "fault":
        raise BrokenPipeError("of another pipe")
    if what == "much":
        print("more than a pipe holds " * 100_000)

main(sys.argv[1])
"""


def run(what: str, output: int) -> tuple[int, str]:
    """The exit status of the program and what it says to stderr."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    command = [sys.executable, "-c", PROGRAM, what]
    done = subprocess.run(
        command, env=environment, stdout=output, stderr=subprocess.PIPE, text=True, timeout=60, check=False
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("what", "status", "said"),
    [
        ("mistake", 2, "error: wrong, as you see\n"),
        ("interrupt", 130, "interrupted; every file that was written is complete\n"),
        ("nothing", 0, ""),
    ],
)
def test_a_program_ends_with_a_line_and_a_status(what: str, status: int, said: str):
    assert run(what, subprocess.DEVNULL) == (status, said)


@pytest.mark.parametrize(("what", "unbuffered"), one_in(3, ["little", "much"], ["", "1"]))
def test_a_program_that_nobody_reads_ends_without_a_word(
    what: str, unbuffered: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert run(what, writer) == (141, "")
    finally:
        os.close(writer)


def test_another_broken_pipe_is_a_fault():
    status, said = run("fault", subprocess.DEVNULL)
    assert status == 1
    assert "BrokenPipeError: of another pipe" in said
