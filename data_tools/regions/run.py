"""A whole run: what is there already, the shards that are left, and the report of it all."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.preview.card import card
from data_tools.preview.pick import pick
from data_tools.regions.annotate import Annotated, AnnotateTask, Wanted, annotate_shard
from data_tools.regions.pace import Work
from data_tools.shared.result_cache import shards_identity
from data_tools.shared.unfinished_run import UnfinishedRun
from siglip_train.data.processes import run_all
from siglip_train.data.progress import progress
from siglip_train.data.shards.fields import Field
from siglip_train.data.shards.reader import indexed_tar
from siglip_train.errors import UserError
from siglip_train.files.atomic import write_whole
from siglip_train.report.render import render

REPORT, BAD, PREVIEW = "regions.json", "bad.tsv", "preview.html"
# raise it whenever the same options would write something else
_VERSION = 1
# samples on the page, and those that are looked at to find some that have regions
_SHOWN, _LOOKED_AT = 48, 960


def annotate(
    urls: Sequence[str], out_dir: Path, wanted: Wanted, cache: Path, *, workers: int, batch: int
) -> tuple[dict[str, Any], bool]:
    """Annotate shards into `out_dir`, or go on where a run was ended; (report, was there anything to do?).

    Shards have the order and numbers of their sources. Raises `UserError`, also where `out_dir` holds something else.
    """
    options = {
        name: sorted(value) if isinstance(value, frozenset) else value
        for name, value in wanted._asdict().items()
    }
    made_with = json.loads(json.dumps({"version": _VERSION, **options, **shards_identity(urls)}))
    run = UnfinishedRun(out_dir, REPORT, "regions", made_with, "annotated")
    if (present := run.finished()) is not None:
        return present, False
    with run.alone():
        try:
            reports = _annotate_shards(urls, run, wanted, cache, workers=workers, batch=batch)
            sums = _sums(reports)
            if not sums["annotated"]:
                raise UserError(_nothing_done(sums, wanted))
        except UserError:
            _forget_useless(run)
            raise
        _save_bad(out_dir / BAD, reports)
        write_preview(out_dir, wanted, cache)
        return run.finish(sums), True


def _annotate_shards(
    urls: Sequence[str], run: UnfinishedRun, wanted: Wanted, cache: Path, *, workers: int, batch: int
) -> list[Annotated]:
    out_dir, state = run.out_dir, run.state
    names = [f"{number:05d}" for number in range(len(urls))]
    left = [place for place, name in enumerate(names) if not (state / f"{name}.json").exists()]
    if left:
        # to count all of them would fetch all of them
        samples = len(indexed_tar(urls[left[0]], cache)[1])
        work = Work(len(left), samples, min(workers, len(left)))
        tasks = [
            AnnotateTask(
                urls[place], cache, out_dir / f"{names[place]}.tar", state / f"{names[place]}.json",
                wanted, batch, state, work,
            )
            for place in left
        ]  # fmt: skip
        with progress(len(tasks), "annotating", "annotated", "shards") as advance:
            for count in run_all(annotate_shard, tasks, workers):
                advance(count)
    return [Annotated.load(state / f"{name}.json") for name in names]


def _forget_useless(run: UnfinishedRun) -> None:
    """Empty the folder where no sample of it is annotated, so that other options may be tried with it."""
    if any(Annotated.load(path).annotated for path in run.state.glob("*.json")):
        return
    for path in run.out_dir.glob("*.tar"):
        path.unlink()
    run.forget()


def _sums(reports: Sequence[Annotated]) -> dict[str, Any]:
    counts = {
        name: sum(getattr(report, name) for report in reports)
        for name in ("samples", "drawn", "without_noun", "annotated", "with_regions")
    }
    regions: Counter[str] = sum((report.regions for report in reports), Counter())
    bad = Counter(each.cause for report in reports for each in report.bad)
    return {**counts, "regions": dict(regions), "bad": dict(bad.most_common())}


def _save_bad(path: Path, reports: Sequence[Annotated]) -> None:
    lines = ["\t".join(each).replace("\n", " ") for report in reports for each in report.bad]
    write_whole(path, "\n".join(["shard\tkey\tcause\tdetail", *lines]) + "\n")


def _nothing_done(report: dict[str, Any], wanted: Wanted) -> str:
    why = [f"{count} {cause}" for cause, count in report["bad"].items()]
    if report["without_noun"]:
        why.append(f"{report['without_noun']} whose captions name nothing (--any-caption takes them)")
    if report["drawn"] < report["samples"]:
        why.append(f"{report['samples'] - report['drawn']} outside of --share {wanted.share}")
    return (
        f"none of {report['samples']} samples could be annotated: {', '.join(why) or 'the shards are empty'}"
    )


def write_preview(out_dir: Path, wanted: Wanted, cache: Path) -> None:
    """A page of samples with their regions."""
    samples, _ = pick(str(out_dir), _LOOKED_AT, 0, cache)
    where = Field("json", (wanted.field,))
    found = [sample for sample in samples if _has_regions(where, sample)] or samples
    places = np.linspace(0, len(found) - 1, min(_SHOWN, len(found))).round().astype(int)
    text = [Field.parse(name) for name in wanted.text]
    cards = [card(found[place], wanted.image, text, (wanted.field,)) for place in places.tolist()]
    page = render(
        "preview.html", package="data_tools.preview", title=f"regions of {out_dir.name}", cards=cards
    )
    write_whole(out_dir / PREVIEW, page)


def _has_regions(where: Field, sample: Any) -> bool:
    try:
        return bool(where.node(sample))
    except ValueError:
        return False
