"""The ViT towers that the "How to train your ViT" paper released (AugReg), in the layout that big_vision has since.

They are image towers alone, with a class token that has a position of its own, and with labels that are left here.
"""

import re
from collections.abc import Mapping

from torch import Tensor

_POSITIONS = "Transformer/posembed_input/pos_embedding"
_RENAMED = (
    (r"^(?=embedding/|cls$|Transformer/)", "img/"),
    ("MultiHeadDotProductAttention_1", "MultiHeadDotProductAttention_0"),
    ("LayerNorm_2", "LayerNorm_1"),
    ("MlpBlock_3", "MlpBlock_0"),
)


def is_augreg(arrays: Mapping[str, Tensor]) -> bool:
    """Whether the arrays of an `.npz` are such a tower."""
    return _POSITIONS in arrays and "cls" in arrays


def as_big_vision(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tower under big_vision's names; other arrays keep theirs."""
    renamed = {}
    for name, array in arrays.items():
        if name.startswith("head/"):
            continue
        for pattern, other in _RENAMED:
            name = re.sub(pattern, other, name)
        renamed[name] = array
    # the token never stands anywhere else, so its position is a part of it
    positions = renamed.pop(f"img/{_POSITIONS}")  # [1, 1 + N, D]
    renamed["img/cls"] = arrays["cls"] + positions[:, :1]
    renamed["img/pos_embedding"] = positions[:, 1:]
    return renamed
