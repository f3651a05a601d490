"""A record says where the parts of one sample lie; all records are made before the first image is opened."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from siglip_train.data.remote.limits import USUAL_LIMITS
from siglip_train.data.shards.tar import read_part
from siglip_train.errors import SampleError

# the record's part that is the image, whatever its format
IMAGE = "image"
# the part, and member, that is a class map
MASK = "mask.png"
# fields that hold a caption where the user names none, the first that is there
CAPTION_FIELDS = ("caption", "captions", "text", "title", "txt", "description")


class Readable(Protocol):
    """Bytes that lie somewhere in the file `path`; size: a number that changes when they do, -1 = not known."""

    @property
    def path(self) -> str: ...

    @property
    def size(self) -> int: ...

    def read(self) -> bytes:
        """The bytes. Raises `SampleError`."""
        ...


class Part(NamedTuple):
    """Bytes in a file: `size` of them from `offset`, -1 = all that follow."""

    path: str
    offset: int = 0
    size: int = -1

    @classmethod
    def of_file(cls, path: str) -> "Part":
        """The whole of a file, which may be missing. The fingerprint has its size, by which another one is noticed."""
        try:
            return cls(path, 0, os.stat(path).st_size)
        except (OSError, ValueError):  # ValueError: a name with a zero byte
            return cls(path)

    def read(self) -> bytes:
        """The bytes. Raises `SampleError`."""
        if self.size > USUAL_LIMITS.member_bytes:
            raise SampleError("file too large", f"{self.size} bytes, limit {USUAL_LIMITS.member_bytes}")
        try:
            with open(self.path, "rb") as file:
                return file.read() if self.size < 0 else read_part(file.fileno(), self.offset, self.size)
        except FileNotFoundError as error:
            raise SampleError("missing file", self.path) from error
        except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
            raise SampleError("read error", f"{self.path}: {error}") from error


@dataclass(frozen=True)
class Record:
    """One sample to be packed.

    origin: the image as the source names it, for messages. parts: `image` and other members, by extension.
    text, facts: the caption and the json fields, as far as the source itself holds them. group: records of one group
    come into the same split (the key where it is empty). caption_needed: without a caption it is skipped.
    label: index of its class. box: x, y, width, height in pixels of what its captions mean. fault: (cause, detail) of a
    record that is known to be unusable.
    """

    key: str
    origin: str
    parts: Mapping[str, Readable] = field(default_factory=dict)
    text: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    group: str = ""
    caption_needed: bool = True
    label: int | None = None
    box: tuple[float, float, float, float] | None = None
    fault: tuple[str, str] | None = None


class Found(NamedTuple):
    """The records of a source, and the names of its classes in the order of their labels (none where it has none)."""

    records: list[Record]
    classnames: list[str]


@dataclass(frozen=True)
class SourceOptions:
    """How a source is read; None = not asked for. The names are those of the command's options."""

    image_root: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    coco_instances: str | None = None
    label_column: str | None = None
    key_column: str | None = None
    caption_template: list[str] | None = None
    box_column: str | None = None


def key_of(path: str) -> str:
    """The key of an image's relative path: without its ending; dots of its name, which would end the key, as _."""
    folder, name = os.path.split(os.path.splitext(path)[0])
    return os.path.join(folder, name.replace(".", "_"))


def captions_of(value: Any, language: Any = None) -> tuple[str, dict[str, Any]]:
    """(the caption for txt, the json fields that keep all of them) of a text, a list of texts, or {language: texts}.

    Of a mapping the first text in `language` is taken, else in English, else of all. ("", {}) where there is no text.
    Raises `SampleError` where there are numbers in place of texts.
    """
    if isinstance(value, str):
        return value.strip(), {}
    if isinstance(value, dict):
        by_language = {name: texts for name, each in value.items() if (texts := _texts(each))}
        if not by_language:
            return "", {}
        chosen = next((name for name in (language, "en") if name in by_language), next(iter(by_language)))
        first = by_language[chosen]
        return first if isinstance(first, str) else first[0], {"captions": by_language, "language": chosen}
    found = _texts(value if isinstance(value, list) else [value])
    return (found[0], {"captions": found}) if found else ("", {})


def _texts(value: Any) -> Any:
    """A text, or the texts of a list, without spaces around them; what is empty there is left out."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, list):
        return [text for text in map(_texts, value) if text and isinstance(text, str)]
    if isinstance(value, int | float) and value == value:
        # NaN is how tables say that there is nothing
        raise SampleError(
            "caption is no text", f"it is {value!r}; is this the column, or field, of captions?"
        )
    return ""
