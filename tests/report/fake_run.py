"""A made-up run directory with everything a report can show: gaps, hostile captions, all sections."""

import json
import math
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from siglip_train.report.thumbnail import thumbnail

HOSTILE = '<script>alert("x")</script> & "quoted"'
CAPTIONS = [
    "a red circle on a grey background", "ein großer blauer Stern links von einem Quadrat", "一个红色的圆形",
    "دائرة حمراء كبيرة", "три жёлтых треугольника", "एक नीला तारा", HOSTILE, "赤い円",
]  # fmt: skip


def picture(index: int) -> Image.Image:
    """Draw a disc whose colour and place depend on `index`."""
    image = Image.new("RGB", (80 + 8 * (index % 5), 100), (230, 230, 225))
    colour = tuple(int(128 + 110 * math.sin(index + phase)) for phase in (0, 2, 4))
    left = 10 + index * 7 % 30
    ImageDraw.Draw(image).ellipse((left, 20, left + 40, 60), fill=colour)
    return image


def write_fake_run(run_dir: Path, steps: int = 600) -> None:
    """Write the files of a run of `steps` logged steps."""
    run_dir.mkdir(parents=True, exist_ok=True)
    rows = [_training_row(step) for step in range(1, steps + 1)]
    for step in range(100, steps + 1, 100):
        share = 1 - math.exp(-step / 200)
        rows.append(
            {"step": step, "samples_seen": step * 256}
            | {f"val/shapes/acc{k}": share * (0.8 + 0.02 * k) for k in (1, 5)}
            | {f"val/scenes/image_retrieval_recall@{k}": share * (0.5 + 0.04 * k) for k in (1, 5, 10)}
            | {f"val/scenes/{language}/image_retrieval_recall@1": share * 0.5 for language in ("de", "en")}
            | {
                "val/held_out/loss": 5 * math.exp(-step / 150),
                "val/held_out/positive_loss": 3 * math.exp(-step / 150),
            }
        )
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run_dir / "metrics.jsonl").write_text(text + '{"step": 601, "train/lo', encoding="utf-8")
    (run_dir / "config.yaml").write_text("seed: 0\nmodel:\n  name: <tiny>\n", encoding="utf-8")
    (run_dir / "environment.json").write_text('{"torch": "2.15.0"}', encoding="utf-8")
    (run_dir / "evaluations").mkdir(exist_ok=True)
    for task, content in evaluations().items():
        (run_dir / "evaluations" / f"{task}.json").write_text(json.dumps(content), encoding="utf-8")


def _training_row(step: int) -> dict[str, Any]:
    loss = 6 * math.exp(-step / 120) + 0.4 + 0.15 * math.sin(step * 1.7)
    norm = 40 * math.exp(-step / 60) + 0.3 + 0.2 * math.sin(step)
    return {
        "step": step, "samples_seen": step * 256, "time": 1.7e9 + step * 0.9,
        "train/loss": math.nan if 200 < step < 215 else loss, "train/sigmoid_loss": loss,
        "train/logit_scale": 10 + step / 100, "train/logit_bias": -10 - step / 300,
        "train/lr": 1e-3 * min(1, step / 50) * 0.5 * (1 + math.cos(math.pi * step / 600)),
        "train/grad_norm": norm, "train/grad_norm_clipped": min(1.0, norm),
        "train/samples_per_second": 900 + 60 * math.sin(step / 5), "train/exchange_time": 0.004,
        "train/data_time": 0.01 + 0.02 * (step % 50 == 0), "train/step_time": 0.28, "train/mfu": 0.31,
        "train/memory_gib": 3.2,
        "data/seen": step * 256, "data/bad/broken image": step // 200, "train/surprise": step % 7,
    }  # fmt: skip


def evaluations() -> dict[str, dict[str, Any]]:
    """Give one evaluation with every section of retrieval and one with those of classification."""
    count = len(CAPTIONS)
    recalls = {f"{way}_retrieval_recall@{k}": 0.1 * k**0.9 for way in ("image", "text") for k in (1, 5, 10)}
    scenes = {
        "counts": {"seen": 500, "bad/empty caption": 2},
        "languages": {"de": recalls, "en": recalls, "": recalls},
        "similarity": {
            "pictures": [thumbnail(picture(index), 48) for index in range(count)],
            "captions": CAPTIONS,
            "values": [[0.9 if i == j else math.sin(i * j) / 9 for j in range(count)] for i in range(count)],
        },
        "image_retrieval": [
            {
                "query": caption, "language": "de" if row % 2 else "",
                "results": [
                    {"picture": thumbnail(picture(row + i)), "score": 0.9 - i / 10, "correct": i == row % 5}
                    for i in range(5)
                ],
            }
            for row, caption in enumerate(CAPTIONS)
        ],
        "text_retrieval": [
            {
                "picture": thumbnail(picture(row)), "language": "en",
                "results": [{"text": CAPTIONS[i], "score": 0.5, "correct": i == 1} for i in range(5)],
            }
            for row in range(4)
        ],
    }  # fmt: skip
    shapes = {
        "counts": {"seen": 90, "excluded/no text": 1},
        "classes": [{"name": f"class {i}", "images": 10, "recall": i / 9} for i in range(9)],
        "confusions": [{"label": "red circle", "predicted": HOSTILE, "images": 12}],
        "mistakes": [
            {
                "picture": thumbnail(picture(i)),
                "key": f"0.tar/{i}",
                "label": "red circle",
                "predicted": "red ring",
            }
            for i in range(6)
        ],
    }
    return {
        "scenes": {
            "task": "scenes",
            "step": 600,
            "metrics": recalls | {"de/x_recall@1": 0.1},
            "details": scenes,
        },
        "shapes": {
            "task": "shapes",
            "step": None,
            "metrics": {"acc1": 0.81, "acc5": math.nan},
            "details": shapes,
        },
    }
