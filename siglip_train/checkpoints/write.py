"""What a checkpoint's folder holds, and how it comes to be: complete or absent, safetensors and JSON only.

`checkpoints/step-NNNNNNNN/` holds `weights/` (an export folder that `load_model` opens), `heads.safetensors` (what
objectives own, and layers with adapters, which `weights/` has in merged form), `moments.safetensors`
(AdamW's state by parameter name), `state.json`, and `manifest.json` with size and SHA-256 of these files;
`checkpoints/LAST` names the newest. It can be loaded at any ZeRO stage and number of ranks.
"""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from siglip_train.errors import said
from siglip_train.files.atomic import put_folder, write_text
from siglip_train.files.manifest import sealing
from siglip_train.interop.files import write_tensors
from siglip_train.interop.runs import LAST, checkpoint_name
from siglip_train.models.adapters import is_unmerged

log = logging.getLogger(__name__)

MODEL_PREFIX = "model."
# in state.json: a manifest was written too, so that one without it is known to be damaged
SEALED = "sealed"


class Progress(NamedTuple):
    """How far a run is: optimizer steps done, pairs seen, and the loader's state.

    pretrained: the parameters that `init_from` gave when the run began, which may be treated in another way.
    """

    step: int = 0
    samples_seen: int = 0
    loader: dict[str, Any] | None = None
    pretrained: Sequence[str] = ()


class CheckpointFolder:
    """The folder `checkpoints/` of a run, which rank 0 writes.

    write_weights: writes the export folder of the model from its state dict.
    """

    def __init__(self, path: Path, write_weights: Callable[[Path, dict[str, Tensor]], None]) -> None:
        self.path = path
        self._write_weights = write_weights
        self._not_removed: set[Path] = set()

    def write(self, weights: dict[str, Tensor], moments: dict[str, Tensor], progress: Progress) -> Path:
        """Write a checkpoint aside, then rename it, and let LAST name it; return where it lies."""
        final = self.path / checkpoint_name(progress.step)
        partial = self.path / f".{final.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            self._fill(partial, weights, moments, progress)
            # a damaged or abandoned checkpoint of that name goes
            put_folder(partial, final)
        finally:
            # of a full disk, what was written of this one
            shutil.rmtree(partial, ignore_errors=True)
        write_text(self.path / LAST, final.name + "\n")
        return final

    def _fill(
        self, folder: Path, weights: dict[str, Tensor], moments: dict[str, Tensor], progress: Progress
    ) -> None:
        model = {k.removeprefix(MODEL_PREFIX): v for k, v in weights.items() if k.startswith(MODEL_PREFIX)}
        heads = {k: v for k, v in weights.items() if not k.startswith(MODEL_PREFIX) or is_unmerged(k)}
        with sealing(folder) as seal:
            # the largest first: it is digested while the others are written
            write_tensors(moments, folder / "moments.safetensors")
            seal.add(folder / "moments.safetensors")
            self._write_weights(folder / "weights", model)
            seal.add(folder / "weights")
            write_tensors(heads, folder / "heads.safetensors")
            seal.add(folder / "heads.safetensors")
            state = {**progress._asdict(), SEALED: True}
            (folder / "state.json").write_text(json.dumps(state, indent=1))
            seal.add(folder / "state.json")

    def remove(self, path: Path) -> None:
        """Remove a folder. A failure is logged once and does not end the run."""
        try:
            shutil.rmtree(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            if path not in self._not_removed:
                log.warning("cannot remove %s: %s; the run goes on, please remove it", path, said(error))
            self._not_removed.add(path)
