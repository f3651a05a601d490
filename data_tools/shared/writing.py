"""Write samples of shards again, with another json member and otherwise as they are."""

import json
from typing import Any

from siglip_train.data.shards.fields import read_facts
from siglip_train.data.shards.tar import TarIndex


def with_fact(members: dict[str, bytes], name: str, value: Any) -> dict[str, bytes]:
    """The members with a field of json, which is added where there is none. Raises `SampleError` for a broken one."""
    facts = {**read_facts(members), name: value}
    return {**members, "json": json.dumps(facts, ensure_ascii=False).encode("utf-8", "replace")}


def exact_key(index: TarIndex, row: int) -> str:
    """The key with every byte that it has, where it is not UTF-8 too."""
    start = int(index.key_ends[row - 1]) if row else 0
    return index.keys[start : int(index.key_ends[row])].tobytes().decode("utf-8", "surrogateescape")
