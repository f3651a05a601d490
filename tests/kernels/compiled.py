"""Compiles a Triton kernel for a GPU that is not there, and reads from the machine code what would hurt on one."""

import os
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# what a program may take of a multiprocessor's shared memory, in KiB
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227}
# Triton releases under which the bounds on registers, spills and instructions were measured. Each allots registers in
# its own way, so they say nothing of another: to measure one, put it here and run test_compile_gate.py
MEASURED = ("3.6", "3.8", "3.9")
TRITON = ".".join(triton.__version__.split(".")[:2])
MATRIX_INSTRUCTION = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


class Compiled(NamedTuple):
    """registers of a thread; stack and local memory in bytes (spills are there); shared in bytes."""

    registers: int
    stack: int
    local: int
    shared: int
    threads: int
    tensor_columns: int
    instructions: Counter[str]

    @property
    def total(self) -> int:
        return self.instructions.total()


def only_where_measured() -> None:
    """Skip the rest of the test, bounds that hold for one compiler, under a Triton that is not in `MEASURED`."""
    if TRITON not in MEASURED:
        pytest.skip(f"not measured with Triton {TRITON}; what holds under any was checked")


def compile_kernel(
    kernel: Any, capability: int, types: dict[str, str], constants: dict[str, Any], **options: Any
) -> Compiled:
    """Compile for sm_`capability`. types: of the arguments, those ending in `:16` multiples of 16 or so aligned."""
    signature, constexprs, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], constexprs[(position,)] = "constexpr", constants[name]
            continue
        signature[name], _, aligned = types[name].partition(":")
        if aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return _inspect(binary)


def _inspect(binary: Any) -> Compiled:
    cubin = Path(os.environ["TRITON_CACHE_DIR"]) / f"{binary.hash[:32]}.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    usage = _run("cuobjdump", "--dump-resource-usage", str(cubin))
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    sass = _run("nvdisasm", "-c", str(cubin))
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", sass)
    return Compiled(
        registers=found["REG"],
        stack=found["STACK"],
        local=found["LOCAL"],
        shared=binary.metadata.shared,
        threads=binary.metadata.num_warps * 32,
        tensor_columns=getattr(binary.metadata, "tmem_size", None) or 0,
        instructions=Counter(names),
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout
