"""Where the peers' outputs stand; tests that need them skip where they are absent."""

from pathlib import Path

import numpy as np
import pytest

GOLDENS = Path(__file__).resolve().parents[1].parent / "shared" / "goldens"


def golden_folder(name: str) -> Path:
    """The folder of one case."""
    folder = GOLDENS / name
    if not folder.is_dir():
        pytest.skip(f"the outputs of peers (../shared/goldens/{name}) are not here")
    return folder


def arrays(name: str, file: str) -> dict[str, np.ndarray]:
    """The arrays of one file of a case."""
    return dict(np.load(golden_folder(name) / file))
