"""A command that writes a folder of shards, ended in the middle and run again: the start of both, in one place."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from siglip_train.data.packing.run_record import alone_in, earlier_record, require_same
from siglip_train.files.atomic import remove_leftovers, write_whole


class UnfinishedRun(NamedTuple):
    """What a run of `generator` has in `out_dir`: its report, and until the end a folder of what is done.

    made_with: everything that decides what is written, as JSON has it. did: as in "filtered".
    """

    out_dir: Path
    report: str
    generator: str
    made_with: dict[str, Any]
    did: str

    @property
    def state(self) -> Path:
        """The folder of what is done, which is removed at the end."""
        return self.out_dir / f".{self.generator}"

    @property
    def record(self) -> dict[str, Any]:
        """What the report begins with."""
        return {"generator": self.generator, "made_with": self.made_with}

    def finished(self) -> dict[str, Any] | None:
        """The report of an earlier run that came to its end, None where there is something to do.

        Raises `UserError` where the folder holds something else, or was made with other options.
        """
        present = earlier_record(self.out_dir, self.report, self.generator)
        if present is None:
            return None
        require_same(self.out_dir, present.get("made_with", {}), self.made_with, self.did)
        if "samples" not in present:
            return None
        # the earlier run may have ended just before it could
        shutil.rmtree(self.state, ignore_errors=True)
        return present

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other runs out of the folder meanwhile, and make it ready."""
        with alone_in(self.out_dir):
            # the record first: a folder without it is not known as ours
            self._write(self.record)
            self.state.mkdir(exist_ok=True)
            remove_leftovers(self.state)
            remove_leftovers(self.out_dir)
            yield

    def forget(self) -> None:
        """Remove the record and what is done, so that other options may be tried with the same folder."""
        shutil.rmtree(self.state)
        (self.out_dir / self.report).unlink()

    def finish(self, results: dict[str, Any]) -> dict[str, Any]:
        """Write the report, whose `samples` tells that the run is finished, and return it."""
        report = {**self.record, **results}
        self._write(report)
        shutil.rmtree(self.state)
        return report

    def _write(self, content: dict[str, Any]) -> None:
        write_whole(self.out_dir / self.report, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
