"""Small files that claim gigabytes among the samples of a run: each costs itself, and no memory."""

import json
import re
import resource
import shutil
import tarfile
from collections.abc import Callable
from multiprocessing.util import Finalize
from pathlib import Path

import pytest

from tests.data import bombs
from tests.data.shard_files import sample, write_tar
from tests.faults.runs import losses
from tests.forks import run_program_by_rank

SIDE = 13_000
# what the bombs would take at least, each, in KiB; a run alone takes less
GIGABYTE = 1 << 20
IMAGE_ENDINGS = {
    "png": lambda: bombs.png(SIDE, SIDE, rows=10),
    "png with transparency": lambda: bombs.png(SIDE, SIDE, colour_type=6, rows=10),
    "webp": lambda: bombs.webp_animation(16_000),
    "gif": lambda: bombs.gif(65_535),
    "gif frame": lambda: bombs.gif_frame(SIDE),
    "jpeg": lambda: bombs.jpeg_of_scans(5000, 2000),
    "icon": lambda: bombs.icon(5000),
    "text": lambda: bombs.png(64, 64, bombs.text_chunk(256 << 20)),
}
JSON = {
    "nested": b'{"language":' + b"[" * 1_000_000,
    "lists": b'{"language": ["de", ' + b"[]," * 8_000_000 + b"[]]}",
    "number": b'{"language": ' + b"9" * 1_000_000 + b"}",
}


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All bombs in one shard, the text of each its name, and a good sample."""
    rows = [
        sample(f"{number}", png=make(), txt=name.encode())
        for number, (name, make) in enumerate(IMAGE_ENDINGS.items())
    ]
    rows += [sample(name, json=content) for name, content in JSON.items()]
    rows += [sample("good"), sample("long", txt=b"a b " * 5_000_000)]
    return write_tar(
        tmp_path_factory.mktemp("bombs") / "bombs.tar", [member for row in rows for member in row]
    )


def _say_memory(_rank: int) -> None:
    def say() -> None:
        print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "KiB", flush=True)

    # a process of multiprocessing does not come to what atexit knows
    Finalize(None, say, exitpriority=1)


def _peak(output: str) -> int:
    return int(re.findall(r"peak (\d+) KiB", output)[-1])


def test_a_run_goes_on_and_counts_them(
    go_on: Callable, shard: Path, tiny_data: Path, tmp_path: Path, record_fault
) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(tiny_data / "train", data)
    shutil.copy(shard, data / "zz.tar")
    bombs.gzip_of_zeros(data / "zzz.tar.gz", 1024)
    shards = f'data.sources.tiny.shards=["{data}/*.tar", "{data}/zzz.tar.gz"]'
    arguments = [shards, f"run_dir={run}", f"data.cache_dir={tmp_path}/cache", "data.max_bad_share=0.5"]
    # sequential from the last shard on would be no run; so many samples that each is met
    (result,) = go_on([*arguments, "total_samples=720"], ranks=1, prepare=_say_memory, timeout=300)
    assert result.returncode == 0, result.stderr
    log = (run / "log.txt").read_text()
    for number, name in enumerate(IMAGE_ENDINGS):
        if name != "text":
            assert re.search(rf"bad sample zz\.tar/{number}: (image too large|broken image)", log), name
    assert "bad sample zz.tar/long: text too long" in log
    assert "bad sample zzz.tar.gz/?: shard too large" in log
    assert _peak(result.stdout) < GIGABYTE
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file()) < 100 << 20
    record_fault(
        f"{len(IMAGE_ENDINGS) + len(JSON) + 2} bombs", ranks=1, happened="counted and named; the run goes on",
        lost=0, repeated=len(losses(run)) - 30,
    )  # fmt: skip


@pytest.mark.parametrize(
    "verb",
    [
        ["verify", "{shards}", "--report", "{out}.json"],
        ["stats", "{shards}", "--json", "{out}.json"],
        ["filter", "{shards}", "{out}", "--min-side", "8"],
        ["pack", "{shards}", "{out}", "--resize", "64"],
        ["preview", "{shards}", "{out}.html"],
    ],
    ids=lambda verb: verb[0],
)
def test_no_tool_takes_memory_for_them(shard: Path, tmp_path: Path, verb: list[str]) -> None:
    out = tmp_path / "out"
    arguments = [part.format(shards=shard, out=out) for part in verb]
    if verb[0] != "preview":
        arguments += ["--workers", "1"]
    if verb[0] not in ("pack", "preview"):
        arguments += ["--cache-dir", f"{tmp_path}/cache"]
    (result,) = run_program_by_rank("data_tools.cli", arguments, ranks=1, prepare=_say_memory)
    assert result.returncode == (1 if verb[0] == "verify" else 0), result.stderr
    assert "Traceback" not in result.stderr
    assert _peak(result.stdout) < GIGABYTE
    if verb[0] == "verify":
        problems = json.loads((tmp_path / "out.json").read_text())["problems"]
        named = {problem["key"] for problem in problems}
        assert named >= {str(number) for number, name in enumerate(IMAGE_ENDINGS) if name != "text"} | {
            "long",
            "nested",
        }
    if verb[0] == "filter":
        (kept,) = out.glob("*.tar")
        with tarfile.open(kept) as archive:
            keys = {name.partition(".")[0] for name in archive.getnames()}
        # texts are not looked at where no rule asks for them
        assert keys <= {*JSON, "good", "long", str(list(IMAGE_ENDINGS).index("text"))}
