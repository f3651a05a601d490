"""Plots beside the reports: SVG, the same file for the same figures."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def drawn(path: Path, *, rows: int = 1, columns: int, size: tuple[float, float]) -> Iterator[Any]:
    """Panels `[rows][columns]` of a figure of this size in inches, which is written at the end."""
    # here: tables need no matplotlib
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "siglip"
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False)
    yield panels
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
