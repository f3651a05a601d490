"""`siglip-data regions`: texts of captions become boxes, everything else of a sample passes through as it was."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.cli import main
from data_tools.regions import owl, run
from data_tools.regions.annotate import is_drawn
from data_tools.regions.detector import Found, Limits, kept, regions_of
from data_tools.regions.owl import Owl
from data_tools.regions.pace import Pace, Work
from data_tools.regions.queries import n_grams, names_a_thing
from siglip_train.data.inputs.regions import read_regions
from siglip_train.data.shards.fields import Field
from siglip_train.data.shards.reader import RawSample
from tests.data_tools.conftest import Sample, read_split
from tests.data_tools.test_verify import named, write_tar
from tests.data_tools.tiny_owl import save_owl

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def owl_dir(tmp_path_factory) -> Path:
    return save_owl(tmp_path_factory.mktemp("models") / "owlv2")


def regions(shards: object, out_dir: Path, detector: object, *options: object) -> list[Sample]:
    fixed = ["--detector", str(detector), "--workers", "1", "--cache-dir", str(out_dir.parent / "cache")]
    main(["regions", str(shards), str(out_dir), *fixed, *map(str, options)])
    return read_split(out_dir)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that says why."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        regions(*arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


def report(out_dir: Path) -> dict:
    return json.loads((out_dir / "regions.json").read_text())


def test_the_texts_are_all_n_grams_that_say_something() -> None:
    assert n_grams(["A photo of a red cat, and 2 dogs."], longest=2) == [
        "red", "cat", "dogs", "a red", "red cat", "cat and", "2 dogs"
    ]  # fmt: skip
    assert n_grams(["of the", "stock image", "12 34"]) == []
    assert n_grams(["Cat", "cat"]) == ["Cat"], "whatever its case"
    long = n_grams(["one cat " + "word " * 100 + "end"])
    assert max(len(text.split()) for text in long) == 10
    assert not any("end" in text for text in long), "what follows the first 64 words is not read"
    assert n_grams(["die Katze"], more_stop_words=frozenset(["die"])) == ["Katze", "die Katze"]
    assert n_grams(["लाल वृत्त!"]) == ["लाल", "वृत्त", "लाल वृत्त"], "marks belong to words"


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a dog", True),
        ("this is so beautiful, really lovely", False),
        ("IMG 1234", False),
        ("click here to see more", False),
        ("ein Hund", True),
        ("", False),
    ],
)
def test_a_caption_names_a_thing_where_a_word_may_be_a_noun(caption: str, *, expected: bool) -> None:
    assert names_a_thing([caption]) is expected


def test_boxes_are_kept_by_score_and_overlap_inside_of_the_image() -> None:
    boxes = np.array(
        [
            [0.0, 0.0, 0.5, 0.5],
            [0.0, 0.0, 0.5, 0.45],  # overlaps the first by 0.9
            [0.25, 0.0, 0.75, 0.5],  # by a third
            [0.6, 0.6, 1.2, 0.9],  # reaches outside
            [1.1, 0.0, 1.3, 0.5],  # is outside
            [0.0, 0.9, 0.1, 1.0],  # is below the score
        ]
    )
    found = Found(boxes, np.array([0.5, 0.9, 0.8, 0.6, 0.99, 0.2]), np.array([0, 1, 0, 1, 0, 0]))
    assert kept(found, Limits(0.3, 0.5)) == [1, 2, 3]
    assert kept(found, Limits(0.3, 0.3)) == [1, 3]
    assert kept(found, Limits(0.1, 1.0)) == [1, 2, 3, 0, 5]
    assert regions_of(found, ["a", "b"], Limits(0.55, 0.3)) == [
        {"box": [0, 0, 0.5, 0.45], "text": "b", "score": 0.9},
        {"box": [0.6, 0.6, 1, 0.9], "text": "b", "score": 0.6},
    ]
    empty = Found(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))
    assert kept(empty, Limits(0.3, 0.5)) == []


@pytest.mark.parametrize("kind", ["owlv2", "owlvit"])
def test_boxes_and_scores_are_those_of_transformers(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owl, "TEMPLATES", ("a {}", "{}."))
    folder = save_owl(tmp_path / kind, kind)
    detector = Owl(folder, CPU)
    pixels = np.random.default_rng(0).integers(0, 255, (2, 40, 60, 3), dtype=np.uint8)
    images = [Image.fromarray(each) for each in pixels]
    texts = ["cat", "big dog", "house"]
    nobody = RawSample("", "", {})
    found = detector.find(
        [detector.prepare(image, nobody) for image in images], [[texts, ["dog"]], [["house", "cat"]]]
    )

    model = getattr(transformers, owl.CLASSES[kind]).from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = processor(images=images, return_tensors="pt")
    with torch.no_grad():
        means = []
        for template in owl.TEMPLATES:
            sentences = [template.format(text) for text in texts]
            tokens = tokenizer(sentences, padding="max_length", max_length=48, return_tensors="pt")
            hidden = getattr(model, kind).text_model(**tokens)[1]
            means.append(torch.nn.functional.normalize(getattr(model, kind).text_projection(hidden), dim=-1))
        grid = model.image_embedder(inputs["pixel_values"])[0]
        queries = torch.stack(means).mean(0)[None].expand(2, -1, -1)
        logits = model.class_predictor(grid.flatten(1, 2), queries)[0]
        # of the box head as transformers' own forward calls it
        tokens = tokenizer(["cat", "cat"], padding="max_length", max_length=48, return_tensors="pt")
        said = model(pixel_values=inputs["pixel_values"], **tokens)
        said.logits = logits
    wanted = processor.post_process_object_detection(said, threshold=0.0, target_sizes=[(40, 60)] * 2)
    torch.testing.assert_close(torch.tensor(found[0][0].scores), wanted[0]["scores"])
    assert found[0][0].texts.tolist() == wanted[0]["labels"].tolist()
    assert len(set(found[0][0].texts.tolist())) > 1, "the texts compete"
    in_pixels = found[1][0].boxes * np.array([60, 40, 60, 40])
    torch.testing.assert_close(torch.tensor(in_pixels).float(), wanted[1]["boxes"], atol=1e-4, rtol=1e-4)


def test_each_text_is_embedded_once(owl_dir: Path) -> None:
    detector = Owl(owl_dir, CPU)
    image = detector.prepare(Image.new("RGB", (32, 32)), RawSample("", "", {}))
    first = detector.find([image, image], [[["cat", "dog"], ["house"]], [["dog"], ["house"]]])
    assert detector.embedded == 3
    again = detector.find([image], [[["dog", "bird"]]])
    assert detector.embedded == 4
    assert again[0][0].scores.max() >= first[1][0].scores.max()


def test_a_model_annotates_shards_and_all_else_passes_through(
    tiny_dir: Path, splits: dict[str, list[Sample]], owl_dir: Path, tmp_path: Path
) -> None:
    before = {sample.key: sample for sample in splits["referring_seen"]}
    names = tmp_path / "names.txt"
    names.write_text("circle\nstar\n")
    after = regions(
        tiny_dir / "referring_seen", tmp_path / "out", owl_dir, "--categories", names, "--share", 0.5,
        "--text", "json:captions.en", "--min-score", 0.01, "--overlap", 0.4, "--batch-size", 3, "--field", "found",
    )  # fmt: skip
    assert [sample.key for sample in after] == list(before)
    drawn = [sample for sample in after if is_drawn(sample.key, 0.5)]
    assert 0 < len(drawn) < len(after)
    for sample in after:
        old = before[sample.key]
        assert {**sample.members, "json": b""} == {**old.members, "json": b""}
        if sample not in drawn:
            assert sample.members["json"] == old.members["json"]
            continue
        found = sample.facts.pop("found")
        assert {name: value for name, value in sample.facts.items() if name != "found"} == old.facts
        assert {each["from"] for each in found} <= {"caption", "categories"}
        raw = RawSample("", sample.key, sample.members)
        assert len(read_regions(Field.parse("json:found"), raw)) == len(found), "training reads them"
        texts = n_grams([old.facts["captions"]["en"]])
        assert all(each["text"] in texts for each in found if each["from"] == "caption")
    told = report(tmp_path / "out")
    assert (told["samples"], told["drawn"], told["annotated"]) == (len(after), len(drawn), len(drawn))
    assert set(told["regions"]) == {"caption", "categories"}
    assert sum(told["regions"].values()) == sum(len(sample.facts["found"]) for sample in drawn)
    page = (tmp_path / "out" / "preview.html").read_text()
    assert page.count("<rect ") == sum(told["regions"].values())


def test_an_oracle_finds_what_captions_say_of_scenes(
    tiny_dir: Path, splits: dict[str, list[Sample]], tmp_path: Path
) -> None:
    after = regions(
        tiny_dir / "referring_seen", tmp_path / "out", "json:objects", "--text", "json:captions.en"
    )  # fmt: skip
    boxes = 0
    for sample, old in zip(after, splits["referring_seen"], strict=True):
        texts = {tuple(each["box"]): each["text"] for each in sample.facts["regions"]}
        for each in old.facts["objects"]:
            assert texts[tuple(each["box"])].lower().split() == each["label"].split()
            boxes += 1
    assert report(tmp_path / "out")["regions"] == {"caption": boxes}


def test_bad_samples_are_counted_and_pass_through(
    splits: dict[str, list[Sample]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = splits["referring_seen"][:5]
    image = next(name for name in good[0].members if name in ("jpg", "png", "webp"))
    nan = {**good[3].facts, "objects": [{"label": "cat", "box": [0, 0, float("nan"), 1]}]}
    pixels = {**good[4].facts, "objects": [{"label": "cat", "box": [10, 10, 60, 50]}]}
    samples = [
        good[0],
        good[1]._replace(members={**good[1].members, image: good[1].members[image][:60]}),
        good[2]._replace(members={**good[2].members, "json": b"{"}),
        good[3]._replace(members={**good[3].members, "json": json.dumps(nan).encode()}),
        good[4]._replace(members={**good[4].members, "json": json.dumps(pixels).encode()}),
        Sample("nothing", {image: good[0].members[image], "txt": b"so beautiful", "json": b"{}"}),
        Sample("silent", {image: good[0].members[image], "txt": b" "}),
    ]
    write_tar(tmp_path / "in.tar", named(samples))
    after = regions(tmp_path / "in.tar", tmp_path / "out", "json:objects")
    told = report(tmp_path / "out")
    assert told["annotated"] == 1
    assert told["without_noun"] == 1
    assert told["bad"].pop("broken json", 0) + told["bad"].pop("bad box", 0) == 2
    assert set(told["bad"]) == {"broken image", "box in pixels", "empty caption"}
    listed = (tmp_path / "out" / "bad.tsv").read_text().splitlines()
    assert len(listed) == 6
    assert {sample.key: sample.members for sample in after[1:]} == {
        sample.key: sample.members for sample in samples[1:]
    }
    write_tar(tmp_path / "nothing.tar", named(samples[5:6]))
    said = refused(capsys, tmp_path / "nothing.tar", tmp_path / "none", "json:objects")
    assert "none of 1 samples could be annotated: 1 whose captions name nothing" in said
    assert not list((tmp_path / "none").iterdir()), "so that other options may be tried"


def test_a_run_that_was_ended_goes_on_and_finished_shards_stay(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = next((tiny_dir / "referring_seen").glob("*.tar"))
    shards = [tmp_path / "in" / f"{number}.tar" for number in range(3)]
    shards[0].parent.mkdir()
    for shard in shards:
        shutil.copy(source, shard)
    options = ("--text", "json:captions.en")
    regions(tmp_path / "in", tmp_path / "whole", "json:objects", *options)

    write, begun = run.annotate_shard, []

    def killed(task) -> int:
        begun.append(task.path.name)
        if len(begun) == 2:
            # as after a kill in the middle: a file under a temporary name is left
            task.path.with_name(f".{task.path.name}.123").write_bytes(b"half")
            raise KeyboardInterrupt
        return write(task)

    with monkeypatch.context() as patched:
        patched.setattr(run, "annotate_shard", killed)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            regions(tmp_path / "in", tmp_path / "out", "json:objects", *options)
    done = (tmp_path / "out" / "00000.tar").stat()
    assert not (tmp_path / "out" / "00001.tar").exists()
    capsys.readouterr()
    regions(tmp_path / "in", tmp_path / "out", "json:objects", *options)
    assert "annotated 2 of 2 shards" in capsys.readouterr().err
    again = (tmp_path / "out" / "00000.tar").stat()
    assert (again.st_ino, again.st_mtime_ns) == (done.st_ino, done.st_mtime_ns)
    for name in ("00000.tar", "00001.tar", "00002.tar", "bad.tsv", "preview.html"):
        whole = (tmp_path / "whole" / name).read_bytes()
        assert (tmp_path / "out" / name).read_bytes().replace(b"regions of out", b"regions of whole") == whole
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
    regions(tmp_path / "in", tmp_path / "out", "json:objects", *options)
    assert "is up to date" in capsys.readouterr().out
    said = refused(capsys, tmp_path / "in", tmp_path / "out", "json:objects", *options, "--min-score", 0.5)
    assert "min_score 0.3, now 0.5" in said


@pytest.mark.slow
def test_other_processes_write_the_same(tiny_dir: Path, tmp_path: Path) -> None:
    shards = f"{tiny_dir}/referring_seen::{tiny_dir}/referring_unseen"
    options = ("--text", "json:captions.en", "--share", "0.7")
    one = regions(shards, tmp_path / "one", "json:objects", *options)
    two = regions(shards, tmp_path / "two", "json:objects", *options, "--workers", 2)
    assert one == two
    for path in (tmp_path / "one").glob("*.tar"):
        assert tarfile.is_tarfile(path)
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_the_hours_of_the_whole_set_are_said_once_after_a_minute() -> None:
    times, lines = iter([100.0, 130.0, 161.0, 200.0, 300.0]), []
    pace = Pace(clock=lambda: next(times), say=lines.append)
    work = Work(shards=1000, samples=10_000, processes=8)
    for _ in range(5):
        # the first batch, in which a model is loaded, does not count
        pace.advance(61, work)
    assert lines == [
        "after a minute: 2.0 samples/s in each of 8 processes, which makes about 173.6 hours for 1,000 shards of some"
        " 10,000 samples"
    ]


@pytest.mark.parametrize(
    ("detector", "options", "message"),
    [
        ("absent", [], "absent has no config.json that can be read; --detector takes a folder of Owlv2"),
        ("siglip", [], "siglip is a model of another class (siglip); --detector takes a folder of Owlv2"),
        ("empty", [], "empty cannot be opened by transformers: OSError"),
        ("json:", [], "names no json field"),
        ("json:objects", ["--share", "0"], "--share is 0"),
        ("json:objects", ["--field", "a.b"], "--field is 'a.b'"),
        ("json:objects", ["--categories", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_wrong_use_is_said_in_a_line(
    tiny_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    detector: str,
    options: list[str],
    message: str,
) -> None:
    for name, kind in (("siglip", "siglip"), ("empty", "owlv2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": kind}))
    named = detector if detector.startswith("json:") else tmp_path / detector
    said = refused(capsys, tiny_dir / "referring_seen", tmp_path / "out", named, *options)
    assert message in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
