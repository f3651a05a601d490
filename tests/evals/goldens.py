"""The peers' numbers for recall and zero-shot weights; tests skip where they are absent."""

from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2].parent / "shared" / "goldens" / "metrics"


def load_goldens() -> tuple[dict, dict]:
    """Give inputs and expected values as dicts of arrays."""
    if not FOLDER.is_dir():
        pytest.skip("the golden numbers of peers (../shared/goldens/metrics) are not here")
    return dict(np.load(FOLDER / "inputs.npz")), dict(np.load(FOLDER / "expected.npz"))
