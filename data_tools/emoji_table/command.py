"""`siglip-data emoji-table`: a table of drawn emoji with their names in twelve languages, for `siglip-data pack`.

Drawings and names come from packages that `npm install` puts into a folder: `siglip-data recipes emoji`.
"""

import argparse
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.shared.whole_file import check_targets
from siglip_train.errors import UserError
from siglip_train.files.atomic import read_text, write_text

# style -> the package that has its drawings, and their folder in it
STYLES = {
    "noto": ("emoji-datasource-google", "img/google/64"),
    "twemoji": ("emoji-datasource-twitter", "img/twitter/64"),
}
# packages of CLDR: names of sequences, such as those with a colour of skin, stand in the second alone
_NAMES = (("cldr-annotations-full", "annotations"), ("cldr-annotations-derived-full", "annotationsDerived"))
LANGUAGES = ("en", "de", "fr", "es", "ja", "zh", "ar", "hi", "sw", "ru", "tr", "ko")
# in a caption, beside the name
_KEYWORDS = 3
# asks for the coloured form of a character; CLDR leaves it out
_VARIANT = "\ufe0f"


def add_command(commands: Any) -> None:
    """Add `emoji-table` to the sub-parsers of `siglip-data`."""
    parser = commands.add_parser(
        "emoji-table",
        help="make a table of drawn emoji and their names in twelve languages",
        description=__doc__,
        epilog="example: siglip-data emoji-table data/npm/node_modules data/emoji.jsonl",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    packages = ", ".join([package for package, _ in (*STYLES.values(), *_NAMES)])
    parser.add_argument("packages", type=Path, metavar="FOLDER", help=f"with the packages {packages}")
    parser.add_argument("table", type=Path, metavar="OUT.jsonl", help="file to write")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    check_targets(arguments.table)
    rows = list(emoji_rows(arguments.packages))
    root = arguments.table.parent
    for row in rows:
        row["image"] = os.path.relpath(row["image"], root)
    write_text(arguments.table, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
    drawings = len({row["image"] for row in rows})
    print(f"wrote {arguments.table}: {len(rows)} rows of {drawings} drawings")


def emoji_rows(packages: Path) -> Iterator[dict[str, Any]]:
    """Two rows a drawing: one with an English caption, one in another language, by turns.

    key: STYLE_CODEPOINTS_LANGUAGE; names: in all languages; caption: the name, of every second row with keywords.
    Raises `UserError`.
    """
    annotations = {language: _annotations(packages, language) for language in LANGUAGES}
    for style, (package, folder) in STYLES.items():
        for place, image in enumerate(_images(packages / package)):
            path = packages / package / folder / image
            code = image.removesuffix(".png")
            found = _characters(code)
            said = {language: table[found] for language, table in annotations.items() if found in table}
            names = {language: entry["tts"][0] for language, entry in said.items() if entry.get("tts")}
            if "en" not in names or not path.is_file():
                continue
            others = [language for language in LANGUAGES if language in names and language != "en"]
            second = others[place % len(others)] if others else "en"
            for language in dict.fromkeys(("en", second)):
                key = f"{style}_{code}_{language}"
                caption = _caption(key, names[language], said[language].get("default", []))
                yield {"key": key, "image": str(path), "caption": caption, "lang": language,
                       "style": style, "codepoints": code, "names": names}  # fmt: skip


def _caption(key: str, name: str, keywords: list[str]) -> str:
    others = [word for word in keywords if word != name][:_KEYWORDS]
    return ", ".join([name, *others]) if zlib.crc32(key.encode()) % 2 else name


def _images(package: Path) -> list[str]:
    """The names of the drawings, in the order of the code points."""
    return sorted(entry["image"] for entry in _json(package / "emoji.json"))


def _annotations(packages: Path, language: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for package, folder in reversed(_NAMES):
        content = _json(packages / package / folder / language / "annotations.json")
        for part in content.values():
            found.update(part["annotations"])
    return found


def _characters(code: str) -> str:
    return "".join(chr(int(part, 16)) for part in code.split("-")).replace(_VARIANT, "")


def _json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except UserError as error:
        raise UserError(f"{error}; install the packages first: siglip-data recipes emoji says how") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
