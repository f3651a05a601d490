"""`siglip-data filter`: what stays is what plain Python says, with the same bytes, however often it was interrupted."""

import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tools.cli import main
from data_tools.filter import run
from siglip_train.data.packing.run_record import alone_in
from tests.data_tools.conftest import Sample, read_split


def png(red: int = 0, width: int = 40, height: int = 30) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (red, 90, 200)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key, members in samples:
            for extension, data in members.items():
                entry = tarfile.TarInfo(f"{key}.{extension}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    return path


def captioned(texts: list[str], **facts: Any) -> list[tuple[str, dict[str, bytes]]]:
    """A sample for each text, with images that differ."""
    return [
        (f"{place:03d}", {"png": png(place % 256), "txt": text.encode(), "json": json.dumps(facts).encode()})
        for place, text in enumerate(texts)
    ]


def filtered(shards: Path, out: Path, *options: str) -> list[Sample]:
    main(["filter", str(shards), str(out), *options, "--workers", "1"])
    return read_split(out)


def keys(samples: list[Sample]) -> list[str]:
    return [sample.key for sample in samples]


def members(out: Path) -> list[list[str]]:
    """The keys of every shard, in order."""
    return [
        [name.split(".")[0] for name in tarfile.open(path).getnames() if name.endswith(".txt")]
        for path in sorted(out.glob("*.tar"))
    ]


def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def picture_size(sample: Sample) -> tuple[int, int]:
    data = next(data for name, data in sample.members.items() if name in ("jpg", "png", "webp"))
    with Image.open(io.BytesIO(data)) as image:
        return image.size


def test_rules_keep_what_plain_python_keeps_with_every_byte(tiny_dir: Path, splits, tmp_path: Path) -> None:
    shards = tiny_dir / "train"
    kept = filtered(
        shards, tmp_path / "out",
        "--languages", "en", "de", "--min-side", "80", "--max-aspect", "1.5", "--min-words", "4",
        "--where", "json:objects.*.label ~ circle|star|square", "--drop-text", r"(?i)\bred\b",
    )  # fmt: skip

    def stays(sample: Sample) -> bool:
        width, height = picture_size(sample)
        caption = sample.members["txt"].decode()
        labels = " ".join(each["label"] for each in sample.facts["objects"])
        return (
            sample.facts["language"] in ("en", "de")
            and min(width, height) >= 80
            and max(width, height) / min(width, height) <= 1.5
            and len(caption.split()) >= 4
            and any(name in labels for name in ("circle", "star", "square"))
            and "red" not in caption.lower().split()
        )

    expected = [sample for sample in splits["train"] if stays(sample)]
    assert 5 < len(expected) < 200
    assert kept == expected
    counts = report(tmp_path / "out")
    assert counts["samples"] == len(splits["train"])
    assert counts["kept"] == len(expected)
    assert sum(each["first"] for each in counts["dropped"].values()) == len(splits["train"]) - len(expected)
    # each rule is counted alone too
    languages = sum(sample.facts["language"] not in ("en", "de") for sample in splits["train"])
    assert counts["dropped"]["languages"] == {"first": languages, "each": languages}
    small = sum(min(picture_size(sample)) < 80 for sample in splits["train"])
    assert counts["dropped"]["min-side"]["each"] == small > counts["dropped"]["min-side"]["first"]
    by_language = counts["languages"]
    assert {name: each["kept"] for name, each in by_language.items() if each["kept"]} == {
        name: sum(sample.facts["language"] == name for sample in expected) for name in ("en", "de")
    }
    assert by_language["en"]["samples"] == by_language["en"]["kept"] + sum(
        by_language["en"]["dropped"].values()
    )
    lines = (tmp_path / "out" / "dropped.tsv").read_text().splitlines()
    assert len(lines) == 1 + len(splits["train"]) - len(expected)


def test_lengths_and_lists(tmp_path: Path) -> None:
    shards = tmp_path / "in"
    write_shard(shards / "a.tar", captioned(["", "one", "two words", "three such words", "x" * 50]))
    write_shard(shards / "b.tar", captioned(["in the second shard", "and another one"]))
    filtered(shards, tmp_path / "1", "--min-chars", "4", "--max-chars", "17")
    assert members(tmp_path / "1") == [["002", "003"], ["001"]]
    filtered(shards, tmp_path / "2", "--min-words", "2")
    assert members(tmp_path / "2") == [["002", "003"], ["000", "001"]]
    (tmp_path / "keys.txt").write_text("001\nb.tar/000\n\nnowhere\n")
    filtered(shards, tmp_path / "3", "--keep-list", str(tmp_path / "keys.txt"))
    assert members(tmp_path / "3") == [["001"], ["000", "001"]]
    filtered(shards, tmp_path / "4", "--drop-list", str(tmp_path / "keys.txt"))
    assert members(tmp_path / "4") == [["000", "002", "003", "004"]]
    assert [path.name for path in sorted((tmp_path / "4").glob("*.tar"))] == ["00000.tar"]
    assert report(tmp_path / "4")["files"][1] == {
        "source": str(shards / "b.tar"), "samples": 2, "file": None, "kept": 0,
    }  # fmt: skip


def test_every_caption_must_pass(tmp_path: Path) -> None:
    names = {"names": {"en": "a cat", "de": "eine Katze"}}
    write_shard(tmp_path / "in" / "a.tar", captioned(["cat"], **names))
    fields = ("--text", "txt", "json:names")
    assert filtered(tmp_path / "in", tmp_path / "1", *fields, "--min-chars", "3")
    with pytest.raises(SystemExit):
        filtered(tmp_path / "in", tmp_path / "2", *fields, "--drop-text", "Katze")
    # nothing is left behind, so that the folder can be used for a better attempt
    assert not list((tmp_path / "2").iterdir())


def test_a_second_run_into_a_folder_is_refused_while_the_first_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_shard(tmp_path / "in" / "a.tar", captioned(["one", "two"]))
    out = tmp_path / "out"
    with alone_in(out), pytest.raises(SystemExit):
        filtered(tmp_path / "in", out)
    assert f"out is being written by process {os.getpid()}: wait" in capsys.readouterr().err
    filtered(tmp_path / "in", out)
    assert sorted(path.name for path in out.iterdir()) == ["00000.tar", "dropped.tsv", "report.json"]


def test_broken_samples_go_and_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    good = png(7, 64, 64)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    noisy, photo = encoded(Image.fromarray(noise)), encoded(Image.fromarray(noise), "JPEG")
    samples = [
        ("good", {"png": good, "txt": b"fine"}),
        ("half", {"png": noisy[:6000], "txt": b"the header is whole"}),
        ("hole", {"jpg": photo[: len(photo) // 2] + photo[-2:], "txt": b"decoders fill the rest"}),
        ("rubbish", {"png": b"no image", "txt": b"x"}),
        ("bare", {"txt": b"x"}),
        ("latin", {"png": good, "txt": b"\xff\xfe"}),
        ("list", {"png": good, "txt": b"x", "json": b"{"}),
        ("last", {"png": good, "txt": b"x" * 3000}),
    ]
    shard = write_shard(tmp_path / "in" / "a.tar", samples)
    whole = shard.read_bytes()
    shard.write_bytes(whole[: whole.index(b"x" * 3000) + 1500])
    options = ("--min-side", "8", "--max-chars", "5000", "--where", "json:x != 1")
    assert keys(filtered(tmp_path / "in", tmp_path / "out", *options)) == ["good"]
    counts = report(tmp_path / "out")
    assert counts["broken"] == {
        "broken image": 2, "damaged picture data": 1, "no image": 1, "not utf-8": 1, "broken json": 1, "truncated": 1,
    }  # fmt: skip
    assert counts["samples"] == 8
    assert counts["dropped"]["broken"] == {"first": 7, "each": 7}
    named = {each["key"]: each["cause"] for each in counts["broken_named"]}
    assert named["half"] == "broken image"
    assert named["last"] == "truncated"
    lines = [line.split("\t") for line in (tmp_path / "out" / "dropped.tsv").read_text().splitlines()[1:]]
    assert [line[1] for line in lines] == ["half", "hole", "rubbish", "bare", "latin", "list", "last"]
    assert all(" at 0x" not in line[3] for line in lines)
    assert "broken image" in capsys.readouterr().out
    # without decoding, only what the header shows
    kept = filtered(tmp_path / "in", tmp_path / "headers", *options, "--headers-only")
    assert keys(kept) == ["good", "half", "hole"]


def photograph(seed: int) -> Image.Image:
    """Smooth noise, which has low frequencies as photographs do."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((160, 120), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_near_duplicates_go_over_all_shards_and_the_first_that_stays_stays(tmp_path: Path) -> None:
    one, two = photograph(1), photograph(2)
    write_shard(tmp_path / "in" / "a.tar", [
        ("tiny", {"png": encoded(one.resize((16, 12))), "txt": b"too small, so it may not speak for the others"}),
        ("one", {"png": encoded(one), "txt": b"Hello, world!"}),
        ("two", {"png": encoded(two), "txt": b"another"}),
    ])  # fmt: skip
    write_shard(tmp_path / "in" / "b.tar", [
        ("same", {"jpg": encoded(one.resize((120, 90)), "JPEG", quality=60), "txt": b"x"}),
        ("said", {"png": encoded(photograph(3)), "txt": "ｈｅｌｌｏ world".encode()}),
        ("other", {"png": encoded(photograph(4)), "txt": b"nothing like it"}),
    ])  # fmt: skip
    out = tmp_path / "out"
    kept = filtered(tmp_path / "in", out, "--min-side", "50", "--dedup-images", "--dedup-texts")
    assert keys(kept) == ["one", "two", "other"]
    lines = [line.split("\t") for line in (out / "dropped.tsv").read_text().splitlines()[1:]]
    assert [(line[1], line[2], line[3]) for line in lines] == [
        ("tiny", "min-side", ""),
        ("same", "dedup-images", "like a.tar/one"),
        ("said", "dedup-texts", "like a.tar/one"),
    ]


def test_a_caption_may_be_kept_several_times(tmp_path: Path) -> None:
    write_shard(tmp_path / "in" / "a.tar", captioned(["a", "b", "A.", "a", "c", "b"]))
    assert keys(filtered(tmp_path / "in", tmp_path / "out", "--dedup-texts", "2")) == [
        "000",
        "001",
        "002",
        "004",
        "005",
    ]


BALANCE = {
    "attributes": {"gender": {"woman": r"\bwoman\b", "man": r"\bman\b"}},
    "concepts": {"skiing": r"\bskis?\b"},
}


def people() -> list[str]:
    return (
        ["a man"] * 60 + ["a man on skis"] * 30 + ["a woman"] * 20 + ["a woman on skis"] * 6 + ["a dog"] * 10
    )


def test_balance_drops_or_weighs(tmp_path: Path) -> None:
    write_shard(tmp_path / "in" / "a.tar", captioned(people(), id=7))
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(BALANCE))
    kept = filtered(tmp_path / "in", tmp_path / "1", "--balance", str(spec))
    captions = [sample.members["txt"].decode() for sample in kept]
    # nobody who is in the minority, or shows no attribute, has to go
    assert captions.count("a woman on skis") == 6
    assert captions.count("a dog") == 10
    assert abs(captions.count("a man on skis") - 6) <= 1
    assert abs(captions.count("a man") - 20) <= 2
    table = report(tmp_path / "1")["balance"]["shares"]
    assert [(row["value"], row["concept"]) for row in table] == [
        ("woman", ""), ("man", ""), ("woman", "skiing"), ("man", "skiing"),
    ]  # fmt: skip
    assert table[2]["before"] == pytest.approx(6 / 36, abs=1e-6)
    assert abs(table[0]["solved"] - 0.5) <= 0.01

    weighed = filtered(tmp_path / "in", tmp_path / "2", "--balance", str(spec), "--balance-as", "weights")
    assert len(weighed) == len(people())
    weights: dict[str, float] = {}
    for sample in weighed:
        assert sample.facts["id"] == 7
        weights[sample.members["txt"].decode()] = sample.facts["balance_weight"]
    assert weights["a dog"] == 1
    skiers = {name: weights[name] * people().count(name) for name in ("a man on skis", "a woman on skis")}
    assert 0.49 <= skiers["a woman on skis"] / sum(skiers.values()) <= 0.51


def test_the_result_depends_neither_on_workers_nor_on_interruptions(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    options = ["--dedup-images", "6", "--where", "json:language != de"]
    arguments = ["filter", str(tiny_dir / "train")]
    main([*arguments, str(tmp_path / "one"), *options, "--workers", "1"])
    with monkeypatch.context() as patch:
        # processes take seconds to start: those of one stage are enough
        write = run._write
        patch.setattr(run, "_write", lambda tasks, workers: write(pickle.loads(pickle.dumps(tasks)), 1))
        main([*arguments, str(tmp_path / "two"), *options, "--workers", "2"])
    assert contents(tmp_path / "one") == contents(tmp_path / "two")

    def interrupted_at(number: int, work):
        calls = []

        def wrapped(task):
            calls.append(task)
            if len(calls) == number:
                raise KeyboardInterrupt
            return work(task)

        return wrapped, calls

    again = [*arguments, str(tmp_path / "again"), *options, "--workers", "1"]
    for name, number in (("look_at_shard", 3), ("write_shard", 2)):
        with monkeypatch.context() as patch:
            wrapped, calls = interrupted_at(number, getattr(run, name))
            patch.setattr(run, name, wrapped)
            with pytest.raises(SystemExit) as leaving:
                main(again)
            assert leaving.value.code == 130
            assert len(calls) == number
    # what a killed run was writing
    (tmp_path / "again" / ".00001.tar.1").write_text("half")
    # two shards were looked at before the first interruption, and one was written before the second
    with monkeypatch.context() as patch:
        wrapped, calls = interrupted_at(99, run.write_shard)
        patch.setattr(run, "write_shard", wrapped)
        patch.setattr(run, "look_at_shard", None)
        main(again)
        assert len(calls) == len(list((tmp_path / "one").glob("*.tar"))) - 1
    assert contents(tmp_path / "one") == contents(tmp_path / "again")

    before = contents(tmp_path / "again")
    capsys.readouterr()
    main(again)
    assert "is up to date" in capsys.readouterr().out
    with pytest.raises(SystemExit) as leaving:
        main([*again, "--min-side", "70"])
    assert leaving.value.code == 2
    assert "with other options (min_side None, now 70)" in capsys.readouterr().err
    assert contents(tmp_path / "again") == before


def test_a_changed_shard_is_another_source(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_shard(tmp_path / "in" / "a.tar", captioned(["one", "two"]))
    filtered(tmp_path / "in", tmp_path / "out")
    write_shard(tmp_path / "in" / "a.tar", captioned(["one", "two", "three"]))
    with pytest.raises(SystemExit):
        filtered(tmp_path / "in", tmp_path / "out")
    assert "shards_fingerprint" in capsys.readouterr().err


def test_odd_names_and_members_are_copied(tmp_path: Path) -> None:
    long = "folder/" + "ä" * 120
    members = {"png": png(), "mask.png": png(1), "cls": b"3", "txt": b"x"}
    write_shard(tmp_path / "in" / "a.tar", [(long, members), ("\udcff", members)])
    filtered(tmp_path / "in", tmp_path / "out", "--where", "cls == 3")
    with tarfile.open(tmp_path / "out" / "00000.tar") as archive:
        assert archive.getnames() == [f"{key}.{name}" for key in (long, "\udcff") for name in members]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--where", "json:width"], "write FIELD OP VALUE"),
        (["--where", "txt ~ ("], "no regular expression"),
        (["--where", "json: == 3"], "names no json field"),
        (["--drop-text", "[a"], "no regular expression"),
        (["--keep-list", "{tmp}/nowhere"], "cannot read"),
        (["--drop-list", "{tmp}/empty"], "is empty"),
        (["--max-aspect", "0.5"], "at least 1"),
        (["--dedup-images", "11"], "not in 0 to 10"),
        (["--dedup-images", "--headers-only"], "leave --headers-only out"),
        (["--balance-as", "weights"], "needs --balance"),
        (["--balance", "{tmp}/empty"], "must be a mapping"),
        (["--balance", "{tmp}/nowhere"], "cannot read"),
        (["--balance", "{tmp}/spec.json"], "gender cannot be balanced: no sample shows it"),
        (["--min-side", "900"], "no sample is left of 2: min-side drops 2"),
        (["--image", ";"], "must name member extensions"),
    ],
)
def test_mistakes(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_shard(tmp_path / "in" / "a.tar", captioned(["one", "two"]))
    (tmp_path / "empty").write_text("")
    (tmp_path / "spec.json").write_text(json.dumps(BALANCE))
    given = [option.format(tmp=tmp_path) for option in options]
    with pytest.raises(SystemExit) as leaving:
        main(["filter", str(tmp_path / "in"), str(tmp_path / "out"), *given, "--workers", "1"])
    assert leaving.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list((tmp_path / "out").glob("*"))


def test_folders_and_shards_that_will_not_do(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_shard(tmp_path / "in" / "a.tar", captioned(["one"]))
    with pytest.raises(SystemExit):
        filtered(tmp_path / "in", tmp_path / "in")
    assert "was not made by filter" in capsys.readouterr().err
    (tmp_path / "in" / "b.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(SystemExit):
        filtered(tmp_path / "in", tmp_path / "out")
    assert "cannot read shard" in capsys.readouterr().err


def test_help_shows_an_example(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["filter", "--help"])
    assert leaving.value.code == 0
    assert "siglip-data filter data/web data/german" in capsys.readouterr().out
