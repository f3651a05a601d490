"""Results in CLIP_benchmark's form, read back as its `build` reads them."""

import json

from siglip_train.evals.base import Evaluation
from siglip_train.evals.benchmark import benchmark_results, write_benchmark_results
from siglip_train.evals.retrieval import Retrieval
from siglip_train.evals.table import result_tables
from siglip_train.evals.validation_loss import ValidationLoss
from siglip_train.evals.zero_shot import ZeroShotClassification

TASKS = {
    "clothing": ZeroShotClassification(shards="x"),
    "kleider": ZeroShotClassification(shards="x", language="de"),
    "xm3600": Retrieval(shards="x"),
    "flickr": Retrieval(shards="x"),
    "loss": ValidationLoss(shards="x"),
}
EVALUATIONS = {
    "clothing": Evaluation(
        {"acc1": 0.5, "acc1_low": 0.4, "acc1_high": 0.625, "n": 12.0, "Asia/acc1": 0.25}, {}
    ),
    "kleider": Evaluation({"acc1": 0.25}, {}),
    "xm3600": Evaluation(
        {
            "image_retrieval_recall@5": 0.2,
            "de/image_retrieval_recall@5": 0.1,
            "th/image_retrieval_recall@5": 0.3,
        },
        {},
    ),
    "flickr": Evaluation({"image_retrieval_recall@5": 0.75}, {}),
    "loss": Evaluation({"loss": 3.0}, {}),
}


def test_an_object_a_task_and_language(tmp_path):
    results = benchmark_results(TASKS, EVALUATIONS, model="b16", pretrained="runs/b16")
    assert results[0] == {
        "dataset": "clothing",
        "model": "b16",
        "pretrained": "runs/b16",
        "task": "zeroshot_classification",
        "metrics": {"acc1": 0.5, "acc1_low": 0.4, "acc1_high": 0.625, "n": 12.0},
        "language": "en",
    }
    parts = [
        (result["dataset"], result["language"], list(result["metrics"].values())) for result in results[1:]
    ]
    assert parts == [
        ("kleider", "de", [0.25]), ("xm3600", "de", [0.1]), ("xm3600", "th", [0.3]), ("flickr", "en", [0.75]),
    ]  # fmt: skip
    assert results[2]["task"] == "zeroshot_retrieval"
    write_benchmark_results(tmp_path / "new" / "folder", results)
    files = {path.name: json.loads(path.read_text()) for path in (tmp_path / "new" / "folder").iterdir()}
    assert len(files) == 5
    assert files["xm3600_b16_th_zeroshot_retrieval.json"] == results[3]


def test_the_printed_table_has_intervals_and_a_table_of_groups():
    text = result_tables(EVALUATIONS)
    assert "0.4000 – 0.6250" in text
    assert "acc1_low" not in text
    assert "group" in text
    assert "language" in text
    assert "95 %" not in result_tables({"flickr": EVALUATIONS["flickr"]})
