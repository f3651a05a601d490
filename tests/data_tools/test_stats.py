"""`siglip-data stats`: its numbers against counts made with tarfile and Pillow, and a page that needs nothing else."""

import io
import itertools
import json
import random
import tarfile
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
import sentencepiece
from PIL import Image

from data_tools.cli import main
from data_tools.stats import command as stats_command
from data_tools.stats.counters import Distinct, Distribution, Frequent
from data_tools.stats.histogram import binned, histogram
from data_tools.stats.measure import measure_shard
from data_tools.stats.texts import normalised, words
from siglip_train.report.charts import bar_chart
from siglip_train.report.numbers import log_ticks, ticks

from .conftest import OPTIONS

VOID_TAGS = {"meta", "img"}
SCRIPT = "<script>alert('x')</script> & co"


def picture(width: int, height: int, kind: str = "PNG", color: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (color, 120, 60)).save(out, kind)
    return out.getvalue()


def write_shard(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for extension, data in members.items():
                entry = tarfile.TarInfo(f"{key}.{extension}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


def facts(**fields: object) -> bytes:
    return json.dumps(fields).encode()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards of known content: ten samples, four of them bad, and half a sample at a damaged end."""
    folder = tmp_path / "shards"
    folder.mkdir()
    boxes = [{"label": "cat", "box": [0, 0, 1, 1]}, {"label": "[b]dog[/b]", "box": [0, 0, 1, 1]}]
    first = {
        "a0": {"png": picture(40, 20), "txt": b"A red cat.", "json": facts(language="en", objects=boxes)},
        "a1": {"png": picture(40, 20), "txt": b"a  RED cat", "json": facts(lang="en", boxes=boxes[:1])},
        "a2": {
            "jpg": picture(300, 300, "JPEG"),
            "txt": "eine große Katze".encode(),
            "json": facts(language="de"),
        },
        "a3": {"webp": picture(10, 80, "WEBP"), "txt": SCRIPT.encode()},
        "a4": {"png": picture(40, 20, color=9), "txt": b"A red cat.", "json": facts(language="en")},
    }
    second = {
        "b0": {"png": picture(40, 20)[:30], "txt": b"broken"},
        "b1": {"png": picture(20, 40), "txt": b" \n"},
        "b2": {"txt": b"no image"},
        "b3": {"png": picture(40, 20), "txt": b"json is broken", "json": b"{"},
        "b4": {"png": picture(64, 64), "txt": b"x" * 400, "json": b'{"language": "\\ud800"}'},
        "b5": {"png": picture(640, 640), "txt": b"cut off"},
    }
    write_shard(folder / "00000.tar", first)
    write_shard(folder / "00001.tar", second)
    data = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(data[: data.rindex(b"b5.txt") + 200])
    return folder


def run(*arguments: object) -> None:
    main(["stats", *map(str, arguments)])


def numbers(shards: object, out: Path, *more: object) -> dict:
    run(shards, "--json", out, *more)
    return json.loads(out.read_text())


def test_hand_made_shards(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    found = numbers(shards, tmp_path / "stats.json", "--workers", 1)
    pictures, captions = found["pictures"], found["captions"]
    assert found["samples"] == 10
    assert found["shards"] == {"read": 2, "bytes": sum(path.stat().st_size for path in shards.iterdir())}
    assert pictures["number"] == 8
    assert pictures["formats"] == {"PNG": 6, "JPEG": 1, "WEBP": 1}
    assert (pictures["width"]["min"], pictures["width"]["median"], pictures["width"]["max"]) == (10, 40, 300)
    assert pictures["width"]["total"] == 4 * 40 + 300 + 10 + 20 + 64
    assert pictures["aspect"]["min"] == 0.125
    assert pictures["megapixels"]["max"] == 0.09
    assert pictures["duplicates"] == {"repeated": 2, "share": 2 / 8, "most_alike": 3, "is_estimate": False}
    assert captions["number"] == 9
    assert captions["per_picture"]["total"] == 9
    assert captions["per_picture"]["min"] == 0
    assert captions["characters"]["max"] == 400
    assert captions["duplicates"]["repeated"] == 2, "case, spaces and punctuation do not tell captions apart"
    assert captions["most_frequent"]["top"][0] == ["A red cat.", 2]
    assert dict(captions["words"]["top"])["cat"] == 3
    languages = {name: each["captions"] for name, each in captions["languages"].items()}
    assert languages == {"en": 3, "unknown": 4, "de": 1, "?": 1}
    assert captions["languages"]["de"]["mean_characters"] == len("eine große Katze")
    assert found["objects"]["labels"]["top"] == [["cat", 2], ["[b]dog[/b]", 1]]
    assert found["objects"]["per_picture"]["count"] == 2
    assert found["bad"]["causes"] == {
        "broken image": 1, "broken json": 1, "empty caption": 1, "no image": 1, "truncated": 1,
    }  # fmt: skip
    named = {(bad["shard"], bad["key"]): bad["cause"] for bad in found["bad"]["named"]}
    assert named == {
        ("00001.tar", "b0"): "broken image",
        ("00001.tar", "b1"): "empty caption",
        ("00001.tar", "b2"): "no image",
        ("00001.tar", "b3"): "broken json",
        ("00001.tar", "b5"): "truncated",
    }
    assert found["decoding"]["pictures"] == 8
    assert found["decoding"]["pictures_per_second_and_core"] > 0
    # in the words of `verify`
    wrong_field = numbers(shards, tmp_path / "wrong.json", "--workers", 1, "--text", "caption")
    assert wrong_field["bad"]["causes"]["no text"] == 10
    assert "empty caption" not in wrong_field["bad"]["causes"]
    shown = capsys.readouterr().out
    assert "[b]dog[/b]" in shown, "a label is no markup"
    assert "broken image" in shown


def test_the_tiny_set_against_tarfile_and_pillow(tiny_dir: Path, splits: dict, tmp_path: Path) -> None:
    model = tiny_dir / "tokenizer.model"
    found = numbers(
        f"{tiny_dir}/train/*.tar", tmp_path / "stats.json", "--tokenizer", model, "--context-length", 16, "--workers", 2
    )  # fmt: skip
    samples = splits["train"]
    data = [next(s.members[kind] for kind in ("jpg", "png", "webp") if kind in s.members) for s in samples]
    opened = [Image.open(io.BytesIO(each)) for each in data]
    texts = [sample.members["txt"].decode() for sample in samples]
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokens = sorted(len(pieces.encode(text.lower())) + 1 for text in texts)
    pictures, captions = found["pictures"], found["captions"]

    assert found["samples"] == OPTIONS.samples
    assert found["bad"]["causes"] == {}
    assert pictures["formats"] == dict(Counter(image.format for image in opened))
    widths = sorted(image.width for image in opened)
    assert pictures["width"]["total"] == sum(widths)
    assert pictures["width"]["median"] == widths[len(widths) // 2 - 1]
    assert pictures["width"]["p95"] == widths[len(widths) * 95 // 100 - 1]
    assert pictures["height"]["mean"] == pytest.approx(sum(image.height for image in opened) / len(opened))
    assert pictures["bytes"]["total"] == sum(map(len, data))
    assert pictures["aspect"]["max"] == max(image.width / image.height for image in opened)
    assert pictures["duplicates"]["repeated"] == len(data) - len(set(data))
    assert captions["characters"]["total"] == sum(map(len, texts))
    assert captions["tokens"]["total"] == sum(tokens)
    assert captions["tokens"]["max"] == tokens[-1]
    over = sum(count > 16 for count in tokens)
    assert 0 < over < len(tokens)
    assert captions["over_context_length"] == over
    assert captions["over_context_length_share"] == over / len(texts)
    counted = Counter(sample.facts["language"] for sample in samples)
    assert {name: each["captions"] for name, each in captions["languages"].items()} == counted
    most, count = Counter(texts).most_common(1)[0]
    assert captions["most_frequent"]["top"][0][1] == count
    assert [most, count] in captions["most_frequent"]["top"]
    labels = Counter(item["label"] for sample in samples for item in sample.facts["objects"])
    assert dict(map(tuple, found["objects"]["labels"]["top"])).items() <= labels.items()
    assert found["objects"]["per_picture"]["total"] == labels.total()


def test_a_mapping_names_the_languages(tiny_dir: Path, tmp_path: Path) -> None:
    found = numbers(tiny_dir / "validation", tmp_path / "s.json", "--text", "json:captions.*", "--workers", 1)
    captions = found["captions"]
    assert captions["per_picture"]["mean"] == 8
    assert {each["captions"] for each in captions["languages"].values()} == {OPTIONS.validation_samples}
    assert len(captions["languages"]) == 8


def test_workers_do_not_change_the_numbers(tiny_dir: Path, tmp_path: Path) -> None:
    one, two = (numbers(tiny_dir / "train", tmp_path / f"{n}.json", "--workers", n) for n in (1, 2))
    assert one.pop("decoding")["pictures"] == two.pop("decoding")["pictures"] == OPTIONS.samples
    assert one == two


def test_a_part_is_spread_over_the_shards(tiny_dir: Path, tmp_path: Path) -> None:
    train = tiny_dir / "train"
    for wanted, shards in ((50, 4), (2, 2)):
        found = numbers(train, tmp_path / "s.json", "--samples", wanted, "--workers", 1)
        assert found["samples"] == wanted
        assert found["shards"]["read"] == shards


class Page(HTMLParser):
    """Checks that every tag is closed, and collects attributes, texts and images."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags[tag] += 1
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "xlink:href")]
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_is_whole_and_needs_nothing_else(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "stats.html"
    run(shards, "--report", out, "--workers", 1)
    text = out.read_text()
    page = Page(text)
    assert page.tags["script"] == 0
    assert any(SCRIPT in piece for piece in page.texts), "escaped, not lost"
    assert page.tags["svg"] >= 9
    assert page.tags["img"] == len(page.links) == 8
    assert all(link.startswith("data:image/jpeg;base64,") for link in page.links)
    assert "://" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    assert [path.name for path in out.parent.iterdir()] == ["stats.html"], "no temporary file is left"


def test_a_shard_that_is_none_is_named_and_the_others_count(shards: Path, tmp_path: Path) -> None:
    (shards / "00002.tar").write_bytes(b"no tar at all" * 100)
    found = numbers(shards, tmp_path / "s.json", "--workers", 1)
    assert found["samples"] == 10
    assert found["bad"]["causes"]["broken shard"] == 1
    assert [bad["shard"] for bad in found["bad"]["named"] if bad["cause"] == "broken shard"] == ["00002.tar"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/nowhere/*.tar"], "no shard matches"),
        (["{tmp}/text.tar"], "broken shard"),
        (["{tmp}/text.tar", "--tokenizer", "{tmp}/none.model"], "none.model"),
        (["{tmp}/text.tar", "--text", "json:"], "json field"),
        (["{tmp}/text.tar", "--report", "{tmp}"], "folder"),
        (["{tmp}/text.tar", "--json", "{tmp}/text.tar/stats.json"], "cannot make the folder"),
        (["{tmp}/text.tar", "--json", "{tmp}/a", "--report", "{tmp}/a"], "for two files"),
    ],
)
def test_mistakes(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "text.tar").write_text("hello " * 500)
    with pytest.raises(SystemExit) as leaving:
        run(*[argument.format(tmp=tmp_path) for argument in arguments])
    assert leaving.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert message in error[0]


def test_quantiles_and_bins_of_a_distribution() -> None:
    source = random.Random(1)
    values = [source.lognormvariate(5, 1) for _ in range(2000)]
    numbers, parts = Distribution(), [Distribution(), Distribution()]
    for place, value in enumerate(values):
        numbers.add(value)
        parts[place % 2].add(value)
    parts[0].merge(parts[1])
    assert parts[0].bins == numbers.bins
    values.sort()
    for share in (0.01, 0.5, 0.95, 1.0):
        assert numbers.quantile(share) == pytest.approx(values[int(share * 2000) - 1], rel=0.006)
    for is_ratio in (False, True):
        bins, _ = binned(numbers, is_ratio=is_ratio)
        assert sum(each.number for each in bins) == 2000
        assert all(one.high == other.low for one, other in itertools.pairwise(bins))


@pytest.mark.parametrize(
    "values", [[0.004, 0.0041], [1, 1, 2], [0, 5000], [1, 1000], [999, 1001], [0.5, 2.0]]
)
def test_every_distribution_can_be_drawn(values: list[float]) -> None:
    numbers = Distribution()
    for value in values:
        numbers.add(value)
    assert sum(each.number for each in binned(numbers)[0]) == len(values)
    drawn = Page(histogram("title", numbers, "unit"))
    assert drawn.tags["rect"] == len(set(values))
    assert histogram("title", Distribution(), "unit") == ""


@pytest.mark.parametrize("value", [0, 64, 0.004])
def test_equal_numbers_are_told_in_words(value: float) -> None:
    numbers = Distribution()
    numbers.add(value)
    assert f"always {value} unit" in histogram("title", numbers, "unit")


def test_bars_need_rows() -> None:
    assert bar_chart("title", [], 0) == ""


def test_ticks_are_round() -> None:
    assert ticks(0, 97, 5) == [0, 20, 40, 60, 80]
    assert ticks(0.5, 3.5, is_whole=True) == [1, 2, 3]
    assert log_ticks(80, 12_000) == [100, 200, 500, 1000, 2000, 5000, 10_000]


def test_duplicates_in_bounded_memory() -> None:
    """Far above the limit the share is still right, whatever the order of merges."""
    items = [str(number % 20_000 if number % 4 else -number).encode() for number in range(60_000)]
    true = 1 - len(set(items)) / len(items)
    results = []
    for order in (1, -1):
        parts = [Distinct(limit=2048) for _ in range(7)]
        for place, item in enumerate(items):
            parts[place % 7].add(item)
        whole = Distinct(limit=2048)
        for part in parts[::order]:
            whole.merge(part)
        whole.settle()
        assert len(whole.hashes) <= 2048
        assert whole.level > 0
        assert whole.repeated_share == pytest.approx(true, abs=0.03)
        results.append((whole.level, whole.hashes.tolist(), whole.counts.tolist()))
    assert results[0] == results[1]


def test_frequent_texts_survive_forgetting() -> None:
    whole = Frequent(limit=100)
    for part in range(20):
        texts = Frequent()
        for number in range(60):
            texts.add(f"rare {part} {number}")
        for _ in range(5):
            texts.add("often")
        whole.merge(texts)
    assert whole.top(1) == [("often", 100)]
    assert len(whole.counts) <= 100
    assert whole.counts.total() + whole.dropped == 20 * 65


def test_words_and_what_makes_captions_alike() -> None:
    assert words("«Ein Café», (rot)!") == ["ein", "café", "rot"]
    assert words("लाल वृत्त।") == ["लाल", "वृत्त"], "vowel signs belong to their word"
    assert normalised("A red\tcat.") == normalised("a  RED cat")
    assert normalised("!!!") != normalised("???")


def test_an_interrupted_run_goes_on(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def run(name: str, most: int) -> dict:
        def counted(task):
            if len(measured) == most:
                raise KeyboardInterrupt
            measured.append(task.url)
            return measure_shard(task)

        monkeypatch.setattr(stats_command, "measure_shard", counted)
        options = ["--tokenizer", str(tiny_dir / "tokenizer.model"), "--workers", "1"]
        options += ["--cache-dir", str(tmp_path / "cache")]
        files = ["--json", str(tmp_path / f"{name}.json"), "--report", str(tmp_path / f"{name}.html")]
        try:
            main(["stats", str(tiny_dir / "train"), *options, *files])
        except (KeyboardInterrupt, SystemExit):
            return {}
        found = json.loads((tmp_path / f"{name}.json").read_text())
        # of this machine at this moment
        found.pop("decoding")
        return found

    urls = sorted(map(str, (tiny_dir / "train").glob("*.tar")))
    assert run("interrupted", most=2) == {}
    resumed = run("resumed", most=100)
    assert measured == urls, "each shard once"
    measured.clear()
    assert resumed == run("whole", most=100)
    assert measured == urls, "nothing is kept of a complete run"
    pages = [(tmp_path / f"{name}.html").read_text() for name in ("resumed", "whole")]
    assert pages[0].count("data:image/") == pages[1].count("data:image/") > 0
