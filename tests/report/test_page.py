import json
import re
from html.parser import HTMLParser

import pytest

from siglip_train.errors import UserError
from siglip_train.report import write_report
from tests.report.fake_run import HOSTILE, write_fake_run

VOID = {"meta", "img", "link", "br"}


class Checker(HTMLParser):
    """Collects tags and addresses, and notices an element that is closed in the wrong order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.addresses, self.text = [], set(), [], []

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(path):
    checker = Checker()
    page = path.read_text(encoding="utf-8")
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return page, checker, " ".join(checker.text)


def test_a_full_run_is_one_small_file_that_fetches_nothing(tmp_path):
    write_fake_run(tmp_path / "run")
    path = write_report(tmp_path / "run")
    page, checker, text = read(path)
    assert path == tmp_path / "run" / "report.html"
    assert path.stat().st_size < 3_000_000
    assert not re.findall(r"https?://|@import|url\(", page)
    assert checker.addresses
    assert all(address.startswith("data:image/jpeg;base64,") for address in checker.addresses)
    for words in (
        "training loss", "gradient norm", "learning rate", "logit scale", "samples per second", "surprise",
        "share of the step spent waiting", "shapes: acc", "scenes: image_retrieval_recall", "held_out: loss",
        "by language", "Similarity of captions and images", "Images found for a caption",
        "Captions found for an image", "most frequent confusions", "Mistakes", "bad/broken image", "excluded/no text",
        "Configuration", "name: <tiny>", "Environment", "at step 600", "81.0 %",
    ):  # fmt: skip
        assert words in text, words
    assert list((tmp_path / "run").glob(".report*")) == []


def test_captions_are_text_and_never_markup(tmp_path):
    write_fake_run(tmp_path, steps=3)
    page, checker, text = read(write_report(tmp_path))
    assert HOSTILE in text
    assert "script" not in checker.seen
    assert "<script" not in page


def test_an_address_in_the_details_is_not_followed(tmp_path):
    write_fake_run(tmp_path, steps=3)
    path = tmp_path / "evaluations" / "scenes.json"
    path.write_text(re.sub(r"data:image/jpeg;base64,[^\"]*", "https://example.com/a.jpg", path.read_text()))
    page, checker, _ = read(write_report(tmp_path))
    assert "example.com" not in page
    assert "" in checker.addresses


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ['{"step": 1, "train/loss": NaN}'],
        ['{"step": 1, "train/loss": 2.5}', "{broken"],
        ["7", "null", '{"train/loss": 1.0}', '{"step": null, "train/loss": null}'],
        ['{"step": 1, "time": 5, "train/loss": 1, "train/data_time": 1, "train/step_time": 0}'],
        ['{"step": 5, "val/a/b/c/d": 1.0, "val/odd": 2, "val/t/n": 3}'],
    ],
)
def test_partial_runs_give_a_page_too(tmp_path, lines):
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    read(write_report(tmp_path))


def test_an_evaluation_without_details_or_with_nan_is_shown(tmp_path):
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations" / "loss.json").write_text(
        json.dumps({"metrics": {"loss": float("nan")}, "details": {}})
    )
    (tmp_path / "evaluations" / "bare.json").write_text(json.dumps({"metrics": {"acc1": 0.5}}))
    (tmp_path / "evaluations" / "torn.json").write_text('{"metrics": {')
    _, _, text = read(write_report(tmp_path))
    assert "nan" in text
    assert "50.0 %" in text


def test_a_diverged_model_is_shown_too(tmp_path):
    """Numbers that are not finite are null in the JSON of an evaluation."""

    def without_numbers(content):
        if isinstance(content, dict):
            return {key: without_numbers(value) for key, value in content.items()}
        if isinstance(content, list):
            return [without_numbers(value) for value in content]
        return None if isinstance(content, float) else content

    write_fake_run(tmp_path, steps=3)
    for path in (tmp_path / "evaluations").iterdir():
        path.write_text(json.dumps(without_numbers(json.loads(path.read_text()))))
    _, _, text = read(write_report(tmp_path))
    assert "Images found for a caption" in text
    assert "nan" in text


def test_an_empty_folder_and_no_folder(tmp_path):
    _, _, text = read(write_report(tmp_path))
    assert tmp_path.name in text
    with pytest.raises(UserError, match="no run directory"):
        write_report(tmp_path / "none")
