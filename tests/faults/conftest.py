"""Two runs that faults are injected into copies of, and the tier of these tests."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import once
from tests.faults.runs import train

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("fault_by_default") is None:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def fault_run(small_run: list[str]) -> list[str]:
    """Overrides of the runs here: ten steps of 24 pairs, a checkpoint every two, four kept, no evaluation."""
    kept = [argument for argument in small_run if not argument.startswith(("evaluation.", "checkpoint."))]
    return [*kept, "~evaluation.tasks", "checkpoint.every_steps=2", "checkpoint.keep=4"]


@pytest.fixture(scope="session")
def straight_run(fault_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to, on one rank."""
    return once(tmp_path_factory, "straight", lambda folder: _run(fault_run, folder, ranks=1))


@pytest.fixture(scope="session")
def stopped_run(fault_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that was stopped after step 6; it has the checkpoints 2, 4 and 6. To be copied."""
    return once(
        tmp_path_factory, "stopped", lambda folder: _run([*fault_run, "stop_after_steps=6"], folder, ranks=2)
    )


def _run(arguments: list[str], folder: Path, ranks: int) -> None:
    for result in train([*arguments, f"run_dir={folder}"], ranks=ranks):
        assert result.returncode == 0, result.stderr


@pytest.fixture
def go_on(fault_run: list[str]) -> Callable:
    """`train` with the overrides of these runs before one's own."""
    return lambda arguments, **options: train([*fault_run, *arguments], **options)
