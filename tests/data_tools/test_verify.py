"""`siglip-data verify`: a clean set passes, and of a damaged copy it finds every planted fault and nothing else."""

import gzip
import hashlib
import io
import itertools
import json
import re
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data_tools
from data_tools.cli import main
from data_tools.verify import all_shards
from data_tools.verify.checks import Rules
from data_tools.verify.shard import verify_shard
from siglip_train.data.remote.locations import expand
from tests.data.shard_files import sparse_member
from tests.data_tools.conftest import Sample, read_split

Members = dict[str, bytes]
CONTEXT = 160
COCO = Path(__file__).resolve().parents[3] / "shared" / "data" / "captions_coco"


def png(width: int, height: int, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height), 0).save(buffer, "PNG")
    return buffer.getvalue()


def twelve_bits() -> bytes:
    """Levels up to 4095, as cameras give them, in an image that goes up to 65535."""
    buffer = io.BytesIO()
    Image.fromarray(np.linspace(0, 4095, 32 * 32).reshape(32, 32).astype(np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


def bomb() -> bytes:
    """A small file whose header promises 60,000 x 60,000 pixels."""
    data = bytearray(png(32, 32))
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def named(samples: list[Sample]) -> list[tuple[str, bytes]]:
    return [(f"{key}.{kind}", data) for key, members in samples for kind, data in members.items()]


def picture_kind(members: Members) -> str:
    return next(kind for kind in ("jpg", "png", "webp") if kind in members)


def with_picture(members: Members, data: bytes) -> Members:
    """Without the mask, which would be of another size."""
    return with_facts({**without(members, "mask.png"), picture_kind(members): data}, width=None, height=None)


def with_facts(members: Members, **facts: object) -> Members:
    return {**members, "json": json.dumps({**json.loads(members["json"]), **facts}).encode()}


def without(members: Members, kind: str) -> Members:
    return {name: data for name, data in members.items() if name != kind}


def jpeg_with_a_hole() -> bytes:
    """Half of its data is missing, its end is there: decoders fill the rest."""
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(buffer, "JPEG")
    data = buffer.getvalue()
    return data[: len(data) // 2] + data[-2:]


EDITS: dict[str, tuple[str, Callable[[Members], Members]]] = {
    "image gone": ("no image", lambda m: without(m, picture_kind(m))),
    "caption gone": ("no text", lambda m: without(m, "txt")),
    "blank": ("empty caption", lambda m: {**m, "txt": b" \n"}),
    "12 bits": ("dark 16-bit picture", lambda m: with_picture(m, twelve_bits())),
    "zeros": ("empty caption", lambda m: {**m, "txt": bytes(40)}),
    "latin": ("not utf-8", lambda m: {**m, "txt": b"\xff\xfe\xfa"}),
    "chatter": ("long caption", lambda m: {**m, "txt": b"a red circle " * 80}),
    "half": ("broken image", lambda m: with_picture(m, m[picture_kind(m)][:200])),
    "hole": ("damaged picture data", lambda m: with_picture(m, jpeg_with_a_hole())),
    "nothing": ("empty image", lambda m: with_picture(m, b"")),
    "bomb": ("image too large", lambda m: with_picture(m, bomb())),
    "dot": ("small picture", lambda m: with_picture(m, png(30, 8))),
    "strip": ("extreme aspect", lambda m: with_picture(m, png(400, 20))),
    "braces": ("broken json", lambda m: {**m, "json": b'{"captions": '}),
    "list": ("broken json", lambda m: {**m, "json": b"[]"}),
    "other mask": ("mask size", lambda m: {**m, "mask.png": png(17, 17, "L")}),
    "no mask": ("broken mask", lambda m: {**m, "mask.png": b"junk"}),
    "coloured mask": ("broken mask", lambda m: {
        **m, "mask.png": png(*Image.open(io.BytesIO(m[picture_kind(m)])).size)}),
    "outside": ("bad box", lambda m: with_facts(m, objects=[{"label": "cat", "box": [0.5, 0.5, 1.2, 0.9]}])),
    "no list": ("bad box", lambda m: with_facts(m, objects="cat")),
    "wide": ("wrong size", lambda m: with_facts(m, width=1)),
    "class gone": ("no label", lambda m: without(m, "cls")),
    "class name": ("bad label", lambda m: {**m, "cls": b"cat"}),
    "negative": ("bad label", lambda m: {**m, "cls": b"-1"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def clean(tiny_dir: Path) -> Path:
    return tiny_dir / "validation"


def tiny_samples(splits: dict[str, list[Sample]]) -> list[Sample]:
    return splits["validation"]


def coco_samples(splits: dict[str, list[Sample]]) -> list[Sample]:
    if not COCO.exists():
        pytest.skip("photographs with captions (../shared/data/captions_coco) are not here")
    return read_split(COCO)


class Planting:
    """Writes damaged shards, and keeps (shard, key, cause) of each fault in them."""

    def __init__(self, folder: Path, samples: list[Sample]) -> None:
        self.folder, self.planted = folder, set[tuple[str, str, str]]()
        labelled = [Sample(key, {**members, "cls": b"3"}) for key, members in samples]
        self.samples = iter(labelled)

    def take(self, count: int) -> list[Sample]:
        """Samples that no shard has yet."""
        return list(itertools.islice(self.samples, count))

    def write(self, shard: str, members: list[tuple[str, bytes]], *faults: tuple[str, str]) -> bytearray:
        self.planted.update((shard, *fault) for fault in faults)
        return bytearray(write_tar(self.folder / shard, members).read_bytes())

    def overwrite(self, shard: str, content: bytes) -> None:
        (self.folder / shard).write_bytes(content)

    def contents(self) -> None:
        """A fault a sample, and samples without one."""
        samples = self.take(len(EDITS) + 4)
        edits = list(EDITS.values())
        edited = [Sample(key, edits[i][1](members)) for i, (key, members) in enumerate(samples[: len(EDITS)])]
        faults = [(each.key, cause) for each, (cause, _) in zip(samples, edits, strict=False)]
        self.write("edited.tar", named(edited + samples[len(EDITS) :]), *faults)
        # the last of them is good where it stands first
        self.write(
            "shared.tar", named([*self.take(1), samples[-1]]), (samples[-1].key, "key in several shards")
        )

    def names(self) -> None:
        apart, twice, dots, swallowed, plain, host, half = self.take(7)
        members = named([Sample(apart.key, without(apart.members, "txt")), twice, twice])
        members += [(f"v1.2/{dots.key}.{kind}", data) for kind, data in dots.members.items()]
        members += [(f"{swallowed.key}.b.{kind}", data) for kind, data in swallowed.members.items()]
        # a name with a dot beside the usual members is what formats call an extension
        members += [*named([plain]), (f"{plain.key}.depth.png", png(20, 20))]
        # but an image with a caption is a sample of its own, here `a.b` inside `a`
        members += named([host, Sample(f"{host.key}.b", host.members)])
        members += [*named([half]), (f"{half.key}.txt", b"of another")]
        members += [(f"{apart.key}.txt", apart.members["txt"])]
        self.write("names.tar", members, (apart.key, "out of order"), (twice.key, "duplicate key"),
                   (f"v1.2/{dots.key}", "dotted key"), (swallowed.key, "dotted key"), (host.key, "dotted key"),
                   (half.key, "repeated member"))  # fmt: skip
        # both halves
        self.twice = ("names.tar", half.key, "repeated member")

    def tars(self) -> None:
        samples = self.take(3)
        whole = self.write("torn.tar", named(samples), (samples[2].key, "truncated"))
        self.overwrite("torn.tar", whole[: self._last("torn.tar").offset_data])

        samples = self.take(2)
        whole = self.write("markless.tar", named(samples), (samples[1].key, "truncated"))
        last = self._last("markless.tar")
        self.overwrite("markless.tar", whole[: last.offset_data + -(-last.size // 512) * 512])

        first = self.write("joined.tar", named(self.take(2)), ("", "data after the end"))
        self.overwrite("joined.tar", first + self.write("joined.tar", named(self.take(2))))

        samples = self.take(2)
        whole = self.write("header.tar", named(samples), (samples[0].key, "broken header"))
        # the time of its last change, so that name and size stay as they are
        whole[140] = ord("7")
        self.overwrite("header.tar", whole)

        sample = self.take(1)
        whole = self.write("sparse.tar", named(sample), ("with", "file with holes"))
        end = next(
            place for place in range(0, len(whole), 512) if not whole[place : place + 1024].strip(b"\0")
        )
        self.overwrite("sparse.tar", whole[:end] + sparse_member("with.npy") + whole[end:])

        self.write("empty.tar", [], ("", "empty shard"))
        self.overwrite("no.tar", b"<html>404</html>" * 100)
        self.planted.add(("no.tar", "", "broken tar"))

    def gzips(self) -> None:
        samples = self.take(3)
        whole = self.write("cut.tar.gz", named(samples), (samples[2].key, "truncated"))
        picture = samples[2].members[picture_kind(samples[2].members)]
        # an image does not shrink: what is left of it ends inside it
        self.overwrite("cut.tar.gz", gzip.compress(whole[: whole.index(picture) + len(picture) // 2])[:-12])
        whole = self.write("checksum.tar.gz", named(self.take(1)), ("", "truncated"))
        packed = bytearray(gzip.compress(whole))
        packed[-6] ^= 1
        self.overwrite("checksum.tar.gz", packed)

    def _last(self, shard: str) -> tarfile.TarInfo:
        with tarfile.open(self.folder / shard) as archive:
            return archive.getmembers()[-1]


@pytest.fixture(scope="module", params=[tiny_samples, coco_samples], ids=["tiny", "coco"])
def damaged(
    request: pytest.FixtureRequest, splits: dict[str, list[Sample]], tmp_path_factory: pytest.TempPathFactory
) -> Planting:
    """Shards of generated samples, or of real ones, with every fault that the README lists."""
    planting = Planting(tmp_path_factory.mktemp("damaged"), request.param(splits))
    for plant in (planting.contents, planting.names, planting.tars, planting.gzips):
        plant()
    return planting


def verify(shards: Path, tmp_path: Path, *options: str, workers: int = 1) -> tuple[int, dict]:
    """(exit status, report)"""
    report = tmp_path / "reports" / "report.json"
    arguments = ["verify", str(shards), "--report", str(report), "--workers", str(workers)]
    try:
        main([*arguments, "--cache-dir", str(tmp_path / "cache"), *options])
    except SystemExit as leaving:
        return leaving.code, json.loads(report.read_text()) if report.exists() else {}
    return 0, json.loads(report.read_text())


def test_a_clean_set_passes_and_its_index_is_right(clean: Path, tmp_path: Path, tiny_dir: Path) -> None:
    index = tmp_path / "index.json"
    tokenizer = ("--tokenizer", str(tiny_dir / "tokenizer.model"))
    status, report = verify(
        clean, tmp_path, "--index", str(index), "--text", "txt", "json:captions.*", *tokenizer
    )
    assert status == 0
    assert report["passed"]
    assert report["problems"] == []
    content = json.loads(index.read_text())
    files = sorted(clean.glob("*.tar"))
    assert [shard["file"] for shard in content["shards"]] == [file.name for file in files]
    for shard, file in zip(content["shards"], files, strict=True):
        assert shard["bytes"] == file.stat().st_size
        assert shard["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        with tarfile.open(file) as archive:
            names = archive.getnames()
        keys = {name.split(".")[0] for name in names}
        assert shard["samples"] == shard["good_samples"] == len(keys)
        kinds = Counter(
            " ".join(sorted(n[len(key) + 1 :] for n in names if n.startswith(f"{key}."))) for key in keys
        )
        assert shard["members"] == kinds
    assert content["samples"] == content["good_samples"] == len(read_split(clean))
    assert not list((tmp_path / "cache").rglob("*.jsonl")), "a complete run leaves nothing to continue"


def test_every_planted_fault_and_nothing_else(
    damaged: Planting, tmp_path: Path, tiny_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    index = tmp_path / "index.json"
    options = ["--tokenizer", str(tiny_dir / "tokenizer.model"), "--context-length", str(CONTEXT)]
    options += ["--index", str(index), "--label", "cls"]
    status, report = verify(damaged.folder, tmp_path, *options)
    found = [(Path(each["shard"]).name, each["key"], each["cause"]) for each in report["problems"]]
    assert set(found) == damaged.planted
    assert sorted(found) == sorted([*damaged.planted, damaged.twice])
    assert status == 1
    printed = capsys.readouterr().out
    assert all(cause in printed for _, _, cause in damaged.planted)
    assert "fail" in printed
    shards = {shard["file"]: shard for shard in json.loads(index.read_text())["shards"]}
    good = {name: (shard["samples"], shard["good_samples"]) for name, shard in shards.items()}
    assert good["edited.tar"] == (len(EDITS) + 4, 4)
    assert good["names.tar"] == (9, 2)
    assert good["torn.tar"] == (2, 2)
    assert good["header.tar"] == (2, 1)
    assert good["shared.tar"] == (2, 1)
    assert good["no.tar"] == (0, 0)


def test_every_fault_of_the_readme_is_planted(damaged: Planting) -> None:
    readme = Path(data_tools.__file__).with_name("README.md").read_text(encoding="utf-8")
    _, _, section = readme.partition("\n## verify\n")
    rows = [line.split("|") for line in section.partition("\n## ")[0].splitlines()]
    listed = {cause for row in rows if len(row) > 3 and row[2].strip() in ("shard", "sample")
              for cause in re.findall("`(.*?)`", row[1])}  # fmt: skip
    assert len(listed) > 25
    # of json alone, which the planted faults are not asked for
    assert listed == {cause for _, _, cause in damaged.planted} | {"caption is no text"}


def test_numbers_in_place_of_captions_are_named(clean: Path, tmp_path: Path) -> None:
    sample = read_split(clean)[0]
    facts = with_facts(without(sample.members, "txt"), captions=[42], text="one")
    write_tar(tmp_path / "in.tar", named([Sample("a", facts)]))
    status, report = verify(tmp_path / "in.tar", tmp_path, "--text", "json:captions")
    assert status == 1
    assert [(each["cause"], each["detail"]) for each in report["problems"]] == [
        ("caption is no text", "json:captions is 42; is this the field of captions?")
    ]
    assert verify(tmp_path / "in.tar", tmp_path, "--text", "json:captions", "json:text")[0] == 0


def test_the_report_does_not_depend_on_workers(clean: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for shard in sorted(clean.glob("*.tar")):
        content = bytearray(shard.read_bytes())
        content[len(content) // 2 :: 3000] = b"x" * len(content[len(content) // 2 :: 3000])
        (tmp_path / "in" / shard.name).write_bytes(content)
    one = verify(tmp_path / "in", tmp_path / "one", workers=1)
    assert len(one[1]["problems"]) > 10
    assert one == verify(tmp_path / "in", tmp_path / "two", workers=2)


def test_an_allowed_share(splits: dict[str, list[Sample]], tmp_path: Path) -> None:
    samples = splits["validation"]
    blank = Sample(samples[0].key, {**samples[0].members, "txt": b""})
    shard = write_tar(tmp_path / "0.tar", named([blank, *samples[1:50]]))
    assert verify(shard, tmp_path, "--allow", "0.019")[0] == 1
    assert verify(shard, tmp_path, "--allow", "0.02")[0] == 0
    # no captions wanted: nothing is wrong
    assert verify(shard, tmp_path, "--text")[0] == 0
    shard.write_bytes(shard.read_bytes()[:-20_000])
    assert verify(shard, tmp_path, "--allow", "1")[0] == 1, "no one knows what a torn shard has lost"


def test_an_interrupted_run_goes_on(clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls, rules = expand(str(clean)), Rules(("png", "jpg"))
    opened: list[str] = []

    def watched(task):
        if len(opened) == 2:
            raise KeyboardInterrupt
        opened.append(task.url)
        return verify_shard(task)

    monkeypatch.setattr(all_shards, "verify_shard", watched)
    with pytest.raises(KeyboardInterrupt):
        all_shards.verify_shards(urls, rules, tmp_path, 1, lambda count: None)
    monkeypatch.setattr(
        all_shards, "verify_shard", lambda task: opened.append(task.url) or verify_shard(task)
    )
    reports = all_shards.verify_shards(urls, rules, tmp_path, 1, lambda count: None)
    assert opened == urls, "each shard once"
    assert [report.url for report in reports] == urls
    assert reports == [verify_shard(all_shards.ShardTask(url, tmp_path, rules)) for url in urls]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/*.tar"], "nowhere"),
        (["{data}", "--context-length", "8"], "--tokenizer"),
        (["{data}", "--tokenizer", "nowhere.model"], "nowhere.model"),
        (["{data}", "--text", "json:"], "json field"),
        (["{data}", "--report", "{data}"], "is a folder"),
        (["{data}", "--report", "{data}/a.json", "--index", "{data}/../validation/a.json"], "for two files"),
        (["{data}", "--max-aspect", "0.5"], "--max-aspect"),
        (["{data}", "--allow", "7"], "share"),
        (["http://nowhere/{{00.."], "cannot expand the braces"),
        (["{data}", "--cache-dir", "{data}/../dataset.json/cache"], "cannot be the cache's folder"),
    ],
)
def test_mistakes(arguments: list[str], message: str, clean: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["verify", *[argument.format(data=clean) for argument in arguments]])
    assert leaving.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["stats", "verify"])
def test_results_that_cannot_be_kept(
    verb: str, clean: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / verb).write_text("in the way")
    with pytest.raises(SystemExit) as leaving:
        main([verb, str(clean), "--cache-dir", str(tmp_path)])
    assert leaving.value.code == 2
    assert f"error: cannot keep results in {tmp_path / verb}: File exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["sift"], ["make-tiny"], ["tokenizer"], ["verify"], ["stats", ".", "--workers", "0"]]
)
def test_wrong_use_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert leaving.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert " ".join(["siglip-data", *arguments[: arguments != ["sift"]], "--help"]) in line


@pytest.mark.parametrize(
    ("verb", "target", "options"),
    [
        ("stats", "", []),
        ("verify", "", []),
        ("preview", "page.html", []),
        ("filter", "out", []),
        ("tokenizer", "new.model", ["--vocab-size", "500", "--text", "json:captions"]),
        ("tokenizer", "{tiny}/tokenizer.model", ["--inspect"]),
    ],
)
def test_copies_of_shards_are_kept_where_the_user_says(
    verb: str, target: str, options: list[str], tiny_dir: Path, tmp_path: Path
) -> None:
    shard = tmp_path / "packed.tar.gz"
    shard.write_bytes(gzip.compress(min((tiny_dir / "validation").glob("*.tar")).read_bytes(), 1))
    places = [str(tmp_path / target.format(tiny=tiny_dir))] if target else []
    main([verb, str(shard), *places, *options, "--cache-dir", str(tmp_path / "cache")])
    assert len(list((tmp_path / "cache").rglob("*.tar"))) == 1
