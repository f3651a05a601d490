"""Whether a run feeds a model as it was fed before: text rules, tokenizer and the filter that resizes images.

Weights load whatever stands around them; but the last position of a text is what is read, and another padding token
there breaks a model.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from siglip_train.data.tokenizer import load_tokenizer
from siglip_train.errors import UserError
from siglip_train.interop.fit import is_left_out
from siglip_train.interop.native import Description
from siglip_train.interop.probe import TEXTS

log = logging.getLogger(__name__)


def check_inputs(theirs: Description, ours: Description, where: Path, skip: Sequence[str]) -> None:
    """Compare what the model in `where` got with what a run will give it; a tower that is left out gets what it likes.

    Raises `UserError` with the settings for other text rules, another length, or a tokenizer that gives other tokens.
    Another filter moves images by little: that is a warning.
    """
    if not is_left_out("text", skip):
        _check_texts(theirs, ours, where, skip)
    if theirs.resize != ours.resize and not is_left_out("vision", skip):
        log.warning(
            "init_from %s: images were resized with the %s filter there, with the %s one here: data.resize=%s",
            where,
            theirs.resize,
            ours.resize,
            theirs.resize,
        )


def _check_texts(theirs: Description, ours: Description, where: Path, skip: Sequence[str]) -> None:
    there, here = asdict(theirs.rules), asdict(ours.rules)
    settings = [f"text_rules.{key}={str(there[key]).lower()}" for key in here if there[key] != here[key]]
    length = theirs.config.text.context_length
    if length != ours.config.text.context_length and not "text.position_table".startswith(tuple(skip)):
        settings.append(f"model.text.context_length={length}")
    remedy = "or leave its text tower out: init_skip=[text., logit_]"
    if settings:
        raise UserError(
            f"init_from {where}: its texts were made otherwise: set {' '.join(settings)}, {remedy}"
        )
    if theirs.tokenizer is None or ours.tokenizer is None:
        return
    tokens = [load_tokenizer(path, ours.rules, length)(TEXTS) for path in (theirs.tokenizer, ours.tokenizer)]
    for text, there_row, here_row in zip(TEXTS, *tokens, strict=True):
        if not torch.equal(there_row, here_row):
            raise UserError(
                f"init_from {where}: {text.strip()[:40]!r} becomes other tokens in {ours.tokenizer} than in its own "
                f"tokenizer: set tokenizer={theirs.tokenizer}, {remedy}"
            )
