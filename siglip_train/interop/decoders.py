"""The decoder of a run or of an export: read with the form of its sentences, and written beside an export's towers."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from siglip_train.data.sentences import SentenceConfig, SentenceForm
from siglip_train.data.tokenizer import Tokenizer
from siglip_train.errors import UserError
from siglip_train.files.manifest import check
from siglip_train.interop.files import read_json, read_tensors, write_tensors
from siglip_train.interop.runs import HEADS, newest_checkpoint, run_config, run_folder
from siglip_train.models.decoder import Decoder, DecoderConfig
from siglip_train.models.siglip import Siglip
from siglip_train.objectives.captioner import Captioner
from siglip_train.objectives.captioning import Captioning
from siglip_train.typed import build

# of an export, beside its model.safetensors and config.json
WEIGHTS, DESCRIPTION = "decoder.safetensors", "decoder.json"
_TARGET = f"{Captioning.__module__}.{Captioning.__qualname__}"


class DecoderFiles(NamedTuple):
    """A decoder as it lies on disk; shared weights are not in `state`."""

    config: DecoderConfig
    sentences: SentenceConfig
    state: dict[str, Tensor]


def read_decoder(path: Path) -> DecoderFiles | None:
    """The decoder of an export, of a run (its newest checkpoint) or of a checkpoint inside its run; None without one.

    Raises `UserError` where files are damaged, and where a run has several.
    """
    if (path / DESCRIPTION).is_file():
        content = read_json(path / DESCRIPTION)
        where = str(path / DESCRIPTION)
        return DecoderFiles(
            build(DecoderConfig, content.get("decoder"), f"{where}: decoder"),
            build(SentenceConfig, content.get("sentences"), f"{where}: sentences"),
            read_tensors(path / WEIGHTS),
        )
    file = newest_checkpoint(path) / HEADS
    run = run_folder(file.parent)
    return None if run is None or not file.is_file() else _of_run(run, file)


def _of_run(run: Path, file: Path) -> DecoderFiles | None:
    values = run_config(run)
    nodes = values.get("objectives")
    found = {
        name: node
        for name, node in (nodes.items() if isinstance(nodes, dict) else ())
        if isinstance(node, dict) and node.get("_target_") == _TARGET
    }
    if not found:
        return None
    if len(found) > 1:
        raise UserError(f"{run} has several decoders, objectives.{' and objectives.'.join(found)}")
    ((name, node),) = found.items()
    check(file.parent, within=HEADS)
    prefix = f"objectives.{name}.decoder."
    tensors = read_tensors(file)
    state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    where = f"objectives.{name}.decoder in {run / 'config.yaml'}"
    config = build(DecoderConfig, {**node["decoder"], "parallel": "mask_embedding" in state}, where)
    data: Any = values.get("data")
    return DecoderFiles(config, build(SentenceConfig, data.get("sentences") or {}, "data.sentences"), state)


def write_decoder(folder: Path, files: DecoderFiles) -> None:
    """Put a decoder beside an export's towers."""
    write_tensors({name: tensor.contiguous() for name, tensor in files.state.items()}, folder / WEIGHTS)
    content = {"decoder": asdict(files.config), "sentences": asdict(files.sentences)}
    (folder / DESCRIPTION).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def captioner_of(path: Path, model: Siglip, tokenizer: Tokenizer | None) -> Captioner:
    """What captions images with `model`'s towers. Raises `UserError` where the files at `path` have no decoder."""
    files = read_decoder(path)
    if files is None:
        raise UserError(
            f"{path} has no decoder: give a run with +objective@objectives.captioning=captioning, a checkpoint inside "
            "it, or an export of one (siglip-convert --to native)"
        )
    if tokenizer is None:
        raise UserError(f"{path} has no tokenizer: give one with tokenizer=PATH")
    decoder = Decoder(files.config)
    decoder.share(model.text.token_embedding.weight)  # type: ignore[arg-type]
    _restore(decoder, files.state, path)
    return Captioner(decoder.to(model.logit_scale.device).eval(), SentenceForm(files.sentences, tokenizer))


def _restore(decoder: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    expected = {name: tensor.shape for name, tensor in decoder.named_parameters()}
    shared = decoder.config.embedding == "text_tower"  # type: ignore[union-attr]
    if shared:
        expected.pop("token_embedding.weight")
    found = {name: tensor.shape for name, tensor in state.items()}
    differing = sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    )
    if differing:
        raise UserError(
            f"the decoder in {path} does not fit its config: {differing[0]} is {found.get(differing[0])} and not "
            f"{expected.get(differing[0])} ({len(differing)} differ)"
        )
    with torch.no_grad():
        decoder.load_state_dict(dict(state), strict=False)
