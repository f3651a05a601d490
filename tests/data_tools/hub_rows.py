"""Parquet files as Hugging Face's `datasets` writes them: images inside, and the names of classes in the schema."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


def picture(seed: int, kind: str = "PNG", size: tuple[int, int] = (24, 20)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_rows(
    path: Path,
    labels: dict[str, Sequence[int]],
    names: dict[str, list[str]],
    image: str = "image",
    **more: list,
) -> list[bytes]:
    """Rows of images with integer labels; names: of the classes of those columns that are class labels."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    count = len(next(iter([*labels.values(), *more.values()])))
    pictures = [picture(seed) for seed in range(count)]
    features: dict[str, Any] = {image: {"_type": "Image"}}
    features |= {column: {"_type": "ClassLabel", "names": each} for column, each in names.items()}
    cells = [{"bytes": data, "path": f"{number}.png"} for number, data in enumerate(pictures)]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    columns = {
        image: pyarrow.array(cells, kind),
        **{n: pyarrow.array(v) for n, v in {**labels, **more}.items()},
    }
    table = pyarrow.table(columns).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=5)
    return pictures
