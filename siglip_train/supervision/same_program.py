"""Whether all ranks run the same program on the same config: where they do not, numbers would differ in silence."""

import hashlib
import json
import platform
import socket
from pathlib import Path
from typing import Any

import kernels
import siglip_train
from siglip_train.distributed.collectives import gather_objects
from siglip_train.errors import UserError
from siglip_train.runtime import package_version
from siglip_train.typed import flat

_PACKAGES = ("torch", "triton", "deepspeed", "numpy", "siglip-train")
# what machines may differ in: rank 0 says where the run is, and copies and workers change no sample
_OF_A_MACHINE = ("run_dir", "data.cache_dir", "data.cache_limit_gib", "data.workers")


def check_same_program(values: dict[str, Any], tokenizer: Path | None) -> None:
    """Compare config, tokenizer, code and versions of all ranks. All ranks.

    values: the composed config. Raises `UserError` on every rank, with one that differs from rank 0 and in what.
    """
    mine = _facts(values, tokenizer)
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()
    if len(set(gather_objects(digest))) == 1:
        return
    hosts, facts = zip(*gather_objects((socket.gethostname(), mine)), strict=True)
    for rank, (host, theirs) in enumerate(zip(hosts, facts, strict=True)):
        names = [name for name in {**facts[0], **theirs} if facts[0].get(name) != theirs.get(name)]
        if names:
            name, more = names[0], len(names) - 1
            raise UserError(
                f"rank {rank} on {host} differs from rank 0: {name} is {theirs.get(name)} there and "
                f"{facts[0].get(name)} on rank 0{f' ({more} more differ)' if more else ''}; start all ranks with the "
                "same command, code, packages and files"
            )


def _facts(values: dict[str, Any], tokenizer: Path | None) -> dict[str, str]:
    facts = {f"the version of {name}": package_version(name) for name in _PACKAGES}
    facts["the version of Python"] = platform.python_version()
    facts["the code of siglip_train and kernels (a digest)"] = _digest(
        [
            path
            for package in (siglip_train, kernels)
            for path in sorted(Path(package.__path__[0]).rglob("*.py"))
        ]
    )
    if tokenizer is not None:
        files = sorted(path for path in tokenizer.rglob("*") if path.is_file())
        facts[f"the content of {tokenizer} (a digest)"] = _digest(
            files if tokenizer.is_dir() else [tokenizer]
        )
    for key, value in flat(values).items():
        if not key.startswith(_OF_A_MACHINE):
            facts[key] = str(value)
    return facts


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode())
        digest.update(content)
    return digest.hexdigest()[:12]
