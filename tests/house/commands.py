"""The commands that READMEs and the headers of conf/ show, taken from their text."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from braceexpand import braceexpand

from tests.conftest import ROOT

_PROGRAMS = {
    "siglip-train": "train",
    "siglip-eval": "evaluate",
    "siglip_train.train": "train",
    "siglip_train.evaluate": "evaluate",
    "siglip-convert": "convert",
    "siglip-data": "data",
}
_PLACEHOLDERS = {
    "experiment=NAME": "experiment=quickstart",
    "model=NAME": "model=tiny",
    "data=NAME": "data=tiny",
}
_FOLDERS = ("benchmarks", "conf", "data_tools", "kernels", "siglip_train", "tests")


class Command(NamedTuple):
    """A command line: `program` is train, evaluate, convert or data; overrides are its words."""

    file: str
    program: str
    overrides: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file}: {self.program} {' '.join(self.overrides)}"


def readmes() -> list[Path]:
    """Every README, and what lies beside the first one."""
    return sorted(
        [*ROOT.glob("*.md"), *(file for folder in _FOLDERS for file in (ROOT / folder).rglob("*.md"))]
    )


def of_readmes() -> list[Command]:
    """Every command of every README, from fenced blocks and from inline code."""
    return [command for file in readmes() for command in _of_markdown(file)]


def of_headers() -> list[Command]:
    """Every command in a comment of conf/."""
    found = []
    for file in sorted((ROOT / "conf").rglob("*.yaml")):
        comments = re.findall(r"^ *#(.*)$", file.read_text(), re.MULTILINE)
        lines = "\n".join(comments).replace("\\\n", " ").splitlines()
        found += _of_lines([line for line in lines if re.match(r" {3}|.*: siglip-", line)], file)
    return found


def _of_markdown(file: Path) -> list[Command]:
    text = file.read_text()
    found = []
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        found += _of_lines(block.replace("\\\n", " ").splitlines(), file)
    prose = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    return found + _of_lines([code for code in inline if "=" in code], file)


def _of_lines(lines: list[str], file: Path) -> list[Command]:
    found = []
    for line in lines:
        if not any(program in line for program in _PROGRAMS):
            continue
        # a remark stands in brackets after some spaces
        words = shlex.split(re.split(r" {2,}\(", line)[0], comments=True)
        for index, word in enumerate(words):
            if word in _PROGRAMS:
                found += _commands(_PROGRAMS[word], _up_to_shell(words[index + 1 :]), file)
    return found


def _commands(program: str, words: list[str], file: Path) -> list[Command]:
    if "--keys" in words:
        # explains the keys and trains nothing: tests/settings/test_keys.py runs it
        return []
    where = str(file.relative_to(ROOT))
    if program in ("convert", "data"):
        # a program that is only named has no words
        return [Command(where, program, tuple(words))] if len(words) > 1 else []
    # a command for each name in the braces of `experiment=finetune_{frozen,lora}`
    overrides = _overrides(words)
    name = next((override for override in overrides if override.startswith("experiment=")), "")
    others = [override for override in overrides if override != name]
    return [
        Command(where, program, tuple([one, *others] if one else others)) for one in braceexpand(name) or [""]
    ]


def _up_to_shell(words: list[str]) -> list[str]:
    """Up to where a shell goes on."""
    ends = (i for i, word in enumerate(words) if word in ("||", "&&", "|", ";", ">"))
    return words[: next(ends, len(words))]


def _overrides(words: list[str]) -> list[str]:
    """Without flags, and what an ellipsis leaves open."""
    kept = [word for word in words if re.match(r"(~|[+]*[\w.@/]+=)", word) and word != "key=value"]
    return [_PLACEHOLDERS.get(word, word).replace("…", "any") for word in kept]
