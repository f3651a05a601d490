"""`siglip-data verify`: a clean set passes, and of a damaged copy it finds every planted fault and nothing else."""

import hashlib
import io
import json
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from data_tools.cli import main
from data_tools.verify import survey
from data_tools.verify.checks import Rules
from data_tools.verify.shard import verify_shard
from siglip_train.data.locations import expand
from tests.data_tools.conftest import Sample, read_split

Members = dict[str, bytes]
CONTEXT = 64


def png(width: int, height: int, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height), 0).save(buffer, "PNG")
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
    changed = {**members, picture_kind(members): data}
    del changed["mask.png"]
    return changed


def with_box(members: Members) -> Members:
    facts = json.loads(members["json"])
    facts["objects"][0]["box"] = [0.5, 0.5, 1.2, 0.9]
    return {**members, "json": json.dumps(facts).encode()}


def without(members: Members, kind: str) -> Members:
    return {name: data for name, data in members.items() if name != kind}


EDITS: dict[str, tuple[str, Callable[[Members], Members]]] = {
    "picture gone": ("no image", lambda m: without(m, picture_kind(m))),
    "caption gone": ("no text", lambda m: without(m, "txt")),
    "blank": ("empty caption", lambda m: {**m, "txt": b" \n"}),
    "latin": ("not utf-8", lambda m: {**m, "txt": b"\xff\xfe\xfa"}),
    "chatter": ("long caption", lambda m: {**m, "txt": b"a red circle " * 40}),
    "half": ("broken image", lambda m: with_picture(m, m[picture_kind(m)][:200])),
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
    "outside": ("bad box", with_box),
}  # fmt: skip


@pytest.fixture(scope="module")
def clean(tiny_dir: Path) -> Path:
    return tiny_dir / "validation"


@pytest.fixture(scope="module")
def damaged(splits: dict[str, list[Sample]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set]:
    """A folder of shards, and the (shard, key, cause) of each fault in it."""
    folder, planted = tmp_path_factory.mktemp("damaged"), set()
    samples = splits["validation"]
    edited = []
    for (cause, edit), (key, members) in zip(EDITS.values(), samples, strict=False):
        edited.append(Sample(key, edit(members)))
        planted.add(("edited.tar", key, cause))
    write_tar(folder / "edited.tar", named(edited + samples[len(EDITS) : 20]))

    apart, twice, dots, swallowed, plain = samples[20:25]
    moved = [("txt", apart.members["txt"])]
    members = named([Sample(apart.key, without(apart.members, "txt")), twice, twice])
    members += [(f"v1.2/{dots.key}.{kind}", data) for kind, data in dots.members.items()]
    members += [(f"{swallowed.key}.b.{kind}", data) for kind, data in swallowed.members.items()]
    # a name with a dot beside the usual members is what formats call an extension
    members += [*named([plain]), (f"{plain.key}.depth.png", png(20, 20))]
    # but a picture with a caption is a sample of its own, here `a.b` inside `a`
    host = samples[37]
    members += named([host, Sample(f"{host.key}.b", host.members)])
    members += [(f"{apart.key}.{kind}", data) for kind, data in moved]
    write_tar(folder / "names.tar", members)
    planted |= {("names.tar", apart.key, "out of order"), ("names.tar", twice.key, "duplicate key"),
                ("names.tar", f"v1.2/{dots.key}", "dotted key"),
                ("names.tar", swallowed.key, "dotted key"), ("names.tar", host.key, "dotted key")}  # fmt: skip

    whole = write_tar(folder / "torn.tar", named(samples[25:28])).read_bytes()
    with tarfile.open(folder / "torn.tar") as archive:
        last = archive.getmembers()[-1]
    (folder / "torn.tar").write_bytes(whole[: last.offset_data + 3])
    planted.add(("torn.tar", samples[27].key, "truncated"))

    whole = write_tar(folder / "markless.tar", named(samples[28:30])).read_bytes()
    with tarfile.open(folder / "markless.tar") as archive:
        last = archive.getmembers()[-1]
    (folder / "markless.tar").write_bytes(whole[: last.offset_data + -(-last.size // 512) * 512])
    planted.add(("markless.tar", samples[29].key, "truncated"))

    first = write_tar(folder / "joined.tar", named(samples[30:32])).read_bytes()
    second = write_tar(folder / "joined.tar", named(samples[32:34])).read_bytes()
    (folder / "joined.tar").write_bytes(first + second)
    planted.add(("joined.tar", "", "data after the end"))

    whole = bytearray(write_tar(folder / "header.tar", named(samples[35:37])).read_bytes())
    # the time of its last change, so that name and size stay as they are
    whole[140] = ord("7")
    (folder / "header.tar").write_bytes(whole)
    planted.add(("header.tar", samples[35].key, "broken header"))

    write_tar(folder / "empty.tar", [])
    planted.add(("empty.tar", "", "empty shard"))
    (folder / "no.tar").write_bytes(b"<html>404</html>" * 100)
    planted.add(("no.tar", "", "broken tar"))
    write_tar(folder / "shared.tar", named([samples[34], samples[18]]))
    planted.add(("shared.tar", samples[18].key, "key in several shards"))
    return folder, planted


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
    damaged: tuple[Path, set], tmp_path: Path, tiny_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, planted = damaged
    index = tmp_path / "index.json"
    options = ["--tokenizer", str(tiny_dir / "tokenizer.model"), "--context-length", str(CONTEXT)]
    options += ["--index", str(index)]
    status, report = verify(folder, tmp_path, *options)
    found = [(Path(each["shard"]).name, each["key"], each["cause"]) for each in report["problems"]]
    assert set(found) == planted
    assert len(found) == len(planted)
    assert status == 1
    printed = capsys.readouterr().out
    assert all(cause in printed for _, _, cause in planted)
    assert "fail" in printed
    shards = {shard["file"]: shard for shard in json.loads(index.read_text())["shards"]}
    good = {name: (shard["samples"], shard["good_samples"]) for name, shard in shards.items()}
    assert good["edited.tar"] == (20, 20 - len(EDITS))
    assert good["names.tar"] == (7, 2)
    assert good["torn.tar"] == (2, 2)
    assert good["shared.tar"] == (2, 1)
    assert good["no.tar"] == (0, 0)


def test_the_report_does_not_depend_on_workers(damaged: tuple[Path, set], tmp_path: Path) -> None:
    one = verify(damaged[0], tmp_path / "one", workers=1)
    assert one == verify(damaged[0], tmp_path / "two", workers=2)


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

    monkeypatch.setattr(survey, "verify_shard", watched)
    with pytest.raises(KeyboardInterrupt):
        survey.verify_shards(urls, rules, tmp_path, 1, lambda count: None)
    monkeypatch.setattr(survey, "verify_shard", lambda task: opened.append(task.url) or verify_shard(task))
    reports = survey.verify_shards(urls, rules, tmp_path, 1, lambda count: None)
    assert opened == urls, "each shard once"
    assert [report.url for report in reports] == urls
    assert reports == [verify_shard(survey.ShardTask(url, tmp_path, rules)) for url in urls]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/*.tar"], "nowhere"),
        (["{data}", "--context-length", "8"], "--tokenizer"),
        (["{data}", "--tokenizer", "nowhere.model"], "nowhere.model"),
        (["{data}", "--text", "json:"], "json field"),
        (["{data}", "--report", "{data}"], "is a folder"),
        (["{data}", "--max-aspect", "0.5"], "--max-aspect"),
        (["{data}", "--allow", "7"], "share"),
    ],
)
def test_mistakes(arguments: list[str], message: str, clean: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["verify", *[argument.format(data=clean) for argument in arguments]])
    assert leaving.value.code == 2
    assert message in capsys.readouterr().err
